//! The program `coel`; everything is in the library.

fn main() -> std::process::ExitCode {
    coel_node::cli::run(std::env::args_os())
}
