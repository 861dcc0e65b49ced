//! What a capture at every step costs the training thread: real steps, real slots on the memory file system, real
//! hashes.
//!
//! Held is all that the thread does for a capture: writing the parameters into the slot is part of the update and costs
//! memory bandwidth, so the time of whole steps is measured too, with captures and without. A thread stands in for the
//! agent: it holds each snapshot until a newer one is complete, as the agent of a node alone does.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint_store::{CAPTURE_FORMAT, Capture, Space, StateDecl};
use proto::ids::{Generation, Rank, WorldSize};
use proto::spec::{DeviceKind, JobSpec, Overrides};
use proto::wire;
use tokio::sync::mpsc;

use crate::bench::BenchError;
use crate::capture::{Capturer, Snapshot};
use crate::collective::{RingListener, RingMembership, RingTimeouts, connect};
use crate::device::choose;
use crate::device::cpu::CpuDevice;
use crate::device::{Frozen, PartMut, RankState, TrainDevice};
use crate::feed::Synthetic;
use crate::generation::{Finished, Member, Observer, Trainer, train};
use crate::init::initialize;
use crate::load::scalar_state;
use crate::machine::cadence::Tier;
use crate::machine::kept::Steps;
use crate::session::{Control, News};
use crate::slots::{Kept, Slots};
use crate::step::{StepError, Taken};

/// For the ring to form and for one exchange.
const EXCHANGE: Duration = Duration::from_mins(2);
/// Bytes of state of one parameter.
const BYTES: u64 = 12;

/// What was measured.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct CaptureReport {
    /// Workers, each with `threads` threads.
    pub workers: usize,
    /// Threads of each worker.
    pub threads: usize,
    /// Parameters of the model.
    pub parameters: u64,
    /// Bytes of one worker's state.
    pub state_bytes: u64,
    /// Steps taken, captures that happened, and captures that found no slot; of the first rank.
    pub steps: u64,
    /// See `steps`.
    pub captured: u64,
    /// See `steps`.
    pub skipped: u64,
    /// Steps that were computed twice because a gradient outgrew its grid.
    pub again: u64,
    /// Seconds that a capture held the training thread: the median.
    pub held_median: f64,
    /// And the 99th percentile.
    pub held_p99: f64,
    /// Median seconds of a step, with captures.
    pub step_median: f64,
    /// The same without captures.
    pub step_without: f64,
    /// Median seconds of hashing a snapshot, in the background.
    pub hash_median: f64,
}

/// Trains a model whose state takes about `bytes` on each of `workers` workers, for `seconds`, capturing every step.
pub fn bench_capture(bytes: u64, threads: usize, workers: usize, seconds: f64) -> Result<CaptureReport, BenchError> {
    bench_snapshots(&spec(bytes * workers as u64 / BYTES)?, DeviceKind::Cpu, threads, workers, seconds)
}

/// Trains a job on synthetic sequences, capturing every step, and without captures for a quarter of the time. With
/// [`DeviceKind::Cuda`] all workers share the first GPU.
pub fn bench_snapshots(
    spec: &JobSpec,
    kind: DeviceKind,
    threads: usize,
    workers: usize,
    seconds: f64,
) -> Result<CaptureReport, BenchError> {
    let with = run(spec, (kind, threads), workers, seconds * 0.75, true)?;
    let without = run(spec, (kind, threads), workers, seconds * 0.25, false)?;
    Ok(CaptureReport { step_without: without.step_median, ..with })
}

/// A job of about so many parameters: few layers, short sequences, so that steps are short and captures dense.
fn spec(parameters: u64) -> Result<JobSpec, BenchError> {
    // A layer of width w with an ffn of 3w has 13 w² parameters.
    let width = (((parameters as f64 / (4.0 * 13.0)).sqrt() / 64.0).round() as u64 * 64).max(64);
    let text = format!(
        "name = \"capture\"\n[model]\nhidden_size = {width}\nnum_hidden_layers = 4\nnum_attention_heads = {heads}\n\
         intermediate_size = {ffn}\nvocab_size = 256\n[data]\ntrain = \"none\"\n[training]\nsteps = 1000000\n\
         sequence_length = 256\nglobal_batch = 16\nmicro_batch = 2\nvalidate_every = 0\n[checkpoint]\n\
         every_steps = 1000000\nmemory_every = 1\n",
        heads = width / 64,
        ffn = width * 3,
    );
    JobSpec::parse("bench", &text, std::path::Path::new("/"), &Overrides::new())
        .map_err(|error| BenchError::Input(error.to_string()))
}

fn run(
    spec: &JobSpec,
    device: (DeviceKind, usize),
    workers: usize,
    seconds: f64,
    capture: bool,
) -> Result<CaptureReport, BenchError> {
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let bound: Result<Vec<_>, _> = (0..workers).map(|_| RingListener::bind(host)).collect();
    let (listeners, addresses): (Vec<_>, Vec<_>) = bound?.into_iter().unzip();
    let memberships = RingMembership::of_ring(&addresses, &spec.name, Generation::new(1), [7; 32]);
    let mut spec = spec.clone();
    spec.checkpoint.memory = capture;
    spec.checkpoint.memory_every = 1;
    spec.checkpoint.every_steps = u64::MAX;
    spec.training.steps = u64::MAX;
    spec.training.validate_every = 0;
    let spec = &spec;
    let reports: Vec<Result<CaptureReport, BenchError>> = std::thread::scope(|scope| {
        let running: Vec<_> = listeners
            .into_iter()
            .zip(memberships)
            .map(|(listener, membership)| scope.spawn(move || on_device(spec, device, &listener, &membership, seconds)))
            .collect();
        running.into_iter().map(|worker| worker.join().unwrap_or(Err(BenchError::Panic))).collect()
    });
    let mut first = None;
    for report in reports {
        let report = report?;
        first.get_or_insert(report);
    }
    first.map(|report| CaptureReport { workers, ..report }).ok_or(BenchError::Panic)
}

fn on_device(
    spec: &JobSpec,
    (kind, threads): (DeviceKind, usize),
    listener: &RingListener,
    membership: &RingMembership,
    seconds: f64,
) -> Result<CaptureReport, BenchError> {
    let report = if kind == DeviceKind::Cuda {
        work(choose::start(0, spec.training.reduction)?, spec, listener, membership, seconds)?
    } else {
        work(CpuDevice::new(threads)?, spec, listener, membership, seconds)?
    };
    Ok(CaptureReport { threads, ..report })
}

/// One worker, its slots in a folder of their own on the memory file system.
fn work<D: TrainDevice>(
    device: D,
    spec: &JobSpec,
    listener: &RingListener,
    membership: &RingMembership,
    seconds: f64,
) -> Result<CaptureReport, BenchError> {
    let input = |error: String| BenchError::Input(error);
    let space = Space::of_model(&spec.model).map_err(|error| input(error.to_string()))?;
    let vocabulary = u32::try_from(spec.model.vocab_size).unwrap_or(u32::MAX);
    let source = Synthetic { vocabulary, sequence: spec.training.sequence_length, held_out: 0 };
    let mut trainer = Trainer::new(spec.clone(), device, space, Box::new(source))?;
    let count = trainer.model.parameter_count();
    let mut parameters = vec![0.0; count];
    initialize(&spec.model, spec.training.seed, 0..count, &mut parameters);
    trainer.device.upload_activation(&parameters, PartMut(&mut trainer.parameters, 0))?;
    let control = Control::new(false);
    let timeouts = RingTimeouts { connect: EXCHANGE, operation: EXCHANGE };
    let ring = connect(listener, membership, timeouts, control.ring())?;
    let folder = Folder::make(membership.rank).map_err(|error| input(format!("no folder for slots: {error}")))?;
    let slots = Arc::new(Slots::default());
    slots.place_in(folder.0.clone(), 0);
    let world = ring.world_size();
    let place = trainer.shards(world)[ring.rank().index()].clone();
    let shard = place.len();
    slots.reserve(shard)?;
    let (news, incoming) = mpsc::channel(64);
    let keeper = keep(slots.clone(), incoming);
    let capturer = Capturer::start(slots.clone(), news).map_err(|error| input(error.to_string()))?;
    let mut state = D::State::new(&trainer.device, slots.clone(), shard)?.ok_or(BenchError::NoSlot)?;
    let start = place.start;
    state.fill()[0].copy_from_slice(&parameters[place]);
    state.filled(&trainer.device, &mut trainer.parameters, start)?;
    drop(parameters);
    let mut member = Member::new(&trainer, ring, state, slots, (membership.generation, 0))?;
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let mut watch = Watch { control: &control, capturer, membership, world, until, seen: Seen::default() };
    train(&mut trainer, &mut member, 0, u64::MAX, &control, &mut watch)?;
    let Watch { capturer, mut seen, .. } = watch;
    capturer.flush(EXCHANGE).map_err(|error| input(error.to_string()))?;
    // The hashing thread ends with the capturer, and the keeper with it.
    drop(capturer);
    let mut hashes = keeper.join().map_err(|_| BenchError::Panic)?;
    Ok(CaptureReport {
        workers: 1,
        threads: 0,
        parameters: count as u64,
        state_bytes: shard as u64 * BYTES,
        steps: seen.steps.len() as u64,
        captured: seen.held.len() as u64,
        skipped: seen.skipped,
        again: seen.again,
        held_median: quantile(&mut seen.held, 0.5),
        held_p99: quantile(&mut seen.held, 0.99),
        step_median: quantile(&mut seen.steps, 0.5),
        step_without: 0.0,
        hash_median: quantile(&mut hashes, 0.5),
    })
}

/// Holds the newest snapshot and frees the one before, as the agent of a node alone does. Returns the times of hashing.
fn keep(slots: Arc<Slots>, mut incoming: mpsc::Receiver<News>) -> std::thread::JoinHandle<Vec<f64>> {
    std::thread::spawn(move || {
        let (mut held, mut hashes) = (None, vec![]);
        while let Some(news) = incoming.blocking_recv() {
            let News::Captured(captured) = news else { continue };
            if let Ok(capture) = Capture::from_json(&captured.capture) {
                let hash = capture.stages.iter().filter(|stage| stage.name == "hash");
                hashes.extend(hash.map(|stage| stage.micros as f64 / 1e6));
            }
            let steps = Steps::of(&[captured.step], &[]);
            slots.keeps(Kept { generation: captured.generation, steps, seconds: 0.0 });
            if let Some(before) = held.replace(captured.slot) {
                slots.free(before);
            }
        }
        hashes
    })
}

#[derive(Debug, Default)]
struct Seen {
    steps: Vec<f64>,
    held: Vec<f64>,
    skipped: u64,
    again: u64,
}

struct Watch<'a> {
    control: &'a Control,
    capturer: Capturer,
    membership: &'a RingMembership,
    world: WorldSize,
    until: Instant,
    seen: Seen,
}

impl<D: TrainDevice> Observer<D> for Watch<'_> {
    type Error = StepError;

    fn updated(&mut self, _: u64, _: &Taken) {}

    fn finished(&mut self, trainer: &Trainer<D>, member: &mut Member<D>, done: Finished) -> Result<(), StepError> {
        // The first steps touch their memory for the first time; they and their captures are not counted.
        let counted = done.step > 2;
        if counted {
            self.seen.steps.push(done.took.as_secs_f64());
            self.seen.again += u64::from(done.taken.again > 0);
        }
        if Instant::now() >= self.until && done.step > 4 {
            self.control.stop();
        }
        let (step, taken) = (done.step, &done.taken);
        self.seen.skipped += u64::from(counted && taken.decision.skipped == Some(Tier::Memory));
        if taken.decision.capture != Some(Tier::Memory) {
            return Ok(());
        }
        let began = Instant::now();
        let RingMembership { job, generation, rank, .. } = self.membership;
        let Frozen { slot, arrival } = member.state.freeze(&trainer.device)?;
        let snapshot = Snapshot {
            slot,
            arrival,
            threads: trainer.device.spare_threads(),
            elements: member.shard.len(),
            frozen: (began, began.elapsed()),
            message: wire::Captured { generation: generation.get(), step, ..Default::default() },
            capture: Capture {
                format: CAPTURE_FORMAT,
                job: job.clone(),
                generation: *generation,
                rank: *rank,
                world_size: self.world,
                space: trainer.space.clone(),
                scalar: scalar_state(&trainer.spec, step, &[]),
                states: StateDecl::adamw(),
                hashes: Vec::new(),
                stages: Vec::new(),
            },
        };
        let announced = self.capturer.announce(snapshot);
        if counted {
            self.seen.held.push(began.elapsed().as_secs_f64());
        }
        // Without its thread nothing more would be captured; the ring's end is what ends a run.
        announced.map_err(|_| StepError::Aborted)
    }
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let at = ((values.len() as f64 - 1.0) * share).round().max(0.0) as usize;
    values.get(at).copied().unwrap_or(0.0)
}

/// A folder for slot files, removed at the end.
struct Folder(std::path::PathBuf);

impl Folder {
    fn make(rank: Rank) -> std::io::Result<Self> {
        let memory = std::path::Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        let path = parent.join(format!("cairn-bench-{}-{rank}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Left behind only if the memory file system is gone.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_model_is_captured_at_nearly_every_step() {
        let report = bench_capture(1 << 20, 1, 2, 2.0).unwrap();
        assert!(report.steps > 0 && report.captured > 0, "{report:?}");
        assert!(report.captured + report.skipped <= report.steps, "{report:?}");
        assert!(report.held_median > 0.0 && report.hash_median > 0.0 && report.step_without > 0.0, "{report:?}");
    }
}
