//! Compiles the wire contract with protox, so that no system `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=schema/cairn.proto");
    let descriptors = protox::compile(["cairn.proto"], ["schema"])?;
    // Large payloads are handed on as they arrived, without a copy.
    tonic_prost_build::configure().bytes(".cairn.v1.Chunk.data").compile_fds(descriptors)?;
    Ok(())
}
