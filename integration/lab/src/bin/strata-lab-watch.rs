//! Cleans up after a lab whose process died: started by the lab with a pipe that ends when the lab does.
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(id) = std::env::args().nth(1) else {
        eprintln!("strata-lab-watch NAME: removes the mesh NAME when standard input ends; started by the lab itself");
        return ExitCode::from(2);
    };
    match strata_lab::watch(&id) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("strata-lab-watch {id}: {error}");
            ExitCode::FAILURE
        }
    }
}
