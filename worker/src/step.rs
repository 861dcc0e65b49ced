//! One training step, on one screen (§6, and ZeRO stage 1: Rajbhandari et al., 2020).
//!
//! Each rank computes its run of the step's micro-batches and adds their gradients as integers; the sums are scattered
//! so that each rank holds its own shard's; losses, block norms and flags meet in one small message; each rank updates
//! its shard, and the parameters are gathered. Every number that decides something is the same on all ranks, because it
//! is computed from the same gathered values in the same order.

use std::ops::Range;

use proto::spec::JobSpec;

use crate::collective::CollectiveError;
use crate::device::DeviceError;
use crate::feed::FeedError;
use crate::generation::{HostDevice, Lap, Member, Trainer};
use crate::machine::cadence::Decision;
use crate::model::ModelError;
use crate::optimizer::{ShardUpdate, clip_scale};
use crate::schedule::learning_rate;
use crate::session::Control;
use crate::word::{Fault, Word};

/// Why a step did not happen.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The exchange broke.
    #[error(transparent)]
    Exchange(#[from] CollectiveError),
    /// A micro-batch could not be read.
    #[error(transparent)]
    Data(#[from] FeedError),
    /// A micro-batch could not be computed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The loss or a gradient is no usable number; every rank sees the same.
    #[error("step {step}: {fault}")]
    Fault {
        /// The step.
        step: u64,
        /// What, and where.
        fault: String,
    },
    /// The state is frozen and there is no slot to go on in, which is a defect.
    #[error("step {0}: no slot is free to go on in, though one was set aside")]
    NoSlot(u64),
    /// The generation was broken off.
    #[error("broken off")]
    Aborted,
}

/// What a step came to; the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Taken {
    /// Mean loss of the global batch, before the update.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// This is the last step: it was to be, or some rank was asked to stop.
    pub last: bool,
    /// Whether the state is captured now; the update has written it into the live slot then.
    pub decision: Decision,
}

/// Takes step number `step` (the first is 1); `last` says that the generation ends after it.
pub fn take<D: HostDevice>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    step: u64,
    last: bool,
    control: &Control,
) -> Result<Taken, StepError> {
    let mut word = Word::default();
    trainer.gradient_sum.restart();
    let (lap, own) = (Lap::begin(), member.own(trainer.spec.training.micro_batches()));
    let count = own.len();
    for m in own {
        if control.is_aborted() {
            return Err(StepError::Aborted);
        }
        let (tokens, targets) = trainer.feed.micro_batch(step, m)?;
        let (parameters, gradient) = (&trainer.parameters, &mut trainer.gradient);
        let loss = trainer.model.loss_and_gradient(&trainer.device, parameters, tokens, targets, gradient)?;
        word.losses.push(loss);
        if !loss.is_finite() {
            word.fault(Fault::Loss { micro_batch: m, loss });
        } else if let Some(fault) = trainer.gradient_sum.add(&trainer.device, &trainer.gradient)? {
            let tensor = trainer.space.tensor_at(fault.element as u64).to_string();
            word.fault(Fault::Gradient { micro_batch: m, tensor, fault });
        }
    }
    word.pace = lap.per(count);
    trainer.gradient_sum.reduce_scatter(&trainer.device, member)?;
    let block = trainer.space.block_elements() as usize;
    word.norms = vec![0.0; member.shard.len().div_ceil(block)];
    trainer.device.block_square_sums(member.shard.len(), block, &member.gradient, &mut word.norms)?;

    word.stop = control.is_stopping();
    word.wish = member.wish(trainer);
    let words = Word::gather(&word, member.ring.as_mut())?;
    if let Some(fault) = words.iter().find_map(|word| word.fault.clone()) {
        return Err(StepError::Fault { step, fault });
    }
    let loss = words.iter().flat_map(|word| &word.losses).sum::<f64>() / trainer.spec.training.micro_batches() as f64;
    let norm = words.iter().flat_map(|word| &word.norms).sum::<f64>().sqrt();
    if !norm.is_finite() {
        return Err(StepError::Fault { step, fault: "the gradient's norm is not finite".into() });
    }

    member.stragglers.step(words.iter().map(|word| word.pace));
    let last = last || words.iter().any(|word| word.stop);
    let wishes: Vec<_> = words.iter().map(|word| word.wish).collect();
    let decision = member.cadence.decide(step, last, &wishes);
    update(trainer, member, step, norm, decision.capture.is_some())?;
    member.ring.all_gather_f32(&mut trainer.parameters, &member.shards)?;
    Ok(Taken { loss, norm, last, decision })
}

/// Updates the own shard; a state to be `captured` is written into the live slot whole.
fn update<D: HostDevice>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    step: u64,
    norm: f64,
    captured: bool,
) -> Result<(), StepError> {
    let clip = clip_scale(trainer.spec.optimizer.clip_norm, norm);
    let scalars = trainer.rule.scalars(step, rate(&trainer.spec, step), clip);
    let parts = member.state.parts(captured).ok_or(StepError::NoSlot(step))?;
    let update = ShardUpdate {
        parameters: &mut trainer.parameters,
        mirror: parts.mirror,
        from: parts.from,
        to: parts.to,
        gradient: &member.gradient,
    };
    Ok(trainer.rule.update(&trainer.device, &scalars, member.shard.clone(), update)?)
}

/// Mean loss over the held-out sequences: the same units of one micro-batch each, in the same order, at any world size.
pub fn validate<D: HostDevice>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    control: &Control,
) -> Result<Option<f64>, StepError> {
    let units = trainer.feed.validation_units();
    if units == 0 {
        return Ok(None);
    }
    let mut word = Word::default();
    for unit in member.own(units) {
        if control.is_aborted() {
            return Err(StepError::Aborted);
        }
        let (tokens, targets) = trainer.feed.validation_unit(unit)?;
        word.losses.push(trainer.model.loss(&trainer.device, &trainer.parameters, tokens, targets)?);
    }
    let words = Word::gather(&word, member.ring.as_mut())?;
    Ok(Some(words.iter().flat_map(|word| &word.losses).sum::<f64>() / units as f64))
}

fn rate(spec: &JobSpec, step: u64) -> f64 {
    learning_rate(&spec.schedule, spec.optimizer.learning_rate, spec.training.steps, step)
}

/// The contiguous run of `units` that falls to `rank` of `world`; sizes differ by at most one.
pub fn share(units: usize, rank: usize, world: usize) -> Range<usize> {
    let cut = |r: usize| (units as u128 * r as u128 / world as u128) as usize;
    cut(rank)..cut(rank + 1)
}
