//! The fixture's byte-level tokenizer against its own files and the library's decoder, and a SentencePiece
//! one made here.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn fixture_file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/fixture/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

pub(crate) fn fixture() -> Arc<Tokenizer> {
    static FIXTURE: std::sync::OnceLock<Arc<Tokenizer>> = std::sync::OnceLock::new();
    let load = || {
        let config = fixture_file("tokenizer_config.json");
        Arc::new(Tokenizer::from_bytes(&fixture_file("tokenizer.json"), Some(&config)).unwrap())
    };
    FIXTURE.get_or_init(load).clone()
}

fn fixture_json() -> Value {
    serde_json::from_slice(&fixture_file("tokenizer.json")).unwrap()
}

/// Mixtral's kind of tokenizer, with eleven tokens besides the 256 bytes.
fn sentencepiece(decoder: Value) -> Result<Tokenizer, TokenizerError> {
    let mut vocab: serde_json::Map<_, _> =
        ["<s>", "▁", "h", "i", "▁h", "▁hi", "t"].iter().enumerate().map(|(i, t)| (t.to_string(), json!(i))).collect();
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(7 + usize::from(byte)));
    }
    let file = json!({
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "byte_fallback": true, "vocab": vocab, "merges": ["▁ h", "▁h i"]},
    });
    Tokenizer::from_bytes(file.to_string().as_bytes(), None)
}

fn mixtral_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

fn streamed(tokenizer: &Arc<Tokenizer>, tokens: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new(tokenizer.clone());
    let mut text: String = tokens.iter().map(|token| detokenizer.push(*token)).collect();
    text.push_str(&detokenizer.finish());
    text
}

#[track_caller]
fn check_round_trip(tokenizer: &Arc<Tokenizer>, text: &str) {
    let tokens = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(&tokens), text);
    assert_eq!(streamed(tokenizer, &tokens), text);
}

const TEXTS: [&str; 9] = [
    "",
    " ",
    "What is the capital of France?",
    "  two  spaces \n\n\ttabs and\r\nlines ",
    "l'été à Zürich",
    "東京は日本の首都です。",
    "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 e\u{301}",
    "Ġ Ċ ▁ <0x0A>",
    "مرحبا \u{0} \u{feff} \u{fffd}",
];

#[test]
fn texts_survive() {
    for text in TEXTS {
        check_round_trip(&fixture(), text);
    }
}

#[test]
fn chat_markers_become_single_tokens_and_are_not_shown() {
    let tokenizer = fixture();
    let tokens = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n", false).unwrap();
    assert_eq!(tokens[0], 1);
    assert_eq!(tokens.iter().filter(|token| **token == 2).count(), 1);
    assert_eq!(tokenizer.decode(&tokens), "user\nHi\n");
    assert_eq!(streamed(&tokenizer, &tokens), "user\nHi\n");
    assert_eq!((tokenizer.token_text(1).as_str(), tokenizer.is_special(1)), ("<|im_start|>", true));
}

#[test]
fn the_fixture_ends_with_im_end() {
    let tokenizer = fixture();
    assert_eq!(tokenizer.eos_tokens().collect::<Vec<_>>(), [2]);
    let json = fixture_file("tokenizer.json");
    let given = Tokenizer::from_bytes(&json, None).unwrap().with_eos_tokens([2, 0]);
    assert_eq!(given.eos_tokens().collect::<Vec<_>>(), [0, 2]);
    assert!(given.is_eos(0) && !given.is_eos(1));
}

#[test]
fn every_tokens_bytes_are_the_librarys() {
    let tokenizer = fixture();
    for id in 0..4096 {
        let expected = tokenizer.encoder.decode(&[id], false).unwrap();
        assert_eq!(tokenizer.token_text(id), expected, "token {id}");
    }
    // All 256 bytes are tokens.
    let mut single: Vec<_> = (0..4096).filter_map(|id| <[u8; 1]>::try_from(tokenizer.token_bytes(id)).ok()).collect();
    single.sort_unstable();
    assert_eq!(single.concat(), (0..=255).collect::<Vec<u8>>());
}

#[test]
fn an_id_outside_the_vocabulary_is_nothing() {
    let tokenizer = fixture();
    assert_eq!(tokenizer.token_bytes(4096), b"");
    assert_eq!(tokenizer.decode(&[4096, u32::MAX]), "");
}

#[test]
fn characters_appear_whole() {
    let tokenizer = fixture();
    let tokens = tokenizer.encode("🦀", false).unwrap();
    assert!(tokens.len() > 1, "the character must be spread over tokens for this test");
    let mut detokenizer = Detokenizer::new(tokenizer);
    let (last, first) = tokens.split_last().unwrap();
    for token in first {
        assert_eq!(detokenizer.push(*token), "");
    }
    assert_eq!(detokenizer.push(*last), "🦀");
    assert_eq!(detokenizer.push(first[0]), "");
    assert_eq!(detokenizer.finish(), "\u{fffd}");
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn sentencepiece_texts_survive() {
    let tokenizer = Arc::new(sentencepiece(mixtral_decoder()).unwrap());
    for text in TEXTS.into_iter().filter(|text| !text.contains('▁')) {
        check_round_trip(&tokenizer, text);
    }
    let tokens = tokenizer.encode("hi hi", true).unwrap();
    assert_eq!(tokens, [0, 5, 5]);
    assert_eq!(tokenizer.decode(&tokens), "hi hi");
    assert_eq!(tokenizer.token_text(5), " hi");
    // After a prompt, the space belongs to the text.
    let mut continuing = Detokenizer::continuing(tokenizer);
    assert_eq!(continuing.push(5), " hi");
}

#[test]
fn metaspace_drops_one_leading_space_unless_never_prepended() {
    let metaspace = |scheme| {
        let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        sentencepiece(decoder).unwrap().decode(&[5, 5])
    };
    assert_eq!(metaspace("always"), "hi hi");
    assert_eq!(metaspace("never"), " hi hi");
}

#[test]
fn unreadable_files_are_refused_by_name() {
    let refused = |json: &[u8], config: Option<&[u8]>| {
        Tokenizer::from_bytes(json, config).err().expect("must be refused").to_string()
    };
    assert!(refused(b"{", None).starts_with("tokenizer.json cannot be read"));
    assert!(refused(br#"{"decoder": {"type": "ByteLevel"}}"#, None).starts_with("tokenizer.json cannot be read"));
    let file = fixture_file("tokenizer.json");
    assert!(refused(&file, Some(b"[")).starts_with("tokenizer_config.json cannot be read"));
    assert!(refused(&file, Some(br#"{"eos_token": "</s>"}"#)).contains("`</s>`"));
    assert!(refused(&file, Some(br#"{"eos_token": {"content": "</t>"}}"#)).contains("`</t>`"));

    let decoder = |decoder: Value| sentencepiece(decoder).err().expect("must be refused").to_string();
    assert!(decoder(Value::Null).contains("there is none"));
    assert!(decoder(json!({"type": "WordPiece", "prefix": "##", "cleanup": true})).contains("WordPiece"));
    let regex = json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""});
    assert!(decoder(regex).contains("`a+`"));
    assert!(decoder(json!({"type": "Strip", "content": "x", "start": 1, "stop": 0})).contains("'x'"));
}

#[test]
fn an_absurd_id_is_refused_before_memory_is_taken() {
    let mut json = fixture_json();
    json["model"]["vocab"]["!"] = json!(u32::MAX);
    let refused = Tokenizer::from_bytes(json.to_string().as_bytes(), None);
    assert!(matches!(refused, Err(TokenizerError::IdTooLarge(u32::MAX))), "{:?}", refused.err());
}

#[test]
fn a_larger_vocabulary_than_the_models_is_a_mismatch() {
    let tokenizer = fixture();
    assert!(tokenizer.fits(4096).is_ok());
    assert!(tokenizer.fits(151_936).is_ok());
    let error = tokenizer.fits(4095).unwrap_err();
    assert!(matches!(error, TokenizerError::VocabularyMismatch { tokenizer: 4096, model: 4095 }));
    assert!(error.to_string().contains("4096") && error.to_string().contains("4095"));
}

#[test]
fn truncation_in_the_file_does_not_cut_prompts() {
    let mut json = fixture_json();
    json["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes(), None).unwrap();
    let text = "What is the capital of France?";
    assert_eq!(tokenizer.encode(text, false).unwrap(), fixture().encode(text, false).unwrap());
}

/// The ids in the reference are transformers'. Four rows are stretches of the held-out texts; that of `code`
/// is not in code.txt, so there only its own text is encoded again.
#[test]
fn held_out_texts_get_the_references_tokens() {
    let file = fixture_file("golden/reference.safetensors");
    let reference = safetensors::SafeTensors::deserialize(&file).unwrap();
    let input = reference.tensor("input_ids").unwrap();
    assert_eq!((input.dtype(), input.shape()), (safetensors::Dtype::I64, [5, 32].as_slice()));
    let id = |bytes: &[u8]| u32::try_from(i64::from_le_bytes(bytes.try_into().unwrap())).unwrap();
    let rows: Vec<Vec<_>> = input.data().chunks(32 * 8).map(|row| row.chunks(8).map(id).collect()).collect();

    let tokenizer = fixture();
    for (row, domain) in rows.iter().zip(["chat", "plays", "speeches", "encyclopedia"]) {
        let text = String::from_utf8(fixture_file(&format!("golden/{domain}.txt"))).unwrap();
        let tokens = tokenizer.encode(&text, false).unwrap();
        assert!(tokens.windows(row.len()).any(|window| window == row), "{domain}");
    }
    assert_eq!(tokenizer.encode(&tokenizer.decode(&rows[4]), false).unwrap(), rows[4]);
}

proptest! {
    #[test]
    fn any_text_survives(text in any::<String>()) {
        let tokenizer = fixture();
        let tokens = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(streamed(&tokenizer, &tokens), text);
    }

    #[test]
    fn pieces_add_up_to_the_librarys_decoding(
        tokens in prop::collection::vec(prop_oneof![0u32..4200, 3u32..260], 0..200)
    ) {
        let tokenizer = fixture();
        let expected = tokenizer.encoder.decode(&tokens, true).unwrap();
        prop_assert_eq!(&tokenizer.decode(&tokens), &expected);
        prop_assert_eq!(&streamed(&tokenizer, &tokens), &expected);
    }

    #[test]
    fn sentencepiece_pieces_add_up(tokens in prop::collection::vec(0u32..263, 0..60)) {
        let tokenizer = Arc::new(sentencepiece(mixtral_decoder()).unwrap());
        prop_assert_eq!(streamed(&tokenizer, &tokens), tokenizer.decode(&tokens));
    }
}
