//! The training thread's work: preparing once, then one generation after another.
//!
//! Whatever goes wrong is sorted here into what the coordinator does about it: the user must act (input), another try
//! may do (transient, exchange), an older checkpoint is needed (corrupt), or the job cannot go on (fatal).

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use checkpoint_store::{CAPTURE_FORMAT, Capture, Kind, Space, StateDecl};
use proto::ids::{Generation, JobName, Rank, WorldSize};
use proto::spec::JobSpec;
use proto::wire::{self, FailureKind};
use tokio::runtime::Handle;

use crate::capture::{CaptureError, Capturer, Patience, Snapshot};
use crate::collective::{RingListener, RingMembership, RingTimeouts, connect};
use crate::device::Device;
use crate::device::cpu::CpuDevice;
use crate::generation::{Finished, Member, Moments, Trainer, train};
use crate::load::{LoadError, Shard, Start, gather_parameters, load_shard, scalar_state};
use crate::machine::session::{Identity, Input};
use crate::session::{Control, News};
use crate::step::StepError;

/// Between two progress reports to the session.
const PROGRESS: Duration = Duration::from_millis(100);
/// The share of `fault.hang` that the last capture may wait for a slot.
const PATIENCE: f64 = 0.8;

/// Why the trainer gave up, and what kind of trouble that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What to do about it.
    pub kind: FailureKind,
    /// For people.
    pub reason: String,
}

impl Failure {
    /// A failure of a kind.
    pub fn new(kind: FailureKind, reason: impl std::fmt::Display) -> Self {
        Self { kind, reason: reason.to_string() }
    }

    fn input(reason: impl std::fmt::Display) -> Self {
        Self::new(FailureKind::Input, reason)
    }
}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        let kind = match &error {
            StepError::Exchange(_) | StepError::Aborted => FailureKind::Exchange,
            StepError::Data(_) => FailureKind::Input,
            StepError::Model(_) | StepError::Device(_) | StepError::Fault { .. } => FailureKind::Fatal,
        };
        Self::new(kind, error)
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        let kind = match &error {
            LoadError::Store(error) => match error.kind() {
                Kind::Retry | Kind::Fenced => FailureKind::Transient,
                Kind::Corrupt => FailureKind::Corrupt,
                Kind::Input => FailureKind::Input,
                Kind::Bug => FailureKind::Fatal,
            },
            LoadError::Reference(_) => FailureKind::Corrupt,
            LoadError::Foreign { .. } => FailureKind::Input,
            LoadError::Aborted => FailureKind::Exchange,
        };
        Self::new(kind, error)
    }
}

impl From<CaptureError> for Failure {
    fn from(error: CaptureError) -> Self {
        let kind = match &error {
            CaptureError::Room { .. } => FailureKind::Input,
            CaptureError::Late(_) => FailureKind::Transient,
            CaptureError::Ended => FailureKind::Fatal,
        };
        Self::new(kind, error)
    }
}

/// How a generation ended for a worker that was told to stop, or is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ended {
    /// The step its state is of.
    pub step: u64,
    /// Loss of that step, if it took one.
    pub loss: Option<f64>,
}

/// A worker that can be given a rank.
pub struct Prepared {
    trainer: Trainer<CpuDevice>,
    listener: RingListener,
    address: SocketAddr,
}

impl Prepared {
    /// Reads the spec, opens and checks the data, allocates the model and opens the ring's port.
    pub fn new(job: &JobName, prepare: &wire::Prepare, capturer: &Capturer) -> Result<Self, Failure> {
        let spec: JobSpec = serde_json::from_slice(&prepare.spec)
            .map_err(|error| Failure::input(format!("the job's spec cannot be read: {error}")))?;
        if spec.name != *job {
            return Err(Failure::input(format!("the spec is of job {}, this worker is of {job}", spec.name)));
        }
        spec.validate("the job's spec").map_err(Failure::input)?;
        let host: IpAddr = prepare.ring_host.parse().map_err(|_| {
            Failure::input(format!("ring host {:?} is not usable; give the agent an IP address", prepare.ring_host))
        })?;
        let source = crate::dataset::open(&spec).map_err(Failure::input)?;
        let space = Space::of_model(&spec.model).map_err(Failure::input)?;
        let device = CpuDevice::new(prepare.threads as usize).map_err(Failure::input)?;
        let trainer = Trainer::new(spec, device, space, source).map_err(Failure::input)?;
        let (listener, address) =
            RingListener::bind(host).map_err(|error| Failure::new(FailureKind::Transient, error))?;
        capturer.slots().place_in(PathBuf::from(&prepare.slots));
        Ok(Self { trainer, listener, address })
    }

    /// What the worker says of itself.
    pub fn identity(&self) -> Identity {
        Identity {
            ring_address: self.address.to_string(),
            numeric_identity: self.trainer.device.numeric_identity(),
            data_fingerprint: self.trainer.feed.fingerprint(),
        }
    }

    /// Joins a generation, trains until it should stop, and sees its last snapshot announced.
    pub fn run(
        &mut self,
        run: &wire::WorkerRun,
        control: &Control,
        capturer: &Capturer,
        handle: &Handle,
        tell: &dyn Fn(News),
    ) -> Result<Ended, Failure> {
        let place = Place::read(run, &self.trainer.spec.name)?;
        let generation = place.membership.generation.get();
        let (mut member, start) = self.join(&place, control, capturer, handle)?;
        tell(News::Event(Input::Joined { generation, step: start.step, source: start.source }));

        let mut told = Instant::now();
        let saver = Saver { place: &place, capturer, control, tell };
        let mut after = |trainer: &Trainer<CpuDevice>, member: &Member<CpuDevice>, done: Finished| {
            if member.is_first() {
                tell(News::Step(place.report(&done)));
            }
            if done.last || told.elapsed() >= PROGRESS {
                told = Instant::now();
                tell(News::Event(Input::Stepped { generation, step: done.step, loss: done.taken.loss }));
            }
            if done.last || done.step.is_multiple_of(trainer.spec.checkpoint.every_steps) {
                saver.save(trainer, member, done.step, done.last)?;
            }
            Ok::<(), Failure>(())
        };
        let trainer = &mut self.trainer;
        let (step, loss) = train(trainer, &mut member, start.step, place.stop_at, control, &mut after)?;
        if step == start.step && start.source == "initialised" {
            saver.save(trainer, &member, step, true)?;
        }
        capturer.flush(saver.grace(trainer))?;
        Ok(Ended { step, loss })
    }

    /// Makes room, loads the shard, forms the ring and completes the parameters.
    fn join(
        &mut self,
        place: &Place,
        control: &Control,
        capturer: &Capturer,
        handle: &Handle,
    ) -> Result<(Member<CpuDevice>, Start), Failure> {
        let trainer = &mut self.trainer;
        let fatal = |error: crate::device::DeviceError| Failure::new(FailureKind::Fatal, error);
        let exchange = |error: crate::collective::CollectiveError| Failure::from(StepError::Exchange(error));
        let range = trainer.shards(place.world)[place.membership.rank.index()].clone();
        capturer.slots().reserve(range.len())?;
        let mut moments = Moments::new(&trainer.device, range.len()).map_err(fatal)?;
        let shard = Shard { range, exp_avg: &mut moments.exp_avg, exp_avg_sq: &mut moments.exp_avg_sq };
        let start = load_shard(trainer, shard, &place.start, handle, control)?;
        let fault = &trainer.spec.fault;
        let timeouts = RingTimeouts {
            connect: Duration::from_secs_f64(fault.restart),
            operation: Duration::from_secs_f64(fault.collective),
        };
        let ring = connect(&self.listener, &place.membership, timeouts, control.ring()).map_err(exchange)?;
        let mut member = Member::new(trainer, ring, moments).map_err(fatal)?;
        gather_parameters(trainer, &mut member).map_err(exchange)?;
        Ok((member, start))
    }
}

/// A checked announcement, as seen from one rank.
struct Place {
    membership: RingMembership,
    world: WorldSize,
    start: Vec<u8>,
    stop_at: u64,
}

impl Place {
    fn read(run: &wire::WorkerRun, job: &JobName) -> Result<Self, Failure> {
        let refuse =
            |what: &str| Failure::new(FailureKind::Transient, format!("the announcement cannot be used: {what}"));
        let announced = run.announcement.as_ref().ok_or_else(|| refuse("it is empty"))?;
        let world = WorldSize::new(announced.world_size).ok_or_else(|| refuse("it has no workers"))?;
        let peers: Result<Vec<SocketAddr>, _> = announced.peers.iter().map(|peer| peer.parse()).collect();
        let peers = peers.map_err(|_| refuse("a peer's address is none"))?;
        if peers.len() != world.count() || run.rank >= world.get() {
            return Err(refuse("its rank or its peers do not fit its world size"));
        }
        let key = announced.key.as_slice().try_into().map_err(|_| refuse("its key does not have 32 bytes"))?;
        let generation = Generation::new(announced.generation);
        let membership = RingMembership { job: job.clone(), generation, rank: Rank::new(run.rank), peers, key };
        Ok(Self { membership, world, start: announced.start.clone(), stop_at: announced.stop_at })
    }

    fn report(&self, done: &Finished) -> wire::StepReport {
        wire::StepReport {
            job: self.membership.job.to_string(),
            generation: self.membership.generation.get(),
            step: done.step,
            loss: done.taken.loss,
            grad_norm: done.taken.norm,
            seconds: done.took.as_secs_f64(),
            validation_loss: done.validation,
        }
    }
}

/// Takes snapshots of a generation.
struct Saver<'a> {
    place: &'a Place,
    capturer: &'a Capturer,
    control: &'a Control,
    tell: &'a dyn Fn(News),
}

impl Saver<'_> {
    /// How long the last snapshot may wait: for the user's patience if asked to stop, else for most of `fault.hang`.
    fn grace(&self, trainer: &Trainer<CpuDevice>) -> Duration {
        let fault = &trainer.spec.fault;
        let seconds = if self.control.is_stopping() { fault.grace } else { fault.grace.max(fault.hang * PATIENCE) };
        Duration::from_secs_f64(seconds)
    }

    /// Captures the state of `step`; without a free slot the `last` one waits, others are skipped and counted.
    fn save(
        &self,
        trainer: &Trainer<CpuDevice>,
        member: &Member<CpuDevice>,
        step: u64,
        last: bool,
    ) -> Result<(), Failure> {
        let RingMembership { job, generation, rank, .. } = &self.place.membership;
        let snapshot = Snapshot {
            message: wire::Captured {
                job: job.to_string(),
                generation: generation.get(),
                step,
                rank: rank.get(),
                world_size: self.place.world.get(),
                ..Default::default()
            },
            capture: Capture {
                format: CAPTURE_FORMAT,
                job: job.clone(),
                generation: *generation,
                rank: *rank,
                world_size: self.place.world,
                space: trainer.space.clone(),
                scalar: scalar_state(&trainer.spec, step),
                states: StateDecl::adamw(),
                hashes: Vec::new(),
                stages: Vec::new(),
            },
            states: [&trainer.parameters[member.shard.clone()], &member.exp_avg, &member.exp_avg_sq],
        };
        let wait = if last { self.grace(trainer) } else { Duration::ZERO };
        let patience = Patience { wait, broken_off: &|| self.control.is_aborted() };
        if self.capturer.capture(snapshot, &patience)?.is_some() {
            return Ok(());
        }
        if last {
            let reason = format!("the snapshot of step {step} found no free slot within {} s", wait.as_secs());
            return Err(Failure::new(FailureKind::Transient, reason));
        }
        (self.tell)(News::Skipped(wire::SaveSkipped {
            job: job.to_string(),
            generation: generation.get(),
            step,
            rank: rank.get(),
        }));
        Ok(())
    }
}
