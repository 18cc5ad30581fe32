//! A mesh in virtual time: the log and its consensus library as they are, the pure halves of gossip, placement and hosting, and simulated
//! links, disks and processes around them. A seed makes a history, and the same history each time.
//!
//! | module | |
//! |---|---|
//! | [`network`] | connections, delay, loss, cuts |
//! | [`node`] | one process |
//! | [`world`] | machines, and what can be done to them |
//! | [`checker`] | what must hold after every step |
//! | [`history`] | what a seed makes of a mesh |
//! | [`scenarios`] | faults that were once seen, each as a history |
//! | [`model`], [`answers`] | a model without tensors, and answers made with it |
//!
//! `COEL_HISTORIES` sets how many histories run, `COEL_SEED` the first one.

mod answers;
mod checker;
mod history;
mod model;
mod network;
mod node;
mod scenarios;
mod world;

use std::sync::Mutex;
use std::time::Instant;

use history::Report;
use node::Faults;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect(variable))
}

/// Runs so many histories on all cores, and says how it went.
fn run_all(first: u64, count: u64, faults: Faults) -> Vec<Report> {
    let seeds = Mutex::new(first..first + count);
    let reports = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = { seeds.lock().unwrap().next() } {
                    let report = history::random(seed, faults);
                    reports.lock().unwrap().push(report);
                }
            });
        }
    });
    let mut reports = reports.into_inner().unwrap();
    reports.sort_by_key(|report| report.seed);
    reports
}

#[test]
fn histories() {
    let (first, count) = (number("COEL_SEED", 1), number("COEL_HISTORIES", 10_000));
    let started = Instant::now();
    let reports = run_all(first, count, Faults::default());
    let seconds = started.elapsed().as_secs_f64();
    let steps: u64 = reports.iter().map(|report| report.steps).sum();
    let acknowledged: usize = reports.iter().map(|report| report.acknowledged).sum();
    let answers: u64 = reports.iter().map(|report| report.answers).sum();
    let virtual_s: u128 = reports.iter().map(|report| report.virtual_ms).sum::<u128>() / 1000;
    println!(
        "{count} histories from seed {first}: {virtual_s} s of virtual time in {seconds:.1} s ({:.0} histories/s), {steps} steps, \
         {acknowledged} commands acknowledged, {answers} answers",
        count as f64 / seconds
    );
    let found: Vec<&Report> = reports.iter().filter(|report| report.violation.is_some()).collect();
    for report in &found {
        println!("seed {}: {}", report.seed, report.violation.as_deref().unwrap_or_default());
    }
    assert!(found.is_empty(), "{} of {count} histories broke a rule", found.len());
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 1..20 {
        let first = history::random(seed, Faults::default());
        assert_eq!(history::random(seed, Faults::default()), first);
    }
}

#[test]
fn a_full_disk_stops_its_node_from_leading_and_no_one_else() {
    for seed in 1..=20 {
        for nodes in [1, 3] {
            let report = history::full_leader(seed, nodes);
            assert_eq!(report.violation, None, "seed {seed}, {nodes} nodes");
        }
    }
}

/// The first history that a fault breaks, of so many.
fn caught(faults: Faults, count: u64) -> Report {
    let found = (1..=count).map(|seed| history::random(seed, faults)).find(|report| report.violation.is_some());
    let report = found.unwrap_or_else(|| panic!("{faults:?}: none of {count} histories shows it"));
    println!("{faults:?}: seed {}: {}", report.seed, report.violation.as_deref().unwrap_or_default());
    report
}

#[test]
fn a_vote_that_is_not_on_the_disk_is_caught() {
    let violation = caught(Faults { unsynced_vote: true, ..Faults::default() }, 500).violation.unwrap();
    // Before it can vote again, the others tell the node in which term it did.
    assert!(violation.contains("every disk has kept its word"), "{violation}");
}

#[test]
fn an_author_that_is_not_checked_is_caught() {
    let violation = caught(Faults { forgets_authors: true, ..Faults::default() }, 500).violation.unwrap();
    assert!(violation.contains("has never said"), "{violation}");
}

#[test]
fn a_reply_that_counts_twice_is_caught() {
    let violation = caught(Faults { counts_twice: true, ..Faults::default() }, 500).violation.unwrap();
    assert!(violation.contains("other tokens"), "{violation}");
}
