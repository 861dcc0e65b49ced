//! The generated gRPC messages, clients and servers of `schema/cairn.proto`.

// Generated code; the schema carries the documentation.
#![allow(missing_docs, unreachable_pub, clippy::pedantic, clippy::large_enum_variant)]

tonic::include_proto!("cairn.v1");

/// Largest gRPC message accepted, in bytes: far above any announcement, far below what could exhaust memory.
pub const MOST_MESSAGE_BYTES: usize = 64 << 20;

/// Most ranks a step's report names as stragglers.
pub const MOST_STRAGGLERS: usize = 64;

/// The version every part of one cluster must share.
pub const BUILD: &str = env!("CARGO_PKG_VERSION");
