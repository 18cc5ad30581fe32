//! Does nothing: a package without a build script has no build dependencies, and theirs are to be the same too.

fn main() {}
