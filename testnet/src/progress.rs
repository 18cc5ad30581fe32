//! Telling a person what is going on: on a terminal a spinner that becomes a tick, elsewhere plain lines.
//!
//! The invariant: everything goes to stderr, so stdout stays the answer's; and no step is silent for longer than
//! [`REPEAT`] where no spinner shows that it lives.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Where lines cannot be redrawn, a step's details are told this often.
const REPEAT: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(100);

/// The steps of a job, one at a time.
#[derive(Debug)]
pub struct Progress {
    is_terminal: bool,
    /// On a terminal, the step's own; it ends with the step.
    spinner: Option<ProgressBar>,
    step: String,
    begun: Instant,
    told: Instant,
}

impl Progress {
    /// For the stderr that there is.
    pub fn new() -> Self {
        let now = Instant::now();
        let is_terminal = std::io::stderr().is_terminal();
        Self { is_terminal, spinner: None, step: String::new(), begun: now, told: now }
    }

    /// Begins a step.
    pub fn step(&mut self, step: impl Into<String>) {
        self.clear();
        self.step = step.into();
        self.begun = Instant::now();
        self.told = self.begun;
        if self.is_terminal {
            let style = ProgressStyle::with_template("{spinner} {wide_msg}").expect("a constant template");
            let spinner = ProgressBar::new_spinner().with_style(style).with_message(self.step.clone());
            spinner.enable_steady_tick(TICK);
            self.spinner = Some(spinner);
        } else {
            eprintln!("{} ...", self.step);
        }
    }

    /// How far the step is.
    pub fn detail(&mut self, detail: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.set_message(format!("{}: {detail}", self.step));
        } else if self.told.elapsed() >= REPEAT {
            self.told = Instant::now();
            eprintln!("  {detail}");
        }
    }

    /// Ends the step well.
    pub fn done(&mut self, result: &str) {
        let seconds = self.begun.elapsed().as_secs_f64();
        self.clear();
        eprintln!("✓ {result} ({seconds:.1} s)");
    }

    /// Takes the spinner off the screen.
    pub fn clear(&mut self) {
        if let Some(spinner) = self.spinner.take() {
            spinner.finish_and_clear();
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}
