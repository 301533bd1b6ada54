//! Finds the kernel programs' object, built by `integration/scripts/build-bpf.sh`, for `include_bytes!`.
use std::{env, path::PathBuf};

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("../..");
    let object = match env::var_os("STRATA_BPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => root.join("target/bpf/strata.bpf.o"),
    };
    println!("cargo::rerun-if-env-changed=STRATA_BPF_OBJECT");
    println!("cargo::rerun-if-changed={}", object.display());
    let Ok(object) = object.canonicalize() else {
        println!(
            "cargo::error=the kernel programs are not built: {} does not exist. Run integration/scripts/build-bpf.sh \
             (or set STRATA_BPF_OBJECT to an object built elsewhere)",
            object.display()
        );
        std::process::exit(1);
    };
    println!("cargo::rustc-env=STRATA_BPF_OBJECT={}", object.display());
}
