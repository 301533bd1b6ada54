//! Holds a lab of the shop until it is killed: what tests/lab.rs kills.
use std::process::ExitCode;

use strata_integration::repository;
use strata_lab::{Lab, Options};

fn main() -> ExitCode {
    let Some(id) = std::env::args().nth(1) else {
        eprintln!("hold-lab NAME");
        return ExitCode::from(2);
    };
    let mut options = Options::new(id, repository().join("manifests/samples/shop"));
    options.copy = true;
    match Lab::start(options) {
        Ok(_lab) => loop {
            std::thread::park();
        },
        Err(error) => {
            eprintln!("hold-lab: {error}");
            ExitCode::FAILURE
        }
    }
}
