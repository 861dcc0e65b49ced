//! What a worker trains with, and one generation of it from joining to its end.
//!
//! [`Trainer`] is what outlives generations: model, device, data and the full parameters. [`Member`] is what a rank has
//! in one generation: its shard of the optimizer state and its place in the ring. [`train`] takes steps until the last
//! one, the step it was told to stop at, or a request that any rank has heard of.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint_store::Space;
use proto::ids::{Generation, Rank, WorldSize};
use proto::spec::JobSpec;

use crate::collective::Collective;
use crate::device::{DeviceResult, RankState, TrainDevice};
use crate::feed::{Feed, Source};
use crate::gradient::GradientSum;
use crate::machine::cadence::{Cadence, Measured, Wish};
use crate::machine::stragglers::Stragglers;
use crate::model::{MicroBatch, Model, ModelError, parameters};
use crate::optimizer::AdamW;
use crate::session::Control;
use crate::slots::Slots;
use crate::step::{self, StepError, Taken};

/// Everything a worker holds from one generation to the next.
pub struct Trainer<D: TrainDevice> {
    /// The job.
    pub spec: JobSpec,
    /// What it computes on.
    pub device: D,
    /// Activations and kernels for one micro-batch.
    pub model: Model<D>,
    /// The update rule.
    pub rule: AdamW,
    /// The canonical space of the model.
    pub space: Space,
    /// Micro-batches.
    pub feed: Feed,
    /// All parameters in compute precision; on the CPU the rank's shard of it is the master copy.
    pub parameters: D::Activation,
    /// Gradient of one micro-batch.
    pub gradient: D::Buffer,
    /// Gradient of the step so far.
    pub gradient_sum: GradientSum<D>,
    /// Sums of the losses of the step's micro-batches, in the order in which this rank computed them.
    pub losses: D::Losses,
    /// The step and micro-batch whose tokens the model has.
    pub loaded: Option<(u64, usize)>,
}

impl<D: TrainDevice> Trainer<D> {
    /// Allocates all a job needs on `device`; no parameter is set yet.
    pub fn new(spec: JobSpec, device: D, space: Space, source: Box<dyn Source>) -> Result<Self, ModelError> {
        let training = &spec.training;
        let make = if training.recompute { Model::recomputing } else { Model::new };
        let model = make(&spec.model, training.micro_batch, training.sequence_length, &device)?;
        let count = model.parameter_count();
        Ok(Self {
            rule: AdamW::new(&spec.optimizer, &parameters(&spec.model)),
            feed: Feed::new(source, training.micro_batch * training.sequence_length),
            parameters: device.allocate_activation(count, "the parameters")?,
            gradient: device.allocate(count, "a gradient")?,
            gradient_sum: GradientSum::new(&device, training, &space)?,
            losses: device.allocate_losses(training.micro_batches())?,
            loaded: None,
            spec,
            device,
            model,
            space,
        })
    }

    /// Has the model hold the tokens of a micro-batch of a step, unless it does.
    pub fn load(&mut self, step: u64, micro_batch: usize) -> Result<(), StepError> {
        if self.loaded.take() != Some((step, micro_batch)) {
            let (tokens, targets) = self.feed.micro_batch(step, micro_batch)?;
            self.model.load(&self.device, MicroBatch { tokens, targets })?;
        }
        self.loaded = Some((step, micro_batch));
        Ok(())
    }

    /// The same while the device is still at work on the last one, if there is such a step. What fails here fails again
    /// when it is needed.
    pub fn load_ahead(&mut self, step: u64, micro_batch: usize) {
        if step <= self.spec.training.steps {
            let _ = self.load(step, micro_batch);
        }
    }

    /// The elements of each rank, in rank order.
    pub fn shards(&self, world: WorldSize) -> Vec<Range<usize>> {
        let shard = |rank| self.space.shard(rank, world);
        world.ranks().map(shard).map(|shard| shard.start as usize..shard.end as usize).collect()
    }
}

/// A rank's part in one generation.
pub struct Member<D: TrainDevice> {
    /// Its place in the ring.
    pub ring: Box<dyn Collective>,
    /// The elements it owns.
    pub shard: Range<usize>,
    /// The elements of every rank.
    pub shards: Vec<Range<usize>>,
    /// Its shard's state, in the slots.
    pub state: D::State,
    /// Mean gradient of its shard.
    pub gradient: D::Buffer,
    /// When it captures.
    pub cadence: Cadence,
    /// Who holds the others up; every rank knows the same.
    pub stragglers: Stragglers,
    slots: Arc<Slots>,
    pace: Pace,
}

/// What a rank measures, to know what captures cost.
#[derive(Debug, Default)]
struct Pace {
    generation: u64,
    /// Seconds of the last step.
    step_seconds: f64,
}

impl<D: TrainDevice> Member<D> {
    /// Takes a place in a formed ring, with the state of step `start` in `state`.
    pub fn new(
        trainer: &Trainer<D>,
        ring: Box<dyn Collective>,
        state: D::State,
        slots: Arc<Slots>,
        place: (Generation, u64),
    ) -> DeviceResult<Self> {
        let shards = trainer.shards(ring.world_size());
        let shard = shards[ring.rank().index()].clone();
        let gradient = trainer.device.allocate(shard.len(), "a shard's gradient")?;
        let (generation, start) = (place.0.get(), place.1);
        let cadence = Cadence::new(&trainer.spec.checkpoint, start);
        let pace = Pace { generation, ..Pace::default() };
        let stragglers = Stragglers::new(trainer.spec.fault.straggler, shards.len());
        Ok(Self { ring, shard, shards, state, gradient, cadence, stragglers, slots, pace })
    }

    /// Its word on the next capture.
    pub fn wish(&mut self, trainer: &Trainer<D>) -> Wish {
        let kept = Some(self.slots.kept()).filter(|kept| kept.generation == self.pace.generation).unwrap_or_default();
        let measured = Measured {
            cost: self.slots.hash_seconds() + kept.seconds,
            step: self.pace.step_seconds,
            threads: trainer.device.threads(),
            spare: trainer.device.spare_threads(),
        };
        let ready = self.state.ready();
        self.cadence.wish(ready, kept.steps, measured)
    }

    fn stepped(&mut self, took: Duration) {
        self.pace.step_seconds = took.as_secs_f64();
    }

    /// The run of `units` that this rank computes.
    pub fn own(&self, units: usize) -> Range<usize> {
        step::share(units, self.ring.rank().index(), self.ring.world_size().count())
    }

    /// Whether this rank speaks for all.
    pub fn is_first(&self) -> bool {
        self.ring.rank() == Rank::ZERO
    }
}

/// A stretch of work, for measuring how fast a rank is.
#[derive(Debug, Clone, Copy)]
pub struct Lap(Instant);

impl Lap {
    /// It begins now.
    pub fn begin() -> Self {
        Self(Instant::now())
    }

    /// Seconds that each of so many units of it took.
    pub fn per(self, units: usize) -> f32 {
        self.0.elapsed().as_secs_f32() / units.max(1) as f32
    }
}

/// A finished step, for whoever watches.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The step.
    pub step: u64,
    /// Loss, norm, whether it was the last of the generation, and what is captured.
    pub taken: Taken,
    /// Held-out loss, where this step validated.
    pub validation: Option<f64>,
    /// Time the step took.
    pub took: Duration,
}

/// Whoever watches a generation.
pub trait Observer<D: TrainDevice> {
    /// Why it breaks the generation off.
    type Error: From<StepError>;
    /// A step's update is done; its validation, if it has one, is not.
    fn updated(&mut self, step: u64, taken: &Taken);
    /// A step is finished. The state is to be captured now if the step decided so.
    fn finished(&mut self, trainer: &Trainer<D>, member: &mut Member<D>, done: Finished) -> Result<(), Self::Error>;
}

/// Takes steps from `from` on. Returns the last step and its loss.
pub fn train<D: TrainDevice, O: Observer<D>>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    from: u64,
    stop_at: u64,
    control: &Control,
    observer: &mut O,
) -> Result<(u64, Option<f64>), O::Error> {
    let steps = trainer.spec.training.steps;
    let every = trainer.spec.training.validate_every;
    let end = stop_at.min(steps);
    let (mut step, mut loss) = (from, None);
    while step < end {
        step += 1;
        let began = Instant::now();
        let taken = step::take(trainer, member, step, step == end, control)?;
        let took = began.elapsed();
        member.stepped(took);
        loss = Some(taken.loss);
        observer.updated(step, &taken);
        let due = every > 0 && (step.is_multiple_of(every) || step == steps);
        let validation = if due { step::validate(trainer, member, control)? } else { None };
        let last = taken.last;
        observer.finished(trainer, member, Finished { step, taken, validation, took })?;
        if last {
            break;
        }
    }
    Ok((step, loss))
}
