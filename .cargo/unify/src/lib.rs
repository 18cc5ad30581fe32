//! One feature set for every dependency, whichever packages are built. See `Cargo.toml`; there is no code here.
