//! How often each expert is chosen on a text: what placement knows before there is traffic.
//!
//! Owns the built-in calibration text and [`Popularity`]. The invariant: counts of a layer add up to tokens times
//! `num_experts_per_tok`, or there are none because the layer has no experts. It says what was counted on which text,
//! and draws no conclusion from it.

use serde::{Deserialize, Serialize};

use crate::{
    nn::batch::Want,
    serve::engine::{Engine, EngineError},
};

/// Name of the built-in text; it changes whenever a byte of the text does.
pub const CALIBRATION_NAME: &str = "coel-calibration-1";

/// Plain English of several kinds, questions and answers, a play, a speech and some code.
pub const CALIBRATION_TEXT: &str = include_str!("calibration.txt");

/// Tokens counted in one go, without memory of what went before.
pub const WINDOW_TOKENS: usize = 256;

/// Routed (row, expert) pairs counted on a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Popularity {
    /// What the text is called.
    pub text: String,
    pub tokens: u64,
    /// `[num_hidden_layers][num_experts]`; empty for a layer without experts.
    pub counts: Vec<Vec<u64>>,
}

/// Counts the routes of `tokens`, a text called `text`, on an engine that holds every expert.
///
/// Needs room for one session of at most [`WINDOW_TOKENS`].
pub async fn route_popularity(engine: &Engine, text: &str, tokens: &[u32]) -> Result<Popularity, EngineError> {
    let config = engine.config();
    let experts = |layer| if config.is_sparse(layer) { config.num_experts } else { 0 };
    let mut counts: Vec<Vec<u64>> = (0..config.num_hidden_layers).map(|layer| vec![0; experts(layer)]).collect();
    let window = WINDOW_TOKENS.min(config.max_position_embeddings);
    let mut session = engine.open_session(window.min(tokens.len()))?;
    for tokens in tokens.chunks(window) {
        session.truncate(0)?;
        let (_, routes) = session.advance_watched(tokens, Want::Nothing).await?;
        for (layer, rows) in routes.iter().enumerate() {
            for route in rows.iter().flatten() {
                counts[layer][usize::from(route.expert)] += 1;
            }
        }
    }
    Ok(Popularity { text: text.to_owned(), tokens: tokens.len() as u64, counts })
}
