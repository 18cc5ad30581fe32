//! The decoder: exactness, and what misuse does.

use coel_model::{
    bytes::DType,
    checkpoint::Checkpoint,
    decoder::{DecodeError, Step, Want},
    kernels::{Kernels, isa::Isa, packed::Packed, plain::Plain},
};
use serde_json::{Value, json};

use crate::{
    synth,
    whole::{Whole, checkpoint},
};
use burn::backend::flex::{Flex, FlexDevice};

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

/// Logits of all tokens, given in pieces of the lengths `cuts` repeats.
fn logits_in_pieces<K: Kernels>(whole: &mut Whole<K>, tokens: &[u32], cuts: &[usize]) -> Vec<f32> {
    let mut decoder = whole.decoder(tokens.len());
    let (mut rest, mut logits) = (tokens, Vec::new());
    for cut in cuts.iter().cycle() {
        let (piece, after) = rest.split_at(rest.len().min(*cut));
        logits.extend(whole.advance(&mut decoder, piece, Want::All, |_| {}));
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    logits
}

#[test]
fn a_rows_bits_do_not_hang_on_the_batch() {
    let mut whole = Whole::new(Packed::default(), &checkpoint());
    let tokens = tokens(64, 4096);
    let all = bits(&logits_in_pieces(&mut whole, &tokens, &[64]));
    for cuts in [&[1][..], &[2], &[3], &[5, 1, 9], &[16], &[33, 31], &[63, 1]] {
        assert!(bits(&logits_in_pieces(&mut whole, &tokens, cuts)) == all, "pieces of {cuts:?}");
    }
}

#[test]
fn a_long_prompt_is_split_without_a_trace() {
    let mut whole = Whole::new(Packed::default(), &checkpoint());
    let tokens = tokens(600, 4096);
    let mut decoder = whole.decoder(600);
    let mut calls = Vec::new();
    let whole_prompt = whole.advance(&mut decoder, &tokens, Want::Last, |call| calls.push(call.routes.len()));
    assert_eq!(calls, [[256; 6], [256; 6], [88; 6]].concat());
    assert_eq!((decoder.used(), whole_prompt.len()), (600, 4096));
    let pieces = logits_in_pieces(&mut whole, &tokens, &[100, 37]);
    assert!(bits(&pieces[599 * 4096..]) == bits(&whole_prompt));
    let mut decoder = whole.decoder(600);
    let all = whole.advance(&mut decoder, &tokens, Want::All, |_| {});
    assert!(bits(&all) == bits(&pieces));
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let tokens = tokens(40, 4096);
    let checkpoint = checkpoint();
    let run = |isa| bits(&logits_in_pieces(&mut Whole::new(Packed::new(isa, 2), &checkpoint), &tokens, &[39, 1]));
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
    let packed = logits_in_pieces(&mut Whole::new(Packed::default(), &checkpoint), &tokens, &[21]);
    let mut plain = Whole::new(Plain::<Flex>::new(FlexDevice), &checkpoint);
    let generic = logits_in_pieces(&mut plain, &tokens, &[21]);
    let largest = packed.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let worst = packed.iter().zip(&generic).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(worst <= 1e-5 * largest, "off by {worst} of {largest}");
    let one_by_one = logits_in_pieces(&mut plain, &tokens, &[1]);
    assert!(bits(&one_by_one) == bits(&generic), "burn's operations depend on the batch");
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
    let mut whole = Whole::new(Packed::default(), &checkpoint);
    let mut decoder = whole.decoder(300);
    let mut layers = Vec::new();
    let tokens = tokens(300, 83);
    let all = whole.advance(&mut decoder, &tokens, Want::All, |call| layers.push((call.layer, call.routes.len())));
    // Layers 0, 2 and 4 are dense: the last one too, between the chunks.
    assert_eq!(layers, [(1, 256), (3, 256), (1, 44), (3, 44)]);
    let pieces = logits_in_pieces(&mut whole, &tokens, &[1, 7, 64]);
    assert_eq!(bits(&all), bits(&pieces));
}

#[test]
fn kernel_classes_agree_on_the_bundled_model() {
    let checkpoint = checkpoint();
    let tokens = tokens(5, 4096);
    let packed = logits_in_pieces(&mut Whole::new(Packed::default(), &checkpoint), &tokens, &[5]);
    let plain = Plain::<Flex>::new(FlexDevice);
    let generic = logits_in_pieces(&mut Whole::new(plain, &checkpoint), &tokens, &[5]);
    let largest = packed.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    assert!(packed.iter().zip(&generic).all(|(a, b)| (a - b).abs() <= 1e-5 * largest));
}

#[test]
fn misuse_is_an_error_and_changes_nothing() {
    let (_dir, checkpoint) = synthetic(json!({}), DType::BF16);
    let mut whole = Whole::new(Packed::default(), &checkpoint);
    let mut decoder = whole.decoder(4);
    assert_eq!(decoder.resume(&mut whole.core(), &[]), Err(DecodeError::NotPending));
    assert_eq!(decoder.advance(&mut whole.core(), &[], Want::Last), Err(DecodeError::Empty));
    assert_eq!(
        decoder.advance(&mut whole.core(), &[1, 83], Want::Last),
        Err(DecodeError::Token { token: 83, vocab: 83 })
    );
    let full = DecodeError::CacheFull { used: 0, wanted: 5, capacity: 4 };
    assert_eq!(decoder.advance(&mut whole.core(), &[1; 5], Want::Last), Err(full));

    let Ok(Step::NeedExperts(call)) = decoder.advance(&mut whole.core(), &[1, 2], Want::Last) else {
        panic!("experts come first");
    };
    assert_eq!((call.layer, call.slots(), call.rows.len()), (0, 4, 2 * 52));
    assert_eq!(decoder.advance(&mut whole.core(), &[3], Want::Last), Err(DecodeError::Pending { layer: 0 }));
    let wrong = DecodeError::Outputs { expected: 4 * 52, found: 3 };
    assert_eq!(decoder.resume(&mut whole.core(), &[0.0; 3]), Err(wrong));
    // After all that, the sequence goes on as if nothing had happened.
    let mut step = Step::NeedExperts(call);
    let logits = loop {
        match step {
            Step::Logits(logits) => break logits,
            Step::NeedExperts(call) => {
                let outputs = whole.serve(&call);
                step = decoder.resume(&mut whole.core(), &outputs).unwrap();
            }
        }
    };
    let mut fresh = whole.decoder(4);
    assert_eq!(bits(&logits), bits(&whole.advance(&mut fresh, &[1, 2], Want::Last, |_| {})));
}

#[test]
fn going_back_gives_the_bits_of_never_having_gone() {
    let (_dir, checkpoint) = synthetic(json!({}), DType::BF16);
    let mut whole = Whole::new(Packed::default(), &checkpoint);
    let mut decoder = whole.decoder(8);
    whole.advance(&mut decoder, &[1, 2, 3, 4, 5], Want::Last, |_| {});
    let Ok(Step::NeedExperts(_)) = decoder.advance(&mut whole.core(), &[6], Want::Last) else {
        panic!("experts come first");
    };
    assert_eq!(decoder.truncate(6), Err(DecodeError::Truncate { wanted: 6, used: 5 }));
    decoder.truncate(2).unwrap();
    let again = whole.advance(&mut decoder, &[7, 8], Want::Last, |_| {});
    let mut fresh = whole.decoder(8);
    assert_eq!(bits(&again), bits(&whole.advance(&mut fresh, &[1, 2, 7, 8], Want::Last, |_| {})));
}
