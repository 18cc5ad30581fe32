//! Histories: what a seed makes of a mesh.

use std::collections::BTreeSet;

use coel_store::simulation::Simulation;
use rand::Rng;
use rand::seq::IndexedRandom;

use crate::node::Faults;
use crate::world::World;

/// What came of a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub seed: u64,
    pub violation: Option<String>,
    /// States applied and leaders elected.
    pub steps: u64,
    pub acknowledged: usize,
    pub answers: u64,
    pub virtual_ms: u128,
    /// Equal for equal histories.
    pub trace: [u8; 32],
}

/// A mesh of one to five nodes under a write load, to which everything happens that a seed has in store; then it is left alone, and must
/// come to rest with all that it acknowledged.
pub fn random(seed: u64, faults: Faults) -> Report {
    let simulation = Simulation::new(seed);
    simulation.run(async {
        let mut world = World::new(&simulation, faults);
        disturb(&mut world).await;
        world.heal();
        world.come_to_rest().await;
        report(seed, &world)
    })
}

/// The leader's disk fills: another one of `nodes` leads, if there is one, and writes. The one with the full disk refuses at once, and goes on
/// when there is room.
pub fn full_leader(seed: u64, nodes: usize) -> Report {
    let simulation = Simulation::new(seed);
    simulation.run(async {
        let mut world = World::new(&simulation, Faults::default());
        let first = world.create().await;
        for _ in 1..nodes {
            world.join(first).await;
        }
        world.sleep(20_000).await;
        let full = world.leading().expect("one leads");
        world.fill(full, true);
        world.write(full);
        world.sleep(10_000).await;
        let (leads, before) = (world.leading(), world.checker.acknowledgements());
        if leads == Some(full) || (leads.is_none() && nodes > 1) {
            world.checker.violated(format!("the disk of {full} is full, and {leads:?} leads; {}", world.describe()));
        }
        world.write(leads.unwrap_or(full));
        world.sleep(5000).await;
        let written = world.checker.acknowledgements() - before;
        if written != usize::from(nodes > 1) {
            world.checker.violated(format!("{nodes} nodes, one with a full disk, acknowledged {written}"));
        }
        world.heal();
        world.come_to_rest().await;
        report(seed, &world)
    })
}

pub fn report(seed: u64, world: &World) -> Report {
    Report {
        seed,
        violation: world.checker.violation(),
        steps: world.checker.steps(),
        acknowledged: world.checker.acknowledgements(),
        answers: world.checker.answers(),
        virtual_ms: world.simulation.elapsed().as_millis(),
        trace: world.checker.trace(),
    }
}

async fn disturb(world: &mut World) {
    let first = world.create().await;
    if world.rng.random_bool(0.5) {
        world.register_model(first).await;
    }
    let nodes = world.rng.random_range(1..=5);
    for _ in 1..nodes {
        let via = *world.running().choose(&mut world.rng).unwrap_or(&first);
        world.join(via).await;
        let pause = world.rng.random_range(0..3000);
        world.sleep(pause).await;
    }
    // Newcomers that come and die at once.
    if world.rng.random_bool(0.3) {
        for _ in 0..world.rng.random_range(1..4) {
            let via = *world.running().choose(&mut world.rng).unwrap_or(&first);
            let newcomer = world.join(via).await;
            let pause = world.rng.random_range(0..1800);
            world.sleep(pause).await;
            newcomer.into_iter().for_each(|machine| world.destroy_newcomer(machine));
        }
    }
    // Most meshes form before they are disturbed.
    if world.rng.random_bool(0.8) {
        world.sleep(5000).await;
    }
    let disturbances = world.rng.random_range(1..12);
    // The disk of one machine, in some histories, is put back to an earlier state.
    let rolls_back = world.rng.random_bool(0.3).then(|| world.rng.random_range(0..world.hosts.len()));
    for _ in 0..disturbances {
        if let Some(machine) = rolls_back {
            world.back_up(machine);
            if world.rng.random_bool(0.2) {
                world.roll_back(machine);
            }
        }
        let writes = world.rng.random_range(0..6);
        for _ in 0..writes {
            if let Some(&machine) = world.running().choose(&mut world.rng) {
                world.write(machine);
                if world.rng.random_bool(0.3) {
                    world.answer(machine);
                }
            }
            let pause = world.rng.random_range(0..400);
            world.sleep(pause).await;
        }
        disturb_once(world);
        let pause = world.rng.random_range(0..4000);
        world.sleep(pause).await;
        if world.checker.violation().is_some() {
            return;
        }
    }
}

fn disturb_once(world: &mut World) {
    let machines = world.hosts.len();
    let any = world.rng.random_range(0..machines);
    match world.rng.random_range(0..100) {
        0..22 => world.kill(any),
        22..40 => world.cut_power(any),
        40..60 => {
            let dead: Vec<usize> = (0..machines).filter(|&machine| world.hosts[machine].node.is_none()).collect();
            dead.into_iter().for_each(|machine| world.start(machine));
        }
        60..68 => world.pause(any),
        68..73 => world.simulation.resume_all(),
        73..85 => {
            let left: BTreeSet<usize> = (0..machines).filter(|_| world.rng.random_bool(0.5)).collect();
            let right: Vec<usize> = (0..machines).filter(|machine| !left.contains(machine)).collect();
            let left: Vec<usize> = left.into_iter().collect();
            let both = world.rng.random_bool(0.7);
            world.part(&left, &right, both);
        }
        85..91 => world.network.mend_all(),
        91..93 => {
            world.network.mend_all();
            let full = !world.hosts[any].full;
            world.fill(any, full);
        }
        93..95 => world.slander(any),
        95..98 => {
            let permille = world.rng.random_range(0..200);
            world.network.set_loss(permille);
        }
        _ => {
            // Everything at once.
            (0..machines).for_each(|machine| world.cut_power(machine));
        }
    }
}
