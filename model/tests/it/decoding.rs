//! The decoder: exactness, and its reaction to misuse.

use coel_model::{
    kernels::{
        DynKernels,
        cpu::{CpuKernels, isa::Isa},
    },
    nn::{
        batch::{DecodeError, SequenceChunk, Step, Want},
        outputs::LayerOutputs,
    },
    weights::{checkpoint::Checkpoint, matrix::DType},
};
use serde_json::{Value, json};

use crate::{
    gpu::vulkan,
    synth,
    whole::{Whole, checkpoint},
};

/// A fixed sequence of tokens below `vocab`.
fn tokens(count: usize, vocab: u32) -> Vec<u32> {
    (0..count as u32).map(|index| (index * index * 7 + index * 13 + 5) % vocab).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn synthetic(changes: Value, dtype: DType) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    synth::write_checkpoint(dir.path(), &synth::config(changes), dtype, 7);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// Logits of all tokens, fed in pieces whose lengths cycle through `cuts`.
fn logits_in_pieces(whole: &mut Whole, tokens: &[u32], cuts: &[usize]) -> Vec<f32> {
    let mut solo = whole.solo(tokens.len());
    let (mut rest, mut logits) = (tokens, Vec::new());
    for cut in cuts.iter().cycle() {
        let (piece, after) = rest.split_at(rest.len().min(*cut));
        logits.extend(whole.advance(&mut solo, piece, Want::All, |_| {}));
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    logits
}

#[test]
fn a_rows_bits_do_not_hang_on_the_batch() {
    let mut whole = Whole::new(CpuKernels::default(), &checkpoint());
    let tokens = tokens(64, 4096);
    let all = bits(&logits_in_pieces(&mut whole, &tokens, &[64]));
    for cuts in [&[1][..], &[2], &[3], &[5, 1, 9], &[16], &[33, 31], &[63, 1]] {
        assert!(bits(&logits_in_pieces(&mut whole, &tokens, cuts)) == all, "pieces of {cuts:?}");
    }
}

#[test]
fn a_long_prompt_is_split_without_a_trace() {
    let mut whole = Whole::new(CpuKernels::default(), &checkpoint());
    let tokens = tokens(600, 4096);
    let mut solo = whole.solo(600);
    let mut calls = Vec::new();
    let whole_prompt = whole.advance(&mut solo, &tokens, Want::Last, |call| calls.push(call.routes.len()));
    assert_eq!(calls, [[256; 6], [256; 6], [88; 6]].concat());
    assert_eq!((solo.used, whole_prompt.len()), (600, 4096));
    let pieces = logits_in_pieces(&mut whole, &tokens, &[100, 37]);
    assert!(bits(&pieces[599 * 4096..]) == bits(&whole_prompt));
}

/// Checks sessions at different positions, some with a prompt and some with one token, on pages of these sizes.
fn check_computed_together<K: DynKernels + 'static>(
    make: impl Fn() -> K,
    checkpoint: &Checkpoint,
    page_sizes: &[usize],
) {
    let vocab = checkpoint.config().vocab_size as u32;
    let pasts = [0, 5, 31, 32, 33, 70, 0, 1];
    let news = [7, 1, 1, 1, 4, 1, 1, 33];
    let wants = [Want::All, Want::Last, Want::Last, Want::All, Want::Nothing, Want::Last, Want::All, Want::Last];
    let sessions: Vec<Vec<u32>> = pasts
        .iter()
        .zip(news)
        .zip(0..)
        .map(|((past, new), salt)| tokens(past + new, vocab).into_iter().map(|token| (token + salt) % vocab).collect())
        .collect();
    let mut alone = Whole::with_pages(make(), checkpoint, 128);
    let expected: Vec<Vec<u32>> = sessions
        .iter()
        .zip(pasts)
        .zip(wants)
        .map(|((tokens, past), want)| {
            let mut solo = alone.solo(tokens.len());
            if past > 0 {
                alone.advance(&mut solo, &tokens[..past], Want::Nothing, |_| {});
            }
            bits(&alone.advance(&mut solo, &tokens[past..], want, |_| {}))
        })
        .collect();
    for page_tokens in page_sizes {
        let mut whole = Whole::with_pages(make(), checkpoint, *page_tokens);
        let mut solos: Vec<_> = sessions.iter().map(|tokens| whole.solo(tokens.len())).collect();
        let before = solos.iter_mut().zip(&sessions).zip(pasts).filter(|(_, past)| *past > 0);
        let pieces: Vec<SequenceChunk> =
            before.map(|((solo, tokens), past)| solo.chunk(&tokens[..past], Want::Nothing)).collect();
        assert!(whole.compute(pieces, |_| {}).iter().all(Vec::is_empty));
        solos.iter_mut().zip(pasts).for_each(|(solo, past)| solo.used = past);
        let pieces = solos.iter().zip(&sessions).zip(wants);
        let pieces = pieces.map(|((solo, tokens), want)| solo.chunk(&tokens[solo.used..], want)).collect();
        let together: Vec<_> = whole.compute(pieces, |_| {}).iter().map(|logits| bits(logits)).collect();
        assert!(together == expected, "pages of {page_tokens}");
    }
}

#[test]
fn sessions_together_get_what_they_would_alone() {
    check_computed_together(CpuKernels::default, &checkpoint(), &[1, 7, 32, 100]);
    let normed = json!({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0], "intermediate_size": 61});
    let clipped = json!({"architectures": ["OlmoeForCausalLM"], "intermediate_size": 61, "clip_qkv": 0.8});
    for shape in [json!({}), json!({"num_key_value_heads": 6}), json!({"num_key_value_heads": 1}), normed, clipped] {
        let (_dir, checkpoint) = synthetic(shape, DType::BF16);
        for isa in Isa::available() {
            check_computed_together(|| CpuKernels::new(isa, 2), &checkpoint, &[3, 32]);
        }
        if vulkan().is_some() {
            check_computed_together(|| vulkan().expect("it was there just now"), &checkpoint, &[3, 32]);
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let tokens = tokens(40, 4096);
    let checkpoint = checkpoint();
    let run = |isa| bits(&logits_in_pieces(&mut Whole::new(CpuKernels::new(isa, 2), &checkpoint), &tokens, &[39, 1]));
    let sets = Isa::available();
    let portable = run(sets[0]);
    for isa in &sets[1..] {
        assert!(run(*isa) == portable, "{} differs from {}", isa.name(), sets[0].name());
    }
}

/// Both kernel classes on a model of the given shape.
#[track_caller]
fn check_classes_agree(changes: Value, dtype: DType) {
    let (_dir, checkpoint) = synthetic(changes, dtype);
    let tokens = tokens(21, 83);
    let packed = logits_in_pieces(&mut Whole::new(CpuKernels::default(), &checkpoint), &tokens, &[21]);
    let Some(vulkan) = vulkan() else { return };
    let mut gpu = Whole::new(vulkan, &checkpoint);
    let generic = logits_in_pieces(&mut gpu, &tokens, &[21]);
    let largest = packed.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let worst = packed.iter().zip(&generic).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(worst <= 1e-5 * largest, "off by {worst} of {largest}");
    let one_by_one = logits_in_pieces(&mut gpu, &tokens, &[1]);
    assert!(bits(&one_by_one) == bits(&generic), "a row's bits depend on the batch");
}

#[test]
fn kernel_classes_agree_on_every_shape_of_model() {
    check_classes_agree(json!({}), DType::BF16);
    check_classes_agree(json!({"torch_dtype": "float16"}), DType::F16);
    check_classes_agree(json!({"torch_dtype": "float32", "norm_topk_prob": false}), DType::F32);
    check_classes_agree(json!({"qkv_bias": false, "tie_word_embeddings": true}), DType::BF16);
    check_classes_agree(json!({"num_key_value_heads": 6, "num_experts_per_tok": 5}), DType::BF16);
    let first_dense = json!({"mlp_only_layers": [0], "intermediate_size": 61});
    check_classes_agree(first_dense, DType::BF16);
    let last_dense = json!({"num_hidden_layers": 3, "decoder_sparse_step": 2, "intermediate_size": 61});
    check_classes_agree(last_dense, DType::BF16);
    let qwen3 = json!({"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": true});
    check_classes_agree(qwen3, DType::BF16);
    let mixtral = json!({"architectures": ["MixtralForCausalLM"], "intermediate_size": 61});
    check_classes_agree(mixtral, DType::BF16);
    let olmoe = json!({"architectures": ["OlmoeForCausalLM"], "intermediate_size": 61, "clip_qkv": 0.8});
    check_classes_agree(olmoe, DType::BF16);
}

#[test]
fn dense_layers_ask_for_nothing() {
    let changes = json!({"num_hidden_layers": 5, "decoder_sparse_step": 2, "intermediate_size": 61});
    let (_dir, checkpoint) = synthetic(changes, DType::BF16);
    let mut whole = Whole::new(CpuKernels::default(), &checkpoint);
    let mut solo = whole.solo(300);
    let mut layers = Vec::new();
    let tokens = tokens(300, 83);
    let all = whole.advance(&mut solo, &tokens, Want::All, |call| layers.push((call.layer, call.routes.len())));
    // Layers 0, 2 and 4 are dense, so a dense layer also ends each chunk.
    assert_eq!(layers, [(1, 256), (3, 256), (1, 44), (3, 44)]);
    let pieces = logits_in_pieces(&mut whole, &tokens, &[1, 7, 64]);
    assert_eq!(bits(&all), bits(&pieces));
}

#[test]
fn kernel_classes_agree_on_the_bundled_model() {
    let checkpoint = checkpoint();
    let tokens = tokens(5, 4096);
    let packed = logits_in_pieces(&mut Whole::new(CpuKernels::default(), &checkpoint), &tokens, &[5]);
    let Some(vulkan) = vulkan() else { return };
    let generic = logits_in_pieces(&mut Whole::new(vulkan, &checkpoint), &tokens, &[5]);
    let largest = packed.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    assert!(packed.iter().zip(&generic).all(|(a, b)| (a - b).abs() <= 1e-5 * largest));
}

#[test]
fn misuse_is_an_error_and_changes_nothing() {
    let (_dir, checkpoint) = synthetic(json!({}), DType::BF16);
    let mut whole = Whole::with_pages(CpuKernels::default(), &checkpoint, 4);
    let solo = whole.solo(4);
    let mut refused = |pieces: Vec<SequenceChunk>| whole.context().begin(pieces).map(|_| ()).unwrap_err();
    let piece = |tokens: &[u32]| solo.chunk(tokens, Want::Last);
    assert_eq!(refused(vec![]), DecodeError::Empty);
    assert_eq!(refused(vec![piece(&[1]), piece(&[])]), DecodeError::Empty);
    assert_eq!(refused(vec![piece(&[1, 83])]), DecodeError::Token { token: 83, vocab: 83 });
    assert_eq!(refused(vec![piece(&[1; 5])]), DecodeError::CacheFull { used: 0, wanted: 5, capacity: 4 });
    assert_eq!(refused(vec![piece(&[1; 257])]), DecodeError::Rows { rows: 257 });
    let beyond = SequenceChunk { pages: vec![1024], ..piece(&[1]) };
    assert_eq!(refused(vec![beyond]), DecodeError::Page { page: 1024, pages: 1024 });

    let (mut batch, step) = whole.context().begin(vec![piece(&[1, 2])]).unwrap();
    let call = whole.context().call(&batch);
    assert_eq!((step, call.layer, call.slots(), call.rows.len()), (Step::NeedExperts, 0, 4, 2 * 52));
    let wrong = DecodeError::Outputs { expected: 4, found: 3 };
    assert_eq!(whole.context().resume(&mut batch, LayerOutputs::whole(vec![0.0; 3 * 52], 52)), Err(wrong));
    // After all these refusals, the batch goes on as if nothing had happened.
    let mut step = Step::NeedExperts;
    let logits = loop {
        match step {
            Step::Logits(mut logits) => break logits.remove(0),
            Step::NeedExperts => {
                let call = whole.context().call(&batch);
                let outputs = whole.serve(&call);
                step = whole.context().resume(&mut batch, LayerOutputs::whole(outputs, 52)).unwrap();
            }
        }
    };
    let nothing = LayerOutputs::whole(vec![], 52);
    assert_eq!(whole.context().resume(&mut batch, nothing), Err(DecodeError::NotPending));
    let mut fresh = whole.solo(4);
    assert_eq!(bits(&logits), bits(&whole.advance(&mut fresh, &[1, 2], Want::Last, |_| {})));
}

#[test]
fn going_back_gives_the_bits_of_never_having_gone() {
    let (_dir, checkpoint) = synthetic(json!({}), DType::BF16);
    let mut whole = Whole::with_pages(CpuKernels::default(), &checkpoint, 3);
    let mut solo = whole.solo(8);
    whole.advance(&mut solo, &[1, 2, 3, 4, 5], Want::Last, |_| {});
    // A batch that is dropped leaves no trace either.
    let lost = whole.context().begin(vec![solo.chunk(&[6], Want::Last)]).unwrap();
    drop(lost);
    solo.used = 2;
    let again = whole.advance(&mut solo, &[7, 8], Want::Last, |_| {});
    let mut fresh = whole.solo(8);
    assert_eq!(bits(&again), bits(&whole.advance(&mut fresh, &[1, 2, 7, 8], Want::Last, |_| {})));
}
