//! What the exchange sums and gathers, lent to it in pinned memory of the host.
//!
//! One area serves all that is lent, as large as the largest, from the first exchange on. Only what the exchange needs
//! is copied to the host, and only what it leaves behind is copied back.

use std::ops::Range;
use std::sync::PoisonError;

use bytemuck::Pod;

use super::driver::{Driver, Stream};
use super::error::CudaResult;
use super::memory::{Array, Bf16, Plain, Staging};
use super::state::CudaState;
use super::{CudaBlockSums, CudaDevice, NoSums};
use crate::device::{DeviceResult, ExactForm, HostParameters, TrainDevice};

/// Threads of the host for what goes on beside a step, hashing above all: a small share of those that machines have for
/// each of their GPUs.
const SPARE: usize = 4;

impl<D: Driver> CudaDevice<D> {
    /// Lends `elements` elements of an array, of which those `before` are copied to the host first and those in `keep`
    /// back afterwards.
    fn lend<T: Plain, H: Pod, R>(
        &self,
        array: &Array<D, T>,
        elements: usize,
        before: Range<usize>,
        keep: Range<usize>,
        work: impl FnOnce(&mut [H]) -> R,
    ) -> CudaResult<R> {
        const { assert!(size_of::<T>() == size_of::<H>()) };
        let (driver, size) = (&self.driver, size_of::<T>());
        let mut held = self.exchange.lock().unwrap_or_else(PoisonError::into_inner);
        let area = match held.take().filter(|area| area.len() >= elements * size) {
            Some(area) => area,
            None => Staging::new(driver, elements * size)?,
        };
        let area = held.insert(area);
        // What was copied back the last time is still on its way.
        driver.wait_host(area.done(), self.patience, "a copy to the device")?;
        let (from, bytes) = (array.at(before.start, before.len()), before.len() * size);
        // SAFETY: pinned, with room for all elements, and looked at only after `done`.
        unsafe { driver.copy_out(Stream::Compute, from, area.start().wrapping_add(before.start * size), bytes)? };
        driver.record(area.done(), Stream::Compute)?;
        driver.wait_host(area.done(), self.patience, "the work before an exchange")?;
        let result = work(bytemuck::cast_slice_mut(&mut area.bytes()[..elements * size]));
        let (to, bytes) = (array.at(keep.start, keep.len()), keep.len() * size);
        // SAFETY: pinned, with room for all elements, and filled again only after `done`.
        unsafe { driver.copy_in(Stream::Compute, area.start().wrapping_add(keep.start * size), to, bytes)? };
        driver.record(area.done(), Stream::Compute)?;
        Ok(result)
    }
}

impl<D: Driver> TrainDevice for CudaDevice<D> {
    type State = CudaState<D>;

    fn exact_form(&self) -> ExactForm {
        ExactForm::Blocks
    }

    fn spare_threads(&self) -> usize {
        std::thread::available_parallelism().map_or(1, |cores| cores.get() - 1).clamp(1, SPARE)
    }

    fn finish(&self) -> DeviceResult {
        Ok(self.transfer().finish()?)
    }

    fn time<R>(&self, work: impl FnOnce() -> DeviceResult<R>) -> DeviceResult<(R, f64)> {
        let [begin, end] = &self.timer;
        self.driver.record(begin.event, Stream::Compute)?;
        let result = work()?;
        self.driver.record(end.event, Stream::Compute)?;
        end.wait_host(self.patience, "an operation")?;
        Ok((result, self.driver.seconds(begin.event, end.event)?))
    }

    fn lend_sums<R>(
        &self,
        sums: &mut NoSums,
        _elements: usize,
        _keep: Range<usize>,
        _work: impl FnOnce(&mut [i64]) -> R,
    ) -> DeviceResult<R> {
        match *sums {}
    }

    fn lend_block_sums<R>(
        &self,
        sums: &mut CudaBlockSums<D>,
        elements: usize,
        keep: Range<usize>,
        work: impl FnOnce(&mut [i32]) -> R,
    ) -> DeviceResult<R> {
        Ok(self.lend(&sums.sums, elements, 0..elements, keep, work)?)
    }

    fn lend_floats<R>(
        &self,
        buffer: &mut Array<D, f32>,
        elements: usize,
        keep: Range<usize>,
        work: impl FnOnce(&mut [f32]) -> R,
    ) -> DeviceResult<R> {
        Ok(self.lend(buffer, elements, 0..elements, keep, work)?)
    }

    fn lend_parameters<R>(
        &self,
        parameters: &mut Array<D, Bf16>,
        elements: usize,
        own: Range<usize>,
        work: impl FnOnce(HostParameters<'_>) -> R,
    ) -> DeviceResult<R> {
        let work = |halves: &mut [u16]| work(HostParameters::Bf16(halves));
        Ok(self.lend(parameters, elements, own, 0..elements, work)?)
    }
}
