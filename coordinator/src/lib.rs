//! Control plane: pure machine, driver, gRPC edge.
pub mod machine;
mod watch;
