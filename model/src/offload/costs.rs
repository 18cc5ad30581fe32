//! What moving an expert costs, and what computing it in host memory does.
//!
//! Owns [`Costs`]: running means of what was measured, both in seconds per byte of weights, so that they compare for an
//! expert of any size. Pure; the driver holds the clock. The invariant: nothing is said to pay before both were measured.

/// How much of a new measurement goes into a mean.
const FRESH: f64 = 0.125;
/// Numbers of rows that are told apart: 1, 2 to 3, 4 to 7 and so on, the last one without end.
const CLASSES: usize = 10;
/// Moves that are measured to begin with, and then one of so many: measuring waits for the device.
const MEASURED_FIRST: u64 = 8;
const MEASURED_EVERY: u64 = 64;

/// Means of what was measured so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Costs {
    moving: Option<f64>,
    moves: u64,
    computing: [Option<f64>; CLASSES],
}

fn class(rows: f64) -> usize {
    (rows.max(1.0).log2() as usize).min(CLASSES - 1)
}

fn take(mean: &mut Option<f64>, bytes: u64, seconds: f64) {
    let new = seconds / bytes.max(1) as f64;
    *mean = Some(mean.map_or(new, |mean| mean + FRESH * (new - mean)));
}

impl Costs {
    /// Whether the next move is to be measured.
    pub fn measures(&mut self) -> bool {
        self.moves += 1;
        self.moves <= MEASURED_FIRST || self.moves.is_multiple_of(MEASURED_EVERY)
    }

    /// So many bytes were brought to the device.
    pub fn moved(&mut self, bytes: u64, seconds: f64) {
        take(&mut self.moving, bytes, seconds);
    }

    /// Experts of so many bytes were computed in host memory, each for so many rows on average.
    pub fn computed(&mut self, bytes: u64, rows: f64, seconds: f64) {
        take(&mut self.computing[class(rows)], bytes, seconds);
    }

    /// Whether an expert is brought to the device sooner than it is computed in host memory for `rows` rows.
    pub fn moving_pays(&self, rows: usize) -> bool {
        // More rows never cost less: what fewer of them took is the least that these will.
        let known = self.computing[..=class(rows as f64)].iter().rev().find_map(|mean| *mean);
        self.moving.zip(known).is_some_and(|(moving, computing)| moving < computing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moving_pays_for_many_rows() {
        let mut costs = Costs::default();
        costs.computed(100, 1.0, 1.0);
        assert!(!costs.moving_pays(1000), "nobody knows what moving costs");
        costs.moved(100, 3.0);
        assert!(!costs.moving_pays(1) && !costs.moving_pays(64), "it is not known that more rows cost more");
        costs.computed(100, 20.0, 4.0);
        assert!(!costs.moving_pays(15) && costs.moving_pays(16) && costs.moving_pays(100_000));
        for _ in 0..100 {
            costs.moved(200, 10.0);
        }
        assert!(!costs.moving_pays(100_000), "the bus has become slow");
    }

    #[test]
    fn the_first_moves_are_measured_then_few() {
        let mut costs = Costs::default();
        let measured = (0..128).filter(|_| costs.measures()).count() as u64;
        assert_eq!(measured, MEASURED_FIRST + 128 / MEASURED_EVERY);
    }
}
