//! Each fault that was once seen, as a history of its own. On the code of before, each breaks a rule.

use std::time::Duration;

use coel_store::simulation::Simulation;

use crate::history::{Report, report};
use crate::node::Faults;
use crate::world::World;

/// Runs a history in a fresh world.
fn run<F: AsyncFnOnce(&mut World)>(seed: u64, faults: Faults, history: F) -> Report {
    let simulation = Simulation::new(seed);
    simulation.run(async {
        let mut world = World::new(&simulation, faults);
        history(&mut world).await;
        report(seed, &world)
    })
}

/// The scenario, under many seeds: network, disks and interleavings differ.
fn hold(seeds: u64, history: impl AsyncFn(&mut World)) {
    for seed in 1..=seeds {
        let report = run(seed, Faults::default(), async |world: &mut World| history(world).await);
        assert_eq!(report.violation, None, "seed {seed}");
    }
}

/// The first rule that a fault breaks in the scenario.
fn caught(faults: Faults, history: impl AsyncFn(&mut World)) -> String {
    let reports = (1..=200).map(|seed| run(seed, faults, async |world: &mut World| history(world).await));
    let found = reports.into_iter().find_map(|report| Some((report.seed, report.violation?)));
    let (seed, violation) = found.unwrap_or_else(|| panic!("{faults:?}: no history shows it"));
    println!("{faults:?}: seed {seed}: {violation}");
    violation
}

/// A mesh of so many nodes that has come to rest.
async fn settled(world: &mut World, nodes: usize) {
    let first = world.create().await;
    world.register_model(first).await;
    for _ in 1..nodes {
        world.join(first).await;
        world.sleep(1000).await;
    }
    world.come_to_rest().await;
    // Long enough for votes, and for gossip to tell how far everyone has got.
    world.sleep(5000).await;
}

/// A mesh of one; two newcomers come, and die for good within the second.
async fn newcomers_die(world: &mut World) {
    let first = world.create().await;
    for _ in 0..2 {
        let newcomer = world.join(first).await;
        let pause = 1000 + world.simulation.random() % 900;
        world.sleep(pause).await;
        newcomer.into_iter().for_each(|machine| world.destroy_newcomer(machine));
    }
    world.sleep(40_000).await;
    world.come_to_rest().await;
}

#[test]
fn newcomers_that_die_at_once_do_not_take_the_quorum_with_them() {
    hold(30, newcomers_die);
}

#[test]
fn a_dead_learner_with_a_vote_is_caught() {
    let violation = caught(Faults { promotes_the_dead: true, ..Faults::default() }, newcomers_die);
    assert!(violation.contains("cannot write"), "{violation}");
}

#[test]
fn a_node_whose_disk_was_put_back_returns_under_a_new_id() {
    hold(30, async |world| {
        settled(world, 3).await;
        world.back_up(2);
        for _ in 0..5 {
            world.write(0);
            world.sleep(500).await;
        }
        let before = world.node_id(2);
        world.roll_back(2);
        world.sleep(10_000).await;
        world.come_to_rest().await;
        if world.node_id(2) == before {
            world.checker.violated("a node whose log went back kept its id".into());
        }
    });
}

#[test]
fn a_leader_whose_disk_was_put_back_does_not_lead_again() {
    hold(30, async |world| {
        settled(world, 3).await;
        let leader = world.leading().expect("a settled mesh has a leader");
        world.back_up(leader);
        for _ in 0..5 {
            world.write(leader);
            world.sleep(500).await;
        }
        world.roll_back(leader);
        world.sleep(10_000).await;
        world.come_to_rest().await;
    });
}

#[test]
fn of_two_processes_with_one_identity_one_goes_on() {
    hold(30, async |world| {
        settled(world, 3).await;
        let machine = (world.simulation.random() % 3) as usize;
        let copy = world.copy(machine).await.expect("a settled mesh has logs");
        world.sleep(3000).await;
        if world.is_running(copy) == world.is_running(machine) {
            world.checker.violated("of two processes with one identity none or both go on".into());
        }
        world.destroy(copy);
        world.write(machine);
        world.come_to_rest().await;
    });
}

#[test]
fn a_node_that_was_cut_off_does_not_disturb_the_others_when_it_comes_back() {
    hold(30, async |world| {
        settled(world, 3).await;
        let leader = world.leading().expect("a settled mesh has a leader");
        let other = (leader + 1) % 3;
        let rest: Vec<usize> = (0..3).filter(|machine| *machine != other).collect();
        world.part(&[other], &rest, true);
        world.sleep(20_000).await;
        let term = world.term(leader);
        world.network.mend_all();
        world.sleep(5000).await;
        if world.term(leader) != term {
            world.checker.violated(format!("term {term} ended when a node came back"));
        }
        world.come_to_rest().await;
    });
}

#[test]
fn a_mesh_that_lost_its_only_voter_goes_on_from_the_survivor() {
    hold(30, async |world| {
        settled(world, 2).await;
        let voter = world.leading().expect("a settled mesh has a leader");
        let survivor = 1 - voter;
        world.destroy(voter);
        world.sleep(10_000).await;
        world.recover(survivor).await;
        world.sleep(5000).await;
        // Others follow by a new invite.
        world.join(survivor).await;
        world.sleep(5000).await;
        world.come_to_rest().await;
    });
}

/// A voter votes and loses its power at once; meanwhile another stands, whom the first candidate has not reached.
async fn vote_and_forget(world: &mut World) {
    settled(world, 3).await;
    let leader = world.leading().expect("a settled mesh has a leader");
    let others: Vec<usize> = (0..3).filter(|machine| *machine != leader).collect();
    let (voter, other) = (others[0], others[1]);
    // The leader is cut off from the one, and loses its memory of leading by a restart.
    world.part(&[leader], &[other], true);
    world.kill(leader);
    world.start(leader);
    let term = world.term(voter);
    let until = world.simulation.elapsed() + Duration::from_secs(30);
    while world.simulation.elapsed() < until && world.term(voter) == term {
        world.sleep(1).await;
    }
    world.cut_power_keeping(voter, 0);
    world.part(&[leader], &[voter], true);
    world.start(voter);
    world.sleep(15_000).await;
    world.heal();
    world.come_to_rest().await;
}

#[test]
fn a_vote_outlives_a_power_cut() {
    hold(20, vote_and_forget);
}
