//! `strata-cni`: executed by the container runtime with the CNI protocol.
use std::io::Read;
use std::process::ExitCode;

/// A configuration with a large `prevResult` is a few KiB; GC lists every attachment of the node.
const MAX_INPUT: u64 = 4 << 20;

fn main() -> ExitCode {
    let mut input = String::new();
    if let Err(error) = std::io::stdin().take(MAX_INPUT).read_to_string(&mut input) {
        eprintln!("strata-cni: standard input: {error}");
    }
    let outcome = l4_cni::run(&|variable| std::env::var(variable).ok(), &input);
    if let Some(stdout) = outcome.stdout {
        println!("{stdout}");
    }
    if outcome.success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
