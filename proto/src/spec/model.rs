//! The model's shape, in Hugging Face's names, and the presets.
//!
//! One record serves all architectures: the sizes they share are plain fields, what only some have is optional and
//! absent elsewhere. [`super::architecture`] says what a model of each is made of.

use serde::{Deserialize, Serialize};

/// The default of `rope_theta`.
pub(crate) const ROPE_THETA: f64 = 10_000.0;
/// The default of `rms_norm_eps` and `layer_norm_epsilon`.
pub(crate) const EPSILON: f64 = 1e-5;
/// The default of `max_position_embeddings`.
pub(crate) const POSITIONS: usize = 1024;

/// A family of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Decoder-only transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU.
    Llama,
    /// Decoder-only transformer with LayerNorm, learned positions, multi-head attention, GELU, and biases throughout.
    Gpt2,
}

/// `[model]`: field names and meanings of a Hugging Face `config.json`, in Llama's naming for all architectures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads; divides `hidden_size` unless `head_dim` is given.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`, and is the same number for GPT-2.
    pub num_key_value_heads: usize,
    /// Width of one head; even. For GPT-2 always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Inner width of the feed-forward block.
    pub intermediate_size: usize,
    /// Token ids are `0..vocab_size`.
    pub vocab_size: usize,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Llama: base of the rotary frequencies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// Llama: added under the root in RMSNorm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rms_norm_eps: Option<f64>,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// GPT-2: the number of learned positions, the longest sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_position_embeddings: Option<usize>,
    /// GPT-2: added under the root in LayerNorm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_norm_epsilon: Option<f64>,
}

/// Names of the presets, smallest first.
pub const PRESETS: [&str; 11] = [
    "tiny",
    "small",
    "llama-15m",
    "llama-42m",
    "llama-110m",
    "gpt2-124m",
    "gpt2-350m",
    "gpt2-774m",
    "llama-1b",
    "gpt2-1.5b",
    "llama-8b",
];

impl ModelSpec {
    /// The shape of a named preset, or `None` if there is none of that name.
    pub fn preset(name: &str) -> Option<Self> {
        match name {
            "tiny" => Some(Self::llama([128, 4, 4, 2, 352, 256], true)),
            "small" => Some(Self::llama([256, 6, 8, 8, 768, 256], true)),
            "llama-15m" => Some(Self::llama([288, 6, 6, 6, 768, 32_000], true)),
            "llama-42m" => Some(Self::llama([512, 8, 8, 8, 1376, 32_000], true)),
            "llama-110m" => Some(Self::llama([768, 12, 12, 12, 2048, 32_000], true)),
            "llama-1b" => Some(Self::llama([2048, 22, 32, 4, 5632, 32_000], false)),
            "llama-8b" => {
                let shape = Self::llama([4096, 32, 32, 8, 14_336, 128_256], false);
                Some(Self { rope_theta: Some(500_000.0), ..shape })
            }
            "gpt2-124m" => Some(Self::gpt2(768, 12, 12)),
            "gpt2-350m" => Some(Self::gpt2(1024, 24, 16)),
            "gpt2-774m" => Some(Self::gpt2(1280, 36, 20)),
            "gpt2-1.5b" => Some(Self::gpt2(1600, 48, 25)),
            _ => None,
        }
    }

    /// A Llama with the defaults of all but its sizes.
    fn llama([hidden, layers, heads, kv_heads, inner, vocabulary]: [usize; 6], tied: bool) -> Self {
        Self {
            architecture: Architecture::Llama,
            hidden_size: hidden,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: hidden / heads,
            intermediate_size: inner,
            vocab_size: vocabulary,
            tie_word_embeddings: tied,
            rope_theta: Some(ROPE_THETA),
            rms_norm_eps: Some(EPSILON),
            initializer_range: 0.02,
            max_position_embeddings: None,
            layer_norm_epsilon: None,
        }
    }

    /// A GPT-2 as it was published, of the given width.
    fn gpt2(hidden: usize, layers: usize, heads: usize) -> Self {
        Self {
            architecture: Architecture::Gpt2,
            hidden_size: hidden,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: hidden / heads,
            intermediate_size: 4 * hidden,
            vocab_size: 50_257,
            tie_word_embeddings: true,
            rope_theta: None,
            rms_norm_eps: None,
            initializer_range: 0.02,
            max_position_embeddings: Some(POSITIONS),
            layer_norm_epsilon: Some(EPSILON),
        }
    }
}
