//! How fast a model runs on this machine.
//!
//! Owns [`Bench`]: rounds of prefill, decode and concurrent decode on an open [`LocalModel`], each a fresh sequence of
//! tokens picked from a fixed seed, so that every round routes to experts as it comes and none is sampled or detokenized.
//! Beside them [`read_gb_s`], what this machine's memory gives to plain reads, which is what decoding is measured
//! against. It measures one round at a time and keeps no statistics: who compares engines alternates their rounds.

use std::{
    hint::black_box,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    nn::batch::Want,
    serve::{
        engine::{Engine, EngineError, block_on},
        session::Session,
    },
    tools::generate::LocalModel,
};
use coel_weights::{
    config::ModelConfig,
    layout::{self, ExpertId},
};

/// Rounds on one model.
pub struct Bench<'a> {
    model: &'a LocalModel,
    rng: ChaCha8Rng,
}

impl<'a> Bench<'a> {
    pub fn new(model: &'a LocalModel, seed: u64) -> Self {
        Self { model, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    fn engine(&self) -> &Engine {
        &self.model.engine
    }

    fn tokens(&mut self, n: usize) -> Vec<u32> {
        let vocab = self.engine().config().vocab_size as u32;
        (0..n).map(|_| self.rng.random_range(0..vocab)).collect()
    }

    /// A prompt of `n` tokens, up to its last logits: tokens per second.
    pub fn prefill(&mut self, n: usize) -> Result<f64, EngineError> {
        let tokens = self.tokens(n);
        let mut session = self.engine().open_session(n)?;
        let start = Instant::now();
        block_on(session.advance(&tokens, Want::Last))?;
        Ok(n as f64 / start.elapsed().as_secs_f64())
    }

    /// `n` tokens one after another from an empty cache: tokens per second.
    pub fn decode(&mut self, n: usize) -> Result<f64, EngineError> {
        let tokens = self.tokens(n);
        let mut session = self.engine().open_session(n)?;
        let start = Instant::now();
        step_through(&mut session, &tokens)?;
        Ok(n as f64 / start.elapsed().as_secs_f64())
    }

    /// `requests` sequences at once, each with a prompt of `prompt` tokens and then `n` tokens one after another; the
    /// prompts are not timed: tokens per second of all together.
    pub fn concurrent(&mut self, requests: usize, prompt: usize, n: usize) -> Result<f64, EngineError> {
        let mut sequences = Vec::new();
        for _ in 0..requests {
            let mut session = self.engine().open_session(prompt + n)?;
            if prompt > 0 {
                let prompt = self.tokens(prompt);
                block_on(session.advance(&prompt, Want::Last))?;
            }
            sequences.push((session, self.tokens(n)));
        }
        let barrier = Barrier::new(requests + 1);
        let elapsed = thread::scope(|scope| {
            let run = |(mut session, tokens): (Session, Vec<u32>)| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    step_through(&mut session, &tokens)
                })
            };
            let running: Vec<_> = sequences.into_iter().map(run).collect();
            barrier.wait();
            let start = Instant::now();
            for sequence in running {
                sequence.join().expect("a sequence returns its errors")?;
            }
            Ok::<Duration, EngineError>(start.elapsed())
        })?;
        Ok((requests * n) as f64 / elapsed.as_secs_f64())
    }

    /// Bytes of packed weights that one token alone reads: the trunk without its embedding table, and the experts of
    /// one row in every layer.
    pub fn bytes_per_token(&self) -> u64 {
        let trunk_bytes = self.engine().memory().trunk_bytes;
        let config = self.engine().config();
        let counted = !config.tie_word_embeddings && !self.engine().offload_stats().embedding_on_disk;
        let embeddings = if counted { embedding_bytes(config, trunk_bytes) } else { 0 };
        let per_layer = config.num_experts_per_tok as u64;
        let layers: u64 = sparse_layers(config);
        let experts = layout::experts(config).count() as u64;
        trunk_bytes - embeddings + self.engine().held_bytes() * layers * per_layer / experts.max(1)
    }
}

fn sparse_layers(config: &ModelConfig) -> u64 {
    layout::experts(config).filter(|ExpertId { index, .. }| *index == 0).count() as u64
}

/// The embedding table's share of a trunk, all matrices being held alike.
fn embedding_bytes(config: &ModelConfig, trunk_bytes: u64) -> u64 {
    let elements = |shape: &[usize]| shape.iter().map(|side| *side as u64).product::<u64>();
    let all: u64 = layout::trunk(config).iter().map(|spec| elements(&spec.shape)).sum();
    let table: u64 = layout::embeddings(config).iter().map(|spec| elements(&spec.shape)).sum();
    (trunk_bytes as f64 * table as f64 / all as f64) as u64
}

fn step_through(session: &mut Session, tokens: &[u32]) -> Result<(), EngineError> {
    for token in tokens {
        black_box(block_on(session.advance(&[*token], Want::Last))?.logits);
    }
    Ok(())
}

/// What `threads` threads read of `bytes` bytes of memory that no cache holds, 10^9 bytes per second: the best of
/// `rounds`, since anything else on the machine only takes away.
pub fn read_gb_s(threads: usize, bytes: usize, rounds: usize) -> f64 {
    let memory = vec![1u64; bytes / 8];
    let share = memory.len().div_ceil(threads.max(1)).max(1);
    let round = || {
        let start = Instant::now();
        thread::scope(|scope| {
            for part in memory.chunks(share) {
                scope.spawn(move || black_box(xor(part)));
            }
        });
        start.elapsed().as_secs_f64()
    };
    let best = (0..rounds.max(1)).map(|_| round()).fold(f64::INFINITY, f64::min);
    (memory.len() * 8) as f64 / best / 1e9
}

/// Many lanes, so that the loop waits for memory and not for itself.
fn xor(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 64];
    for block in words.as_chunks::<64>().0 {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane ^= word;
        }
    }
    lanes.iter().fold(0, |all, lane| all ^ lane)
}
