//! Rotary position embedding: the angles.
//!
//! Owns the frequencies of a model and the [`Angles`] of some positions. They follow transformers in float32:
//! inverse frequencies and angles are f32 values; sine and cosine are computed in f64 and rounded once, so that no
//! platform's f32 functions show through. How a vector is turned by them is the kernels' business.

use crate::config::ModelConfig;

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
        Angles { half, cos, sin }
    }
}

/// Cosines and sines of the positions of rows, `[n, head_dim / 2]` each.
#[derive(Clone, Debug)]
pub struct Angles {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Half the head dimension: the number of angles per position.
    pub fn half(&self) -> usize {
        self.half
    }

    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    pub fn sin(&self) -> &[f32] {
        &self.sin
    }

    /// Cosines and sines of row `row`.
    pub fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let range = row * self.half..(row + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}
