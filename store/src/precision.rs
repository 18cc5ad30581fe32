//! How exactly weights are held, and which precisions are accepted.
//!
//! Owns [`Precision`] and [`Bounds`]. Invariant: bounds are never empty; the lowest is at most the highest. The module
//! does not know which bytes a precision takes (the manifest does) or which one a node should hold (the planner does).

use crate::ids::ParseIdError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The precision at which weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// The base slice: 4.5 bits a weight.
    Q4,
    /// Base and refine: 8.5 bits a weight.
    Q8,
    /// As in the checkpoint: BF16, F16 or F32.
    Exact,
}

impl Precision {
    /// From the least exact to the most.
    pub const ALL: [Self; 3] = [Self::Q4, Self::Q8, Self::Exact];

    /// The precision as commands, reports and the log spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4 => "q4",
            Self::Q8 => "q8",
            Self::Exact => "exact",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let found = Self::ALL.into_iter().find(|precision| precision.name() == text);
        found.ok_or_else(|| ParseIdError::new("precision", text, "q4, q8 or exact"))
    }
}

/// The precisions that are accepted: from the lowest to the highest, both included.
///
/// Written `auto` (all), `q8` (that one), `q8..` (that one and better) or `..q8` (that one and worse).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bounds {
    lowest: Precision,
    highest: Precision,
}

impl Bounds {
    /// Every precision.
    pub const AUTO: Self = Self { lowest: Precision::Q4, highest: Precision::Exact };

    /// From `lowest` to `highest`; `None` if that is empty.
    pub fn new(lowest: Precision, highest: Precision) -> Option<Self> {
        (lowest <= highest).then_some(Self { lowest, highest })
    }

    /// This precision and no other.
    pub fn only(precision: Precision) -> Self {
        Self { lowest: precision, highest: precision }
    }

    /// The least exact one.
    pub fn lowest(self) -> Precision {
        self.lowest
    }

    /// The most exact one.
    pub fn highest(self) -> Precision {
        self.highest
    }

    /// Whether `precision` is accepted.
    pub fn has(self, precision: Precision) -> bool {
        (self.lowest..=self.highest).contains(&precision)
    }

    /// The precisions that both accept, if there are any.
    pub fn and(self, other: Self) -> Option<Self> {
        Self::new(self.lowest.max(other.lowest), self.highest.min(other.highest))
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self::AUTO
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lowest, highest } = self;
        match (*lowest, *highest) {
            (Precision::Q4, Precision::Exact) => f.write_str("auto"),
            (lowest, highest) if lowest == highest => write!(f, "{lowest}"),
            (lowest, Precision::Exact) => write!(f, "{lowest}.."),
            (_, highest) => write!(f, "..{highest}"),
        }
    }
}

impl FromStr for Bounds {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let bad =
            || ParseIdError::new("choice of precision", text, "auto, q4, q8, exact, or bounds such as q8.. or ..q8");
        let one = |text: &str| text.parse::<Precision>().map_err(|_| bad());
        match text.split_once("..") {
            None if text == "auto" => Ok(Self::AUTO),
            None => one(text).map(Self::only),
            Some((lowest, "")) => Ok(Self { lowest: one(lowest)?, ..Self::AUTO }),
            Some(("", highest)) => Ok(Self { highest: one(highest)?, ..Self::AUTO }),
            Some((lowest, highest)) => Self::new(one(lowest)?, one(highest)?).ok_or_else(bad),
        }
    }
}

impl TryFrom<String> for Bounds {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, ParseIdError> {
        text.parse()
    }
}

impl From<Bounds> for String {
    fn from(bounds: Bounds) -> Self {
        bounds.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cbor;

    #[test]
    fn precisions_are_ordered_and_read_back() {
        for precision in Precision::ALL {
            assert_eq!(precision.to_string().parse(), Ok(precision));
            // One word for people, commands and the log.
            let encoded = cbor::to_vec(&precision).unwrap();
            assert_eq!(encoded[1..], *precision.name().as_bytes());
        }
        assert!(Precision::ALL.is_sorted());
        // Pinned: this is on disks and on the wire.
        let pinned: [&[u8]; 3] = [b"\x62q4", b"\x62q8", b"\x65exact"];
        assert_eq!(Precision::ALL.map(|precision| cbor::to_vec(&precision).unwrap()), pinned.map(<[u8]>::to_vec));
        assert!("q5".parse::<Precision>().unwrap_err().to_string().contains("q4, q8 or exact"));
    }

    #[test]
    fn bounds_read_back_what_they_print() {
        for (text, lowest, highest) in [
            ("auto", Precision::Q4, Precision::Exact),
            ("q4", Precision::Q4, Precision::Q4),
            ("exact", Precision::Exact, Precision::Exact),
            ("q8..", Precision::Q8, Precision::Exact),
            ("..q8", Precision::Q4, Precision::Q8),
        ] {
            let bounds: Bounds = text.parse().unwrap();
            assert_eq!((bounds.lowest(), bounds.highest(), bounds.to_string().as_str()), (lowest, highest, text));
            let encoded = cbor::to_vec(&bounds).unwrap();
            assert_eq!(cbor::from_slice::<Bounds>(&encoded, encoded.len()), Ok(bounds));
        }
        assert_eq!("q4..exact".parse(), Ok(Bounds::AUTO));
        for text in ["", "..", "q5", "q8..q4", "Q8", "auto.."] {
            assert!(text.parse::<Bounds>().is_err(), "{text}");
        }
        assert!(cbor::from_slice::<Bounds>(&cbor::to_vec("exact..q4").unwrap(), 64).is_err());
    }

    #[test]
    fn bounds_meet_or_do_not() {
        let bounds = |text: &str| text.parse::<Bounds>().unwrap();
        assert_eq!(bounds("..q8").and(bounds("q8..")), Some(bounds("q8")));
        assert_eq!(bounds("auto").and(bounds("q4")), Some(bounds("q4")));
        assert_eq!(bounds("q4").and(bounds("q8..")), None);
        assert!(bounds("..q8").has(Precision::Q4) && !bounds("..q8").has(Precision::Exact));
    }
}
