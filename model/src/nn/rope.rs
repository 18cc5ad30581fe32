//! Rotary position embedding: the angles.
//!
//! Owns the frequencies of a model, and makes the [`Angles`] of positions. They follow transformers in float32:
//! inverse frequencies and angles are f32 values; sine and cosine are computed in f64 and rounded once, so that no
//! platform's f32 functions show through. How a vector is turned by them is the kernels' business.

use coel_kernels::angles::Angles;
use coel_weights::config::ModelConfig;

/// The inverse frequencies of a model.
#[derive(Clone, Debug)]
pub struct Rope {
    inverse_frequencies: Vec<f32>,
}

impl Rope {
    pub fn new(config: &ModelConfig) -> Self {
        let dim = config.head_dim as f32;
        let frequency = |pair: usize| {
            let exponent = (2 * pair) as f32 / dim;
            1.0 / f64::from(config.rope_theta).powf(f64::from(exponent)) as f32
        };
        Self { inverse_frequencies: (0..config.head_dim / 2).map(frequency).collect() }
    }

    /// The angles of `positions`, one row each.
    pub fn angles(&self, positions: impl IntoIterator<Item = usize>) -> Angles {
        let half = self.inverse_frequencies.len();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for frequency in &self.inverse_frequencies {
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        Angles::new(half, cos, sin)
    }
}
