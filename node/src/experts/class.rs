//! Kernel classes as text: which kernels computed a row, and at which precision the weights were held.
//!
//! A class reads `cpu-avx512/exact`, or `cpu-avx512/q4+q8` where experts of both precisions took part. A node that computes
//! on two devices joins two of them: `cuda/exact and cpu-avx512/q4`. Homes keep the classes of their hosts, so this module
//! bounds what a peer can make them keep. The invariant: text that passes [`check`] is short and printable.
//!
//! It does not know where classes come from or who keeps them.

use std::collections::BTreeSet;

use coel_store::Precision;

/// Longest class in bytes. The name of a Vulkan device takes at most 256 of them.
pub const CLASS_BYTES_MAX: usize = 384;
/// Joins the classes of two devices that shared a call.
pub const AND: &str = " and ";

/// Whether `text` is printable ASCII of at most `bytes_max` bytes.
fn is_printable(text: &str, bytes_max: usize) -> bool {
    text.len() <= bytes_max && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// Whether a peer's class may be kept.
pub fn check(class: &str) -> bool {
    !class.is_empty() && is_printable(class, CLASS_BYTES_MAX)
}

/// The first `bytes_max` characters of `text`, with `?` in place of everything that is not printable ASCII.
pub fn printable(text: &str, bytes_max: usize) -> String {
    let visible = |char: char| if matches!(char, ' '..='~') { char } else { '?' };
    text.chars().take(bytes_max).map(visible).collect()
}

/// The precisions that a class names. A class of an unknown form names none.
pub fn precisions(class: &str) -> BTreeSet<Precision> {
    let named = class.split(AND).filter_map(|device| device.rsplit_once('/'));
    named.flat_map(|(_, names)| names.split('+')).filter_map(|name| name.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_short_and_printable() {
        assert!(check("vulkan llvmpipe (LLVM 19.1.7, 256 bits)/q4+q8"));
        assert!(check(&"x".repeat(CLASS_BYTES_MAX)));
        for bad in [String::new(), "x".repeat(CLASS_BYTES_MAX + 1), "a\nb".into(), "a\u{7f}".into(), "caf\u{e9}".into()]
        {
            assert!(!check(&bad), "{bad:?}");
        }
    }

    #[test]
    fn any_text_becomes_printable() {
        assert_eq!(printable("caf\u{e9}\n/exact", 64), "caf??/exact");
        assert_eq!(printable("abcdef", 3), "abc");
        assert!(check(&printable(&"\u{1f600}".repeat(1000), CLASS_BYTES_MAX)));
    }

    #[test]
    fn a_class_names_its_precisions() {
        assert_eq!(precisions("cpu-avx2/exact"), [Precision::Exact].into());
        assert_eq!(precisions("cpu-avx2/q4+q8"), [Precision::Q4, Precision::Q8].into());
        assert_eq!(precisions("vulkan a/b/exact and cpu-avx2/q4"), [Precision::Q4, Precision::Exact].into());
        for unknown in ["", "cpu", "cpu/", "cpu/q5", "unlisted"] {
            assert_eq!(precisions(unknown), BTreeSet::new(), "{unknown:?}");
        }
    }
}
