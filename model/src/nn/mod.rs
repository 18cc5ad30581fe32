//! The network: trunk, router, attention, and the way of a batch through the layers.
//!
//! | room | what it owns |
//! |---|---|
//! | [`rope`], [`router`] | angles of positions; routes of rows, in plain values |
//! | [`expert_call`] | what a layer asks of its experts, in plain values |
//! | [`embedding`], [`trunk`] | the weights that are not experts |
//! | [`batch`] | a batch of rows on its way through the layers: plain state |
//! | [`outputs`] | outputs of a layer's experts, as they come |
//! | [`forward`] | what computes a batch: kernels, trunk and KV cache |
//!
//! Nothing here knows sessions, threads, or where an expert is.

pub mod batch;
pub mod embedding;
pub mod expert_call;
pub mod forward;
pub mod outputs;
pub mod rope;
pub mod router;
pub mod trunk;
