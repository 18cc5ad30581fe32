//! How a CPU kernel is compiled for every instruction set.
//!
//! Owns `per_isa`, which compiles a generic body once per set and calls the one an [`Isa`] names. An `Isa` exists only
//! for a set this machine has, which is what makes that call sound. Every set computes the same bits (see `lanes` and
//! `sliced`), so the choice is about speed alone.

pub use coel_weights::isa::{Isa, Level};

/// Compiles `$body::<Lanes, R, C>` for every instruction set and calls the one asked for. `R` by `C` is the tile of
/// accumulators that fits the set's registers; it has no influence on results.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::cpu::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) {
                // SAFETY: this function enables what the lanes of `Avx512` need.
                unsafe { $body::<$crate::cpu::lanes::Avx512, 6, 4>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) {
                // SAFETY: this function enables what the lanes of `Avx2` need.
                unsafe { $body::<$crate::cpu::lanes::Avx2, 2, 2>($($arg),*) }
            }
            use $crate::cpu::isa::Level;
            match isa.level() {
                // SAFETY: portable lanes need no instruction that a machine may lack.
                Level::Portable => unsafe { $body::<$crate::cpu::lanes::Portable, 1, 4>($($arg),*) },
                // SAFETY: an `Isa` exists only for a set this machine has.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: an `Isa` exists only for a set this machine has.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}

pub(super) use per_isa;
