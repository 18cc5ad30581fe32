//! Counts and measurements of a survey on a text, against an engine that counts and computes independently.

use std::collections::BTreeSet;

use coel_model::{
    serve::{
        device::Device,
        engine::{Engine, EngineOptions, block_on},
    },
    text::model::TextModel,
    tools::{
        popularity::{CALIBRATION_TEXT, WINDOW_TOKENS, route_popularity},
        survey::{Survey, SurveyError, SurveySource, survey},
    },
    weights::{checkpoint::Checkpoint, error::LoadError, layout::ExpertId, slices::Precision, tensors::Tensors},
};

use crate::whole::checkpoint;

/// A checkpoint that slices its experts when asked, and records each request.
struct Slicing<'a> {
    checkpoint: &'a Checkpoint,
    asked: Vec<(ExpertId, Precision)>,
    layers: Vec<(usize, usize)>,
    /// Whether there are slices.
    sliced: bool,
    /// The number of layers after which the survey is given up.
    patience: usize,
}

impl<'a> Slicing<'a> {
    fn of(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, asked: Vec::new(), layers: Vec::new(), sliced: true, patience: usize::MAX }
    }
}

impl SurveySource for Slicing<'_> {
    fn expert(&mut self, id: ExpertId, precision: Precision) -> Result<Option<Tensors>, LoadError> {
        self.asked.push((id, precision));
        if precision != Precision::Exact && !self.sliced {
            return Ok(None);
        }
        self.checkpoint.expert(id).sliced(precision).map(Some)
    }

    fn go_on(&mut self, done: usize, total: usize) -> bool {
        self.layers.push((done, total));
        done < self.patience
    }
}

fn tokens(checkpoint: &Checkpoint) -> Vec<u32> {
    TextModel::open(checkpoint).unwrap().tokenizer.encode(CALIBRATION_TEXT, false).unwrap()
}

fn run(source: &mut Slicing<'_>, tokens: &[u32], threads: usize) -> Result<Survey, SurveyError> {
    let checkpoint = source.checkpoint;
    survey(checkpoint.config(), &checkpoint.trunk(), tokens, threads, source)
}

#[test]
fn a_survey_counts_what_an_engine_routes_and_asks_for_each_expert_once() {
    let checkpoint = checkpoint();
    let tokens = tokens(&checkpoint);
    assert!(tokens.len() > 2 * WINDOW_TOKENS, "several windows fly side by side");
    let mut source = Slicing::of(&checkpoint);
    let found = run(&mut source, &tokens, 2).unwrap();
    let options = EngineOptions { kv_tokens: WINDOW_TOKENS, ..EngineOptions::default() };
    let engine = Engine::start(Device::Cpu, checkpoint.config().clone(), options).unwrap();
    block_on(engine.load_checkpoint(&checkpoint)).unwrap();
    let counted = block_on(route_popularity(&engine, "text", &tokens)).unwrap();
    assert_eq!((found.tokens, &found.counts), (counted.tokens, &counted.counts));

    let distinct: BTreeSet<_> = source.asked.iter().collect();
    assert_eq!(distinct.len(), source.asked.len(), "each once at each precision");
    assert!(source.asked.is_sorted_by_key(|(id, _)| *id), "layer by layer");
    assert_eq!(source.layers, (1..=6).map(|done| (done, 6)).collect::<Vec<_>>());

    // Fewer bits lose more: four bits fewer lose some 256 times as much.
    let mut ratios = Vec::new();
    for (losses, counts) in found.losses.iter().zip(&found.counts) {
        for (loss, count) in losses.iter().zip(counts) {
            assert_eq!(loss.is_some(), *count > 0);
            let Some(loss) = loss else { continue };
            assert!(0.0 < loss.q8 && loss.q8 < loss.q4 && loss.q4 < 0.5, "{loss:?}");
            ratios.push(loss.q4 / loss.q8);
        }
    }
    ratios.sort_by(f32::total_cmp);
    let median = ratios[ratios.len() / 2];
    assert!((30.0..1000.0).contains(&median), "{median}");
}

#[test]
fn what_is_found_depends_on_nothing_but_model_and_text() {
    let checkpoint = checkpoint();
    let tokens = &tokens(&checkpoint)[..300];
    let one = run(&mut Slicing::of(&checkpoint), tokens, 1).unwrap();
    assert_eq!(run(&mut Slicing::of(&checkpoint), tokens, 3).unwrap(), one);
    let mut unsliced = Slicing { sliced: false, ..Slicing::of(&checkpoint) };
    let found = run(&mut unsliced, tokens, 1).unwrap();
    assert_eq!(found.counts, one.counts);
    assert!(found.losses.iter().flatten().all(Option::is_none), "nothing is measured that there is not");
}

/// A source in which experts that cannot be sliced have no slices, as in an import.
struct Exactly<'a>(&'a Checkpoint);

impl SurveySource for Exactly<'_> {
    fn expert(&mut self, id: ExpertId, precision: Precision) -> Result<Option<Tensors>, LoadError> {
        match self.0.expert(id).sliced(precision) {
            Err(LoadError::Slice { .. }) => Ok(None),
            sliced => sliced.map(Some),
        }
    }

    fn go_on(&mut self, _: usize, _: usize) -> bool {
        true
    }
}

#[test]
fn a_weight_beyond_slices_leaves_nothing_measured_that_is_no_number() {
    let whole = checkpoint();
    let tokens = &tokens(&whole)[..300];
    let counts = run(&mut Slicing::of(&whole), tokens, 2).unwrap().counts;
    let chosen = counts[0].iter().position(|rows| *rows > 20).unwrap();
    // The last matrix of an expert that is used is filled with the largest bf16 number.
    let dir = tempfile::tempdir().unwrap();
    for (name, path) in whole.files() {
        std::fs::copy(path, dir.path().join(name)).unwrap();
    }
    let mut weights = std::fs::read(&whole.weight_files()[0]).unwrap();
    let expert = whole.expert(ExpertId { layer: 0, index: chosen as u16 });
    let (_, down) = expert.iter().find(|(name, _)| name.contains("down_proj")).unwrap();
    let range = down.offset as usize..down.offset as usize + down.bytes.len();
    weights[range].as_chunks_mut::<2>().0.fill([0x7f, 0x7f]);
    std::fs::write(dir.path().join("model.safetensors"), weights).unwrap();

    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let found = survey(checkpoint.config(), &checkpoint.trunk(), tokens, 2, &mut Exactly(&checkpoint)).unwrap();
    assert_eq!(found.losses[0][chosen], None);
    let measured = || found.losses.iter().flatten().flatten();
    assert!(measured().all(|loss| loss.q4.is_finite() && loss.q8.is_finite()), "{:?}", found.losses);
}

#[test]
fn a_survey_can_be_given_up() {
    let checkpoint = checkpoint();
    let mut source = Slicing { patience: 2, ..Slicing::of(&checkpoint) };
    let ended = run(&mut source, &tokens(&checkpoint), 1);
    assert!(matches!(ended, Err(SurveyError::Stopped)));
    assert_eq!(source.asked.iter().map(|(id, _)| id.layer).max(), Some(1));
    let vocab = checkpoint.config().vocab_size as u32;
    let beyond = run(&mut Slicing::of(&checkpoint), &[1, vocab], 1).unwrap_err();
    assert!(beyond.to_string().contains(&vocab.to_string()), "{beyond}");
}
