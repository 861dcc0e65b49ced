//! The CUDA device: kernels of our own compiled by NVRTC, matrix products by cuBLASLt, bfloat16 where it is enough.

pub mod bf16;
pub mod driver;
pub mod error;
pub mod libraries;
pub mod memory;
pub mod probe;
pub mod real;

mod compile;
#[cfg(any(test, feature = "emulator"))]
pub mod emulated;
mod kernels;
#[cfg(test)]
mod recording;
