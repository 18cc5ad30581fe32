//! Experts on disk: the same bits as in memory, the budget, and files that cannot be read.

use std::{
    fs,
    path::{Path, PathBuf},
};

use coel_model::{
    nn::batch::Want,
    offload::{OffloadError, predict::Predictor},
    serve::{
        device::Device,
        engine::{Engine, EngineError, EngineOptions, block_on},
    },
    text::tokenizer::Tokenizer,
    weights::{
        checkpoint::Checkpoint,
        folder::ModelFolder,
        layout::{self, ExpertId},
        memory::ReadError,
        slices::Precision,
        slicing::slice_checkpoint,
    },
};

use crate::whole::checkpoint;

/// An expert of the bundled model in memory: three runs of whole pages, at most.
const EXPERT: u64 = 3 * (96 * 256 * 2 + 2 * 4096);

fn start(checkpoint: &Checkpoint, disk_cache_bytes: u64) -> Engine {
    start_with(checkpoint, EngineOptions { disk_cache_bytes, ..EngineOptions::default() })
}

fn start_with(checkpoint: &Checkpoint, options: EngineOptions) -> Engine {
    let options = EngineOptions { kv_tokens: 2048, page_tokens: 16, low_priority: true, ..options };
    Engine::start(Device::Cpu, checkpoint.config().clone(), options).expect("the CPU is always there")
}

/// An engine with everything in memory.
fn whole(checkpoint: &Checkpoint) -> Engine {
    let engine = start(checkpoint, 0);
    block_on(engine.load_checkpoint(checkpoint)).unwrap();
    engine
}

/// An engine with all experts on disk, and memory for `experts` of them.
fn on_disk(checkpoint: &Checkpoint, experts: u64) -> Engine {
    on_disk_with(checkpoint, experts, EngineOptions::default())
}

fn on_disk_with(checkpoint: &Checkpoint, experts: u64, options: EngineOptions) -> Engine {
    let engine = start_with(checkpoint, EngineOptions { disk_cache_bytes: experts * EXPERT, ..options });
    block_on(engine.load_trunk_tensors(checkpoint.trunk())).unwrap();
    for id in layout::experts(checkpoint.config()) {
        block_on(engine.load_expert_tensors_on_disk(id, checkpoint.expert(id))).unwrap();
    }
    engine
}

fn tokens(count: usize, salt: u32) -> Vec<u32> {
    (0..count as u32).map(|index| (index * index * 7 + index * 31 + salt * 97 + 3) % 4096).collect()
}

/// The logits after a prompt, then after each of `more` tokens.
fn follow(engine: &Engine, prompt: usize, more: usize, salt: u32) -> Vec<Vec<f32>> {
    let all = tokens(prompt + more, salt);
    let mut session = engine.open_session(prompt + more).unwrap();
    let mut logits = vec![block_on(session.advance(&all[..prompt], Want::Last)).unwrap().logits];
    for token in &all[prompt..] {
        logits.push(block_on(session.advance(&[*token], Want::Last)).unwrap().logits);
    }
    logits
}

#[test]
fn any_budget_gives_the_same_bits() {
    let checkpoint = checkpoint();
    let cases = [(150, 12, 1), (1, 20, 2), (9, 3, 3)];
    let expected = {
        let engine = whole(&checkpoint);
        cases.map(|(prompt, more, salt)| follow(&engine, prompt, more, salt))
    };
    // Memory for one expert, for the experts of two rows, for a third of all experts, and for nearly all of them.
    for experts in [1, 8, 40, 140] {
        let engine = on_disk(&checkpoint, experts);
        let ledger = engine.memory();
        assert_eq!((ledger.expert_bytes, ledger.disk_cache_bytes_reserved), (0, experts * EXPERT));
        assert_eq!(engine.held().len(), 6 * 24);
        for ((prompt, more, salt), expected) in cases.into_iter().zip(&expected) {
            assert!(
                follow(&engine, prompt, more, salt) == *expected,
                "{experts} experts in memory, prompt of {prompt}"
            );
        }
        let stats = engine.offload_stats();
        assert_eq!(stats.on_disk, 144, "{stats:?}");
        assert!(stats.in_memory as u64 * engine.footprint().expert_bytes <= experts * EXPERT, "{stats:?}");
        assert!(stats.misses > 0 && stats.bytes_read > 0, "{stats:?}");
        // 36 batches decode one row each. They predict a layer only if the layer before it waits: up to five layers
        // each.
        let pairs: u64 = stats.recall.iter().map(|layer| layer.late.pairs).sum();
        let most = (12 + 1 + 20 + 3) * 5 * 4;
        assert!(if experts == 1 { pairs == most } else { (1..=most).contains(&pairs) }, "{stats:?}");
        let [early, late] = stats.mean_recall();
        assert!(early.is_none() && late.is_some_and(|late| late > 0.6), "{stats:?}");
    }
}

#[test]
fn rows_that_go_ahead_leave_no_trace() {
    let checkpoint = checkpoint();
    // Pages have 16 tokens: some sessions begin a page, others continue in the middle of one.
    let cases = [(150, 12, 1), (1, 20, 2), (15, 3, 3)];
    let run = |engine: &Engine| cases.map(|(prompt, more, salt)| follow(engine, prompt, more, salt));
    let expected = run(&whole(&checkpoint));
    // If recall is measured, the rows of prompts go ahead too, in every layer, even with everything in memory.
    for predictor in [Predictor::Off, Predictor::Attention] {
        for measure_recall in [false, true] {
            let options = || EngineOptions { predictor, measure_recall, ..EngineOptions::default() };
            let engine = on_disk_with(&checkpoint, 20, options());
            assert!(run(&engine) == expected, "{predictor:?}, measured: {measure_recall}");
            let off = predictor == Predictor::Off;
            assert_eq!(
                engine.offload_stats().mean_recall().map(|recall| recall.is_some()),
                [!off && measure_recall, !off]
            );
            let engine = start_with(&checkpoint, options());
            block_on(engine.load_checkpoint(&checkpoint)).unwrap();
            assert!(run(&engine) == expected, "in memory, {predictor:?}, measured: {measure_recall}");
        }
    }
}

#[test]
fn experts_are_predicted_better_than_by_the_next_router_alone() {
    let checkpoint = checkpoint();
    let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fixture/golden"));
    let tokenizer = fs::read(golden.with_file_name("tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_bytes(&tokenizer, None).unwrap();
    let engine = start_with(&checkpoint, EngineOptions { measure_recall: true, ..EngineOptions::default() });
    block_on(engine.load_checkpoint(&checkpoint)).unwrap();
    for file in ["encyclopedia.txt", "code.txt"] {
        let tokens = tokenizer.encode(&fs::read_to_string(golden.join(file)).unwrap(), false).unwrap();
        let mut session = engine.open_session(256).unwrap();
        block_on(session.advance(&tokens[..256], Want::Nothing)).unwrap();
    }
    let stats = engine.offload_stats();
    assert_eq!(stats.recall.iter().map(|layer| layer.early.pairs).sum::<u64>(), 2 * 256 * 5 * 4);
    // The next router alone has a recall of 0.66 from the rows as they are, and of 0.76 once all outputs are there.
    let [early, late] = stats.mean_recall();
    assert!(early.is_some_and(|early| early > 0.82) && late.is_none(), "{stats:?}");
}

#[test]
fn sessions_that_wait_for_the_disk_do_not_disturb_each_other() {
    let checkpoint = checkpoint();
    let cases: Vec<(usize, u32)> = vec![(120, 1), (1, 2), (30, 3), (5, 4), (64, 5)];
    let engine = whole(&checkpoint);
    let expected: Vec<_> = cases.iter().map(|(prompt, salt)| follow(&engine, *prompt, 8, *salt)).collect();
    for experts in [4, 60] {
        let engine = on_disk(&checkpoint, experts);
        let found: Vec<_> = std::thread::scope(|scope| {
            let run = |(prompt, salt): &(usize, u32)| {
                let (prompt, salt, engine) = (*prompt, *salt, &engine);
                scope.spawn(move || follow(engine, prompt, 8, salt))
            };
            let running: Vec<_> = cases.iter().map(run).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(found == expected, "{experts} experts in memory");
    }
}

#[test]
fn a_call_of_a_peer_waits_for_the_disk_too() {
    let checkpoint = checkpoint();
    let rows: Vec<f32> = (0..4 * 256).map(|index| (index % 13) as f32 / 16.0 - 0.4).collect();
    let calls: Vec<(u16, Vec<u32>)> = (0..12).map(|expert| (expert * 2, vec![u32::from(expert) % 4])).collect();
    let run = |engine: &Engine| block_on(engine.run_experts(3, rows.clone(), calls.clone())).unwrap();
    let expected = run(&whole(&checkpoint));
    let engine = on_disk(&checkpoint, 3);
    assert!(run(&engine) == expected);
    assert!(run(&engine) == expected, "even with other experts in memory");
    assert!(block_on(engine.drop_expert(ExpertId { layer: 3, index: 4 })).unwrap());
    let gone = block_on(engine.run_experts(3, rows.clone(), calls.clone())).unwrap_err();
    assert!(matches!(gone, EngineError::NotHeld(ExpertId { layer: 3, index: 4 })), "{gone}");
}

#[test]
fn slices_on_disk_and_experts_that_move_between_disk_and_memory() {
    let checkpoint = checkpoint();
    let (_dir, slices) = sliced();
    let folder = ModelFolder::open(&slices).unwrap();
    let load = |precision| {
        let engine = start(&checkpoint, 0);
        block_on(engine.load_trunk_tensors(folder.trunk(Precision::Q8).unwrap())).unwrap();
        for id in layout::experts(folder.config()) {
            block_on(engine.load_expert_tensors(id, folder.expert(id, precision).unwrap())).unwrap();
        }
        engine
    };
    let [q4, q8] = [Precision::Q4, Precision::Q8].map(|precision| follow(&load(precision), 20, 6, 1));

    let engine = start(&checkpoint, 30 * EXPERT);
    block_on(engine.load_trunk_without_embedding(folder.trunk(Precision::Q8).unwrap())).unwrap();
    let whole_trunk = load(Precision::Q4).memory().trunk_bytes;
    assert!(engine.memory().trunk_bytes < whole_trunk, "the embedding table is not in memory");
    let offload = |precision| {
        for id in layout::experts(folder.config()) {
            block_on(engine.load_expert_tensors_on_disk(id, folder.expert(id, precision).unwrap())).unwrap();
        }
    };
    offload(Precision::Q4);
    assert!(follow(&engine, 20, 6, 1) == q4);
    assert!(engine.held().values().all(|precision| *precision == Precision::Q4));
    offload(Precision::Q8);
    assert!(follow(&engine, 20, 6, 1) == q8, "upgraded on disk");
    for id in layout::experts(folder.config()).filter(|id| id.index % 2 == 0) {
        block_on(engine.load_expert_tensors(id, folder.expert(id, Precision::Q8).unwrap())).unwrap();
    }
    assert_eq!((engine.offload_stats().on_disk, engine.held().len()), (72, 144));
    assert!(follow(&engine, 20, 6, 1) == q8, "half of them in memory for good");
    offload(Precision::Q4);
    assert!(follow(&engine, 20, 6, 1) == q4, "and back");
}

/// The bundled model as slices, in a folder of its own.
fn sliced() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let slices = dir.path().join("slices");
    slice_checkpoint(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fixture")), &slices, |_, _| {}).unwrap();
    (dir, slices)
}

#[test]
fn a_missing_file_ends_the_requests_that_need_it_and_is_named() {
    // Slices: each expert is a file of its own.
    let (_dir, slices) = sliced();
    let folder = ModelFolder::open(&slices).unwrap();
    let engine = start(&checkpoint(), 10 * EXPERT);
    block_on(engine.load_trunk_tensors(folder.trunk(Precision::Q4).unwrap())).unwrap();
    for id in layout::experts(folder.config()) {
        block_on(engine.load_expert_tensors_on_disk(id, folder.expert(id, Precision::Q4).unwrap())).unwrap();
    }
    let expected = follow(&engine, 40, 2, 1);

    // The experts of one layer: a prompt needs many of them, a single row four.
    let file = |index: u16| slices.join(format!("layer.2.expert.{index}.base.safetensors"));
    let mut session = engine.open_session(1).unwrap();
    let (_, routes) = block_on(session.advance_watched(&[7], Want::Last)).unwrap();
    drop(session);
    let used: Vec<u16> = routes[2][0].iter().map(|route| route.expert).collect();
    let spoilt = (0..24).filter(|index| !used.contains(index)).collect::<Vec<_>>();
    let kept: Vec<Vec<u8>> = spoilt.iter().map(|index| fs::read(file(*index)).unwrap()).collect();
    for (turn, index) in spoilt.iter().enumerate() {
        match turn % 2 {
            0 => fs::remove_file(file(*index)).unwrap(),
            _ => fs::File::options().write(true).open(file(*index)).unwrap().set_len(8192).unwrap(),
        }
    }
    // Other experts displace the spoilt ones, until none of them is in memory.
    for salt in 0..8 {
        let mut session = engine.open_session(1).unwrap();
        _ = block_on(session.advance(&[salt * 50 + 11], Want::Last));
    }
    let mut session = engine.open_session(40).unwrap();
    let error = block_on(session.advance(&tokens(40, 1), Want::Last)).unwrap_err();
    let EngineError::Offload(OffloadError::Read { id, why }) = &error else { panic!("{error}") };
    assert!(id.layer == 2 && spoilt.contains(&id.index), "{error}");
    assert!(matches!(why, ReadError::Io { .. } | ReadError::Truncated { .. }), "{error}");
    let name = format!("layer.2.expert.{}.base.safetensors", id.index);
    assert!(error.to_string().contains(&name), "{error}");
    drop(session);

    let mut session = engine.open_session(1).unwrap();
    block_on(session.advance(&[7], Want::Last)).expect("it needs none of them");
    drop(session);
    for (index, bytes) in spoilt.iter().zip(kept) {
        fs::write(file(*index), bytes).unwrap();
    }
    assert!(follow(&engine, 40, 2, 1) == expected, "they are read again once they are back");
}

#[test]
fn experts_that_cannot_stay_on_disk_are_refused() {
    let checkpoint = checkpoint();
    let id = ExpertId { layer: 1, index: 2 };
    let refused = |engine: &Engine, tensors| block_on(engine.load_expert_tensors_on_disk(id, tensors)).unwrap_err();
    let engine = start(&checkpoint, 8 * EXPERT);
    let sliced = checkpoint.expert(id).sliced(Precision::Q4).unwrap();
    let error = refused(&engine, sliced);
    assert!(
        matches!(&error, EngineError::Offload(OffloadError::Read { why: ReadError::NotInAFile { .. }, .. })),
        "{error}"
    );
    let error = refused(&engine, checkpoint.expert(ExpertId { layer: 1, index: 3 }));
    assert!(matches!(&error, EngineError::Load(_)), "another expert's: {error}");
    let error = refused(&start(&checkpoint, 0), checkpoint.expert(id));
    assert!(matches!(&error, EngineError::Offload(OffloadError::TooSmall { budget: 0, .. })), "{error}");
    assert!(engine.held().is_empty());
}
