//! Where the parameters of a model lie in the canonical space.
//!
//! [`ModelSpec::tensors`] declares them; here are the offsets the model computes with. Matrices that multiply the same
//! input are neighbours, so `[q; k; v]` and `[gate; up]` are each one taller matrix, and one product. A bias lies
//! behind its matrix or gain.

use proto::spec::{Block, FeedForward, Layout, ModelSpec, Norm, Positions};

/// One tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamDecl {
    /// Hugging Face name.
    pub name: String,
    /// Row-major shape; see [`ModelSpec::tensors`].
    pub shape: Vec<usize>,
}

impl ParamDecl {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All tensors in canonical order.
pub fn parameters(spec: &ModelSpec) -> Vec<ParamDecl> {
    spec.tensors().into_iter().map(|(name, shape)| ParamDecl { name, shape }).collect()
}

/// Number of elements of the canonical space.
pub fn parameter_count(spec: &ModelSpec) -> usize {
    parameters(spec).iter().map(ParamDecl::elements).sum()
}

/// A linear layer: its widths, and where its matrix and bias begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinearAt {
    pub(crate) weight: usize,
    pub(crate) bias: Option<usize>,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) layout: Layout,
}

/// Where one layer's tensors begin in the canonical space, in elements. A norm's place is its gain's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerOffsets {
    pub(crate) input_norm: usize,
    /// `[q; k; v]`, of `(heads + 2·kv_heads)·head_dim` outputs.
    pub(crate) qkv: LinearAt,
    pub(crate) output: LinearAt,
    pub(crate) post_norm: usize,
    /// Into the feed-forward block's inner width; `[gate; up]`, twice as wide, of SwiGLU.
    pub(crate) up: LinearAt,
    pub(crate) down: LinearAt,
}

/// Where everything begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offsets {
    pub(crate) embedding: usize,
    /// The learned positions and how many there are.
    pub(crate) positions: Option<(usize, usize)>,
    pub(crate) layers: Vec<LayerOffsets>,
    pub(crate) final_norm: usize,
    /// The output head; equal to `embedding` when tied.
    pub(crate) head: usize,
    pub(crate) total: usize,
}

/// Hands out places in canonical order.
struct Cursor {
    block: Block,
    hidden: usize,
    end: usize,
}

impl Cursor {
    fn take(&mut self, elements: usize) -> usize {
        self.end += elements;
        self.end - elements
    }

    fn norm(&mut self) -> usize {
        self.take(match self.block.norm {
            Norm::Rms => self.hidden,
            Norm::Layer => 2 * self.hidden,
        })
    }

    fn linear(&mut self, inputs: usize, outputs: usize) -> LinearAt {
        let weight = self.take(inputs * outputs);
        let bias = self.block.biases.then(|| self.take(outputs));
        LinearAt { weight, bias, inputs, outputs, layout: self.block.layout }
    }
}

impl Offsets {
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let (block, hidden, inner) = (spec.block(), spec.hidden_size, spec.intermediate_size);
        let heads = spec.num_attention_heads * spec.head_dim;
        let qkv = heads + 2 * spec.num_key_value_heads * spec.head_dim;
        let up = inner_inputs(block.feed_forward, inner);
        let mut at = Cursor { block, hidden, end: 0 };
        let embedding = at.take(spec.vocab_size * hidden);
        let positions = match block.positions {
            Positions::Rotary { .. } => None,
            Positions::Learned { most } => Some((at.take(most * hidden), most)),
        };
        let layers = (0..spec.num_hidden_layers)
            .map(|_| LayerOffsets {
                input_norm: at.norm(),
                qkv: at.linear(hidden, qkv),
                output: at.linear(heads, hidden),
                post_norm: at.norm(),
                up: at.linear(hidden, up),
                down: at.linear(inner, hidden),
            })
            .collect();
        let final_norm = at.norm();
        let head = if spec.tie_word_embeddings { embedding } else { at.take(spec.vocab_size * hidden) };
        Self { embedding, positions, layers, final_norm, head, total: at.end }
    }
}

/// What the feed-forward block's activation reads to make `inner` numbers.
pub(super) fn inner_inputs(kind: FeedForward, inner: usize) -> usize {
    match kind {
        FeedForward::SwiGlu => 2 * inner,
        FeedForward::Gelu => inner,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The offsets the model computes with are where the declared tensors of those names begin.
    #[test]
    fn every_offset_is_where_its_tensor_begins() {
        for name in proto::spec::PRESETS {
            let mut spec = ModelSpec::preset(name).unwrap();
            for tied in [true, false] {
                spec.tie_word_embeddings = tied;
                check(&spec);
            }
        }
        assert_eq!(parameter_count(&ModelSpec::preset("tiny").unwrap()), count_by_hand());
    }

    fn check(spec: &ModelSpec) {
        let offsets = Offsets::new(spec);
        assert_eq!(offsets.total, parameter_count(spec));
        let (mut starts, mut end) = (BTreeMap::new(), 0);
        for tensor in parameters(spec) {
            starts.insert(tensor.name.clone(), end);
            end += tensor.elements();
        }
        let gpt2 = spec.block().biases;
        let (root, head) = if gpt2 { ("transformer.wte", "ln_f") } else { ("model.embed_tokens", "norm") };
        assert_eq!(offsets.embedding, starts[&format!("{root}.weight")]);
        let top = if gpt2 { "transformer" } else { "model" };
        assert_eq!(offsets.final_norm, starts[&format!("{top}.{head}.weight")]);
        assert_eq!(offsets.head, if spec.tie_word_embeddings { 0 } else { starts["lm_head.weight"] });
        assert_eq!(offsets.positions.map(|p| p.0), starts.get("transformer.wpe.weight").copied());
        for (index, layer) in offsets.layers.iter().enumerate() {
            let names = if gpt2 {
                ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
                    .map(|n| format!("h.{index}.{n}"))
            } else {
                let parts = ["input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm"];
                let parts = [parts[0], parts[1], parts[2], parts[3], "mlp.gate_proj", "mlp.down_proj"];
                parts.map(|n| format!("layers.{index}.{n}"))
            };
            let start = |part: usize, end: &str| starts.get(&format!("{top}.{}.{end}", names[part])).copied();
            assert_eq!(Some(layer.input_norm), start(0, "weight"));
            assert_eq!(Some(layer.post_norm), start(3, "weight"));
            for (part, linear) in [(1, layer.qkv), (2, layer.output), (4, layer.up), (5, layer.down)] {
                assert_eq!((Some(linear.weight), linear.bias), (start(part, "weight"), start(part, "bias")));
            }
            // Behind Llama's stacked matrices the next one begins.
            let d = spec.hidden_size;
            assert!(gpt2 || layer.qkv.weight + layer.qkv.outputs * d == layer.output.weight);
            assert!(gpt2 || layer.up.weight + layer.up.outputs * d == layer.down.weight);
        }
    }

    fn count_by_hand() -> usize {
        let (d, f, kv) = (128, 352, 64);
        256 * d + 4 * (2 * d + 2 * d * d + 2 * kv * d + 3 * f * d) + d
    }
}
