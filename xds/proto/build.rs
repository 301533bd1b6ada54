//! Compiles Istio's few messages from our own text; protox stands in for protoc.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["istio/workload.proto", "istio/authorization.proto", "istio/ca.proto"];
    for file in files {
        println!("cargo:rerun-if-changed=proto/{file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
