//! The worker's decisions, pure: no clock, no randomness, no I/O, no threads.

pub mod session;
