//! What it costs to move an expert to the GPU, and to compute it on the CPU.
//!
//! Owns [`Costs`]: running means of measurements, both in seconds per byte of weights, so that they compare for experts
//! of any size. Pure: the driver holds the clock. The invariant: moving is not said to pay before both were measured.

/// The weight of a new measurement in a mean.
const FRESH: f64 = 0.125;
/// Classes of numbers of rows: 1, 2 to 3, 4 to 7 and so on; the last one has no end.
const CLASSES: usize = 10;
/// The first moves are all measured, later ones once in so many, because measuring waits for the device.
const MEASURED_FIRST: u64 = 8;
const MEASURED_EVERY: u64 = 64;

/// Means of the measurements so far.
#[derive(Debug, Default)]
pub(crate) struct Costs {
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
    /// Counts the next move; whether it is to be measured.
    pub(super) fn measures(&mut self) -> bool {
        self.moves += 1;
        self.moves <= MEASURED_FIRST || self.moves.is_multiple_of(MEASURED_EVERY)
    }

    /// Notes that moving `bytes` to the device took `seconds`.
    pub(super) fn moved(&mut self, bytes: u64, seconds: f64) {
        take(&mut self.moving, bytes, seconds);
    }

    /// Notes that computing experts of `bytes` on the CPU, each for `rows` rows on average, took `seconds`.
    pub(super) fn computed(&mut self, bytes: u64, rows: f64, seconds: f64) {
        take(&mut self.computing[class(rows)], bytes, seconds);
    }

    /// Whether moving an expert to the device takes less time than computing it on the CPU for `rows` rows.
    pub(super) fn moving_pays(&self, rows: usize) -> bool {
        // More rows never cost less: the time for fewer rows is a lower bound.
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
        assert!(!costs.moving_pays(1000), "moving was not measured yet");
        costs.moved(100, 3.0);
        assert!(!costs.moving_pays(1) && !costs.moving_pays(64), "more rows are not known to cost more");
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
