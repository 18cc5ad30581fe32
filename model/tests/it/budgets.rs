//! Experts that move from memory to disk and back while the engine serves, and the memory they take meanwhile.

use coel_model::{
    nn::batch::Want,
    serve::{
        device::Device,
        engine::{Engine, EngineOptions, block_on},
    },
    weights::{checkpoint::Checkpoint, layout, memory::WeightBytes, tensors::Tensors},
};

use crate::whole::checkpoint;

/// An expert of the bundled model in memory: three runs of whole pages, at most.
const EXPERT: u64 = 3 * (96 * 256 * 2 + 2 * 4096);

fn start(checkpoint: &Checkpoint) -> Engine {
    let options = EngineOptions { kv_tokens: 256, ..EngineOptions::default() };
    let engine = Engine::start(Device::Cpu, checkpoint.config().clone(), options).expect("the CPU is always there");
    block_on(engine.load_checkpoint(checkpoint)).unwrap();
    engine
}

fn logits(engine: &Engine) -> Vec<f32> {
    let mut session = engine.open_session(64).unwrap();
    let prompt: Vec<u32> = (5..45).collect();
    block_on(session.advance(&prompt, Want::Last)).unwrap().logits
}

#[test]
fn experts_go_to_disk_and_come_back_and_the_bits_stay() {
    let checkpoint = checkpoint();
    let engine = start(&checkpoint);
    let expected = logits(&engine);
    let all: Vec<_> = layout::experts(checkpoint.config()).collect();
    let loaded = engine.memory();
    assert_eq!((loaded.disk_cache_bytes_reserved, engine.offload_stats().on_disk), (0, 0));

    // Experts move to disk one by one, and their memory goes to the disk cache.
    block_on(engine.set_disk_cache_bytes(8 * EXPERT)).unwrap();
    assert_eq!(engine.memory().disk_cache_bytes_reserved, 0, "nothing is on disk yet");
    for (index, id) in all.iter().enumerate() {
        block_on(engine.load_expert_tensors_on_disk(*id, checkpoint.expert(*id))).unwrap();
        if index % 36 == 0 {
            assert!(logits(&engine) == expected, "with {} on disk", index + 1);
        }
    }
    let on_disk = engine.memory();
    assert_eq!((on_disk.expert_bytes, on_disk.disk_cache_bytes_reserved), (0, 8 * EXPERT));
    assert_eq!((engine.held().len(), engine.offload_stats().on_disk), (all.len(), all.len()));
    let misses = engine.offload_stats().misses;
    assert!(logits(&engine) == expected && engine.offload_stats().misses > misses);
    assert!(engine.offload_stats().bytes_in_memory <= 8 * EXPERT);

    // A larger budget is used; a smaller one gives memory back.
    block_on(engine.set_disk_cache_bytes(40 * EXPERT)).unwrap();
    assert!(logits(&engine) == expected);
    assert!(engine.offload_stats().bytes_in_memory > 8 * EXPERT);
    block_on(engine.set_disk_cache_bytes(2 * EXPERT)).unwrap();
    assert!(engine.offload_stats().bytes_in_memory <= 2 * EXPERT, "no expert is needed now");
    assert!(logits(&engine) == expected);

    // Experts move back to memory.
    for id in &all {
        block_on(engine.load_expert_tensors(*id, checkpoint.expert(*id))).unwrap();
    }
    block_on(engine.set_disk_cache_bytes(0)).unwrap();
    assert_eq!(engine.memory(), loaded);
    assert_eq!(engine.offload_stats().bytes_in_memory, 0);
    let misses = engine.offload_stats().misses;
    assert!(logits(&engine) == expected && engine.offload_stats().misses == misses);
}

#[test]
fn tensors_are_read_from_pieces_of_a_file() {
    let checkpoint = checkpoint();
    let file = WeightBytes::map(&checkpoint.weight_files()[0]).unwrap();
    let id = layout::experts(checkpoint.config()).last().unwrap();
    // The two pieces meet between two tensors.
    let cut = checkpoint.expert(id).iter().map(|(_, view)| view.offset as usize).max().unwrap();
    let pieces = |cut: usize| [file.slice(0..cut).unwrap(), file.slice(cut..file.len()).unwrap()];
    let lying = Tensors::parse_pieces(&pieces(cut), "pieces").unwrap();
    assert_eq!(lying.len(), checkpoint.tensors().len());
    for ((name, a), (_, b)) in checkpoint.tensors().iter().zip(lying.iter()) {
        assert_eq!(a.bytes.as_slice(), b.bytes.as_slice(), "{name}");
        assert!(b.bytes.place().is_some() && a.offset == b.offset, "{name}");
    }
    let torn = Tensors::parse_pieces(&pieces(cut + 1), "pieces").unwrap_err().to_string();
    assert!(torn.contains("lies outside"), "{torn}");
    let short = Tensors::parse_pieces(&pieces(cut)[..1], "pieces").unwrap_err().to_string();
    assert!(short.contains("truncated"), "{short}");
}
