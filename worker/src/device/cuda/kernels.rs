//! The kernels: their sources, which are part of the binary, and which of them each file has.
//!
//! `worker/kernels/README.md` tells how they are written; the header of each file states its floor and its launch.

/// A file of kernels, compiled by itself.
#[derive(Debug)]
pub(super) struct Module {
    /// Its name.
    pub(super) file: &'static str,
    /// Its text.
    pub(super) text: &'static str,
    /// What is defined for it, as `NAME=VALUE`.
    pub(super) defines: &'static [&'static str],
    /// Kernels in it.
    pub(super) kernels: &'static [&'static str],
}

macro_rules! source {
    ($file:literal) => {
        include_str!(concat!("../../../kernels/", $file))
    };
}

/// A module without definitions.
macro_rules! module {
    ($file:literal: $($kernel:literal),+) => {
        Module { file: $file, text: source!($file), defines: &[], kernels: &[$($kernel),+] }
    };
}

/// What the files include.
pub(super) const HEADERS: [(&str, &str); 2] =
    [("ptx.cuh", source!("ptx.cuh")), ("common.cuh", source!("common.cuh"))];

/// All of them.
pub(super) const MODULES: [Module; 1] = [
    module!("cast.cu": "cast_to_bf16", "cast_to_float", "axpy", "scale"),
];
