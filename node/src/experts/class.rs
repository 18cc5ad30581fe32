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

/// Whether `text` is a class that may be kept: it is short and printable, and says at which precisions its weights were held.
/// What comes before the last precisions may be any name of a device.
pub fn check(text: &str) -> bool {
    let is_precision = |name: &str| name.parse::<Precision>().is_ok();
    let names = text.rsplit_once('/').map(|(_, names)| names);
    is_printable(text, CLASS_BYTES_MAX) && names.is_some_and(|names| names.split('+').all(is_precision))
}

/// The class that stands for others of the same precisions, without the device.
pub fn unlisted(class: &str) -> String {
    let precisions = precisions(class);
    let names: Vec<_> = precisions.iter().map(|precision| precision.name()).collect();
    format!("unlisted/{}", names.join("+"))
}

/// The first `bytes_max` characters of `text`, with `?` in place of everything that is not printable ASCII.
pub fn printable(text: &str, bytes_max: usize) -> String {
    let visible = |char: char| if matches!(char, ' '..='~') { char } else { '?' };
    text.chars().take(bytes_max).map(visible).collect()
}

/// The precisions that a class names. Text that is no class names none.
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
        assert!(check("vulkan This and That/exact"), "a device may have any name");
        let long = |bytes: usize| format!("{}/exact", "x".repeat(bytes - "/exact".len()));
        assert!(check(&long(CLASS_BYTES_MAX)) && !check(&long(CLASS_BYTES_MAX + 1)));
        for bad in ["a\nb/exact", "a\u{7f}/exact", "caf\u{e9}/exact"] {
            assert!(!check(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_class_without_precisions_is_none() {
        for bad in ["", "cpu", "cpu/", "cpu/q5", "cpu/exact+q5", "cpu/exact and cuda", "unlisted"] {
            assert!(!check(bad), "{bad:?}");
        }
        assert_eq!(unlisted("cpu-avx2/q4 and cuda/exact+q4"), "unlisted/q4+exact");
    }

    #[test]
    fn any_text_becomes_printable() {
        assert_eq!(printable("caf\u{e9}\n/exact", 64), "caf??/exact");
        assert_eq!(printable("abcdef", 3), "abc");
        assert!(is_printable(&printable(&"\u{1f600}".repeat(1000), CLASS_BYTES_MAX), CLASS_BYTES_MAX));
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
