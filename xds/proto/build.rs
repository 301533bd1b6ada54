//! Compiles Istio's few messages from our own text, and the descriptors by which Envoy's are shown as JSON; protox
//! stands in for protoc.
use std::error::Error;
use std::path::{Path, PathBuf};

use protox::Compiler;

/// Istio's messages.
const ISTIO: [&str; 5] =
    ["istio/workload.proto", "istio/authorization.proto", "istio/ca.proto", "istio/zds.proto", "istio/stats.proto"];

/// Every file with a message istiod may send to a waypoint (xds-contract, appendix A), below Envoy's and xDS's own;
/// what they import comes along.
const SHOWN: &str = include_str!("shown.txt");

/// Folders of the generated crate's sources.
const FOLDERS: [&str; 8] = [
    "data-plane-api",
    "xds",
    "protoc-gen-validate",
    "googleapis",
    "cel-spec/proto",
    "cel-spec",
    "client_model",
    "opentelemetry-proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=shown.txt");
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-env-changed=ENVOY_TYPES_PROTO");
    let descriptors = protox::compile(ISTIO, ["proto"])?;
    tonic_prost_build::configure().bytes(".").btree_map(".stats").compile_fds(descriptors)?;

    let envoy = envoy_types()?;
    let folders = FOLDERS.iter().map(|folder| envoy.join(folder)).chain([PathBuf::from("proto")]);
    let mut compiler = Compiler::new(folders)?;
    compiler.include_imports(true).include_source_info(false);
    let names = SHOWN.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    compiler.open_files(names.chain(ISTIO))?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("descriptors.binpb"), compiler.encode_file_descriptor_set())?;
    Ok(())
}

/// The sources of `envoy-types`, which ships the texts it was generated from: where cargo unpacked the version of the
/// lock file, or `ENVOY_TYPES_PROTO` (for builds from vendored sources).
fn envoy_types() -> Result<PathBuf, Box<dyn Error>> {
    if let Some(path) = std::env::var_os("ENVOY_TYPES_PROTO") {
        return Ok(path.into());
    }
    let here = std::env::var_os("CARGO_MANIFEST_DIR").ok_or("cargo sets CARGO_MANIFEST_DIR")?;
    let lock = Path::new(&here).join("../../Cargo.lock");
    let text = std::fs::read_to_string(&lock).map_err(|error| format!("{}: {error}", lock.display()))?;
    let (_, rest) =
        text.split_once("name = \"envoy-types\"\nversion = \"").ok_or("envoy-types is not in Cargo.lock")?;
    let version = rest.split('"').next().unwrap_or_default();
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let sources = home.ok_or("neither CARGO_HOME nor HOME is set")?.join("registry/src");
    let registries = std::fs::read_dir(&sources).map_err(|error| format!("{}: {error}", sources.display()))?;
    registries
        .filter_map(Result::ok)
        .map(|registry| registry.path().join(format!("envoy-types-{version}/proto")))
        .find(|path| path.is_dir())
        .ok_or_else(|| {
            format!("envoy-types-{version} is not below {}; set ENVOY_TYPES_PROTO", sources.display()).into()
        })
}
