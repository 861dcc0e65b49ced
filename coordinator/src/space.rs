//! The canonical space of a job's model, as its manifests declare it.
//!
//! The coordinator needs it to check that a set of receipts covers the whole state. Names, shapes and order are those
//! of Hugging Face's `LlamaForCausalLM` and must be the ones the workers train with; if they were not, no set of
//! receipts would be accepted.

use checkpoint_store::{Dtype, Space, SpaceError, TensorDecl};
use proto::spec::ModelSpec;

/// All parameters in canonical order.
pub(crate) fn space(model: &ModelSpec) -> Result<Space, SpaceError> {
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let shape = shape.iter().map(|size| *size as u64).collect();
        tensors.push(TensorDecl { name, shape, dtype: Dtype::F32 });
    };
    let (width, inner) = (model.hidden_size, model.intermediate_size);
    let queries = model.num_attention_heads * model.head_dim;
    let keys = model.num_key_value_heads * model.head_dim;
    add("model.embed_tokens.weight".into(), &[model.vocab_size, width]);
    for layer in 0..model.num_hidden_layers {
        let parts: [(&str, &[usize]); 9] = [
            ("input_layernorm", &[width]),
            ("self_attn.q_proj", &[queries, width]),
            ("self_attn.k_proj", &[keys, width]),
            ("self_attn.v_proj", &[keys, width]),
            ("self_attn.o_proj", &[width, queries]),
            ("post_attention_layernorm", &[width]),
            ("mlp.gate_proj", &[inner, width]),
            ("mlp.up_proj", &[inner, width]),
            ("mlp.down_proj", &[width, inner]),
        ];
        for (part, shape) in parts {
            add(format!("model.layers.{layer}.{part}.weight"), shape);
        }
    }
    add("model.norm.weight".into(), &[width]);
    if !model.tie_word_embeddings {
        add("lm_head.weight".into(), &[model.vocab_size, width]);
    }
    Space::new(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiny_preset_has_its_known_size() {
        let model = ModelSpec::preset("tiny").unwrap();
        let layer = 2 * 128 + (128 + 64 + 64 + 128) * 128 + 3 * 352 * 128;
        assert_eq!(space(&model).unwrap().elements(), 256 * 128 + 4 * layer + 128);
    }
}
