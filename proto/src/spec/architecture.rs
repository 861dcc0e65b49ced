//! What a model of each architecture is made of: its tensors, and its decoder layer described by data.
//!
//! Both architectures are the same chain (norm, attention, residual, norm, feed-forward, residual) and differ in the
//! parts that are put into it. [`Block`] names those parts, so that one model code computes them all, and nothing but
//! this module needs to know an architecture by its name.

use super::model::{EPSILON, POSITIONS, ROPE_THETA};
use super::{Architecture, ModelSpec};

/// The parts of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Block {
    /// The norm before attention, before the feed-forward block, and at the end.
    pub norm: Norm,
    /// Added under the norm's root.
    pub epsilon: f64,
    /// How a token's position reaches the model.
    pub positions: Positions,
    /// The feed-forward block.
    pub feed_forward: FeedForward,
    /// How the matrices of linear layers lie in the canonical space.
    pub layout: Layout,
    /// Whether linear layers have biases; each lies behind its matrix.
    pub biases: bool,
}

/// A kind of norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// `x/rms(x)` times a gain (Zhang and Sennrich, 2019).
    Rms,
    /// `(x − mean)/σ` times a gain plus a bias (Ba, Kiros and Hinton, 2016); the bias lies behind the gain.
    Layer,
}

/// A kind of position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// Queries and keys are rotated by angles to this base (Su et al., 2021).
    Rotary {
        /// The base of the frequencies.
        theta: f64,
    },
    /// A learned vector is added to each token's.
    Learned {
        /// How many there are.
        most: usize,
    },
}

/// A kind of feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForward {
    /// `down(silu(gate(x))·up(x))`; gate and up are neighbours, one matrix of twice the inner width (Shazeer, 2020).
    SwiGlu,
    /// `down(gelu(up(x)))` with GELU in its tanh form (Hendrycks and Gimpel, 2016).
    Gelu,
}

/// How a linear layer's matrix is written down, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[out, in]`, PyTorch's `Linear`.
    OutIn,
    /// `[in, out]`, the `Conv1D` of the published GPT-2.
    InOut,
}

impl Architecture {
    /// All architectures by their names in a job file.
    pub(crate) const ALL: [(&'static str, Self); 2] = [("llama", Self::Llama), ("gpt2", Self::Gpt2)];

    /// The name in a job file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Gpt2 => "gpt2",
        }
    }

    /// The default of `optimizer.no_decay`: parts of the names of gains and biases.
    pub(crate) fn no_decay(self) -> &'static [&'static str] {
        match self {
            Self::Llama => &["norm"],
            Self::Gpt2 => &["bias", "ln_"],
        }
    }
}

impl ModelSpec {
    /// The parts of the model's layers. Of a spec that was not checked, what is absent has its default.
    pub fn block(&self) -> Block {
        match self.architecture {
            Architecture::Llama => Block {
                norm: Norm::Rms,
                epsilon: self.rms_norm_eps.unwrap_or(EPSILON),
                positions: Positions::Rotary { theta: self.rope_theta.unwrap_or(ROPE_THETA) },
                feed_forward: FeedForward::SwiGlu,
                layout: Layout::OutIn,
                biases: false,
            },
            Architecture::Gpt2 => Block {
                norm: Norm::Layer,
                epsilon: self.layer_norm_epsilon.unwrap_or(EPSILON),
                positions: Positions::Learned { most: self.max_position_embeddings.unwrap_or(POSITIONS) },
                feed_forward: FeedForward::Gelu,
                layout: Layout::InOut,
                biases: true,
            },
        }
    }

    /// All parameters in canonical order: name and row-major shape.
    ///
    /// Names, shapes and order are those of Hugging Face's `LlamaForCausalLM` (matrices `[out, in]`) and
    /// `GPT2LMHeadModel` (matrices `[in, out]`, but for the embeddings). Laid end to end in this order without padding,
    /// they are the canonical space: a function of the model alone, the same for training, sharding and checkpoints.
    /// The order makes neighbours of matrices that multiply the same input: Llama's `[q; k; v]` and `[gate; up]` are
    /// each one taller matrix, and one product.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = match self.architecture {
            Architecture::Llama => self.llama_tensors(),
            Architecture::Gpt2 => self.gpt2_tensors(),
        };
        if !self.tie_word_embeddings {
            list.push(("lm_head.weight".to_string(), vec![self.vocab_size, self.hidden_size]));
        }
        list
    }

    fn llama_tensors(&self) -> Vec<(String, Vec<usize>)> {
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
        list
    }

    fn gpt2_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = Vec::with_capacity(5 + 12 * self.num_hidden_layers);
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let positions = self.max_position_embeddings.unwrap_or(POSITIONS);
        list.push(("transformer.wte.weight".to_string(), vec![self.vocab_size, d]));
        list.push(("transformer.wpe.weight".to_string(), vec![positions, d]));
        // A part's bias is as long as its last dimension.
        let mut add = |part: String, shape: Vec<usize>| {
            let bias = shape[shape.len() - 1..].to_vec();
            list.push((format!("transformer.{part}.weight"), shape));
            list.push((format!("transformer.{part}.bias"), bias));
        };
        for layer in 0..self.num_hidden_layers {
            add(format!("h.{layer}.ln_1"), vec![d]);
            add(format!("h.{layer}.attn.c_attn"), vec![d, 3 * d]);
            add(format!("h.{layer}.attn.c_proj"), vec![d, d]);
            add(format!("h.{layer}.ln_2"), vec![d]);
            add(format!("h.{layer}.mlp.c_fc"), vec![d, f]);
            add(format!("h.{layer}.mlp.c_proj"), vec![f, d]);
        }
        add("ln_f".to_string(), vec![d]);
        list
    }
}
