//! A whole model on both devices, from the same parameters.

use proto::spec::ModelSpec;

use super::{Bench, cases, random};
use crate::device::Device;
use crate::device::cuda::driver::Driver;
use crate::model::{Model, recorded};

cases!(llama, gpt2, float64);

/// A small model of a preset's kind.
fn small(preset: &str) -> ModelSpec {
    let mut spec = ModelSpec::preset(preset).unwrap();
    spec.hidden_size = 40;
    spec.intermediate_size = 56;
    spec.num_hidden_layers = 2;
    spec.num_attention_heads = 4;
    spec.head_dim = 10;
    spec.vocab_size = 61;
    spec
}

/// A small Llama with grouped queries.
pub(super) fn spec() -> ModelSpec {
    ModelSpec { num_key_value_heads: 2, ..small("tiny") }
}

fn llama<D: Driver>(bench: &mut Bench<'_, D>) {
    loss_and_gradient(bench, &spec());
}

fn gpt2<D: Driver>(bench: &mut Bench<'_, D>) {
    let positions = Some(23);
    let spec = ModelSpec { num_key_value_heads: 4, max_position_embeddings: positions, ..small("gpt2-124m") };
    loss_and_gradient(bench, &spec);
}

/// Micro-batches of two sequences of 19 tokens: tokens and targets.
pub(super) fn batch() -> [Vec<u32>; 2] {
    [0, 1].map(|shift| (0..38u32).map(|i| (i + shift) * (i + shift) * 5 % 61).collect())
}

/// Every activation on the way is rounded, so what is close is the whole: the loss, and the gradient's direction and
/// length.
fn loss_and_gradient<D: Driver>(bench: &mut Bench<'_, D>, spec: &ModelSpec) {
    let [tokens, targets] = batch();
    let mut twin_model = Model::new(spec, 2, 19, &bench.cpu).unwrap();
    let count = twin_model.parameter_count();
    let parameters: Vec<f32> = random(count, 0).iter().map(|x| x * 0.125).collect();
    let (twin, mut twin_gradient) = (bench.twin(&parameters), bench.twin(&vec![0.0; count]));
    let expected = twin_model.loss_and_gradient(&bench.cpu, &twin, &tokens, &targets, &mut twin_gradient).unwrap();

    let cuda = bench.cuda;
    let mut model = Model::new(spec, 2, 19, cuda).unwrap();
    let parameters = bench.halves(&parameters);
    let mut gradient = cuda.allocate(count, "gradient").unwrap();
    for _ in 0..2 {
        let loss = model.loss_and_gradient(cuda, &parameters, &tokens, &targets, &mut gradient).unwrap();
        assert!((loss - expected).abs() < 0.01 * expected, "loss {loss}, expected {expected}");
        let alone = model.loss(cuda, &parameters, &tokens, &targets).unwrap();
        assert_eq!(alone, loss, "the loss does not depend on whether a gradient is asked for");
        let mut values = vec![0.0; count];
        cuda.download(crate::device::Part(&gradient, 0), &mut values).unwrap();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let (ours, theirs) = (dot(&values, &values).sqrt(), dot(&twin_gradient, &twin_gradient).sqrt());
        let cosine = dot(&values, &twin_gradient) / (ours * theirs);
        assert!(cosine > 0.999 && (ours / theirs - 1.0).abs() < 0.02, "cosine {cosine}, lengths {ours} and {theirs}");
        bench.results.extend(values);
        bench.results.push(loss as f32);
    }
}

/// Against what PyTorch computed in float64: the difference is small beside the gradient, of the whole and of each
/// tensor. Weights and activations have eight significant bits, and tensors are small, so roundings do not average out.
fn float64<D: Driver>(bench: &mut Bench<'_, D>) {
    for case in recorded::cases() {
        let (name, (loss, _, gradient)) = (case.name, recorded::run(&case, bench.cuda));
        assert!((loss - case.loss).abs() < 0.01 * case.loss, "{name}: loss {loss}, recorded {}", case.loss);
        let (mut at, mut whole) = (0, [0.0, 0.0]);
        for tensor in crate::model::parameters(&case.spec) {
            let range = at..at + tensor.elements();
            at = range.end;
            let (mut off, mut all) = (0.0f64, 0.0f64);
            for (got, expected) in gradient[range.clone()].iter().zip(&case.gradient[range]) {
                off += f64::from(got - expected).powi(2);
                all += f64::from(*expected).powi(2);
            }
            let share = (off / all.max(f64::MIN_POSITIVE)).sqrt();
            assert!(share < 0.1, "{name}: the gradient of {} is off by {share}", tensor.name);
            whole = [whole[0] + off, whole[1] + all];
        }
        assert!(whole[0] < 0.03f64.powi(2) * whole[1], "{name}: the gradient is off by {whole:?}");
        bench.results.extend(gradient);
    }
}
