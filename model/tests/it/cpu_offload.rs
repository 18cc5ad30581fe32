//! Experts in host memory beside a GPU, on a Vulkan device in hardware or software. The module `gpu` says which tests
//! are skipped where.
//!
//! The GPU and the CPU are different kernel classes, so results are compared within the bound for both; `worker/tests`
//! compares them on one class, bit by bit.

use coel_model::{
    kernels::cpu::isa::Isa,
    nn::batch::Want,
    serve::{
        Advanced,
        device::Device,
        engine::{Engine, EngineOptions, block_on},
    },
    text::{model::TextModel, sequence::GenerateParams},
    tools::{
        eval::eval_reference,
        generate::{LocalError, LocalModel, LocalOptions},
    },
    weights::{
        checkpoint::Checkpoint,
        layout::{self, ExpertId},
        slices::Precision,
    },
};

use crate::{
    gpu::{reference_file, vulkan},
    whole::{self, checkpoint},
};

/// An expert of the bundled model, exact.
const EXPERT: u64 = 3 * 96 * 256 * 2;
/// The same expert in a buffer of the disk cache: three runs of whole pages, at most.
const EXPERT_BUFFER: u64 = EXPERT + 3 * 2 * 4096;
const EXPERTS: u64 = 6 * 24;

fn start(device_expert_bytes: Option<u64>, disk_cache_bytes: u64) -> Engine {
    let options = EngineOptions { kv_tokens: 1024, device_expert_bytes, disk_cache_bytes, ..EngineOptions::default() };
    Engine::start(Device::Vulkan(0), checkpoint().config().clone(), options).expect("it was opened before")
}

/// The bundled model, with space for `experts` of its experts on the GPU.
fn with_capacity(checkpoint: &Checkpoint, experts: u64) -> Engine {
    let engine = start(Some(experts * EXPERT), 0);
    block_on(engine.load_checkpoint(checkpoint)).unwrap();
    engine
}

/// The results of a prompt of 20 tokens, then of 6 more tokens one by one.
fn follow(engine: &Engine) -> Vec<Advanced> {
    let tokens: Vec<u32> = (0..26).map(|index| (index * index * 7 + index * 31 + 100) % 4096).collect();
    let mut session = engine.open_session(26).unwrap();
    let mut advanced = vec![block_on(session.advance(&tokens[..20], Want::Last)).unwrap()];
    for token in &tokens[20..] {
        advanced.push(block_on(session.advance(&[*token], Want::Last)).unwrap());
    }
    advanced
}

#[track_caller]
fn check_close(found: &[Advanced], expected: &[Advanced], bound: f32) {
    for (found, expected) in found.iter().zip(expected) {
        let size = expected.logits.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let off = found.logits.iter().zip(&expected.logits).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(off <= bound * size, "off by {off} of {size}");
    }
}

/// Checks that the budget holds, and that the ledger counts both memories.
#[track_caller]
fn check_budget(engine: &Engine, experts: u64) {
    let (ledger, device) = (engine.memory(), engine.offload_stats().device);
    assert_eq!(device.budget_bytes, experts * EXPERT);
    assert!(device.bytes <= device.budget_bytes, "{device:?}");
    assert_eq!(device.bytes, device.experts as u64 * EXPERT, "{device:?}");
    let promoted_for_good = device.bytes - ledger.disk_cache_bytes_promoted;
    assert_eq!(ledger.cpu_offload_bytes, ledger.expert_bytes - promoted_for_good + ledger.disk_cache_bytes_reserved);
}

fn cpu_class(precision: Precision) -> String {
    format!("cpu-{}/{precision}", Isa::best().name())
}

#[test]
fn a_third_on_the_gpu_answers_as_the_reference() {
    if vulkan().is_none() {
        return;
    }
    let engine = with_capacity(&checkpoint(), EXPERTS / 3);
    let config = engine.config().clone();
    let files = checkpoint().files();
    let model = LocalModel { text: TextModel::from_paths(&config, files).unwrap(), engine };
    check_budget(&model.engine, EXPERTS / 3);
    let report = eval_reference(&model, reference_file(4).path()).unwrap();
    assert!(report.max_rel_logit_error <= 1e-4, "{report:?}");
    assert_eq!((report.greedy_equal, report.greedy_total), (20, 20), "{report:?}");
    assert_eq!((report.routes_equal, report.routes_total), (960, 960), "{report:?}");
    check_budget(&model.engine, EXPERTS / 3);
    let device = model.engine.offload_stats().device;
    assert!(device.hits > 0 && device.on_cpu > 0 && device.promoted > 0, "{device:?}");
    assert!(device.bytes_promoted > (EXPERTS / 3) * EXPERT, "more than was loaded there: {device:?}");
}

#[test]
fn without_capacity_the_cpu_computes_all_experts_and_with_enough_none() {
    if vulkan().is_none() {
        return;
    }
    let checkpoint = checkpoint();
    let whole = start(None, 0);
    block_on(whole.load_checkpoint(&checkpoint)).unwrap();
    let expected = follow(&whole);
    assert!(expected.iter().all(|advanced| advanced.classes.is_empty()));
    assert_eq!((whole.offload_stats().device, whole.memory().cpu_offload_bytes), Default::default());

    let none = with_capacity(&checkpoint, 0);
    let found = follow(&none);
    check_close(&found, &expected, 1e-4);
    assert!(found.iter().all(|advanced| advanced.classes == [cpu_class(Precision::Exact)]), "{:?}", found[0].classes);
    let device = none.offload_stats().device;
    assert_eq!((device.experts, device.hits, device.promoted, device.bytes_promoted), (0, 0, 0, 0), "{device:?}");
    assert!(device.on_cpu > 0, "{device:?}");
    assert_eq!(none.memory().cpu_offload_bytes, EXPERTS * EXPERT);

    let all = with_capacity(&checkpoint, EXPERTS);
    let found = follow(&all);
    assert!(found == expected, "the same bits, and no other kernel class took part");
    let device = all.offload_stats().device;
    assert_eq!((device.experts as u64, device.on_cpu, device.promoted), (EXPERTS, 0, 0), "{device:?}");
    assert_eq!((all.memory().cpu_offload_bytes, all.memory().total()), (0, whole.memory().total()));
}

#[test]
fn experts_on_the_gpu_are_replaced_and_dropped() {
    if vulkan().is_none() {
        return;
    }
    let checkpoint = checkpoint();
    let (whole, engine) = (start(None, 0), start(Some(EXPERTS / 3 * EXPERT), 0));
    for engine in [&whole, &engine] {
        block_on(engine.load_trunk_tensors(checkpoint.trunk())).unwrap();
    }
    // The weights are sliced on loading, into this process's memory, which is freed while they are on the GPU.
    let load = |precision| {
        for id in layout::experts(checkpoint.config()) {
            for engine in [&whole, &engine] {
                let tensors = checkpoint.expert(id).sliced(precision).unwrap();
                block_on(engine.load_expert_tensors(id, tensors)).unwrap();
            }
        }
    };
    load(Precision::Q4);
    for precision in [Precision::Q8, Precision::Exact, Precision::Q4] {
        let found = follow(&engine);
        // A difference in the last bit may move an activation to the next int8 step.
        check_close(&found, &follow(&whole), 2e-2);
        load(precision);
        assert!(engine.held().values().all(|held| *held == precision));
        let device = engine.offload_stats().device;
        assert!(device.bytes <= device.budget_bytes, "{device:?}");
    }
    for _ in 0..2 {
        check_close(&follow(&engine), &follow(&whole), 2e-2);
    }
    let dropped: Vec<ExpertId> = layout::experts(checkpoint.config()).filter(|id| id.layer > 0).collect();
    for id in &dropped {
        assert!(block_on(engine.drop_expert(*id)).unwrap());
        assert!(!block_on(engine.drop_expert(*id)).unwrap());
    }
    assert_eq!(engine.held().len(), 24);
    let (device, ledger) = (engine.offload_stats().device, engine.memory());
    assert!(device.experts <= 24 && device.bytes <= ledger.expert_bytes, "{device:?}");
    assert_eq!(ledger.cpu_offload_bytes, ledger.expert_bytes - device.bytes);
    // A call from a peer, with experts in both memories.
    let rows: Vec<f32> = (0..4 * 256).map(|index| (index % 13) as f32 / 16.0 - 0.4).collect();
    let calls: Vec<(u16, Vec<u32>)> = (0..16).map(|expert| (23 - expert, vec![u32::from(expert) % 4])).collect();
    let [found, expected] =
        [&engine, &whole].map(|engine| block_on(engine.run_experts(0, rows.clone(), calls.clone())).unwrap());
    let size = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    assert!(found.len() == expected.len());
    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 2e-3 * size));
}

#[test]
fn disk_and_cpu_offload_together() {
    if vulkan().is_none() {
        return;
    }
    let checkpoint = checkpoint();
    let whole = start(None, 0);
    block_on(whole.load_checkpoint(&checkpoint)).unwrap();
    let expected = follow(&whole);
    // All experts are on disk; memory has space for a sixth of them at a time, and the GPU for a third.
    let (in_memory, on_device) = (EXPERTS / 6, EXPERTS / 3);
    let engine = start(Some(on_device * EXPERT), in_memory * EXPERT_BUFFER);
    block_on(engine.load_trunk_tensors(checkpoint.trunk())).unwrap();
    for id in layout::experts(checkpoint.config()) {
        block_on(engine.load_expert_tensors_on_disk(id, checkpoint.expert(id))).unwrap();
    }
    for _ in 0..3 {
        check_close(&follow(&engine), &expected, 1e-4);
        check_budget(&engine, on_device);
        let stats = engine.offload_stats();
        assert!(stats.bytes_in_memory <= in_memory * EXPERT_BUFFER, "{stats:?}");
    }
    let stats = engine.offload_stats();
    assert!(stats.device.experts > 0 && stats.device.hits > 0 && stats.bytes_read > 0, "{stats:?}");
    assert_eq!(engine.memory().disk_cache_bytes_promoted, stats.device.bytes);

    // Half of the experts move from disk to memory for good, and then most are dropped.
    let ids: Vec<ExpertId> = layout::experts(checkpoint.config()).collect();
    for id in &ids[..72] {
        block_on(engine.load_expert_tensors(*id, checkpoint.expert(*id))).unwrap();
    }
    check_close(&follow(&engine), &expected, 1e-4);
    for id in &ids[..100] {
        assert!(block_on(engine.drop_expert(*id)).unwrap());
    }
    let stats = engine.offload_stats();
    assert_eq!((engine.held().len(), stats.on_disk), (44, 44));
    assert!(stats.device.experts <= 44, "{stats:?}");
    assert_eq!(engine.memory().disk_cache_bytes_promoted, stats.device.bytes);
}

#[test]
fn a_local_model_keeps_to_both_budgets() {
    if vulkan().is_none() {
        return;
    }
    let open = |vram, memory| {
        let device = Device::Vulkan(0);
        let options = LocalOptions { device, vram: Some(vram), memory, kv_tokens: Some(64), ..LocalOptions::default() };
        LocalModel::open_with(&whole::fixture(), &options)
    };
    let Err(LocalError::DeviceTooSmall(short)) = open(1, None) else { panic!("a byte is not enough") };
    assert_eq!(short.least, short.trunk + short.kv + short.buffers);
    let Err(LocalError::TooSmall(short_of_memory)) = open(short.least, Some(1)) else { panic!("nor is it here") };
    assert!(short_of_memory.least > short_of_memory.expert * 8, "{short_of_memory}");

    let third = open(short.least + EXPERTS / 3 * EXPERT, None).unwrap();
    check_budget(&third.engine, EXPERTS / 3);
    assert_eq!(third.engine.offload_stats().device.experts as u64, EXPERTS / 3);
    let params = GenerateParams { max_tokens: Some(4), ..GenerateParams::default() };
    let answer = third.chat("What is the capital of France?", params, |_| {}).unwrap();
    assert_eq!(answer.text, "The capital of France");
    assert_eq!(answer.other_classes, [cpu_class(Precision::Exact)]);

    let all = open(short.least + EXPERTS * EXPERT, Some(1 << 40)).unwrap();
    assert_eq!((all.engine.offload_stats().device, all.engine.memory().cpu_offload_bytes), Default::default());
    let cpu = LocalOptions { device: Device::Cpu, vram: Some(1 << 40), ..LocalOptions::default() };
    assert!(matches!(LocalModel::open_with(&whole::fixture(), &cpu), Err(LocalError::NoDevice)));
}
