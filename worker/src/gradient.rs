//! The sum of a step's micro-batch gradients, over micro-batches and ranks.
//!
//! Exact: integers on a grid, the same bits at any world size (see [`crate::exact`]). Fast: float32, half the bytes on
//! the wire, but bits that depend on how many ranks added in which order; the job asked for it.

use crate::collective::CollectiveError;
use crate::device::{DeviceResult, Part, PartMut};
use crate::exact::{ExactGradient, GradientFault, mean_scale};
use crate::generation::{HostDevice, Member};
use crate::step::StepError;
use proto::spec::Reduction;

/// Collects one step's gradient over the whole canonical space.
pub struct GradientSum<D: HostDevice> {
    kind: Kind<D>,
    elements: usize,
    micro_batches: usize,
    /// Whether this step has had a micro-batch.
    started: bool,
}

enum Kind<D: HostDevice> {
    Exact(ExactGradient<D>),
    Fast(D::Buffer),
}

impl<D: HostDevice> GradientSum<D> {
    /// For `elements` parameters and `micro_batches` micro-batches in a step, over all ranks.
    pub fn new(device: &D, reduction: Reduction, elements: usize, micro_batches: usize) -> DeviceResult<Self> {
        let kind = match reduction {
            Reduction::Exact => Kind::Exact(ExactGradient::new(device, elements, micro_batches)?),
            Reduction::Fast => Kind::Fast(device.allocate(elements, "the gradient's sum")?),
        };
        Ok(Self { kind, elements, micro_batches, started: false })
    }

    /// Begins a step.
    pub fn restart(&mut self) {
        self.started = false;
        if let Kind::Exact(sum) = &mut self.kind {
            sum.restart();
        }
    }

    /// Adds one micro-batch's gradient; `Some` names the first element that cannot be added.
    pub fn add(&mut self, device: &D, gradient: &D::Buffer) -> DeviceResult<Option<GradientFault>> {
        let first = !std::mem::replace(&mut self.started, true);
        match &mut self.kind {
            Kind::Exact(sum) => sum.add(device, gradient),
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
        let exchange = |result: Result<(), CollectiveError>| result.map_err(StepError::Exchange);
        match &mut self.kind {
            Kind::Exact(sum) => {
                let sums = sum.sums_mut();
                if !self.started {
                    sums.fill(0); // a rank without micro-batches adds nothing
                }
                exchange(member.ring.reduce_scatter_i64(sums, &member.shards))?;
                let scale = mean_scale(self.micro_batches);
                let (length, first) = (member.shard.len(), member.shard.start);
                device.gradient_from_sums(length, scale, sum.sums(), first, &mut member.gradient)?;
            }
            Kind::Fast(sum) => {
                if !self.started {
                    sum.fill(0.0);
                }
                exchange(member.ring.reduce_scatter_f32(sum, &member.shards))?;
                let scale = 1.0 / self.micro_batches as f32;
                for (mean, sum) in member.gradient.iter_mut().zip(&sum[member.shard.clone()]) {
                    *mean = sum * scale;
                }
            }
        }
        Ok(())
    }
}
