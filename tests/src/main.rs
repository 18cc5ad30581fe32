//! The program that the tests run: the testnet, and behind its hidden first argument the whole of `coel`.

fn main() -> std::process::ExitCode {
    coel_testnet::main()
}
