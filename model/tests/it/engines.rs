//! The engine: accounting, refusals, and the same bits as a bare decoder.

use coel_model::{
    kernels::cpu::CpuKernels,
    nn::batch::{DecodeError, Want},
    serve::{
        device::{Device, DeviceError},
        engine::{Engine, EngineError, EngineOptions, block_on},
    },
    text::model::TextModel,
    tools::popularity::{CALIBRATION_NAME, CALIBRATION_TEXT, route_popularity},
    weights::{checkpoint::Checkpoint, layout::ExpertId, matrix::DType, memory::WeightBytes},
};
use serde_json::json;

use crate::{
    synth,
    whole::{Whole, checkpoint},
};

fn start(checkpoint: &Checkpoint, kv_tokens: usize) -> Engine {
    start_with(checkpoint, EngineOptions { kv_tokens, ..EngineOptions::default() })
}

fn start_with(checkpoint: &Checkpoint, options: EngineOptions) -> Engine {
    let options = EngineOptions { low_priority: true, ..options };
    Engine::start(Device::Cpu, checkpoint.config().clone(), options).expect("the CPU is always there")
}

fn small() -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    synth::write_checkpoint(dir.path(), &synth::config(json!({})), DType::BF16, 3);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// Greedy tokens after each of `prompts`, in batches of one row after the batches of the prompt.
fn greedy_alone(checkpoint: &Checkpoint, prompts: &[Vec<u32>], count: usize) -> Vec<Vec<u32>> {
    let mut whole = Whole::new(CpuKernels::default(), checkpoint);
    let mut follow = |prompt: &Vec<u32>| {
        let mut solo = whole.solo(prompt.len() + count);
        let (mut input, mut chosen) = (prompt.clone(), Vec::new());
        while chosen.len() < count {
            let logits = whole.advance(&mut solo, &input, Want::Last, |_| {});
            chosen.push(greedy(&logits));
            input = vec![greedy(&logits)];
        }
        chosen
    };
    prompts.iter().map(&mut follow).collect()
}

fn greedy(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("a vocabulary") as u32
}

#[test]
fn eight_threads_get_the_tokens_each_would_get_alone() {
    let checkpoint = checkpoint();
    let prompts: Vec<Vec<u32>> = (0..8u32)
        .map(|salt| (0..3 + 37 * salt).map(|index| (index * index * 7 + index * 31 + salt * 97) % 4096).collect())
        .collect();
    let expected = greedy_alone(&checkpoint, &prompts, 10);
    for (page_tokens, rows_max) in [(32, 256), (5, 48)] {
        let engine = start_with(
            &checkpoint,
            EngineOptions { kv_tokens: 2048, page_tokens, rows_max, ..EngineOptions::default() },
        );
        block_on(engine.load_checkpoint(&checkpoint)).unwrap();
        let follow = |prompt: &Vec<u32>| {
            let mut session = engine.open_session(prompt.len() + 10).unwrap();
            let (mut input, mut chosen) = (prompt.clone(), Vec::new());
            while chosen.len() < 10 {
                let advanced = block_on(session.advance(&input, Want::Last)).unwrap();
                assert_eq!(advanced.pairs_here, 24 * input.len() as u64);
                chosen.push(greedy(&advanced.logits));
                input = vec![greedy(&advanced.logits)];
            }
            chosen
        };
        let found: Vec<Vec<u32>> = std::thread::scope(|scope| {
            let running: Vec<_> = prompts.iter().map(|prompt| scope.spawn(|| follow(prompt))).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(found, expected, "pages of {page_tokens}, batches of {rows_max}");
        let rows: usize = prompts.iter().map(|prompt| prompt.len() + 9).sum();
        let activity = engine.activity();
        assert_eq!((activity.rows, activity.waiting, activity.pages_used), (rows as u64, 0, 0));
    }
}

#[test]
fn the_pool_is_never_overdrawn() {
    let (_dir, checkpoint) = small();
    let engine = start_with(&checkpoint, EngineOptions { kv_tokens: 100, page_tokens: 20, ..EngineOptions::default() });
    assert!(matches!(engine.open_session(1), Err(EngineError::NoTrunk)));
    block_on(engine.load_checkpoint(&checkpoint)).unwrap();
    assert_eq!(engine.kv_tokens_free(), 100, "a session that did not open holds nothing");
    let first = engine.open_session(60).unwrap();
    let refused = engine.open_session(41).unwrap_err();
    assert!(matches!(refused, EngineError::Busy { wanted: 41, free: 40 }), "{refused}");
    let refused = engine.open_session(101).unwrap_err();
    assert!(matches!(refused, EngineError::TooLong { wanted: 101, limit: 100 }), "{refused}");
    let _second = engine.open_session(40).unwrap();
    drop(first);
    let mut third = engine.open_session(60).unwrap();
    assert_eq!((engine.kv_tokens_free(), third.capacity()), (0, 60));
    let full = block_on(third.advance(&[1; 61], Want::Last)).unwrap_err();
    assert!(matches!(full, EngineError::Decode(DecodeError::CacheFull { .. })), "{full}");
    block_on(third.advance(&[1; 60], Want::Last)).unwrap();
}

#[test]
fn the_ledger_counts_what_is_loaded() {
    let (_dir, checkpoint) = small();
    let engine = start(&checkpoint, 100);
    let footprint = engine.footprint().clone();
    let empty = engine.memory();
    assert_eq!((empty.trunk_bytes, empty.expert_bytes), (0, 0));
    assert_eq!(empty.kv_bytes_reserved, 128 * footprint.kv_bytes_per_token, "whole pages");
    let id = ExpertId { layer: 1, index: 2 };
    block_on(engine.load_expert_tensors(id, checkpoint.expert(id))).unwrap();
    block_on(engine.load_expert_tensors(id, checkpoint.expert(id))).unwrap();
    assert_eq!(engine.memory().expert_bytes, footprint.expert_bytes);
    assert_eq!(engine.held().into_keys().collect::<Vec<_>>(), [id]);
    assert!(block_on(engine.drop_expert(id)).unwrap());
    assert!(!block_on(engine.drop_expert(id)).unwrap());
    block_on(engine.load_checkpoint(&checkpoint)).unwrap();
    assert_eq!(engine.held().len(), 10);
    let ledger = engine.memory();
    assert_eq!(ledger.trunk_bytes, footprint.trunk_bytes);
    assert_eq!(ledger.expert_bytes, 10 * footprint.expert_bytes);
    assert!(ledger.total() > ledger.trunk_bytes + ledger.expert_bytes);
    assert!(matches!(block_on(engine.load_checkpoint(&checkpoint)), Err(EngineError::TrunkLoaded)));
}

#[test]
fn a_peers_expert_call_is_checked_and_its_rows_do_not_hang_on_each_other() {
    let (_dir, checkpoint) = small();
    let engine = start(&checkpoint, 8);
    block_on(engine.load_checkpoint(&checkpoint)).unwrap();
    let d = checkpoint.config().hidden_size;
    let rows: Vec<f32> = (0..40 * d).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
    let run = |rows: &[f32], calls: Vec<(u16, Vec<u32>)>| block_on(engine.run_experts(1, rows.to_vec(), calls));
    let all = run(&rows, vec![(0, (0..40).collect()), (4, vec![7, 3])]).unwrap();
    assert_eq!(all.len(), 42 * d);
    for row in 0..40 {
        let alone = run(&rows[row * d..][..d], vec![(0, vec![0])]).unwrap();
        assert!(alone == all[row * d..][..d], "row {row}");
    }
    assert!(run(&rows, vec![(4, vec![3])]).unwrap() == all[41 * d..]);
    assert!(run(&rows, vec![]).unwrap().is_empty());
    assert!(run(&rows, vec![(2, vec![])]).unwrap().is_empty());

    let message = |result: Result<Vec<f32>, EngineError>| result.unwrap_err().to_string();
    assert!(message(run(&rows[1..], vec![(0, vec![0])])).contains("no whole rows"));
    assert!(message(run(&rows, vec![(0, vec![40])])).contains("row 40 of 40"));
    assert!(message(run(&rows[..d], vec![(0, vec![0; 3])])).contains("3 outputs for 1 rows"));
    assert!(message(run(&vec![0.0; 257 * d], vec![])).contains("257 rows"));
    assert!(message(run(&rows, vec![(5, vec![0])])).contains("layer 1 expert 5 does not exist"));
    let beyond = block_on(engine.run_experts(2, rows.clone(), vec![(0, vec![0])]));
    assert!(message(beyond).contains("layer 2 expert 0 does not exist"));
    block_on(engine.drop_expert(ExpertId { layer: 1, index: 4 })).unwrap();
    let missing = run(&rows, vec![(0, vec![0]), (4, vec![0])]).unwrap_err();
    assert!(matches!(missing, EngineError::NotHeld(ExpertId { layer: 1, index: 4 })), "{missing}");
    // A session that needs a missing expert stays as it was, and completes once the experts are back.
    let mut session = engine.open_session(8).unwrap();
    for index in 0..5 {
        block_on(engine.drop_expert(ExpertId { layer: 1, index })).unwrap();
    }
    assert!(matches!(block_on(session.advance(&[1, 2], Want::Last)), Err(EngineError::NotHeld(_))));
    for index in 0..5 {
        let id = ExpertId { layer: 1, index };
        block_on(engine.load_expert_tensors(id, checkpoint.expert(id))).unwrap();
    }
    block_on(session.advance(&[1; 8], Want::Last)).unwrap();
}

#[test]
fn blobs_that_are_not_what_they_claim_are_refused() {
    let (_dir, checkpoint) = small();
    let engine = start(&checkpoint, 8);
    let id = ExpertId { layer: 0, index: 0 };
    let junk = WeightBytes::from(vec![0xab; 200]);
    assert!(matches!(block_on(engine.load_expert(id, junk.clone())), Err(EngineError::Load(_))));
    assert!(matches!(block_on(engine.load_trunk(vec![junk])), Err(EngineError::Load(_))));
    let other = checkpoint.expert(ExpertId { layer: 0, index: 1 });
    let message = block_on(engine.load_expert_tensors(id, other)).unwrap_err().to_string();
    assert!(message.contains("model.layers.0.mlp.experts.1.") && message.contains("not part"), "{message}");
    let beyond = ExpertId { layer: 9, index: 0 };
    assert!(matches!(
        block_on(engine.load_expert_tensors(beyond, checkpoint.expert(id))),
        Err(EngineError::NoSuchExpert(_))
    ));
    assert!(engine.held().is_empty());
}

#[test]
fn an_absent_gpu_is_an_error_and_auto_finds_the_cpu() {
    let (_dir, checkpoint) = small();
    let explicit = Engine::start(Device::Cuda(4096), checkpoint.config().clone(), EngineOptions::default());
    assert!(matches!(explicit, Err(EngineError::Device(DeviceError::Missing { device: Device::Cuda(4096), .. }))));
    let auto = Engine::start(Device::Auto, checkpoint.config().clone(), EngineOptions::default()).unwrap();
    assert_ne!(auto.device(), Device::Auto);
    assert!(!auto.class().is_empty());
}

#[test]
fn popularity_counts_every_route() {
    let checkpoint = checkpoint();
    let engine = start(&checkpoint, 512);
    block_on(engine.load_checkpoint(&checkpoint)).unwrap();
    let tokenizer = TextModel::open(&checkpoint).unwrap().tokenizer;
    let tokens = tokenizer.encode(CALIBRATION_TEXT, false).unwrap();
    assert!(tokens.len() > 600, "{} tokens are too few to tell experts apart", tokens.len());
    let counted = block_on(route_popularity(&engine, CALIBRATION_NAME, &tokens)).unwrap();
    assert_eq!((counted.text.as_str(), counted.tokens), (CALIBRATION_NAME, tokens.len() as u64));
    assert_eq!(counted.counts.len(), 6);
    for layer in &counted.counts {
        assert_eq!((layer.len(), layer.iter().sum::<u64>()), (24, 4 * tokens.len() as u64));
    }
    assert_eq!(engine.kv_tokens_free(), 512);
}

#[test]
fn the_thread_ends_with_its_last_handle() {
    let (_dir, checkpoint) = small();
    let engine = start(&checkpoint, 8);
    block_on(engine.load_checkpoint(&checkpoint)).unwrap();
    let config = std::sync::Arc::downgrade(engine.config());
    let session = engine.open_session(4).unwrap();
    drop(engine);
    let before = config.strong_count();
    drop(session);
    // The thread holds the configuration until it notices that its last handle is gone.
    for _ in 0..1000 {
        if config.strong_count() < before {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(config.strong_count(), 1, "only the checkpoint still holds it");
}
