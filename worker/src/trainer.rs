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

use crate::capture::{CaptureError, Capturer, Snapshot};
use crate::collective::{Collective, CollectiveError, Moved, RingListener, RingMembership, RingTimeouts, connect};
use crate::device::choose::{Chosen, choose, start};
use crate::device::cpu::CpuDevice;
use crate::device::{DeviceError, Frozen, RankState, TrainDevice};
use crate::generation::{Finished, Member, Observer, Trainer, train};
use crate::load::{LoadError, Start, load_shard, scalar_state};
use crate::machine::cadence::Tier;
use crate::machine::kept::Verdicts;
use crate::machine::session::{Identity, Input};
use crate::machine::stragglers::{Straggler, Stragglers};
use crate::model::ModelError;
use crate::session::{Control, News};
use crate::slots::SlotError;
use crate::step::{StepError, Taken, gather_parameters};

/// Between two progress reports to the session.
const PROGRESS: Duration = Duration::from_millis(100);
/// The share of `fault.hang` that hashing the last capture may take.
const PATIENCE: f64 = 0.8;

/// Why the trainer gave up, and what kind of trouble that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What to do about it.
    pub kind: FailureKind,
    /// For people.
    pub reason: String,
    /// The device is lost to this process: another has to take its place.
    pub lost: bool,
    /// Of a broken exchange: how far it had come.
    pub moved: Option<Moved>,
}

impl Failure {
    /// A failure of a kind.
    pub fn new(kind: FailureKind, reason: impl std::fmt::Display) -> Self {
        Self { kind, reason: reason.to_string(), lost: false, moved: None }
    }

    /// With how far the exchange had come, if it is that which broke.
    fn of_ring(self, ring: &dyn Collective) -> Self {
        let moved = (self.kind == FailureKind::Exchange).then(|| ring.moved());
        Self { moved, ..self }
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
            StepError::Fault { .. } => FailureKind::NonFinite,
            StepError::Model(ModelError::Device(device)) | StepError::Device(device) if device.is_lost() => {
                return Self { lost: true, ..Self::new(FailureKind::Transient, error) };
            }
            StepError::Model(_) | StepError::Device(_) | StepError::NoSlot(_) => FailureKind::Fatal,
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
            CaptureError::Late(_) => FailureKind::Transient,
            CaptureError::Ended => FailureKind::Fatal,
        };
        Self::new(kind, error)
    }
}

impl From<SlotError> for Failure {
    fn from(error: SlotError) -> Self {
        Self::input(error)
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

/// A worker that can be given a rank, whatever device it computes on.
pub trait Ready {
    /// What the worker says of itself.
    fn identity(&self) -> Identity;

    /// Joins a generation, trains until it should stop, and sees its last snapshot announced.
    fn run(
        &mut self,
        run: &wire::WorkerRun,
        control: &Control,
        capturer: &Capturer,
        handle: &Handle,
        tell: &dyn Fn(News),
    ) -> Result<Ended, Failure>;
}

/// Reads the spec, opens and checks the data, allocates the model on the job's device and opens the ring's port.
pub fn prepare(job: &JobName, prepare: &wire::Prepare, capturer: &Capturer) -> Result<Box<dyn Ready>, Failure> {
    let spec: JobSpec = serde_json::from_slice(&prepare.spec)
        .map_err(|error| Failure::input(format!("the job's spec cannot be read: {error}")))?;
    if spec.name != *job {
        return Err(Failure::input(format!("the spec is of job {}, this worker is of {job}", spec.name)));
    }
    spec.validate("the job's spec").map_err(Failure::input)?;
    let chosen = choose(spec.resources.device, prepare.place as usize).map_err(|error| {
        Failure::input(format!("{error}; `cairn doctor` says more, and resources.device = \"cpu\" does without"))
    })?;
    tracing::info!(device = ?chosen, "computing");
    match chosen {
        Chosen::Cpu => {
            let device = CpuDevice::new(prepare.threads as usize).map_err(Failure::input)?;
            Ok(Box::new(Prepared::new(spec, device, prepare, capturer)?))
        }
        Chosen::Cuda(index) => {
            let device = start(index, spec.training.reduction).map_err(|error| {
                if error.is_lost() {
                    Failure { lost: true, ..Failure::new(FailureKind::Transient, error) }
                } else {
                    Failure::input(error)
                }
            })?;
            Ok(Box::new(Prepared::new(spec, device, prepare, capturer)?))
        }
    }
}

/// A worker on one kind of device.
struct Prepared<D: TrainDevice> {
    trainer: Trainer<D>,
    listener: RingListener,
    address: SocketAddr,
}

impl<D: TrainDevice> Prepared<D> {
    fn new(spec: JobSpec, device: D, prepare: &wire::Prepare, capturer: &Capturer) -> Result<Self, Failure> {
        let host: IpAddr = prepare.ring_host.parse().map_err(|_| {
            Failure::input(format!("ring host {:?} is not usable; give the agent an IP address", prepare.ring_host))
        })?;
        let source = crate::dataset::open(&spec).map_err(Failure::input)?;
        let space = Space::of_model(&spec.model).map_err(Failure::input)?;
        let trainer = Trainer::new(spec, device, space, source).map_err(Failure::input)?;
        let (listener, address) =
            RingListener::bind(host).map_err(|error| Failure::new(FailureKind::Transient, error))?;
        capturer.slots().place_in(PathBuf::from(&prepare.slots), prepare.slot_budget);
        Ok(Self { trainer, listener, address })
    }

    /// Makes room, loads the shard, forms the ring and completes the parameters.
    fn join(
        &mut self,
        place: &Place,
        control: &Control,
        capturer: &Capturer,
        handle: &Handle,
        tell: &dyn Fn(News),
    ) -> Result<(Member<D>, Start), Failure> {
        let trainer = &mut self.trainer;
        let fatal = |error: DeviceError| Failure::from(StepError::Device(error));
        let exchange = |error: CollectiveError| Failure::from(StepError::Exchange(error));
        let range = trainer.shards(place.world)[place.membership.rank.index()].clone();
        let slots = capturer.slots().clone();
        slots.reserve(range.len())?;
        let mut state = D::State::new(&trainer.device, slots.clone(), range.len())
            .map_err(fatal)?
            .ok_or_else(|| Failure::new(FailureKind::Fatal, "no slot is free, though they were just reserved"))?;
        let start = if place.in_memory {
            restore(trainer, place, state.slot(), control, tell)?
        } else {
            load_shard(trainer, range.clone(), state.fill(), &place.start, handle, control)?
        };
        if !trainer.gradient_sum.resume(&start.exponents) {
            let count = start.exponents.len();
            let reason = format!("the state of step {} has {count} grids of another kind of device", start.step);
            // What peers hold in memory may be wrong for once; what is stored stays so.
            let kind = if place.in_memory { FailureKind::Transient } else { FailureKind::Input };
            return Err(Failure::new(kind, reason));
        }
        state.filled(&trainer.device, &mut trainer.parameters, range.start).map_err(fatal)?;
        let fault = &trainer.spec.fault;
        let timeouts = RingTimeouts {
            connect: Duration::from_secs_f64(fault.restart),
            operation: Duration::from_secs_f64(fault.collective),
        };
        let ring = connect(&self.listener, &place.membership, timeouts, control.ring()).map_err(exchange)?;
        let at = (place.membership.generation, start.step);
        let mut member = Member::new(trainer, ring, state, slots, at).map_err(fatal)?;
        gather_parameters(trainer, &mut member).map_err(|error| Failure::from(error).of_ring(&*member.ring))?;
        Ok((member, start))
    }
}

impl<D: TrainDevice> Ready for Prepared<D> {
    fn identity(&self) -> Identity {
        Identity {
            ring_address: self.address.to_string(),
            numeric_identity: self.trainer.device.numeric_identity(),
            data_fingerprint: self.trainer.feed.fingerprint(),
        }
    }

    fn run(
        &mut self,
        run: &wire::WorkerRun,
        control: &Control,
        capturer: &Capturer,
        handle: &Handle,
        tell: &dyn Fn(News),
    ) -> Result<Ended, Failure> {
        let place = Place::read(run, &self.trainer.spec.name)?;
        let generation = place.membership.generation.get();
        let (mut member, start) = self.join(&place, control, capturer, handle, tell)?;
        let (source, load) = (start.source.clone(), start.stages.clone());
        tell(News::Event(Input::Joined { generation, step: start.step, source, load }));

        let trainer = &mut self.trainer;
        let mut saver =
            Saver { place: &place, capturer, tell, told: Instant::now(), kept: Verdicts::default(), first: false };
        saver.first = member.is_first();
        let trained = train(trainer, &mut member, start.step, place.stop_at, control, &mut saver);
        let (step, loss) = trained.map_err(|failure| failure.of_ring(&*member.ring))?;
        if step == start.step && start.source != Start::STORED {
            // No step was taken that would have captured the state, and the coordinator waits for its checkpoint: the
            // one that made the snapshot may have been lost before it could store it.
            let shard = member.shard.clone();
            member.state.unchanged(&trainer.device, &trainer.parameters, shard).map_err(StepError::Device)?;
            saver.capture(trainer, &mut member, step, Tier::Store)?;
        }
        capturer.flush(grace(trainer, control))?;
        Ok(Ended { step, loss })
    }
}

/// Has the agent fill the live slot from the nodes' memory.
fn restore<D: TrainDevice>(
    trainer: &Trainer<D>,
    place: &Place,
    slot: u32,
    control: &Control,
    tell: &dyn Fn(News),
) -> Result<Start, Failure> {
    let generation = place.membership.generation.get();
    tell(News::Restore(wire::Restore { generation, slot }));
    let within = Duration::from_secs_f64(trainer.spec.fault.hang * PATIENCE);
    let late = || Failure::new(FailureKind::Transient, "the agent did not restore the state from memory in time");
    let answer = control.wait_restored(within).ok_or_else(late)?;
    match answer.failure {
        Some(failure) => Err(Failure::new(failure.kind(), failure.reason)),
        None => Ok(Start {
            step: answer.step,
            source: answer.source,
            stages: answer.stages,
            exponents: answer.exponents.iter().map(|byte| byte.cast_signed()).collect(),
        }),
    }
}

/// How long the last snapshot may take to be hashed: the user's patience if asked to stop, else most of `fault.hang`.
fn grace<D: TrainDevice>(trainer: &Trainer<D>, control: &Control) -> Duration {
    let fault = &trainer.spec.fault;
    let seconds = if control.is_stopping() { fault.grace } else { fault.grace.max(fault.hang * PATIENCE) };
    Duration::from_secs_f64(seconds)
}

/// A checked announcement, as seen from one rank.
struct Place {
    membership: RingMembership,
    world: WorldSize,
    start: Vec<u8>,
    /// The state is in the nodes' memory.
    in_memory: bool,
    /// Parity groups of the generation.
    groups: u32,
    stop_at: u64,
}

impl Place {
    fn read(run: &wire::WorkerRun, job: &JobName) -> Result<Self, Failure> {
        let refuse =
            |what: &str| Failure::new(FailureKind::Transient, format!("the announcement cannot be used: {what}"));
        let announced = run.announcement.as_ref().ok_or_else(|| refuse("it is empty"))?;
        let world = WorldSize::new(announced.world_size).ok_or_else(|| refuse("it has no workers"))?;
        let placement = announced.placements.iter().find(|placement| placement.rank == run.rank);
        let placement = placement.filter(|_| run.rank < world.get());
        let placement = placement.ok_or_else(|| refuse("its rank is not one of this node or of its world"))?;
        let next = placement.next.parse().map_err(|_| refuse("the next rank's address is none"))?;
        let key = announced.key.as_slice().try_into().map_err(|_| refuse("its key does not have 32 bytes"))?;
        let generation = Generation::new(announced.generation);
        let membership = RingMembership { job: job.clone(), generation, rank: Rank::new(run.rank), world, next, key };
        Ok(Self {
            membership,
            world,
            start: announced.start.clone(),
            in_memory: announced.memory.is_some(),
            groups: announced.groups,
            stop_at: announced.stop_at,
        })
    }

    fn report(&self, done: &Finished, stragglers: &Stragglers) -> wire::StepReport {
        let straggler = |of: Straggler| wire::Straggler { rank: of.rank.get(), ratio: f64::from(of.ratio) };
        wire::StepReport {
            job: self.membership.job.to_string(),
            generation: self.membership.generation.get(),
            step: done.step,
            loss: done.taken.loss,
            grad_norm: done.taken.norm,
            seconds: done.took.as_secs_f64(),
            validation_loss: done.validation,
            stragglers: stragglers.named().take(wire::MOST_STRAGGLERS).map(straggler).collect(),
        }
    }
}

/// Watches a generation: takes its snapshots and tells how far it is.
struct Saver<'a> {
    place: &'a Place,
    capturer: &'a Capturer,
    tell: &'a dyn Fn(News),
    /// This rank speaks for all.
    first: bool,
    /// When progress was last told.
    told: Instant,
    /// What was said last of the steps in all groups.
    kept: Verdicts,
}

impl<D: TrainDevice> Observer<D> for Saver<'_> {
    type Error = Failure;

    fn updated(&mut self, step: u64, taken: &Taken) {
        let generation = self.place.membership.generation.get();
        if taken.last || self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            (self.tell)(News::Event(Input::Stepped { generation, step, loss: taken.loss }));
        }
    }

    fn finished(&mut self, trainer: &Trainer<D>, member: &mut Member<D>, done: Finished) -> Result<(), Failure> {
        // Before the capture, so that a checkpoint's validation loss is known when it is committed.
        if self.first {
            (self.tell)(News::Step(self.place.report(&done, &member.stragglers)));
        }
        let (step, decision) = (done.step, done.taken.decision);
        if let Some(tier) = decision.capture {
            self.capture(trainer, member, step, tier)?;
        }
        let RingMembership { job, rank, generation, .. } = &self.place.membership;
        let generation = generation.get();
        if let Some(tier) = decision.skipped {
            (self.tell)(News::Skipped(wire::SaveSkipped {
                job: job.to_string(),
                generation,
                step,
                rank: rank.get(),
                reason: String::new(),
                memory: tier == Tier::Memory,
            }));
        }
        // With one group the agent knows by itself.
        if self.place.groups > 1 && self.kept.follow(&decision.steps) {
            let (complete, given_up) = (self.kept.complete(), self.kept.given_up());
            (self.tell)(News::Kept(wire::StepsKept { generation, complete, given_up, seconds: 0.0 }));
        }
        Ok(())
    }
}

impl Saver<'_> {
    /// Freezes the state of `step` and has it hashed and announced.
    fn capture<D: TrainDevice>(
        &self,
        trainer: &Trainer<D>,
        member: &mut Member<D>,
        step: u64,
        tier: Tier,
    ) -> Result<(), Failure> {
        let began = Instant::now();
        let RingMembership { job, generation, rank, .. } = &self.place.membership;
        let Frozen { slot, arrival } = member.state.freeze(&trainer.device).map_err(StepError::Device)?;
        let snapshot = Snapshot {
            slot,
            arrival,
            frozen: (began, began.elapsed()),
            threads: trainer.device.spare_threads(),
            elements: member.shard.len(),
            message: wire::Captured {
                job: job.to_string(),
                generation: generation.get(),
                step,
                rank: rank.get(),
                world_size: self.place.world.get(),
                store: tier == Tier::Store,
                stall_seconds: began.elapsed().as_secs_f64(),
                ..Default::default()
            },
            capture: Capture {
                format: CAPTURE_FORMAT,
                job: job.clone(),
                generation: *generation,
                rank: *rank,
                world_size: self.place.world,
                space: trainer.space.clone(),
                scalar: scalar_state(&trainer.spec, step, trainer.gradient_sum.exponents()),
                states: StateDecl::adamw(),
                hashes: Vec::new(),
                stages: Vec::new(),
            },
        };
        Ok(self.capturer.announce(snapshot)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::error::CudaError;

    #[test]
    fn a_lost_device_asks_for_another_process_and_a_full_one_ends_the_job() {
        let lost = CudaError::Lost { device: "a GPU".into(), operation: "a copy".into(), code: "ECC".into() };
        for error in [StepError::Device(lost.clone().into()), StepError::Model(ModelError::Device(lost.into()))] {
            let failure = Failure::from(error);
            assert!(failure.lost && failure.kind == FailureKind::Transient && failure.reason.contains("Xid"));
        }
        let full = CudaError::OutOfMemory { bytes: 9, what: "activations" };
        let failure = Failure::from(StepError::Device(full.into()));
        assert!(!failure.lost && failure.kind == FailureKind::Fatal);
    }
}
