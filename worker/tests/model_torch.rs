//! The model against recorded PyTorch losses and gradients, and against itself on other numbers of threads.
//!
//! `fixtures/make_fixtures.py` computed Llama's in float64 from the published definition, `make_gpt2_fixtures.py` those
//! of GPT-2 with Hugging Face's model. The parameters are hashes of their canonical index, so a difference in order or
//! layout would show too.

use proto::spec::{Architecture, ModelSpec};
use safetensors::SafeTensors;
use worker::device::Device;
use worker::device::cpu::{CpuBuffer, CpuDevice};
use worker::model::{Model, parameter_count, parameters};

const CASES: [&str; 6] = ["gqa_tied", "untied", "wide_head", "gpt2", "gpt2_inner", "gpt2_untied"];

struct Case {
    spec: ModelSpec,
    batch: usize,
    sequence: usize,
    tokens: Vec<u32>,
    targets: Vec<u32>,
    loss: f64,
    gradient: Vec<f32>,
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn load(name: &str) -> Case {
    let path = format!("{}/tests/fixtures/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
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
    Case { spec, batch, sequence, tokens, targets, loss, gradient }
}

/// The parameters the scripts use.
fn hashed_parameters(spec: &ModelSpec, device: &CpuDevice) -> CpuBuffer {
    let mut buffer = device.allocate(parameter_count(spec), "parameters").unwrap();
    let mut at = 0;
    for tensor in parameters(spec) {
        for i in at..at + tensor.elements() {
            let hash = (i as u64 * 2_654_435_761 % (1 << 32)) >> 16;
            let value = hash as f32 / 65536.0 - 0.5;
            buffer[i] = match tensor.shape.len() {
                1 if tensor.name.ends_with("bias") => value,
                1 => value + 1.0,
                _ => value * 0.5,
            };
        }
        at += tensor.elements();
    }
    buffer
}

fn run(case: &Case, threads: usize) -> (f64, f64, Vec<f32>) {
    let device = CpuDevice::new(threads).unwrap();
    let weights = hashed_parameters(&case.spec, &device);
    let mut model = Model::new(&case.spec, case.batch, case.sequence, &device).unwrap();
    let mut gradient = device.allocate(model.parameter_count(), "gradient").unwrap();
    gradient.fill(f32::NAN);
    let loss = model.loss_and_gradient(&device, &weights, &case.tokens, &case.targets, &mut gradient).unwrap();
    let alone = model.loss(&device, &weights, &case.tokens, &case.targets).unwrap();
    (loss, alone, gradient.to_vec())
}

#[test]
fn losses_and_gradients_agree_with_pytorch() {
    for name in CASES {
        let case = load(name);
        let (loss, alone, gradient) = run(&case, 1);
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
    for name in CASES {
        let case = load(name);
        let first = run(&case, 1);
        for threads in 2..=4 {
            let other = run(&case, threads);
            assert_eq!(first.0.to_bits(), other.0.to_bits());
            assert!(first.2.iter().zip(&other.2).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: {threads} threads");
        }
    }
}
