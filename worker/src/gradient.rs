//! The sum of a step's micro-batch gradients, over micro-batches and ranks.
//!
//! Exact: integers on a grid, the same bits at any world size (see [`crate::exact`] and [`crate::exact32`]). Fast:
//! float32, bits that depend on how many ranks added in which order; the job asked for it.

use checkpoint_store::Space;
use proto::ids::WorldSize;
use proto::spec::{Reduction, TrainingSpec};

use crate::device::{DeviceError, DeviceResult, ExactForm, Part, PartMut, TrainDevice};
use crate::exact::{ExactGradient, GradientFault, mean_scale};
use crate::exact32::{BlockGradient, MOST_MICRO_BATCHES, Verdict};
use crate::generation::Member;
use crate::step::StepError;

/// Collects one step's gradient over the whole canonical space.
pub struct GradientSum<D: TrainDevice> {
    kind: Kind<D>,
    elements: usize,
    micro_batches: usize,
    /// Whether this step has had a micro-batch.
    started: bool,
}

enum Kind<D: TrainDevice> {
    Exact(ExactGradient<D>),
    Blocks(BlockGradient<D>),
    Fast(D::Buffer),
}

impl<D: TrainDevice> GradientSum<D> {
    /// For the parameters of `space` and the micro-batches of a step, over all ranks.
    pub fn new(device: &D, training: &TrainingSpec, space: &Space) -> DeviceResult<Self> {
        let (elements, micro_batches) = (space.elements() as usize, training.micro_batches());
        let kind = match (training.reduction, device.exact_form()) {
            (Reduction::Exact, ExactForm::Fixed) => Kind::Exact(ExactGradient::new(device, elements, micro_batches)?),
            (Reduction::Exact, ExactForm::Blocks) if micro_batches > MOST_MICRO_BATCHES => {
                return Err(DeviceError::Unsupported(format!(
                    "exact sums of {micro_batches} micro-batches do not fit 32 bits; the most are \
                     {MOST_MICRO_BATCHES}: raise training.micro_batch, or use reduction = \"fast\""
                )));
            }
            (Reduction::Exact, ExactForm::Blocks) => {
                let block = space.block_elements() as usize;
                Kind::Blocks(BlockGradient::new(device, elements, block, micro_batches)?)
            }
            (Reduction::Fast, _) => Kind::Fast(device.allocate(elements, "the gradient's sum")?),
        };
        Ok(Self { kind, elements, micro_batches, started: false })
    }

    /// The grids that the next step begins with, one exponent a block; none where the grid is fixed.
    pub fn exponents(&self) -> &[i8] {
        if let Kind::Blocks(sum) = &self.kind { sum.exponents() } else { &[] }
    }

    /// A name for those grids, which all ranks of a step must share; 0 where the grid is fixed.
    pub fn name(&self) -> u64 {
        if self.exponents().is_empty() {
            return 0;
        }
        let hash = blake3::hash(bytemuck::cast_slice(self.exponents()));
        u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }

    /// Takes over the grids of a state to start from. `false`: they are not those of this job on this device.
    #[must_use]
    pub fn resume(&mut self, exponents: &[i8]) -> bool {
        if let Kind::Blocks(sum) = &mut self.kind { sum.resume(exponents) } else { exponents.is_empty() }
    }

    /// Begins a step, or computes it again.
    pub fn restart(&mut self, device: &D) -> DeviceResult {
        self.started = false;
        match &mut self.kind {
            Kind::Exact(sum) => sum.restart(),
            Kind::Blocks(sum) => sum.restart(device)?,
            Kind::Fast(_) => {}
        }
        Ok(())
    }

    /// Adds one micro-batch's gradient; `Some` names the first element that cannot be added.
    pub fn add(&mut self, device: &D, gradient: &D::Buffer) -> DeviceResult<Option<GradientFault>> {
        let first = !std::mem::replace(&mut self.started, true);
        match &mut self.kind {
            Kind::Exact(sum) => sum.add(device, gradient),
            Kind::Blocks(sum) => sum.add(device, gradient).map(|()| None),
            Kind::Fast(sum) => {
                if first {
                    device.zero(self.elements, PartMut(sum, 0))?;
                }
                device.axpy(self.elements, 1.0, Part(gradient, 0), PartMut(sum, 0))?;
                Ok(None)
            }
        }
    }

    /// Sums over the ranks; the member's gradient becomes the mean over all micro-batches of its own shard.
    pub fn reduce_scatter(&mut self, device: &D, member: &mut Member<D>) -> Result<(), StepError> {
        let Member { ring, shard, shards, gradient, .. } = member;
        let (alone, added, elements) = (ring.world_size() == WorldSize::ONE, self.started, self.elements);
        let (length, first, keep) = (shard.len(), shard.start, shard.clone());
        match &mut self.kind {
            Kind::Exact(sum) => {
                if !alone {
                    device.lend_sums(sum.sums_mut(), elements, keep, |sums| {
                        ring.reduce_scatter_i64(zeroed_unless(added, sums), shards)
                    })??;
                }
                device.gradient_from_sums(length, mean_scale(self.micro_batches), sum.sums(), first, gradient)?;
            }
            Kind::Blocks(sum) => {
                if !alone {
                    device.lend_block_sums(sum.sums_mut(), elements, keep, |sums| {
                        ring.reduce_scatter_i32(zeroed_unless(added, sums), shards)
                    })??;
                }
                let scale = 1.0 / self.micro_batches as f64;
                device.gradient_from_blocks(length, scale, sum.sums(), first, gradient)?;
            }
            Kind::Fast(sum) => {
                if !alone {
                    device.lend_floats(sum, elements, keep, |sums| {
                        ring.reduce_scatter_f32(zeroed_unless(added, sums), shards)
                    })??;
                }
                device.scale(length, 1.0 / self.micro_batches as f32, Part(sum, first), gradient)?;
            }
        }
        Ok(())
    }

    /// The largest magnitudes this rank has seen in the step, one a block; none where they do not matter.
    pub fn magnitudes(&mut self, device: &D) -> DeviceResult<&[u8]> {
        match &mut self.kind {
            Kind::Blocks(sum) => sum.magnitudes(device),
            Kind::Exact(_) | Kind::Fast(_) => Ok(&[]),
        }
    }

    /// Judges the step by the largest magnitudes of all ranks.
    pub fn settle(&mut self, magnitudes: &[u8], step: u64) -> Verdict {
        match &mut self.kind {
            Kind::Blocks(sum) => sum.settle(magnitudes, step),
            Kind::Exact(_) | Kind::Fast(_) => Verdict::Fits,
        }
    }
}

/// What a rank gives to the sum: zeros if it had no micro-batch.
fn zeroed_unless<T: Default + Clone>(added: bool, sums: &mut [T]) -> &mut [T] {
    if !added {
        sums.fill(T::default());
    }
    sums
}
