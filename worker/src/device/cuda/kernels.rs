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
    /// The one compute capability it is for, with instructions that no other has; all if none is told.
    pub(super) needs: Option<(u32, u32)>,
}

impl Module {
    /// Whether a device of this capability has its kernels.
    pub(super) fn fits(&self, capability: (u32, u32)) -> bool {
        self.needs.is_none_or(|needed| needed == capability)
    }

    /// What it is compiled for.
    pub(super) fn architecture(&self, (major, minor): (u32, u32)) -> String {
        format!("sm_{major}{minor}{}", if self.needs.is_some() { "a" } else { "" })
    }
}

macro_rules! source {
    ($file:literal) => {
        include_str!(concat!("../../../kernels/", $file))
    };
}

/// A module without definitions.
macro_rules! module {
    ($file:literal: $($kernel:literal),+) => {
        Module { file: $file, text: source!($file), defines: &[], kernels: &[$($kernel),+], needs: None }
    };
}

/// A module of attention kernels for heads of up to a width.
macro_rules! attention {
    ($width:literal) => {
        Module {
            file: "attention.cu",
            text: source!("attention.cu"),
            defines: &[concat!("HEAD_DIM=", $width)],
            kernels: &[
                concat!("attention_forward_", $width),
                concat!("attention_backward_kv_", $width),
                concat!("attention_backward_q_", $width),
            ],
            needs: None,
        }
    };
}

/// What the files include.
pub(super) const HEADERS: [(&str, &str); 6] = [
    ("ptx.cuh", source!("ptx.cuh")),
    ("common.cuh", source!("common.cuh")),
    ("tiles.cuh", source!("tiles.cuh")),
    ("group.cuh", source!("group.cuh")),
    ("attention.cuh", source!("attention.cuh")),
    ("attention_backward.cuh", source!("attention_backward.cuh")),
];

/// All of them.
pub(super) const MODULES: [Module; 14] = [
    module!("cast.cu": "cast_to_bf16", "cast_to_float", "axpy", "scale"),
    module!("exact.cu": "accumulate_blocks", "gradient_from_blocks", "square_sums", "find_fault"),
    module!("optimizer.cu": "adamw"),
    module!(
        "norm.cu":
        "rmsnorm_forward", "rmsnorm_backward", "layernorm_forward", "layernorm_backward",
        "rmsnorm_backward_768", "rmsnorm_backward_1024", "layernorm_backward_768", "layernorm_backward_1024"
    ),
    module!("columns.cu": "column_sums", "bias_gradient"),
    module!("rope.cu": "rope"),
    module!("activation.cu": "swiglu_forward", "swiglu_backward", "gelu_forward", "gelu_backward", "bias_add"),
    module!(
        "embedding.cu":
        "embedding_forward", "embedding_backward_pieces", "embedding_backward_join", "position_backward"
    ),
    module!("loss.cu": "cross_entropy", "sum_losses"),
    module!("attention_dot.cu": "attention_dot"),
    attention!("32"),
    attention!("64"),
    attention!("128"),
    Module {
        needs: Some((9, 0)),
        ..module!(
            "attention_group.cu":
            "attention_forward_group", "attention_backward_kv_group", "attention_backward_q_group"
        )
    },
];

/// Names all sources: 16 hexadecimal digits of their hash.
pub(super) fn version() -> String {
    let mut hasher = blake3::Hasher::new();
    let files = MODULES.iter().map(|module| module.text).chain(HEADERS.iter().map(|(_, text)| *text));
    for text in files {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hasher.finalize().to_hex()[..16].to_string()
}
