//! Training on the CPU: the rank's state in its slots, and memory lent to the exchange without a copy.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::{BlockSums, CpuBuffer, CpuDevice, state};
use crate::device::{AdamwParts, DeviceResult, ExactForm, HostDevice, HostParameters, Part, PartMut, TrainDevice};
use crate::optimizer::AdamwScalars;
use crate::slots::SlotMap;
use crate::state::ShardState;

impl TrainDevice for CpuDevice {
    type State = ShardState<Self>;

    fn exact_form(&self) -> ExactForm {
        self.form
    }

    fn spare_threads(&self) -> usize {
        0
    }

    fn time<R>(&self, work: impl FnOnce() -> DeviceResult<R>) -> DeviceResult<(R, f64)> {
        let began = Instant::now();
        Ok((work()?, began.elapsed().as_secs_f64()))
    }

    fn finish(&self) -> DeviceResult {
        Ok(())
    }

    fn lend_sums<R>(
        &self,
        sums: &mut Vec<i64>,
        elements: usize,
        _: Range<usize>,
        work: impl FnOnce(&mut [i64]) -> R,
    ) -> DeviceResult<R> {
        Ok(work(&mut sums[..elements]))
    }

    fn lend_block_sums<R>(
        &self,
        sums: &mut BlockSums,
        elements: usize,
        _: Range<usize>,
        work: impl FnOnce(&mut [i32]) -> R,
    ) -> DeviceResult<R> {
        Ok(work(&mut sums.sums_mut()[..elements]))
    }

    fn lend_floats<R>(
        &self,
        buffer: &mut CpuBuffer,
        elements: usize,
        _: Range<usize>,
        work: impl FnOnce(&mut [f32]) -> R,
    ) -> DeviceResult<R> {
        Ok(work(&mut buffer[..elements]))
    }

    fn lend_parameters<R>(
        &self,
        parameters: &mut CpuBuffer,
        elements: usize,
        _: Range<usize>,
        work: impl FnOnce(HostParameters<'_>) -> R,
    ) -> DeviceResult<R> {
        Ok(work(HostParameters::F32(&mut parameters[..elements])))
    }
}

impl HostDevice for CpuDevice {
    fn adamw(
        &self,
        elements: usize,
        scalars: &AdamwScalars,
        decay: bool,
        state: AdamwParts<'_, CpuBuffer>,
    ) -> DeviceResult {
        fn read(part: Part<'_, CpuBuffer>, elements: usize) -> &[f32] {
            &part.0[part.1..][..elements]
        }
        fn write(part: PartMut<'_, CpuBuffer>, elements: usize) -> &mut [f32] {
            &mut part.0[part.1..][..elements]
        }
        let AdamwParts { parameters, mirror, from, to, gradient } = state;
        let operands = state::Operands {
            parameters: write(parameters, elements),
            mirror: mirror.map(|part| write(part, elements)),
            from: from.map(|parts| parts.map(|part| read(part, elements))),
            to: to.map(|part| write(part, elements)),
            gradient: read(gradient, elements),
        };
        state::adamw(&self.pool, self.isa, scalars, decay, operands);
        Ok(())
    }

    unsafe fn over(map: &Arc<SlotMap>, first: usize, elements: usize) -> CpuBuffer {
        // SAFETY: the caller promises what the buffer asks for.
        unsafe { CpuBuffer::over(map.clone(), first, elements) }
    }
}
