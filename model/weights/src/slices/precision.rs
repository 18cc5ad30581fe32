//! How exactly weights are held.
//!
//! Owns [`Precision`] and its spelling. What a precision costs or loses is not known here.

/// How exactly a weight is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Precision {
    /// The base slice: 4.5 bits a weight.
    Q4,
    /// Base and refine: 8.5 bits a weight.
    Q8,
    /// The checkpoint's own type.
    Exact,
}

impl Precision {
    pub const ALL: [Precision; 3] = [Precision::Q4, Precision::Q8, Precision::Exact];

    /// The spelling in commands and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::Q4 => "q4",
            Precision::Q8 => "q8",
            Precision::Exact => "exact",
        }
    }
}

/// A word that is not the name of a precision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a precision; write q4, q8 or exact")]
pub struct BadPrecision(String);

impl std::str::FromStr for Precision {
    type Err = BadPrecision;

    fn from_str(text: &str) -> Result<Self, BadPrecision> {
        let found = Self::ALL.into_iter().find(|precision| precision.name() == text);
        found.ok_or_else(|| BadPrecision(text.to_owned()))
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
