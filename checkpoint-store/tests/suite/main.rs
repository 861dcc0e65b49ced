//! The store as its users see it: every backend, saves and loads at any size, the chain under races, formats old
//! and new, deduplication, and damage.

mod backends;
mod chain;
mod compare;
mod counting;
mod crash;
mod crash_disk;
mod dedup;
mod formats;
mod hostile;
mod keeping;
mod loader;
mod reshard;
mod s3;
mod support;
mod tensors;
