//! What a model takes in memory, and what fits a budget.
//!
//! Pure arithmetic: [`footprint`] over a configuration, [`inventory`] over the parts of a model folder, [`fit`] over both
//! and a budget. The invariant: nothing is counted as less than an engine allocates for it.

pub mod fit;
pub mod footprint;
pub mod inventory;
