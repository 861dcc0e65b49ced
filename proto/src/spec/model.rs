//! The model's shape, in Hugging Face's names, and the presets.

use serde::{Deserialize, Serialize};

/// A family of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Decoder-only transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU.
    Llama,
}

/// `[model]`: field names and meanings of a Hugging Face `config.json`.
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
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head; even, for rotary positions.
    pub head_dim: usize,
    /// Inner width of the feed-forward block.
    pub intermediate_size: usize,
    /// Token ids are `0..vocab_size`.
    pub vocab_size: usize,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added under the root in RMSNorm.
    pub rms_norm_eps: f64,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
}

/// Names of the presets, smallest first.
pub const PRESETS: [&str; 6] = ["tiny", "small", "llama-15m", "llama-42m", "llama-110m", "llama-1b"];

impl ModelSpec {
    /// The shape of a named preset, or `None` if there is none of that name.
    pub fn preset(name: &str) -> Option<Self> {
        let (hidden, layers, heads, kv, ffn, vocab, tied) = match name {
            "tiny" => (128, 4, 4, 2, 352, 256, true),
            "small" => (256, 6, 8, 8, 768, 256, true),
            "llama-15m" => (288, 6, 6, 6, 768, 32000, true),
            "llama-42m" => (512, 8, 8, 8, 1376, 32000, true),
            "llama-110m" => (768, 12, 12, 12, 2048, 32000, true),
            "llama-1b" => (2048, 22, 32, 4, 5632, 32000, false),
            _ => return None,
        };
        Some(Self {
            architecture: Architecture::Llama,
            hidden_size: hidden,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv,
            head_dim: hidden / heads,
            intermediate_size: ffn,
            vocab_size: vocab,
            tie_word_embeddings: tied,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            initializer_range: 0.02,
        })
    }
}

impl ModelSpec {
    /// All parameters in canonical order: name and row-major shape (`[out, in]` for a matrix).
    ///
    /// Names and shapes are those of Hugging Face's `LlamaForCausalLM`. Laid end to end in this order, with no padding,
    /// they are the canonical space: a function of the model alone, the same for training, sharding and checkpoints.
    /// The order makes neighbours of matrices that multiply the same input: `[q; k; v]` and `[gate; up]` are each one
    /// taller matrix, and one product.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = Vec::with_capacity(3 + 9 * self.num_hidden_layers);
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        list.push(("model.embed_tokens.weight".to_string(), vec![self.vocab_size, d]));
        for layer in 0..self.num_hidden_layers {
            let mut add = |part: &str, shape: Vec<usize>| {
                list.push((format!("model.layers.{layer}.{part}.weight"), shape));
            };
            add("input_layernorm", vec![d]);
            add("self_attn.q_proj", vec![q, d]);
            add("self_attn.k_proj", vec![kv, d]);
            add("self_attn.v_proj", vec![kv, d]);
            add("self_attn.o_proj", vec![d, q]);
            add("post_attention_layernorm", vec![d]);
            add("mlp.gate_proj", vec![f, d]);
            add("mlp.up_proj", vec![f, d]);
            add("mlp.down_proj", vec![d, f]);
        }
        list.push(("model.norm.weight".to_string(), vec![d]));
        if !self.tie_word_embeddings {
            list.push(("lm_head.weight".to_string(), vec![self.vocab_size, d]));
        }
        list
    }
}
