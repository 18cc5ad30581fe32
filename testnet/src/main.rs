//! The program `coel-testnet`; see the library.

fn main() -> std::process::ExitCode {
    coel_testnet::main()
}
