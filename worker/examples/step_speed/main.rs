//! How fast one worker's training step is, and where its time goes.
//!
//! Runs full steps (forward, backward, exact accumulation, norm, clipping, AdamW) of a 5M-parameter model on random
//! tokens in this process, without exchange or storage, and prints one JSON line with the best and median rate, then a
//! table of the device's operations from a second run:
//!
//! `cargo run -p worker --example step_speed -- --threads 2 --micro-batch 4 --seconds 10 --table`
//!
//! The same model and step in PyTorch: `tests/peers/torch_train.py`.

mod timed;

use std::time::{Duration, Instant};

use proto::spec::{ModelSpec, OptimizerKind, OptimizerSpec};
use worker::device::Device;
use worker::device::cpu::{CpuBuffer, CpuDevice};
use worker::exact::{ExactGradient, mean_scale};
use worker::init::initialize;
use worker::model::{Model, parameters};
use worker::optimizer::{AdamW, ShardUpdate, clip_scale};
use worker::rng::{Counter, Place};

use crate::timed::Timed;

const SEQUENCE: usize = 256;
const BATCH: usize = 16;
const BLOCK: usize = 1 << 16;

/// The value after `--name`, or a default.
fn argument(name: &str, default: usize) -> usize {
    let mut list = std::env::args().skip_while(|a| a != name);
    list.nth(1).and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn optimizer() -> OptimizerSpec {
    OptimizerSpec {
        kind: OptimizerKind::Adamw,
        learning_rate: 1e-3,
        betas: [0.9, 0.95],
        epsilon: 1e-8,
        weight_decay: 0.1,
        no_decay: vec!["norm".into()],
        clip_norm: Some(1.0),
    }
}

/// Runs steps for the given time; returns seconds of each and the last loss.
fn train<D: Device<Buffer = CpuBuffer, Activation = CpuBuffer>>(
    device: &D,
    cpu: &CpuDevice,
    micro_batch: usize,
    time: Duration,
) -> (Vec<f64>, f64) {
    let spec = ModelSpec::preset("small").expect("a preset");
    let count = BATCH / micro_batch;
    let mut model = Model::new(&spec, micro_batch, SEQUENCE, device).expect("memory");
    let n = model.parameter_count();
    let [mut weights, mut gradient, mut exp_avg, mut exp_avg_sq] =
        ["weights", "gradient", "exp_avg", "exp_avg_sq"].map(|what| device.allocate(n, what).expect("memory"));
    initialize(&spec, 1, 0..n, &mut weights);
    let mut sums = ExactGradient::new(device, n, count).expect("memory");
    let rule = AdamW::new(&optimizer(), &parameters(&spec));
    let random = Counter::new(1, Place::Test, 0);
    let tokens: Vec<u32> = (0..=BATCH * SEQUENCE).map(|i| random.bits(i as u64) as u32 % 256).collect();
    let mut norms = vec![0.0; n.div_ceil(BLOCK)];
    let (start, mut times, mut loss) = (Instant::now(), Vec::new(), 0.0);
    while start.elapsed() < time || times.len() < 3 {
        let begin = Instant::now();
        sums.restart();
        loss = 0.0;
        for m in 0..count {
            let first = m * micro_batch * SEQUENCE;
            let last = first + micro_batch * SEQUENCE;
            let (input, target) = (&tokens[first..last], &tokens[first + 1..=last]);
            loss += model.loss_and_gradient(device, &weights, input, target, &mut gradient).expect("a loss");
            assert_eq!(sums.add(device, &gradient).expect("a sum"), None);
        }
        device.gradient_from_sums(n, mean_scale(count), sums.sums(), 0, &mut gradient).expect("a gradient");
        device.block_square_sums(n, BLOCK, &gradient, &mut norms).expect("norms");
        let norm = norms.iter().sum::<f64>().sqrt();
        let scalars = rule.scalars(times.len() as u64 + 1, 1e-3, clip_scale(Some(1.0), norm));
        let to = [&mut exp_avg, &mut exp_avg_sq];
        let update = ShardUpdate { parameters: &mut weights, mirror: None, from: None, to, gradient: &gradient };
        rule.update(cpu, &scalars, 0..n, update).expect("an update");
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    (times, loss / count as f64)
}

fn main() {
    let (threads, micro_batch) = (argument("--threads", 2), argument("--micro-batch", 4));
    let time = Duration::from_secs(argument("--seconds", 10) as u64);
    let device = CpuDevice::new(threads).expect("threads");
    let (times, loss) = train(&device, &device, micro_batch, time);
    let rate = |seconds: f64| (BATCH * SEQUENCE) as f64 / seconds;
    println!(
        "{{\"device\":\"{}\",\"threads\":{threads},\"micro_batch\":{micro_batch},\"steps\":{},\"loss\":{loss:.4},\
         \"tokens_per_second\":{:.0},\"median_tokens_per_second\":{:.0}}}",
        device.numeric_identity(),
        times.len(),
        rate(times[0]),
        rate(times[times.len() / 2])
    );
    if std::env::args().any(|a| a == "--table") {
        let timed = Timed::new(&device);
        let (times, _) = train(&timed, &device, micro_batch, time / 2);
        timed.print(times.len(), times.iter().sum());
    }
}
