//! What training needs of a device beyond the model's operations: the optimizer state, and the exchange.
//!
//! A device whose memory is the host's keeps its state in the slots, so that a capture copies nothing (see
//! [`crate::state`]). A device with memory of its own keeps the state there and copies it into a slot while it computes
//! the next step. What the exchange sums and gathers is lent to it in host memory: in place, or staged.

use std::ops::{DerefMut, Range};
use std::sync::Arc;

use super::{AdamwParts, Device, DeviceResult};
use crate::optimizer::{AdamW, AdamwScalars};
use crate::slots::{Slot, SlotMap, Slots};

/// How exact gradient sums are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExactForm {
    /// 64 bits on one grid; see [`crate::exact`].
    Fixed,
    /// 32 bits, a grid for each block; see [`crate::exact32`].
    Blocks,
}

/// Parameters in compute precision, lent to the host.
#[derive(Debug)]
pub enum HostParameters<'a> {
    /// Float32.
    F32(&'a mut [f32]),
    /// The bits of bfloat16.
    Bf16(&'a mut [u16]),
}

/// A device a worker can train on.
pub trait TrainDevice: Device {
    /// The optimizer state of a rank.
    type State: RankState<Self>;

    /// How it keeps exact sums.
    fn exact_form(&self) -> ExactForm;

    /// Threads of the host that steps leave idle; none where the host itself computes.
    fn spare_threads(&self) -> usize;

    /// Returns when all that was asked of the device is done.
    fn finish(&self) -> DeviceResult;

    /// Does `work`, waits for it, and says how many seconds the device took.
    fn time<R>(&self, work: impl FnOnce() -> DeviceResult<R>) -> DeviceResult<(R, f64)>;

    /// Lends the first `elements` sums to `work`; what it leaves in `keep` is the device's afterwards.
    fn lend_sums<R>(
        &self,
        sums: &mut Self::Sums,
        elements: usize,
        keep: Range<usize>,
        work: impl FnOnce(&mut [i64]) -> R,
    ) -> DeviceResult<R>;
    /// As [`TrainDevice::lend_sums`].
    fn lend_block_sums<R>(
        &self,
        sums: &mut Self::BlockSums,
        elements: usize,
        keep: Range<usize>,
        work: impl FnOnce(&mut [i32]) -> R,
    ) -> DeviceResult<R>;
    /// As [`TrainDevice::lend_sums`].
    fn lend_floats<R>(
        &self,
        buffer: &mut Self::Buffer,
        elements: usize,
        keep: Range<usize>,
        work: impl FnOnce(&mut [f32]) -> R,
    ) -> DeviceResult<R>;
    /// Lends the parameters to `work`, of which only `own` need be right before; all are the device's afterwards.
    fn lend_parameters<R>(
        &self,
        parameters: &mut Self::Activation,
        elements: usize,
        own: Range<usize>,
        work: impl FnOnce(HostParameters<'_>) -> R,
    ) -> DeviceResult<R>;
}

/// What one update of a shard takes.
#[derive(Debug)]
pub struct Update<'a, D: Device> {
    /// The rule.
    pub rule: &'a AdamW,
    /// Its scalars for this step.
    pub scalars: AdamwScalars,
    /// The shard's place in the canonical space.
    pub shard: Range<usize>,
    /// The whole space in compute precision; the shard's part is updated.
    pub parameters: &'a mut D::Activation,
    /// Mean gradient of the shard.
    pub gradient: &'a D::Buffer,
    /// The state after the update will be frozen.
    pub capture: bool,
}

/// Waits until a snapshot has arrived in its slot.
pub type Arrival = Box<dyn FnOnce() -> DeviceResult + Send>;

/// A frozen state.
pub struct Frozen {
    /// Where it lies, or will lie.
    pub slot: Slot,
    /// For a state that is still being copied.
    pub arrival: Option<Arrival>,
}

/// A rank's shard of the optimizer state in one generation: parameters, first and second moment.
pub trait RankState<D: Device>: Sized {
    /// Makes room for the state of `elements` elements; its content is undefined. `None`: no slot is free, so none were
    /// reserved.
    fn new(device: &D, slots: Arc<Slots>, elements: usize) -> DeviceResult<Option<Self>>;
    /// The number of the slot that [`RankState::fill`] shows, for the agent to fill.
    fn slot(&self) -> u32;
    /// Host memory to be filled with a state to start from.
    fn fill(&mut self) -> [&mut [f32]; 3];
    /// Makes what was filled the state, and writes its parameters to `parameters` from element `at` on.
    fn filled(&mut self, device: &D, parameters: &mut D::Activation, at: usize) -> DeviceResult;
    /// Whether training could go on if the next update's state were frozen. Sets a slot aside if it can.
    fn ready(&mut self) -> bool;
    /// One update. `false`: there is no slot to go on in, which [`RankState::ready`] prevents.
    fn update(&mut self, device: &D, update: Update<'_, D>) -> DeviceResult<bool>;
    /// Readies the state, unchanged since it was filled, to be frozen.
    fn unchanged(&mut self, device: &D, parameters: &D::Activation, shard: Range<usize>) -> DeviceResult;
    /// Freezes the state of the last update: it is a snapshot from now on, in the agent's hands too until freed.
    fn freeze(&mut self, device: &D) -> DeviceResult<Frozen>;
}

/// A device whose memory is the host's: the exchange reaches into it directly, and its state lives in slots.
pub trait HostDevice:
    TrainDevice<Buffer: DerefMut<Target = [f32]>, Activation = <Self as Device>::Buffer, Sums: DerefMut<Target = [i64]>>
{
    /// `elements` float32 values of a slot, from element `first` on.
    ///
    /// # Safety
    ///
    /// As for the memory itself: nobody else writes to these elements while the buffer lives, and nobody reads them
    /// while they are written through it.
    unsafe fn over(map: &Arc<SlotMap>, first: usize, elements: usize) -> Self::Buffer;

    /// One AdamW update of `elements` elements.
    fn adamw(
        &self,
        elements: usize,
        scalars: &AdamwScalars,
        decay: bool,
        state: AdamwParts<'_, Self::Buffer>,
    ) -> DeviceResult;
}
