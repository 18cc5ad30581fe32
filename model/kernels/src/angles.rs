//! The angles by which rotary embedding turns rows.

/// Cosines and sines of the positions of rows, `[n, head_dim / 2]` each.
#[derive(Clone, Debug)]
pub struct Angles {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// `cos` and `sin` are `[n, half]`.
    pub fn new(half: usize, cos: Vec<f32>, sin: Vec<f32>) -> Self {
        assert!(cos.len() == sin.len() && cos.len().is_multiple_of(half.max(1)), "one angle for each pair of a head");
        Self { half, cos, sin }
    }

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
