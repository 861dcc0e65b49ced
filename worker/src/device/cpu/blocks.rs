//! Exact sums on per-block grids, the twin of what a GPU does; see [`crate::exact32`].

use super::pool::{Pool, Shared, chunk};
use super::reserve;
use crate::device::{DeviceResult, Write};
use crate::math::power_of_two;

/// 32-bit sums, with the exponent and the largest magnitude of each block.
#[derive(Debug)]
pub struct BlockSums {
    sums: Vec<i32>,
    block: usize,
    exponents: Vec<i8>,
    magnitudes: Vec<u8>,
}

impl BlockSums {
    pub(super) fn zeroed(elements: usize, block: usize) -> DeviceResult<Self> {
        let blocks = elements.div_ceil(block);
        Ok(Self {
            sums: reserve(elements, "gradient sums")?,
            block,
            exponents: reserve(blocks, "exponents")?,
            magnitudes: reserve(blocks, "magnitudes")?,
        })
    }

    /// The sums, for the exchange.
    pub fn sums_mut(&mut self) -> &mut [i32] {
        &mut self.sums
    }

    pub(super) fn set_exponents(&mut self, exponents: &[i8]) {
        self.exponents.copy_from_slice(exponents);
        self.magnitudes.fill(0);
    }

    pub(super) fn magnitudes(&self) -> &[u8] {
        &self.magnitudes
    }

    pub(super) fn accumulate(&mut self, pool: &Pool, gradient: &[f32], limit: i32, write: Write) {
        let (n, block) = (gradient.len(), self.block);
        let (sums, magnitudes) = (Shared::new(&mut self.sums), Shared::new(&mut self.magnitudes));
        let exponents = &self.exponents;
        pool.each(n.div_ceil(block), |task| {
            let part = chunk(task, block, n);
            // SAFETY: the block and its magnitude belong to this task.
            let (sums, magnitude) = unsafe { (sums.part(part.start, part.len()), &mut *magnitudes.at(task)) };
            let cells = power_of_two(-i32::from(exponents[task]));
            let mut largest = 0;
            for (sum, value) in sums.iter_mut().zip(&gradient[part]) {
                // A power of two: the product is exact unless it is far below the grid. The conversion saturates.
                let cell = (value * cells).round_ties_even() as i32;
                let cell = if value.is_finite() { cell.clamp(-limit, limit) } else { 0 };
                *sum = if write == Write::Add { sum.wrapping_add(cell) } else { cell };
                largest = largest.max(value.to_bits() & 0x7fff_ffff);
            }
            *magnitude = (*magnitude).max((largest >> 23) as u8);
        });
    }

    pub(super) fn gradient(&self, pool: &Pool, scale: f64, at: usize, gradient: &mut [f32]) {
        let (n, block) = (gradient.len(), self.block);
        let shared = Shared::new(gradient);
        pool.each(n.div_ceil(block), |task| {
            let part = chunk(task, block, n);
            // SAFETY: the part belongs to this task.
            let to = unsafe { shared.part(part.start, part.len()) };
            for (offset, value) in to.iter_mut().enumerate() {
                let i = at + part.start + offset;
                let cell = f64::from(power_of_two(i32::from(self.exponents[i / block])));
                *value = (f64::from(self.sums[i]) * cell * scale) as f32;
            }
        });
    }
}
