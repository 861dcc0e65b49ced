//! Kernels against scalar definitions.
