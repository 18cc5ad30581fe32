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
    spinner: Option<ProgressBar>,
    step: String,
    begun: Instant,
    told: Instant,
}

impl Progress {
    /// For the stderr that there is.
    pub fn new() -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {wide_msg}").expect("a constant template");
            ProgressBar::new_spinner().with_style(style)
        });
        let now = Instant::now();
        Self { spinner, step: String::new(), begun: now, told: now }
    }

    /// Begins a step.
    pub fn step(&mut self, step: impl Into<String>) {
        self.step = step.into();
        self.begun = Instant::now();
        self.told = self.begun;
        match &self.spinner {
            Some(spinner) => {
                spinner.enable_steady_tick(TICK);
                spinner.set_message(self.step.clone());
            }
            None => eprintln!("{} ...", self.step),
        }
    }

    /// How far the step is.
    pub fn detail(&mut self, detail: &str) {
        match &self.spinner {
            Some(spinner) => spinner.set_message(format!("{}: {detail}", self.step)),
            None if self.told.elapsed() >= REPEAT => {
                self.told = Instant::now();
                eprintln!("  {detail}");
            }
            None => {}
        }
    }

    /// Ends the step well.
    pub fn done(&mut self, result: &str) {
        let seconds = self.begun.elapsed().as_secs_f64();
        self.clear();
        eprintln!("✓ {result} ({seconds:.1} s)");
    }

    /// Takes the spinner off the screen.
    pub fn clear(&self) {
        if let Some(spinner) = &self.spinner {
            spinner.disable_steady_tick();
            spinner.finish_and_clear();
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}
