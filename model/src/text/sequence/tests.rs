//! Generations whose model is a list of tokens: the logits of each step name the next one.

use proptest::prelude::*;

use super::*;
use crate::text::sampling::SamplingParams;
use crate::text::tokenizer::tests::fixture;

const CONTEXT: usize = 2048;
const EOS: u32 = 2;

/// Logits that a greedy sampler answers with `token`.
fn logits_of(token: u32) -> Vec<f32> {
    let mut logits = vec![0.0; 4096];
    logits[token as usize] = 9.0;
    logits
}

fn greedy() -> GenerateParams {
    GenerateParams { sampling: SamplingParams::greedy(), ..GenerateParams::default() }
}

fn stopping_at(stop: &[&str]) -> GenerateParams {
    GenerateParams { stop: stop.iter().map(|stop| stop.to_string()).collect(), ..greedy() }
}

fn sequence(params: GenerateParams) -> Sequence {
    Sequence::new(vec![10, 11, 12], params, CONTEXT, fixture()).unwrap()
}

/// Feeds tokens until the generation finishes or they are used up.
fn run(sequence: &mut Sequence, tokens: &[u32]) -> Vec<Emitted> {
    let mut steps = Vec::new();
    for token in tokens {
        steps.push(sequence.accept(&logits_of(*token)).unwrap());
        if sequence.finish().is_some() {
            break;
        }
    }
    steps
}

fn text_of(steps: &[Emitted]) -> String {
    steps.iter().map(|step| step.text.as_str()).collect()
}

/// One token per character where there is one, so that strings are spread over as many tokens as possible.
fn spelled(text: &str) -> Vec<u32> {
    let tokenizer = fixture();
    let mut buffer = [0; 4];
    let spell = |character: char| tokenizer.encode(character.encode_utf8(&mut buffer), false).unwrap();
    text.chars().flat_map(spell).collect()
}

/// `text` cut before the first stop string that is complete; of several complete there, the longest.
fn cut(text: &str, stops: &[String]) -> (String, bool) {
    for (index, character) in text.char_indices() {
        let before = &text[..index + character.len_utf8()];
        let longest = stops.iter().filter(|stop| before.ends_with(stop.as_str())).map(String::len).max();
        if let Some(longest) = longest {
            return (before[..before.len() - longest].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

#[track_caller]
fn check(params: GenerateParams, tokens: &[u32], text: &str, finish: Option<FinishReason>) {
    let mut sequence = sequence(params);
    let steps = run(&mut sequence, tokens);
    assert_eq!(text_of(&steps), text);
    assert_eq!(sequence.finish(), finish);
    let (last, before) = steps.split_last().unwrap();
    assert_eq!(last.finish, finish);
    assert!(before.iter().all(|step| step.finish.is_none()));
}

#[test]
fn input_is_the_prompt_and_then_one_token_at_a_time() {
    let mut sequence = sequence(greedy());
    assert_eq!(sequence.next_input(), [10, 11, 12]);
    assert_eq!((sequence.prompt(), sequence.completion()), ([10, 11, 12].as_slice(), [].as_slice()));
    sequence.accept(&logits_of(50)).unwrap();
    assert_eq!(sequence.next_input(), [50]);
    sequence.accept(&logits_of(51)).unwrap();
    assert_eq!(sequence.next_input(), [51]);
    assert_eq!((sequence.prompt(), sequence.completion()), ([10, 11, 12].as_slice(), [50, 51].as_slice()));
    let usage = sequence.usage();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens()), (3, 2, 5));
}

#[test]
fn end_of_text_stops_and_is_counted_but_not_shown() {
    let mut sequence = sequence(GenerateParams { logprobs: Some(2), ..greedy() });
    let mut tokens = fixture().encode("Paris.", false).unwrap();
    tokens.push(EOS);
    let steps = run(&mut sequence, &tokens);
    assert_eq!(text_of(&steps), "Paris.");
    let last = steps.last().unwrap();
    assert_eq!((last.token, last.text.as_str(), last.finish), (EOS, "", Some(FinishReason::Stop)));
    assert_eq!(last.logprobs, None);
    assert!(steps[0].logprobs.as_ref().is_some_and(|logprobs| logprobs.top.len() == 2));
    assert_eq!(sequence.usage().completion_tokens, tokens.len());
    assert_eq!(sequence.accept(&logits_of(5)), Err(SequenceError::Finished));
}

#[test]
fn end_of_text_can_be_ignored() {
    let tokens = [spelled("a"), vec![EOS], spelled("b")].concat();
    check(GenerateParams { ignore_eos: true, ..greedy() }, &tokens, "ab", None);
    let limited = GenerateParams { ignore_eos: true, max_tokens: Some(2), ..greedy() };
    check(limited, &tokens, "a", Some(FinishReason::Length));
}

#[test]
fn length_ends_at_max_tokens_or_at_the_context() {
    let tokens = spelled("abcdef");
    check(GenerateParams { max_tokens: Some(4), ..greedy() }, &tokens, "abcd", Some(FinishReason::Length));
    for max_tokens in [None, Some(5), Some(1_000_000)] {
        let params = GenerateParams { max_tokens, ..greedy() };
        let mut sequence = Sequence::new(vec![10, 11, 12], params, 8, fixture()).unwrap();
        assert_eq!(sequence.tokens_max(), 8);
        assert_eq!(text_of(&run(&mut sequence, &tokens)), "abcde");
        assert_eq!(sequence.finish(), Some(FinishReason::Length));
    }
}

#[test]
fn end_of_text_on_the_last_token_is_a_stop() {
    let tokens = [spelled("a"), vec![EOS]].concat();
    check(GenerateParams { max_tokens: Some(2), ..greedy() }, &tokens, "a", Some(FinishReason::Stop));
}

#[test]
fn a_prompt_without_room_for_an_answer_is_refused_with_the_numbers() {
    let new = |prompt: usize, context| Sequence::new(vec![7; prompt], greedy(), context, fixture());
    assert!(new(7, 8).is_ok());
    let error = new(8, 8).err().unwrap();
    assert_eq!(error, SequenceError::ContextOverflow { prompt_tokens: 8, context: 8 });
    let message = error.to_string();
    assert!(message.contains("8 tokens") && message.contains("at most 7"), "{message}");
    assert_eq!(new(0, 8).err(), Some(SequenceError::EmptyPrompt));
    assert!(matches!(new(1, 0).err(), Some(SequenceError::ContextOverflow { .. })));
}

#[test]
fn a_stop_string_cuts_and_is_not_shown() {
    let stop = Some(FinishReason::Stop);
    check(stopping_at(&["END"]), &spelled("some textENDmore"), "some text", stop);
    check(stopping_at(&["\n\n", "é!"]), &spelled("un\nété!"), "un\nét", stop);
    check(stopping_at(&["日本"]), &spelled("日日日本語"), "日日", stop);
    // Held back as a beginning, then shown after all.
    check(stopping_at(&["aab"]), &[spelled("aaac"), vec![EOS]].concat(), "aaac", stop);
    // The whole stop string within one token, and text on both sides of it.
    let tokens = fixture().encode(" the", false).unwrap();
    assert_eq!(tokens.len(), 1);
    check(stopping_at(&["h"]), &tokens, " t", stop);
}

#[test]
fn text_that_may_become_a_stop_string_waits() {
    let mut sequence = sequence(stopping_at(&["</s>"]));
    let shown: Vec<_> = run(&mut sequence, &spelled("a</s</s>")).into_iter().map(|step| step.text).collect();
    assert_eq!(shown, ["a", "", "", "", "</s", "", "", ""]);
}

#[test]
fn what_was_held_back_is_shown_at_the_end() {
    check(stopping_at(&["END"]), &[spelled("the EN"), vec![EOS]].concat(), "the EN", Some(FinishReason::Stop));
    let limited = GenerateParams { max_tokens: Some(6), ..stopping_at(&["END"]) };
    check(limited, &spelled("the ENx"), "the EN", Some(FinishReason::Length));
    let whole = GenerateParams { max_tokens: Some(3), ..stopping_at(&["END"]) };
    check(whole, &spelled("ENDx"), "", Some(FinishReason::Stop));
}

#[test]
fn a_character_cut_off_by_the_end_is_marked() {
    let crab = spelled("🦀");
    let tokens = [spelled("a"), crab[..1].to_vec(), vec![EOS]].concat();
    check(greedy(), &tokens, "a\u{fffd}", Some(FinishReason::Stop));
    // The mark is text like any other: a stop string may name it.
    check(stopping_at(&["a\u{fffd}"]), &tokens, "", Some(FinishReason::Stop));
}

#[test]
fn damaged_logits_are_an_error_and_change_nothing() {
    let mut sequence = sequence(greedy());
    let error = sequence.accept(&[f32::NAN; 4096]).unwrap_err();
    assert!(matches!(error, SequenceError::Sampling(SamplingError::NotFinite { token: 0, .. })));
    assert_eq!((sequence.next_input(), sequence.usage().completion_tokens), ([10, 11, 12].as_slice(), 0));
}

#[test]
fn parameters_outside_their_range_are_named() {
    let field = |params: GenerateParams| match Sequence::new(vec![1], params, 8, fixture()).err().unwrap() {
        SequenceError::Params(error) => error.field,
        other => panic!("{other}"),
    };
    assert_eq!(field(GenerateParams { max_tokens: Some(0), ..greedy() }), "max_tokens");
    assert_eq!(field(GenerateParams { logprobs: Some(LOGPROBS_MAX + 1), ..greedy() }), "top_logprobs");
    assert_eq!(field(stopping_at(&[""])), "stop");
    assert_eq!(field(stopping_at(&["x"; STOP_STRINGS_MAX + 1])), "stop");
    assert_eq!(field(stopping_at(&["x".repeat(STOP_BYTES_MAX + 1).as_str()])), "stop");
    let sampling = SamplingParams { top_p: 1.5, ..SamplingParams::greedy() };
    assert_eq!(field(GenerateParams { sampling, ..greedy() }), "top_p");
}

/// Short strings over few characters, some of several bytes, so that stop strings overlap themselves and each
/// other.
fn dense_text(length: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = String> {
    let characters = prop::sample::select(vec!['a', 'b', 'é', '日', '🦀']);
    prop::collection::vec(characters, length).prop_map(|characters| characters.into_iter().collect())
}

fn stop_strings() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(dense_text(1..5), 0..4)
}

proptest! {
    #[test]
    fn a_stop_filter_cuts_the_same_however_the_text_is_cut(
        pieces in prop::collection::vec(dense_text(0..6), 0..12),
        stops in stop_strings(),
    ) {
        let mut filter = StopFilter::new(stops.clone());
        let mut shown = String::new();
        for piece in &pieces {
            shown.push_str(&filter.push(piece));
        }
        let found = filter.found();
        shown.push_str(&filter.finish());
        prop_assert_eq!((shown, found), cut(&pieces.concat(), &stops));
    }

    #[test]
    fn an_answer_is_its_text_up_to_the_stop_string(
        text in dense_text(1..40),
        stops in stop_strings(),
        spell in any::<bool>(),
    ) {
        let mut tokens = if spell { spelled(&text) } else { fixture().encode(&text, false).unwrap() };
        tokens.push(EOS);
        let mut sequence = sequence(GenerateParams { stop: stops.clone(), ..greedy() });
        let steps = run(&mut sequence, &tokens);
        let (expected, found) = cut(&text, &stops);
        prop_assert_eq!(text_of(&steps), expected);
        prop_assert_eq!(sequence.finish(), Some(FinishReason::Stop));
        prop_assert_eq!(sequence.completion().last() != Some(&EOS), found);
    }

    #[test]
    fn any_tokens_show_what_they_decode_to(
        tokens in prop::collection::vec(3u32..4096, 1..60),
        stops in stop_strings(),
    ) {
        let tokenizer = fixture();
        let params = GenerateParams { stop: stops.clone(), max_tokens: Some(tokens.len()), ..greedy() };
        let mut sequence = sequence(params);
        let steps = run(&mut sequence, &tokens);
        let (expected, found) = cut(&tokenizer.decode(&tokens), &stops);
        prop_assert_eq!(text_of(&steps), expected);
        let finish = if found { FinishReason::Stop } else { FinishReason::Length };
        prop_assert_eq!(sequence.finish(), Some(finish));
    }
}
