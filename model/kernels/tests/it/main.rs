//! Tests of the CPU kernels as their users see them, in one binary.

mod kernels;
mod sliced;
mod support;
