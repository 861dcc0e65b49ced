//! What a worker trains with, and one generation of it from joining to its end.
//!
//! [`Trainer`] is what outlives generations: model, device, data and the full parameters. [`Member`] is what a rank has
//! in one generation: its shard of the optimizer state and its place in the ring. [`train`] takes steps until the last
//! one, the step it was told to stop at, or a request that any rank has heard of.

use std::ops::{DerefMut, Range};
use std::time::{Duration, Instant};

use checkpoint_store::Space;
use proto::ids::{Rank, WorldSize};
use proto::spec::JobSpec;

use crate::collective::Collective;
use crate::device::{Device, DeviceResult};
use crate::feed::{Feed, Source};
use crate::gradient::GradientSum;
use crate::model::{Model, ModelError, parameters};
use crate::optimizer::AdamW;
use crate::session::Control;
use crate::step::{self, StepError, Taken};

/// A device whose memory is the host's: the exchange and the capture reach into it directly.
pub trait HostDevice: Device<Buffer: DerefMut<Target = [f32]>, Sums: DerefMut<Target = [i64]>> {}

impl<D> HostDevice for D
where
    D: Device,
    D::Buffer: DerefMut<Target = [f32]>,
    D::Sums: DerefMut<Target = [i64]>,
{
}

/// Everything a worker holds from one generation to the next.
pub struct Trainer<D: HostDevice> {
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
    /// All parameters; the rank's shard of it is the master copy.
    pub parameters: D::Buffer,
    /// Gradient of one micro-batch.
    pub gradient: D::Buffer,
    /// Gradient of the step so far.
    pub gradient_sum: GradientSum<D>,
}

impl<D: HostDevice> Trainer<D> {
    /// Allocates all a job needs on `device`; no parameter is set yet.
    pub fn new(spec: JobSpec, device: D, space: Space, source: Box<dyn Source>) -> Result<Self, ModelError> {
        let training = &spec.training;
        let model = Model::new(&spec.model, training.micro_batch, training.sequence_length, &device)?;
        let count = model.parameter_count();
        Ok(Self {
            rule: AdamW::new(&spec.optimizer, &parameters(&spec.model)),
            feed: Feed::new(source, training.micro_batch * training.sequence_length),
            parameters: device.allocate(count, "the parameters")?,
            gradient: device.allocate(count, "a gradient")?,
            gradient_sum: GradientSum::new(&device, training.reduction, count, training.micro_batches())?,
            spec,
            device,
            model,
            space,
        })
    }

    /// The elements of each rank, in rank order.
    pub fn shards(&self, world: WorldSize) -> Vec<Range<usize>> {
        let shard = |rank| self.space.shard(rank, world);
        world.ranks().map(shard).map(|shard| shard.start as usize..shard.end as usize).collect()
    }
}

/// A rank's part in one generation.
pub struct Member<D: HostDevice> {
    /// Its place in the ring.
    pub ring: Box<dyn Collective>,
    /// The elements it owns.
    pub shard: Range<usize>,
    /// The elements of every rank.
    pub shards: Vec<Range<usize>>,
    /// First moment of its shard.
    pub exp_avg: D::Buffer,
    /// Second moment of its shard.
    pub exp_avg_sq: D::Buffer,
    /// Mean gradient of its shard.
    pub gradient: D::Buffer,
}

/// The optimizer state of a shard, before there is a ring.
pub struct Moments<D: HostDevice> {
    /// First moment.
    pub exp_avg: D::Buffer,
    /// Second moment.
    pub exp_avg_sq: D::Buffer,
}

impl<D: HostDevice> Moments<D> {
    /// Zeros for a shard of `elements` elements.
    pub fn new(device: &D, elements: usize) -> DeviceResult<Self> {
        let exp_avg = device.allocate(elements, "the first moments")?;
        Ok(Self { exp_avg, exp_avg_sq: device.allocate(elements, "the second moments")? })
    }
}

impl<D: HostDevice> Member<D> {
    /// Takes a place in a formed ring.
    pub fn new(trainer: &Trainer<D>, ring: Box<dyn Collective>, moments: Moments<D>) -> DeviceResult<Self> {
        let shards = trainer.shards(ring.world_size());
        let shard = shards[ring.rank().index()].clone();
        let gradient = trainer.device.allocate(shard.len(), "a shard's gradient")?;
        let Moments { exp_avg, exp_avg_sq } = moments;
        Ok(Self { ring, shard, shards, exp_avg, exp_avg_sq, gradient })
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

/// A finished step, for whoever watches.
#[derive(Debug, Clone, Copy)]
pub struct Finished {
    /// The step.
    pub step: u64,
    /// Loss, norm, and whether a rank was asked to stop.
    pub taken: Taken,
    /// Held-out loss, where this step validated.
    pub validation: Option<f64>,
    /// Time since the step began.
    pub took: Duration,
    /// This is the last step of the generation.
    pub last: bool,
}

/// Sees each finished step, and may capture the state.
pub type After<'a, D, E> = &'a mut dyn FnMut(&Trainer<D>, &Member<D>, Finished) -> Result<(), E>;

/// Takes steps from `from` on; `after` sees each one. Returns the last step and its loss.
pub fn train<D: HostDevice, E: From<StepError>>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    from: u64,
    stop_at: u64,
    control: &Control,
    after: After<'_, D, E>,
) -> Result<(u64, Option<f64>), E> {
    let steps = trainer.spec.training.steps;
    let every = trainer.spec.training.validate_every;
    let (mut step, mut loss) = (from, None);
    while step < stop_at.min(steps) {
        step += 1;
        let began = Instant::now();
        let taken = step::take(trainer, member, step, control)?;
        let took = began.elapsed();
        let due = every > 0 && (step.is_multiple_of(every) || step == steps);
        let validation = if due { step::validate(trainer, member, control)? } else { None };
        let last = taken.stop || step == stop_at.min(steps);
        loss = Some(taken.loss);
        after(trainer, member, Finished { step, taken, validation, took, last })?;
        if last {
            break;
        }
    }
    Ok((step, loss))
}
