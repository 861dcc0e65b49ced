//! Where the parameters of a Llama model lie in the canonical space.
//!
//! [`ModelSpec::tensors`] declares them; here are the offsets the model computes with. Matrices that multiply the same
//! input are neighbours, so `[q; k; v]` and `[gate; up]` are each one taller matrix, and one product.

use proto::spec::ModelSpec;

/// One tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamDecl {
    /// Hugging Face name.
    pub name: String,
    /// Row-major shape; `[out, in]` for a matrix.
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

/// Where one layer's tensors begin in the canonical space, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerOffsets {
    pub(crate) input_norm: usize,
    /// `[q; k; v]`, one matrix of `(heads + 2·kv_heads)·head_dim` rows.
    pub(crate) qkv: usize,
    pub(crate) output: usize,
    pub(crate) post_norm: usize,
    /// `[gate; up]`, one matrix of `2·intermediate_size` rows.
    pub(crate) gate_up: usize,
    pub(crate) down: usize,
}

/// Where everything begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offsets {
    pub(crate) embedding: usize,
    pub(crate) layers: Vec<LayerOffsets>,
    pub(crate) final_norm: usize,
    /// The output head; equal to `embedding` when tied.
    pub(crate) head: usize,
    pub(crate) total: usize,
}

impl Offsets {
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let mut at = 0;
        let starts: Vec<usize> = parameters(spec)
            .iter()
            .map(|p| {
                let start = at;
                at += p.elements();
                start
            })
            .collect();
        let layers: Vec<LayerOffsets> = starts[1..=9 * spec.num_hidden_layers]
            .chunks_exact(9)
            .map(|s| LayerOffsets {
                input_norm: s[0],
                qkv: s[1],
                output: s[4],
                post_norm: s[5],
                gate_up: s[6],
                down: s[8],
            })
            .collect();
        let last = 1 + 9 * spec.num_hidden_layers;
        let head = if spec.tie_word_embeddings { starts[0] } else { starts[last + 1] };
        Self { embedding: starts[0], layers, final_norm: starts[last], head, total: at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_canonical_space_is_dense_and_neighbours_are_neighbours() {
        for name in proto::spec::PRESETS {
            let spec = ModelSpec::preset(name).unwrap();
            let offsets = Offsets::new(&spec);
            assert_eq!(offsets.total, parameter_count(&spec));
            let d = spec.hidden_size;
            let rows = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim;
            for layer in &offsets.layers {
                assert_eq!(layer.qkv + rows * d, layer.output);
                assert_eq!(layer.gate_up + 2 * spec.intermediate_size * d, layer.down);
            }
        }
        assert_eq!(parameter_count(&ModelSpec::preset("tiny").unwrap()), count_by_hand());
    }

    fn count_by_hand() -> usize {
        let (d, f, kv) = (128, 352, 64);
        256 * d + 4 * (2 * d + 2 * d * d + 2 * kv * d + 3 * f * d) + d
    }
}
