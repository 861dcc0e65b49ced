//! Compiles the wire contract with protox, so that no system `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=schema/cairn.proto");
    let descriptors = protox::compile(["cairn.proto"], ["schema"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
