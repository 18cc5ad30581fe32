//! From logits to one token: the choice itself, and nothing of text, of time or of the model.
//!
//! Owns the sampling parameters with their ranges, and the random stream of one generation. The invariant:
//! the same logits, history, parameters and number of earlier choices give the same token. Sums run in a
//! fixed order in f64 and the random stream is ChaCha, whose output is specified, so only the last bit of
//! `exp` can differ between platforms.
//!
//! The filters apply in the order of Hugging Face's generation: repetition penalty, temperature, top-k,
//! top-p, min-p, each on what the one before left. Temperature 0 is greedy: the largest logit after the
//! penalty, the lowest token id where several are equal. Log-probabilities are those of the model, the
//! log-softmax of the logits as they came, untouched by any filter: a client reads from them what the model
//! believed, not what the sampler was told to do.
//!
//! It deliberately does not know which tokens end a text, and never invents a token: logits that are not
//! finite numbers are an error, since they mean that weights are damaged or the computation before went wrong.

use std::cmp::Ordering;
use std::collections::HashSet;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A request's field outside its range. The text is fit for the one who sent the request.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("`{field}` is {value}, but must be {range}")]
pub struct ParamError {
    /// The field's name, as requests spell it.
    pub field: &'static str,
    /// What was given.
    pub value: String,
    /// What is accepted, in words.
    pub range: &'static str,
}

impl ParamError {
    pub(crate) fn new(field: &'static str, value: impl ToString, range: &'static str) -> Self {
        Self { field, value: value.to_string(), range }
    }
}

/// Logits from which no token can be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    #[error("the model returned no logits: its vocabulary is empty")]
    Empty,
    #[error(
        "the logit of token {token} is {value}: weights of the model are no finite numbers, or its arithmetic gave such; \
         `coel model slice DIR OUT` looks through a checkpoint and names the tensor, as an import does"
    )]
    NotFinite { token: u32, value: f32 },
}

/// How the next token is drawn. Fields are named as in OpenAI's and vLLM's requests.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy. In [0, 2].
    pub temperature: f32,
    /// Keeps the smallest set of tokens whose probabilities reach this sum, at least one. In [0, 1]; 1 keeps
    /// all.
    pub top_p: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps tokens at least this fraction as likely as the likeliest. In [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits, and multiplies negative ones, of tokens already in the prompt or the answer.
    /// In (0, 10]; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Starts the random stream.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// OpenAI's defaults: the model's own distribution.
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplingParams {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Refuses the first field outside its range, by name.
    pub fn validate(&self) -> Result<(), ParamError> {
        let check = |field, value: f32, inside: bool, range| {
            // A NaN is in no range, so `inside` is false for it.
            if inside { Ok(()) } else { Err(ParamError::new(field, value, range)) }
        };
        let unit = 0.0..=1.0;
        check("temperature", self.temperature, (0.0..=2.0).contains(&self.temperature), "between 0 and 2")?;
        check("top_p", self.top_p, unit.contains(&self.top_p), "between 0 and 1")?;
        check("min_p", self.min_p, unit.contains(&self.min_p), "between 0 and 1")?;
        let penalty = self.repetition_penalty;
        check("repetition_penalty", penalty, penalty > 0.0 && penalty <= 10.0, "above 0 and at most 10")
    }
}

/// Natural-log probabilities of the model's own distribution at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token chosen.
    pub chosen: f32,
    /// The likeliest tokens, best first, equal ones by id; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// What the sampler decided at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub token: u32,
    /// Present where they were asked for.
    pub logprobs: Option<Logprobs>,
}

/// Draws the tokens of one generation, one after the other.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    random: ChaCha8Rng,
}

impl Sampler {
    /// `params` must have passed [`SamplingParams::validate`]; values outside their range are not refused
    /// again here.
    pub fn new(params: SamplingParams) -> Self {
        let random = ChaCha8Rng::seed_from_u64(params.seed);
        Self { params, random }
    }

    /// Chooses the token that follows.
    ///
    /// `logits` is `[vocab]`, `history` the tokens so far, prompt included (read only under a repetition
    /// penalty), and `logprobs` asks for the chosen token's log-probability and for that many of the
    /// likeliest. One draw of the random stream is used per call, none when greedy.
    pub fn pick(&mut self, logits: &[f32], history: &[u32], logprobs: Option<usize>) -> Result<Choice, SamplingError> {
        check_logits(logits)?;
        let penalised = self.penalise(logits, history);
        let scores = penalised.as_deref().unwrap_or(logits);
        let token = if self.params.temperature == 0.0 { argmax(scores) } else { self.draw(scores) };
        let logprobs = logprobs.map(|count| model_logprobs(logits, token, count));
        Ok(Choice { token, logprobs })
    }

    /// The logits after the repetition penalty, or `None` where it changes nothing.
    fn penalise(&self, logits: &[f32], history: &[u32]) -> Option<Vec<f32>> {
        let penalty = self.params.repetition_penalty;
        if penalty == 1.0 || history.is_empty() {
            return None;
        }
        let mut scores = logits.to_vec();
        // Once per distinct token, however often it occurred.
        for token in history.iter().collect::<HashSet<_>>() {
            // The tokens of a prompt may come from elsewhere: an id outside the vocabulary has no logit.
            if let Some(score) = scores.get_mut(*token as usize) {
                *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
            }
        }
        Some(scores)
    }

    fn draw(&mut self, scores: &[f32]) -> u32 {
        let kept = weigh(scores, &self.params);
        let total: f64 = kept.iter().map(|candidate| candidate.weight).sum();
        let mut left = uniform(&mut self.random) * total;
        for candidate in &kept {
            left -= candidate.weight;
            if left < 0.0 {
                return candidate.token;
            }
        }
        // Rounding can leave a hair's breadth after the last weight; it belongs to the last token that had
        // any.
        let last = kept.iter().rev().find(|candidate| candidate.weight > 0.0);
        last.map_or_else(|| argmax(scores), |candidate| candidate.token)
    }
}

/// A token still in the running, with its unnormalised probability.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    score: f32,
    weight: f64,
}

/// Likeliest first, equal ones by id.
fn by_score(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.total_cmp(&a.score).then(a.token.cmp(&b.token))
}

/// Applies temperature, top-k, top-p and min-p. At least the likeliest token remains, with weight 1.
fn weigh(scores: &[f32], params: &SamplingParams) -> Vec<Candidate> {
    let mut kept: Vec<_> =
        (0u32..).zip(scores).map(|(token, &score)| Candidate { token, score, weight: 0.0 }).collect();
    let top_k = params.top_k;
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k - 1, by_score);
        kept.truncate(top_k);
    }
    // Only a cut by rank needs the order; the whole vocabulary unfiltered is summed in the order of ids.
    if top_k > 0 || params.top_p < 1.0 {
        kept.sort_unstable_by(by_score);
    }

    let best = f64::from(scores[argmax(scores) as usize]);
    let temperature = f64::from(params.temperature);
    for candidate in &mut kept {
        candidate.weight = ((f64::from(candidate.score) - best) / temperature).exp();
    }
    if params.top_p < 1.0 {
        let enough = f64::from(params.top_p) * kept.iter().map(|candidate| candidate.weight).sum::<f64>();
        let mut sum = 0.0;
        let needed = kept.iter().position(|candidate| {
            sum += candidate.weight;
            sum >= enough
        });
        kept.truncate(needed.map_or(kept.len(), |last| last + 1));
    }
    // Relative to the likeliest, whose weight is 1, so that it needs no normalising.
    kept.retain(|candidate| candidate.weight >= f64::from(params.min_p));
    kept
}

/// Evenly in [0, 1) with 53 bits, by a formula of our own: it must not change with a dependency.
fn uniform(random: &mut impl RngCore) -> f64 {
    (random.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

fn check_logits(logits: &[f32]) -> Result<(), SamplingError> {
    if logits.is_empty() {
        return Err(SamplingError::Empty);
    }
    // No model forbids a token by -inf; it is what overflows, and a NaN in the next sum.
    match (0u32..).zip(logits).find(|(_, logit)| !logit.is_finite()) {
        Some((token, &value)) => Err(SamplingError::NotFinite { token, value }),
        None => Ok(()),
    }
}

/// The index of the largest score, the lowest where several are equal. `scores` is not empty and holds no
/// NaN.
fn argmax(scores: &[f32]) -> u32 {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = index;
        }
    }
    best as u32
}

fn model_logprobs(logits: &[f32], token: u32, count: usize) -> Logprobs {
    let best = f64::from(logits[argmax(logits) as usize]);
    let normaliser = best + logits.iter().map(|logit| (f64::from(*logit) - best).exp()).sum::<f64>().ln();
    let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;

    let count = count.min(logits.len());
    let mut top: Vec<_> = (0u32..).zip(logits.iter().copied()).collect();
    let likeliest_first = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count > 0 && count < top.len() {
        top.select_nth_unstable_by(count - 1, likeliest_first);
    }
    top.truncate(count);
    top.sort_unstable_by(likeliest_first);
    let top = top.into_iter().map(|(token, logit)| (token, logprob(logit))).collect();
    Logprobs { chosen: logprob(logits[token as usize]), top }
}

#[cfg(test)]
mod tests;
