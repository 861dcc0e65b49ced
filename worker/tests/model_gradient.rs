//! The gradient against finite differences of the loss, larger shapes on several threads, and refused input.

use proto::spec::{Architecture, ModelSpec};
use worker::device::cpu::CpuDevice;
use worker::device::{Device, DeviceError};
use worker::init::initialize;
use worker::model::{Model, ModelError, parameter_count, parameters};
use worker::rng::{Counter, Place};

fn spec(hidden: usize, heads: [usize; 2], inner: usize, vocabulary: usize, tied: bool) -> ModelSpec {
    ModelSpec {
        architecture: Architecture::Llama,
        hidden_size: hidden,
        num_hidden_layers: 2,
        num_attention_heads: heads[0],
        num_key_value_heads: heads[1],
        head_dim: hidden / heads[0],
        intermediate_size: inner,
        vocab_size: vocabulary,
        tie_word_embeddings: tied,
        rope_theta: Some(10_000.0),
        rms_norm_eps: Some(1e-5),
        initializer_range: 0.3,
        max_position_embeddings: None,
        layer_norm_epsilon: None,
    }
}

/// The same sizes as a GPT-2 of so many positions; it has no grouped queries.
fn gpt2(llama: &ModelSpec, positions: usize) -> ModelSpec {
    ModelSpec {
        architecture: Architecture::Gpt2,
        num_key_value_heads: llama.num_attention_heads,
        rope_theta: None,
        rms_norm_eps: None,
        max_position_embeddings: Some(positions),
        layer_norm_epsilon: Some(1e-5),
        ..llama.clone()
    }
}

fn ids(count: usize, vocabulary: usize, lane: u32) -> Vec<u32> {
    let random = Counter::new(5, Place::Test, lane);
    (0..count).map(|i| (random.bits(i as u64) % vocabulary as u64) as u32).collect()
}

/// Moves gains and biases from their initial ones and zeros, at which some of their mistakes would not show.
fn unsettle(spec: &ModelSpec, weights: &mut [f32]) {
    let (random, mut at) = (Counter::new(6, Place::Test, 0), 0);
    for tensor in parameters(spec) {
        if tensor.shape.len() == 1 {
            for (i, weight) in weights.iter_mut().enumerate().skip(at).take(tensor.elements()) {
                *weight += 0.1 * random.normal(i as u64) as f32;
            }
        }
        at += tensor.elements();
    }
}

/// The slope of the loss along the gradient of each tensor alone must be that gradient's squared length. A central
/// difference in float32 has an error of about 1e-7/step plus step², so the step is about 1e-2 of a length of one.
#[test]
fn slopes_along_every_tensors_gradient() {
    let device = CpuDevice::new(2).unwrap();
    let llamas = [spec(16, [4, 2], 24, 19, true), spec(16, [2, 2], 24, 19, false)];
    let gpt2s = [gpt2(&llamas[0], 40), gpt2(&llamas[1], 33)];
    for spec in llamas.into_iter().chain(gpt2s) {
        let (batch, sequence) = (2, 33);
        let n = parameter_count(&spec);
        let [mut weights, mut gradient] = ["weights", "gradient"].map(|w| device.allocate(n, w).unwrap());
        initialize(&spec, 11, 0..n, &mut weights);
        unsettle(&spec, &mut weights);
        let (tokens, targets) = (ids(batch * sequence, 19, 0), ids(batch * sequence, 19, 1));
        let mut model = Model::new(&spec, batch, sequence, &device).unwrap();
        model.loss_and_gradient(&device, &weights, &tokens, &targets, &mut gradient).unwrap();
        let start = weights.to_vec();
        let mut at = 0;
        for tensor in parameters(&spec) {
            let range = at..at + tensor.elements();
            at = range.end;
            let length = gradient[range.clone()].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let mut loss_at = |step: f64| {
                weights.copy_from_slice(&start);
                for i in range.clone() {
                    weights[i] = (f64::from(start[i]) + step * f64::from(gradient[i]) / length) as f32;
                }
                model.loss(&device, &weights, &tokens, &targets).unwrap()
            };
            let step = 1e-2;
            // Two step sizes cancel the cubic term (Richardson).
            let narrow = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            let wide = (loss_at(2.0 * step) - loss_at(-2.0 * step)) / (4.0 * step);
            let slope = (4.0 * narrow - wide) / 3.0;
            assert!(
                (slope - length).abs() < 2e-3 * length + 1e-5,
                "{}: slope {slope}, length of the gradient {length}",
                tensor.name
            );
            weights.copy_from_slice(&start);
        }
    }
}

/// Shapes large enough that products, attention and loss are really cut into tasks.
#[test]
fn bits_of_large_shapes_do_not_depend_on_threads() {
    let mut llama = spec(128, [4, 2], 352, 9000, true);
    llama.initializer_range = 0.05;
    for spec in [gpt2(&llama, 220), llama] {
        bits_do_not_depend_on_threads(&spec);
    }
}

fn bits_do_not_depend_on_threads(spec: &ModelSpec) {
    let (batch, sequence) = (3, 200);
    let n = parameter_count(spec);
    let (tokens, targets) = (ids(batch * sequence, 9000, 2), ids(batch * sequence, 9000, 3));
    let mut first: Option<(u64, Vec<u32>)> = None;
    for threads in 1..=4 {
        let device = CpuDevice::new(threads).unwrap();
        let [mut weights, mut gradient] = ["weights", "gradient"].map(|w| device.allocate(n, w).unwrap());
        initialize(spec, 1, 0..n, &mut weights);
        let mut model = Model::new(spec, batch, sequence, &device).unwrap();
        let mut pass = || {
            let loss = model.loss_and_gradient(&device, &weights, &tokens, &targets, &mut gradient).unwrap();
            (loss.to_bits(), gradient.iter().map(|g| g.to_bits()).collect::<Vec<_>>())
        };
        let (once, again) = (pass(), pass());
        assert!(once == again, "{threads} threads: two passes differ");
        assert!(first.get_or_insert_with(|| once.clone()) == &once, "{threads} threads differ from one");
    }
}

#[test]
fn bad_tokens_and_lengths_are_refused_and_non_finite_losses_are_seen() {
    let device = CpuDevice::new(1).unwrap();
    let spec = spec(8, [2, 1], 12, 10, true);
    let n = parameter_count(&spec);
    let [mut weights, mut gradient] = ["weights", "gradient"].map(|w| device.allocate(n, w).unwrap());
    initialize(&spec, 1, 0..n, &mut weights);
    let mut model = Model::new(&spec, 1, 4, &device).unwrap();
    let error = model.loss(&device, &weights, &[1, 2, 3], &[1, 2, 3, 4]).unwrap_err();
    assert!(matches!(error, ModelError::Length { what: "tokens", expected: 4, given: 3 }), "{error}");
    let error = model.loss(&device, &weights, &[1, 2, 3, 4], &[1, 10, 3, 4]).unwrap_err();
    assert!(matches!(error, ModelError::Token { position: 1, token: 10, .. }), "{error}");
    assert!(error.to_string().contains("ids 0 to 9"), "{error}");
    weights[100] = f32::NAN;
    let loss = model.loss_and_gradient(&device, &weights, &[1, 2, 3, 4], &[1, 1, 3, 4], &mut gradient).unwrap();
    assert!(loss.is_nan());
    let short = Model::new(&gpt2(&spec, 3), 1, 4, &device).err().unwrap();
    assert!(matches!(short, ModelError::Positions { sequence: 4, positions: 3 }), "{short}");
    let error = device.allocate(usize::MAX / 8, "a test").unwrap_err();
    assert!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}");
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    let device = CpuDevice::new(2).unwrap();
    let mut deep = ModelSpec::preset("gpt2-124m").unwrap();
    (deep.hidden_size, deep.num_hidden_layers, deep.intermediate_size, deep.vocab_size) = (48, 5, 64, 70);
    (deep.num_attention_heads, deep.num_key_value_heads, deep.head_dim) = (3, 3, 16);
    let mut llama = spec(32, [4, 2], 40, 70, false);
    llama.num_hidden_layers = 4;
    for spec in [deep, llama] {
        let (batch, sequence) = (2, 19);
        let n = parameter_count(&spec);
        let mut weights = device.allocate(n, "weights").unwrap();
        initialize(&spec, 3, 0..n, &mut weights);
        let (tokens, targets) = (ids(batch * sequence, 70, 0), ids(batch * sequence, 70, 1));
        let mut passes = [Model::new, Model::recomputing].map(|make| {
            let mut model = make(&spec, batch, sequence, &device).unwrap();
            let mut gradient = device.allocate(n, "gradient").unwrap();
            let loss = model.loss_and_gradient(&device, &weights, &tokens, &targets, &mut gradient).unwrap();
            (loss.to_bits(), gradient.iter().map(|g| g.to_bits()).collect::<Vec<_>>())
        });
        let [plain, again] = &mut passes;
        assert!(plain == again, "{:?}", spec.architecture);
    }
}
