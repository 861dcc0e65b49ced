//! The model against recorded PyTorch losses and gradients, and against itself on other numbers of threads.
//!
//! `fixtures/make_fixtures.py` computed Llama's in float64 from the published definition, `make_gpt2_fixtures.py` those
//! of GPT-2 with Hugging Face's model. The parameters are hashes of their canonical index, so a difference in order or
//! layout would show too.

use proto::spec::{Architecture, ModelSpec};
use safetensors::SafeTensors;

use super::{Model, parameter_count, parameters};
use crate::device::cpu::CpuDevice;
use crate::device::{Device, Part, PartMut};

macro_rules! fixtures {
    ($($name:literal),+ $(,)?) => {
        [$(($name, include_bytes!(concat!("../../tests/fixtures/", $name, ".safetensors")).as_slice())),+]
    };
}

/// Names and files.
const FIXTURES: [(&str, &[u8]); 6] = fixtures!["gqa_tied", "untied", "wide_head", "gpt2", "gpt2_inner", "gpt2_untied"];

/// A model on a micro-batch, with what came of it in float64.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) spec: ModelSpec,
    pub(crate) batch: usize,
    pub(crate) sequence: usize,
    pub(crate) tokens: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    pub(crate) loss: f64,
    pub(crate) gradient: Vec<f32>,
}

/// All of them.
pub(crate) fn cases() -> impl Iterator<Item = Case> {
    FIXTURES.into_iter().map(|(name, bytes)| load(name, bytes))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn load(name: &'static str, bytes: &[u8]) -> Case {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
    let case: serde_json::Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["case"]).unwrap();
    let at = |key: &str| usize::try_from(case[key].as_u64().unwrap()).unwrap();
    let gpt2 = case["architecture"] == "gpt2";
    let heads = at("num_attention_heads");
    let spec = ModelSpec {
        architecture: if gpt2 { Architecture::Gpt2 } else { Architecture::Llama },
        hidden_size: at("hidden_size"),
        num_hidden_layers: at("num_hidden_layers"),
        num_attention_heads: heads,
        num_key_value_heads: if gpt2 { heads } else { at("num_key_value_heads") },
        head_dim: if gpt2 { at("hidden_size") / heads } else { at("head_dim") },
        intermediate_size: at("intermediate_size"),
        vocab_size: at("vocab_size"),
        tie_word_embeddings: case["tie_word_embeddings"].as_bool().unwrap(),
        rope_theta: (!gpt2).then_some(10_000.0),
        rms_norm_eps: (!gpt2).then_some(1e-5),
        initializer_range: 0.02,
        max_position_embeddings: gpt2.then(|| at("max_position_embeddings")),
        layer_norm_epsilon: gpt2.then_some(1e-5),
    };
    spec.validate(name).unwrap();
    let (batch, sequence) = (at("batch"), at("sequence"));
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    let ids: Vec<u32> =
        file.tensor("ids").unwrap().data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    for row in ids.chunks_exact(sequence + 1) {
        tokens.extend(&row[..sequence]);
        targets.extend(&row[1..]);
    }
    let mut gradient = Vec::new();
    for tensor in parameters(&spec) {
        let stored = file.tensor(&tensor.name).unwrap();
        assert_eq!(stored.shape(), tensor.shape, "{}", tensor.name);
        gradient.extend(floats(stored.data()));
    }
    let loss = f64::from_le_bytes(file.tensor("loss").unwrap().data().try_into().unwrap());
    Case { name, spec, batch, sequence, tokens, targets, loss, gradient }
}

/// The parameters the scripts use.
fn hashed_parameters(spec: &ModelSpec) -> Vec<f32> {
    let mut values = Vec::with_capacity(parameter_count(spec));
    for tensor in parameters(spec) {
        let at = values.len();
        values.extend((at..at + tensor.elements()).map(|i| {
            let hash = (i as u64 * 2_654_435_761 % (1 << 32)) >> 16;
            let value = hash as f32 / 65536.0 - 0.5;
            match tensor.shape.len() {
                1 if tensor.name.ends_with("bias") => value,
                1 => value + 1.0,
                _ => value * 0.5,
            }
        }));
    }
    values
}

/// The loss with its gradient, the loss alone, and the gradient.
pub(crate) fn run<D: Device>(case: &Case, device: &D) -> (f64, f64, Vec<f32>) {
    let values = hashed_parameters(&case.spec);
    let mut weights = device.allocate_activation(values.len(), "parameters").unwrap();
    device.upload_activation(&values, PartMut(&mut weights, 0)).unwrap();
    let mut model = Model::new(&case.spec, case.batch, case.sequence, device).unwrap();
    let mut gradient = device.allocate(values.len(), "gradient").unwrap();
    device.upload(&vec![f32::NAN; values.len()], PartMut(&mut gradient, 0)).unwrap();
    let loss = model.loss_and_gradient(device, &weights, &case.tokens, &case.targets, &mut gradient).unwrap();
    let alone = model.loss(device, &weights, &case.tokens, &case.targets).unwrap();
    let mut got = vec![0.0; values.len()];
    device.download(Part(&gradient, 0), &mut got).unwrap();
    (loss, alone, got)
}

#[test]
fn losses_and_gradients_agree_with_pytorch() {
    let device = CpuDevice::new(1).unwrap();
    for case in cases() {
        let (name, (loss, alone, gradient)) = (case.name, run(&case, &device));
        assert_eq!(loss.to_bits(), alone.to_bits(), "{name}: the loss without a gradient");
        assert!((loss - case.loss).abs() < 2e-6 * case.loss, "{name}: loss {loss}, recorded {}", case.loss);
        let mut at = 0;
        for tensor in parameters(&case.spec) {
            let range = at..at + tensor.elements();
            at = range.end;
            let largest = case.gradient[range.clone()].iter().fold(0.0f32, |m, g| m.max(g.abs()));
            for i in range.clone() {
                let (got, expected) = (gradient[i], case.gradient[i]);
                assert!(
                    (got - expected).abs() <= 3e-5 * largest,
                    "{name}: {}[{}] is {got}, recorded {expected}",
                    tensor.name,
                    i - range.start
                );
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for case in cases() {
        let name = case.name;
        let first = run(&case, &CpuDevice::new(1).unwrap());
        for threads in 2..=4 {
            let other = run(&case, &CpuDevice::new(threads).unwrap());
            assert_eq!(first.0.to_bits(), other.0.to_bits());
            assert!(first.2.iter().zip(&other.2).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: {threads} threads");
        }
    }
}
