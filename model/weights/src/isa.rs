//! The instruction sets of this machine.
//!
//! Owns [`Isa`] and the only place that asks the CPU what it can do. The invariant: an [`Isa`] exists only for a set this
//! machine has. Calling a function that needs the set's features is therefore sound wherever an `Isa` is at hand. A set
//! is a bundle: AVX2 includes FMA and F16C, AVX-512 includes VNNI; a machine with half a bundle uses the next smaller
//! one. What a set is used for is not known here.

use std::sync::OnceLock;

/// The name of an instruction set. It promises nothing about this machine; an [`Isa`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every machine has.
    Portable,
    /// AVX2, FMA, F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL, VNNI, and all of the above.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// An instruction set this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

impl Isa {
    /// The fastest set of this machine.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| *Self::available().last().expect("portable code is always available"))
    }

    /// Every set this machine has, slowest first.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Isa(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if avx2 {
                found.push(Isa(Level::Avx2));
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                found.push(Isa(Level::Avx512));
            }
        }
        found
    }

    /// Which set this is. The machine has it.
    #[inline]
    pub const fn level(self) -> Level {
        self.0
    }

    pub const fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_listed_slowest_first_and_the_last_is_the_best() {
        let found = Isa::available();
        assert_eq!(found[0].level(), Level::Portable);
        assert!(found.is_sorted_by(|a, b| a < b), "{found:?}");
        assert_eq!(found.last(), Some(&Isa::best()));
    }
}
