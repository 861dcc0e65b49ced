//! One training step, on one screen (§6, and ZeRO stage 1: Rajbhandari et al., 2020).
//!
//! Each rank computes its run of the step's micro-batches and adds their gradients as integers; the sums are scattered
//! so that each rank holds its own shard's; losses, block norms and flags meet in one small message; each rank updates
//! its shard, and the parameters are gathered. Sums on per-block grids may turn out to have been too fine; then all
//! ranks compute the step again (see [`crate::exact32`]). Every number that decides something is the same on all ranks,
//! because it is computed from the same gathered values in the same order.

use std::ops::Range;

use proto::ids::WorldSize;
use proto::spec::JobSpec;

use crate::collective::CollectiveError;
use crate::device::{DeviceError, HostParameters, RankState, TrainDevice, Update};
use crate::exact32::Verdict;
use crate::feed::FeedError;
use crate::generation::{Lap, Member, Trainer};
use crate::machine::cadence::Decision;
use crate::model::ModelError;
use crate::optimizer::clip_scale;
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
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    /// Mean loss of the global batch, before the update.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// This is the last step: it was to be, or some rank was asked to stop.
    pub last: bool,
    /// How often it was computed again, on other grids.
    pub again: u32,
    /// Whether the state is captured now; the update has written it into the live slot then.
    pub decision: Decision,
}

/// Takes step number `step` (the first is 1); `last` says that the generation ends after it.
pub fn take<D: TrainDevice>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    step: u64,
    last: bool,
    control: &Control,
) -> Result<Taken, StepError> {
    let mut again = 0;
    let (words, norm) = loop {
        let mut word = compute(trainer, member, step, control)?;
        word.stop = control.is_stopping();
        word.wish = member.wish(trainer);
        let words = Word::gather(&word, member.ring.as_mut())?;
        if let Some(fault) = words.iter().find_map(|word| word.fault.clone()) {
            return Err(StepError::Fault { step, fault });
        }
        if agree(trainer, &words, step)? {
            let norm = words.iter().flat_map(|word| &word.norms).sum::<f64>().sqrt();
            break (words, norm);
        }
        again += 1;
    };
    let loss = words.iter().flat_map(|word| &word.losses).sum::<f64>() / trainer.spec.training.micro_batches() as f64;
    if !norm.is_finite() {
        return Err(StepError::Fault { step, fault: "the gradient's norm is not finite".into() });
    }

    member.stragglers.step(words.iter().map(|word| word.pace));
    let last = last || words.iter().any(|word| word.stop);
    let wishes: Vec<_> = words.iter().map(|word| word.wish).collect();
    let decision = member.cadence.decide(step, last, &wishes);
    update(trainer, member, step, norm, decision.capture.is_some())?;
    gather_parameters(trainer, member)?;
    Ok(Taken { loss, norm, last, again, decision })
}

/// Computes this rank's micro-batches, sums them over the ranks, and says what came of it. The device is waited for
/// only where the exchange is made by the host, and to read the losses and norms.
fn compute<D: TrainDevice>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    step: u64,
    control: &Control,
) -> Result<Word, StepError> {
    let mut word = Word::default();
    trainer.gradient_sum.restart(&trainer.device)?;
    let (lap, own) = (Lap::begin(), member.own(trainer.spec.training.micro_batches()));
    let (first, count) = (own.start, own.len());
    let mut beyond = None;
    for (index, m) in own.enumerate() {
        if control.is_aborted() {
            return Err(StepError::Aborted);
        }
        trainer.load(step, m)?;
        let (device, gradient, losses) = (&trainer.device, &mut trainer.gradient, &mut trainer.losses);
        trainer.model.compute(device, &trainer.parameters, gradient, losses, index)?;
        let fault = trainer.gradient_sum.add(device, gradient)?;
        beyond = beyond.or(fault.map(|fault| (m, fault)));
        let next = if index + 1 < count { (step, m + 1) } else { (step + 1, first) };
        trainer.load_ahead(next.0, next.1);
    }
    if member.ring.world_size() != WorldSize::ONE {
        trainer.device.finish()?;
        word.pace = lap.per(count);
    }
    trainer.gradient_sum.reduce_scatter(&trainer.device, member)?;

    word.losses = vec![0.0; count];
    trainer.device.read_losses(&trainer.losses, &mut word.losses)?;
    for loss in &mut word.losses {
        *loss = trainer.model.mean(*loss);
    }
    let bad = word.losses.iter().position(|loss| !loss.is_finite());
    match (bad.map(|index| (first + index, word.losses[index])), beyond) {
        (Some((micro_batch, loss)), beyond) if beyond.is_none_or(|(m, _)| micro_batch <= m) => {
            word.fault(Fault::Loss { micro_batch, loss });
        }
        (_, Some((micro_batch, fault))) => {
            let tensor = trainer.space.tensor_at(fault.element as u64).to_string();
            word.fault(Fault::Gradient { micro_batch, tensor, fault });
        }
        (_, None) => {}
    }
    let block = trainer.space.block_elements() as usize;
    word.norms = vec![0.0; member.shard.len().div_ceil(block)];
    trainer.device.block_square_sums(member.shard.len(), block, &member.gradient, &mut word.norms)?;
    word.grids = trainer.gradient_sum.name();
    word.magnitudes = trainer.gradient_sum.magnitudes(&trainer.device)?.to_vec();
    Ok(word)
}

/// Whether every value of the step was on its block's grid; if not, the step is to be computed again on the grids it
/// calls for, which are the same on every rank.
fn agree<D: TrainDevice>(trainer: &mut Trainer<D>, words: &[Word], step: u64) -> Result<bool, StepError> {
    let mut magnitudes = words.first().map(|word| word.magnitudes.clone()).unwrap_or_default();
    for word in words {
        if word.magnitudes.len() != magnitudes.len() || word.grids != words[0].grids {
            let problem = "ranks summed their gradients on different grids, so the sums mean nothing";
            return Err(StepError::Exchange(CollectiveError::Protocol(problem.into())));
        }
        for (most, magnitude) in magnitudes.iter_mut().zip(&word.magnitudes) {
            *most = (*most).max(*magnitude);
        }
    }
    match trainer.gradient_sum.settle(&magnitudes, step) {
        Verdict::Fits => Ok(true),
        Verdict::Again => Ok(false),
        Verdict::Fault { block, finite } => {
            let start = block as u64 * trainer.space.block_elements();
            let what = if finite { "too large for the exact sum" } else { "not finite" };
            let fault = format!("a gradient in block {block}, from {} on, is {what}", trainer.space.tensor_at(start));
            Err(StepError::Fault { step, fault })
        }
    }
}

/// Updates the own shard; a state to be `captured` is ready to be frozen then.
fn update<D: TrainDevice>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    step: u64,
    norm: f64,
    captured: bool,
) -> Result<(), StepError> {
    let clip = clip_scale(trainer.spec.optimizer.clip_norm, norm);
    let scalars = trainer.rule.scalars(step, rate(&trainer.spec, step), clip);
    let update = Update {
        rule: &trainer.rule,
        scalars,
        shard: member.shard.clone(),
        parameters: &mut trainer.parameters,
        gradient: &member.gradient,
        capture: captured,
    };
    if member.state.update(&trainer.device, update)? { Ok(()) } else { Err(StepError::NoSlot(step)) }
}

/// Completes the parameters on every rank from everyone's shard.
pub fn gather_parameters<D: TrainDevice>(trainer: &mut Trainer<D>, member: &mut Member<D>) -> Result<(), StepError> {
    let Member { ring, shard, shards, .. } = member;
    if ring.world_size() == WorldSize::ONE {
        return Ok(());
    }
    let elements = trainer.space.elements() as usize;
    trainer.device.lend_parameters(
        &mut trainer.parameters,
        elements,
        shard.clone(),
        |parameters| match parameters {
            HostParameters::F32(values) => ring.all_gather_f32(values, shards),
            HostParameters::Bf16(values) => ring.all_gather_u16(values, shards),
        },
    )??;
    Ok(())
}

/// Mean loss over the held-out sequences: the same units of one micro-batch each, in the same order, at any world size.
pub fn validate<D: TrainDevice>(
    trainer: &mut Trainer<D>,
    member: &mut Member<D>,
    control: &Control,
) -> Result<Option<f64>, StepError> {
    let units = trainer.feed.validation_units();
    if units == 0 {
        return Ok(None);
    }
    let mut word = Word::default();
    trainer.loaded = None;
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
