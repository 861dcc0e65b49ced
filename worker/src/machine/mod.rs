//! Decisions of a worker, pure.

pub mod cadence;
pub mod kept;
pub mod session;
pub mod stragglers;
