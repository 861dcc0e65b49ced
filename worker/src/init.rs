//! Initial weights, drawn per element from a counter-based generator.
//!
//! Element `i` of the canonical space depends on (seed, i) and its tensor's rule alone, so a worker can make the whole
//! space or only its shard and get the same bits. Matrices, learned positions among them, are normal with
//! `initializer_range`; the projections that write into the residual stream (`o_proj`, `down_proj`; GPT-2's `c_proj`)
//! are narrower by `1/√(2·layers)`, as in GPT-2, so that the stream's variance does not grow with depth; norm gains are
//! one, biases zero.

use std::ops::Range;

use proto::spec::ModelSpec;
use rayon::prelude::*;

use crate::model::parameters;
use crate::rng::{Counter, Place};

/// Parts of the names of projections into the residual stream.
const RESIDUAL: [&str; 3] = ["o_proj", "down_proj", "c_proj"];

/// Elements that a thread draws at a time.
const CHUNK: usize = 1 << 16;

/// Fills `out` with the initial values of `range` of the canonical space.
///
/// # Panics
/// If `out` is not as long as `range`, or `range` reaches beyond the space.
pub fn initialize(spec: &ModelSpec, seed: u64, range: Range<usize>, out: &mut [f32]) {
    assert_eq!(out.len(), range.len(), "the output is as long as the range");
    let counter = Counter::new(seed, Place::Weights, 0);
    let narrow = 1.0 / (2.0 * spec.num_hidden_layers as f64).sqrt();
    let (mut start, mut filled) = (0, 0);
    for tensor in parameters(spec) {
        let end = start + tensor.elements();
        let part = range.start.max(start)..range.end.min(end);
        if !part.is_empty() {
            let target = &mut out[part.start - range.start..part.end - range.start];
            if tensor.name.ends_with("bias") {
                target.fill(0.0);
            } else if tensor.shape.len() == 1 {
                target.fill(1.0);
            } else {
                let residual = RESIDUAL.iter().any(|part| tensor.name.contains(part));
                let deviation = spec.initializer_range * if residual { narrow } else { 1.0 };
                target.par_chunks_mut(CHUNK).zip(part.clone().into_par_iter().step_by(CHUNK)).for_each(
                    |(run, first)| {
                        for (value, index) in run.iter_mut().zip(first as u64..) {
                            *value = (counter.normal(index) * deviation) as f32;
                        }
                    },
                );
            }
            filled += part.len();
        }
        start = end;
    }
    assert_eq!(filled, out.len(), "the range lies within the canonical space of {start} elements");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::parameter_count;

    #[test]
    fn any_shard_has_the_bits_of_the_whole() {
        let spec = ModelSpec::preset("tiny").unwrap();
        let count = parameter_count(&spec);
        let mut whole = vec![0.0; count];
        initialize(&spec, 42, 0..count, &mut whole);
        for range in [0..1000, 32_000..70_001, count - 777..count] {
            let mut part = vec![0.0; range.len()];
            initialize(&spec, 42, range.clone(), &mut part);
            assert_eq!(part, whole[range]);
        }
        let (mut at, mut other) = (0, vec![0.0; 64]);
        initialize(&spec, 43, 0..64, &mut other);
        assert_ne!(other, whole[..64]);
        for tensor in parameters(&spec) {
            let values = &whole[at..at + tensor.elements()];
            at += tensor.elements();
            let expected = match tensor.name.as_str() {
                n if n.contains("norm") => 1.0,
                n if n.contains("o_proj") || n.contains("down_proj") => 0.02 / 8f64.sqrt(),
                _ => 0.02,
            };
            assert!((root_mean_square(values) / expected - 1.0).abs() < 0.03, "{}", tensor.name);
        }
    }

    fn root_mean_square(values: &[f32]) -> f64 {
        (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    }

    /// As the published model's code sets them, two layers and width 96.
    #[test]
    fn gpt2_begins_as_it_was_published() {
        let mut spec = ModelSpec::preset("gpt2-124m").unwrap();
        (spec.hidden_size, spec.num_hidden_layers, spec.vocab_size) = (96, 2, 256);
        (spec.intermediate_size, spec.head_dim) = (384, 8);
        let count = parameter_count(&spec);
        let (mut at, mut whole) = (0, vec![f32::NAN; count]);
        initialize(&spec, 42, 0..count, &mut whole);
        for tensor in parameters(&spec) {
            let values = &whole[at..at + tensor.elements()];
            at += tensor.elements();
            let name = tensor.name.as_str();
            let plain = |value: f32| values.iter().all(|v| *v == value);
            if name.ends_with("bias") {
                assert!(plain(0.0), "{name}");
            } else if name.contains("ln_") {
                assert!(plain(1.0), "{name}");
            } else {
                let expected = if name.contains("c_proj") { 0.02 / 4f64.sqrt() } else { 0.02 };
                let found = root_mean_square(values);
                assert!((found / expected - 1.0).abs() < 0.03, "{name}: {found}");
            }
        }
    }
}
