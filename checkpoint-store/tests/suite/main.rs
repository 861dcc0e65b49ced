//! The store as its users see it: every backend, saves and loads at any size, the chain under races, and damage.

mod backends;
mod chain;
mod hostile;
mod reshard;
mod s3;
mod support;
mod tensors;
