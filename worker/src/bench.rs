//! How fast this machine trains: real steps of a job, without processes, store or network.
//!
//! Every worker is a thread with its own device, data and ring end on loopback, and takes whole steps: forward,
//! backward, exact sums, exchange, clipping, AdamW. The first step warms up and is not counted.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::ids::Generation;
use proto::spec::{DeviceKind, JobSpec};

use checkpoint_store::Space;

use crate::collective::{CollectiveError, RingListener, RingMembership, RingTimeouts, connect};
use crate::device::choose;
use crate::device::cpu::CpuDevice;
use crate::device::{DeviceError, PartMut, RankState, TrainDevice};
use crate::feed::{Source, Synthetic};
use crate::generation::{Finished, Member, Observer, Trainer, train};
use crate::init::initialize;
use crate::model::ModelError;
use crate::session::Control;
use crate::slots::{SlotError, Slots};
use crate::step::{StepError, Taken};

/// For the ring to form and for one exchange.
const EXCHANGE: Duration = Duration::from_mins(2);

/// What was measured.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Report {
    /// Workers, each with `threads` threads.
    pub workers: usize,
    /// Threads of each worker.
    pub threads: usize,
    /// Parameters of the model.
    pub parameters: u64,
    /// Steps measured.
    pub steps: u64,
    /// Median seconds of a step.
    pub seconds_per_step: f64,
    /// Tokens of a step over the median step.
    pub tokens_per_second: f64,
    /// Steps that were computed twice because a gradient outgrew its grid.
    pub again: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// The arithmetic it ran on.
    pub device: String,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The model cannot be had.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The ring could not be formed.
    #[error(transparent)]
    Exchange(#[from] CollectiveError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The model's space or the job's data.
    #[error("{0}")]
    Input(String),
    /// Memory for the state.
    #[error(transparent)]
    Slots(#[from] SlotError),
    /// A defect: slots were reserved, but none is free.
    #[error("no slot is free")]
    NoSlot,
    /// A worker's thread ended.
    #[error("a worker's thread ended with a panic")]
    Panic,
}

/// Trains a job for about `seconds` on `workers` workers of `threads` threads each, on its own data if `real_data`,
/// else on synthetic sequences. With [`DeviceKind::Cuda`] all workers share the first GPU, else they are on the CPU.
pub fn bench_train(
    spec: &JobSpec,
    kind: DeviceKind,
    threads: usize,
    workers: usize,
    seconds: f64,
    real_data: bool,
) -> Result<Report, BenchError> {
    let workers = workers.clamp(1, spec.training.micro_batches());
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let bound: Result<Vec<_>, _> = (0..workers).map(|_| RingListener::bind(host)).collect();
    let (listeners, addresses): (Vec<_>, Vec<_>) = bound?.into_iter().unzip();
    let memberships = RingMembership::of_ring(&addresses, &spec.name, Generation::new(1), [7; 32]);
    // Any rank's request stops all after the same step.
    let controls: Vec<_> = (0..workers).map(|_| Arc::new(Control::new(false))).collect();
    let mut reports = std::thread::scope(|scope| {
        let running: Vec<_> = listeners
            .into_iter()
            .zip(&controls)
            .zip(memberships)
            .map(|((listener, control), membership)| {
                scope.spawn(move || {
                    let place = (&listener, &membership, control.as_ref());
                    let result = on_device(kind, spec, threads, place, seconds, real_data);
                    if result.is_err() {
                        control.abort(); // closes the ring, so that the others end too
                    }
                    result
                })
            })
            .collect();
        running.into_iter().map(|worker| worker.join().unwrap_or(Err(BenchError::Panic))).collect::<Vec<_>>()
    });
    // The error of the first rank that has one is most likely the cause, except for a ring that broke.
    let cause = |report: &Result<Report, BenchError>| matches!(report, Err(error) if !is_echo(error));
    let first = reports.iter().position(cause).or_else(|| reports.iter().position(Result::is_err)).unwrap_or(0);
    reports.swap_remove(first).map(|report| Report { workers, ..report })
}

fn is_echo(error: &BenchError) -> bool {
    matches!(error, BenchError::Exchange(_) | BenchError::Step(StepError::Exchange(_)))
}

fn on_device(
    kind: DeviceKind,
    spec: &JobSpec,
    threads: usize,
    place: (&RingListener, &RingMembership, &Control),
    seconds: f64,
    real_data: bool,
) -> Result<Report, BenchError> {
    if kind == DeviceKind::Cuda {
        return work(choose::start(0, spec.training.reduction)?, spec, threads, place, seconds, real_data);
    }
    work(CpuDevice::new(threads)?, spec, threads, place, seconds, real_data)
}

fn work<D: TrainDevice>(
    device: D,
    spec: &JobSpec,
    threads: usize,
    (listener, membership, control): (&RingListener, &RingMembership, &Control),
    seconds: f64,
    real_data: bool,
) -> Result<Report, BenchError> {
    let space = Space::of_model(&spec.model).map_err(|error| BenchError::Input(error.to_string()))?;
    let source: Box<dyn Source> = if real_data {
        crate::dataset::open(spec).map_err(|error| BenchError::Input(error.to_string()))?
    } else {
        let vocabulary = u32::try_from(spec.model.vocab_size).unwrap_or(u32::MAX);
        Box::new(Synthetic { vocabulary, sequence: spec.training.sequence_length, held_out: 0 })
    };
    let mut trainer = Trainer::new(endless(spec), device, space, source)?;
    let count = trainer.model.parameter_count();
    let mut parameters = vec![0.0; count];
    initialize(&spec.model, spec.training.seed, 0..count, &mut parameters);
    trainer.device.upload_activation(&parameters, PartMut(&mut trainer.parameters, 0))?;
    let timeouts = RingTimeouts { connect: EXCHANGE, operation: EXCHANGE };
    let ring = connect(listener, membership, timeouts, control.ring())?;
    let shard = trainer.shards(ring.world_size())[ring.rank().index()].clone();
    let slots = Arc::new(Slots::default());
    slots.reserve(shard.len())?;
    let mut state = D::State::new(&trainer.device, slots.clone(), shard.len())?.ok_or(BenchError::NoSlot)?;
    state.fill()[0].copy_from_slice(&parameters[shard.clone()]);
    state.filled(&trainer.device, &mut trainer.parameters, shard.start)?;
    drop(parameters);
    let mut member = Member::new(&trainer, ring, state, slots, (membership.generation, 0))?;
    let mut watch = Stopwatch {
        control,
        until: Instant::now() + Duration::from_secs_f64(seconds),
        times: vec![],
        again: 0,
        loss: 0.0,
    };
    train(&mut trainer, &mut member, 0, u64::MAX, control, &mut watch)?;
    let Stopwatch { mut times, loss, again, .. } = watch;
    times.sort_unstable_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    Ok(Report {
        workers: 1,
        threads,
        parameters: count as u64,
        steps: times.len() as u64,
        seconds_per_step: median,
        tokens_per_second: spec.training.tokens_per_step() as f64 / median,
        again,
        loss,
        device: trainer.device.numeric_identity(),
    })
}

/// Times steps, and asks for an end when the time is up.
struct Stopwatch<'a> {
    control: &'a Control,
    until: Instant,
    times: Vec<f64>,
    again: u64,
    loss: f64,
}

impl<D: TrainDevice> Observer<D> for Stopwatch<'_> {
    type Error = StepError;

    fn updated(&mut self, _: u64, _: &Taken) {}

    fn finished(&mut self, _: &Trainer<D>, _: &mut Member<D>, done: Finished) -> Result<(), StepError> {
        if done.step > 1 {
            self.times.push(done.took.as_secs_f64());
            self.again += u64::from(done.taken.again > 0);
        }
        self.loss = done.taken.loss;
        if Instant::now() >= self.until && done.step > 2 {
            self.control.stop();
        }
        Ok(())
    }
}

/// The same job without an end, without validation and without captures.
fn endless(spec: &JobSpec) -> JobSpec {
    let mut spec = spec.clone();
    spec.checkpoint.memory = false;
    spec.checkpoint.every_steps = u64::MAX;
    spec.training.steps = u64::MAX;
    spec.training.validate_every = 0;
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_workers_take_the_same_steps_as_one() {
        let text = r#"
            name = "bench"
            [model]
            preset = "tiny"
            num_hidden_layers = 1
            [data]
            train = "none"
            [training]
            steps = 4
            sequence_length = 16
            global_batch = 4
        "#;
        let spec = JobSpec::parse("test", text, std::path::Path::new("/"), &std::collections::BTreeMap::new()).unwrap();
        let one = bench_train(&spec, DeviceKind::Cpu, 1, 1, 0.0, false).unwrap();
        let two = bench_train(&spec, DeviceKind::Cpu, 1, 2, 0.0, false).unwrap();
        assert_eq!((one.workers, two.workers, one.steps), (1, 2, two.steps));
        assert_eq!(one.loss, two.loss);
        assert!(one.tokens_per_second > 0.0 && one.loss.is_finite());
    }
}
