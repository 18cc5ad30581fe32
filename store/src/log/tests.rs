//! The store under the log, without a network: openraft's own suite, and power cuts.

mod damage;
mod power_cut;
mod suite;
