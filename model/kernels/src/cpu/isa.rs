//! Which instruction set the CPU kernels use.
//!
//! Owns [`Isa`]: a value exists only for a set this machine has, which is what makes calling its kernels sound.
//! Every set computes the same bits (see `lanes` and `sliced`), so the choice is about speed alone. A set is a bundle:
//! AVX2 comes with FMA and F16C, AVX-512 with VNNI; a machine with half a bundle uses the next smaller one.

use std::sync::OnceLock;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Portable,
    /// AVX2, FMA, F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL, VNNI, and all of the above.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// An instruction set this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(pub(super) Level);

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

    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }
}

/// Compiles `$body::<Lanes, R, C>` for every instruction set and calls the one asked for. `R` by `C` is the tile of
/// accumulators that fits the set's registers; it has no influence on results.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::cpu::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) {
                // SAFETY: this function enables what Avx512 needs.
                unsafe { $body::<$crate::cpu::lanes::Avx512, 6, 4>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) {
                // SAFETY: this function enables what Avx2 needs.
                unsafe { $body::<$crate::cpu::lanes::Avx2, 2, 2>($($arg),*) }
            }
            use $crate::cpu::isa::Level;
            match isa.0 {
                // SAFETY: portable lanes need nothing.
                Level::Portable => unsafe { $body::<$crate::cpu::lanes::Portable, 1, 4>($($arg),*) },
                // SAFETY: an `Isa` exists only for a set this machine has.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}

pub(super) use per_isa;
