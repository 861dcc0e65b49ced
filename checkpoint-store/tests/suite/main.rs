//! The store as its users see it: every backend, saves and loads at any size, the chain under races, and damage.

mod backends;
mod chain;
mod counting;
mod crash;
mod crash_disk;
mod hostile;
mod loader;
mod reshard;
mod s3;
mod support;
