//! Tables and JSON on stdout, progress on stderr.

use std::io::Write;
use std::time::Duration;

use coel_store::Bounds;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::Failure;
use crate::config::Size;
use crate::status::Status;

/// One JSON document.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(value)?)?;
    Ok(())
}

/// A table whose columns from the `numbers`th on are right-aligned.
pub fn table(header: &[&str], numbers: usize, rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(numbers) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// `coel status` for people.
pub fn status(status: &Status) -> Result<(), Failure> {
    let model = status.model.as_ref().or(status.models.first()).map_or("none", |model| model.name.as_str());
    writeln!(std::io::stdout(), "mesh      {}", status.mesh)?;
    writeln!(std::io::stdout(), "model     {model}")?;
    let leader = status.leader.map_or_else(|| "none (no quorum?)".to_owned(), |node| node.to_string());
    writeln!(
        std::io::stdout(),
        "log       leader {leader}, term {}, entry {}, epoch {}",
        status.term,
        status.applied,
        status.epoch
    )?;
    writeln!(
        std::io::stdout(),
        "experts   {:.1} % ready on some node, at least {} replica(s) of each",
        status.coverage * 100.0,
        status.replicas_min
    )?;
    writeln!(std::io::stdout(), "this node {} ({}), {}", status.name, status.api, status.readiness)?;
    for warning in &status.warnings {
        writeln!(std::io::stdout(), "warning   {warning}")?;
    }
    if let Some(importing) = &status.importing {
        writeln!(std::io::stdout(), "import    {importing}")?;
    }
    if let Some(problem) = &status.readiness.problem {
        writeln!(std::io::stdout(), "problem   {problem}")?;
    }
    let name_of = |id| status.nodes.iter().find(|node| node.node_id == id).map_or("?", |node| node.name.as_str());
    if !status.awaited.is_empty() {
        let names: Vec<_> = status.awaited.iter().map(|&id| name_of(id)).collect();
        writeln!(std::io::stdout(), "waiting   for {}, before experts are placed elsewhere", names.join(", "))?;
    }
    if let Some(planner) = &status.planner {
        writeln!(std::io::stdout(), "planner   {planner}")?;
    }
    if status.precisions != Bounds::AUTO {
        writeln!(std::io::stdout(), "precision {} was set", status.precisions)?;
    }
    let rows = status.nodes.iter().map(|node| {
        let share = |share: Option<f64>| share.map_or("-".into(), |share| format!("{:.0} %", share * 100.0));
        vec![
            node.node_id.to_string(),
            node.name.clone(),
            if node.leaving { format!("{}, leaving", node.liveness) } else { node.liveness.clone() },
            if node.voter { "voter" } else { "learner" }.into(),
            format!("{}/{}", node.experts_ready, node.experts),
            match node.expert_bytes {
                Some(bytes) if bytes > 0 => format!("{} ({})", node.precisions, Size(bytes)),
                _ => node.precisions.to_string(),
            },
            node.trunk.map_or("-".into(), |trunk| trunk.to_string()),
            node.memory_budget_bytes.map_or("-".into(), |bytes| Size(bytes).to_string()),
            match (node.disk_budget_bytes, node.paged_bytes) {
                (Some(disk), Some(paged)) if paged > 0 => format!("{} (pages {})", Size(disk), Size(paged)),
                (disk, _) => disk.map_or("-".into(), |bytes| Size(bytes).to_string()),
            },
            share(node.memory_headroom),
            share(node.compute_headroom),
            node.rtt_ms.map_or("-".into(), |rtt| format!("{rtt:.1} ms")),
        ]
    });
    let header: Vec<_> = "node|name|is|log|experts ready|held at|trunk|memory|disk|free memory|free compute|round trip"
        .split('|')
        .collect();
    writeln!(std::io::stdout(), "{}", table(&header, 4, rows))?;
    Ok(())
}

/// A progress bar that appears once something takes longer than a second.
pub struct Progress {
    bar: ProgressBar,
    started: std::time::Instant,
    what: String,
}

impl Progress {
    /// Nothing is shown yet.
    pub fn new() -> Self {
        Self { bar: ProgressBar::hidden(), started: std::time::Instant::now(), what: String::new() }
    }

    /// `done` of `total` of `what`.
    pub fn set(&mut self, what: &str, done: u64, total: u64) {
        if self.what != what && self.started.elapsed() > Duration::from_secs(1) {
            self.bar.finish_and_clear();
            let template = match what.ends_with("bytes") {
                true => "{msg} {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}",
                false => "{msg} {wide_bar} {percent} %",
            };
            let style = ProgressStyle::with_template(template).expect("constant templates");
            self.bar = ProgressBar::new(total).with_style(style).with_message(what.to_owned());
            self.what = what.to_owned();
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
