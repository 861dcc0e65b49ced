//! Exact gradient sums in 32 bits: a grid of its own for each block of the canonical space.
//!
//! The fixed grid of [`crate::exact`] needs 64 bits for a gradient of any size. Here each block has a power-of-two grid
//! of about its own gradients' size, so 32 bits do, and the exchange moves no more bytes than float32 would. A block's
//! grid 2^e is chosen from the steps before: it rises at once to the largest magnitude seen, with room to spare, and
//! falls by at most one power of two in eight steps, so that a block that is quiet for a moment is not surprised. A
//! model has thousands of blocks, and one of them that outgrows its grid makes all compute the step again; so the room
//! to spare is what the precision leaves: of the bits of a micro-batch's values, 24 are kept where there are so many.
//!
//! So that no partial sum can overflow in any order, each of the M micro-batches must stay within (2³¹ − 1)/M cells.
//! Values beyond saturate, which shows in the block's largest magnitude; then the whole step is computed again on the
//! grids that this step's magnitudes call for. Magnitudes are known by their float32 exponent alone, one byte a block:
//! it is the same on every rank once the largest of all ranks is taken, and so is every decision made of it.

use crate::device::{Device, DeviceResult, Write};

/// The coarsest and the finest grid: both powers and their inverses are normal float32 numbers.
const COARSEST: i32 = 126;
const FINEST: i8 = -126;
/// Bits that a block's largest value keeps, if there are enough: as many as a float32 has. The smallest ones matter
/// too, as Adam takes steps of one size for gradients of any.
const PRECISION: i32 = 24;
/// Powers of two that a block may grow by from one step to the next without a second computation: at least, at most.
const HEADROOM: (i32, i32) = (3, 8);
/// Steps in which a grid falls by one power of two at most.
const FALL: u64 = 8;
/// The biased exponent of a float32 that is not finite.
pub const NOT_FINITE: u8 = 255;
/// The fewest bits a micro-batch's values may have.
const FEWEST_BITS: i32 = 12;
/// The most micro-batches of a step whose sum leaves each enough bits.
pub const MOST_MICRO_BATCHES: usize = 1 << (31 - FEWEST_BITS);

/// What the blocks' magnitudes mean for a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every value was on its grid.
    Fits,
    /// Some values saturated: the step must be computed again, on the next grids.
    Again,
    /// This block has a value that is not finite, or that no grid holds.
    Fault {
        /// The first such block.
        block: usize,
        /// Whether it was finite, only too large.
        finite: bool,
    },
}

/// The rule of the grids for steps of a number of micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grids {
    limit: i32,
    /// The power of two that is at most `limit`.
    bits: i32,
    /// Powers of two to spare above the largest magnitude seen.
    headroom: i32,
}

impl Grids {
    /// For steps of so many micro-batches, over all workers.
    ///
    /// # Panics
    /// If there are none, or more than [`MOST_MICRO_BATCHES`].
    pub fn new(micro_batches: usize) -> Self {
        assert!((1..=MOST_MICRO_BATCHES).contains(&micro_batches), "{micro_batches} micro-batches");
        let limit = i32::MAX / micro_batches as i32;
        let bits = limit.ilog2() as i32;
        Self { limit, bits, headroom: (bits - PRECISION).clamp(HEADROOM.0, HEADROOM.1) }
    }

    /// The largest magnitude of a micro-batch's values, in cells.
    pub fn limit(&self) -> i32 {
        self.limit
    }

    /// The grid a block of this largest magnitude calls for after `step`, on which it was `before`.
    pub fn next(&self, before: i8, magnitude: u8, step: u64) -> i8 {
        let needed = Self::top(magnitude) + self.headroom - self.bits;
        let lowest = i32::from(before) - i32::from(step.is_multiple_of(FALL));
        needed.max(lowest).clamp(i32::from(FINEST), COARSEST) as i8
    }

    /// Whether all values of a block of this largest magnitude are on its grid.
    pub fn fits(&self, exponent: i8, magnitude: u8) -> bool {
        magnitude != NOT_FINITE && Self::top(magnitude) - i32::from(exponent) <= self.bits
    }

    /// Judges a step by its blocks' exponents and magnitudes. Blocks beyond `exponents` are on the finest grid.
    pub fn judge(&self, exponents: &[i8], magnitudes: &[u8]) -> Verdict {
        let mut verdict = Verdict::Fits;
        for (block, magnitude) in magnitudes.iter().enumerate() {
            let exponent = exponents.get(block).copied().unwrap_or(FINEST);
            if self.fits(exponent, *magnitude) {
                continue;
            }
            if *magnitude == NOT_FINITE || !self.fits(self.next(exponent, *magnitude, 0), *magnitude) {
                return Verdict::Fault { block, finite: *magnitude != NOT_FINITE };
            }
            verdict = Verdict::Again;
        }
        verdict
    }

    /// Moves all grids on to what the magnitudes of `step` call for.
    pub fn advance(&self, exponents: &mut [i8], magnitudes: &[u8], step: u64) {
        for (exponent, magnitude) in exponents.iter_mut().zip(magnitudes) {
            *exponent = self.next(*exponent, *magnitude, step);
        }
    }

    /// The power of two that is above every value of this biased exponent.
    fn top(magnitude: u8) -> i32 {
        i32::from(magnitude) - 126
    }
}

/// The sums of one step over the whole canonical space, on per-block grids.
pub struct BlockGradient<D: Device> {
    sums: D::BlockSums,
    grids: Grids,
    elements: usize,
    exponents: Vec<i8>,
    magnitudes: Vec<u8>,
    started: bool,
}

impl<D: Device> BlockGradient<D> {
    /// Sums over `elements` elements in blocks of `block`, of steps of `micro_batches` micro-batches over all workers.
    pub fn new(device: &D, elements: usize, block: usize, micro_batches: usize) -> DeviceResult<Self> {
        let blocks = elements.div_ceil(block);
        Ok(Self {
            sums: device.allocate_block_sums(elements, block)?,
            grids: Grids::new(micro_batches),
            elements,
            exponents: vec![FINEST; blocks],
            magnitudes: vec![0; blocks],
            started: false,
        })
    }

    /// The grids of the next step, as the scalar state has them: one exponent a block, or none before the first step.
    pub fn exponents(&self) -> &[i8] {
        &self.exponents
    }

    /// Takes over the grids of a state. `false`: they are not this model's, and nothing was changed.
    #[must_use]
    pub fn resume(&mut self, exponents: &[i8]) -> bool {
        if exponents.is_empty() {
            self.exponents.fill(FINEST);
        } else if exponents.len() == self.exponents.len() {
            self.exponents.copy_from_slice(exponents);
        } else {
            return false;
        }
        true
    }

    /// Begins a step, or computes it again: the next addition replaces the old sums.
    pub fn restart(&mut self, device: &D) -> DeviceResult {
        self.started = false;
        device.set_exponents(&self.exponents, &mut self.sums)
    }

    /// Adds one micro-batch's gradient.
    pub fn add(&mut self, device: &D, gradient: &D::Buffer) -> DeviceResult {
        let write = if self.started { Write::Add } else { Write::Replace };
        self.started = true;
        device.accumulate_blocks(self.elements, gradient, self.grids.limit(), write, &mut self.sums)
    }

    /// The largest magnitudes since the step began, one a block.
    pub fn magnitudes(&mut self, device: &D) -> DeviceResult<&[u8]> {
        device.read_magnitudes(&self.sums, &mut self.magnitudes)?;
        Ok(&self.magnitudes)
    }

    /// Judges the step by the largest magnitudes over all ranks, and moves the grids on unless they are at fault.
    pub fn settle(&mut self, magnitudes: &[u8], step: u64) -> Verdict {
        let verdict = self.grids.judge(&self.exponents, magnitudes);
        if !matches!(verdict, Verdict::Fault { .. }) {
            self.grids.advance(&mut self.exponents, magnitudes, step);
        }
        verdict
    }

    /// The sums, for the exchange. Stale until the first addition of a step.
    pub fn sums(&self) -> &D::BlockSums {
        &self.sums
    }

    /// The sums, for the exchange to write into.
    pub fn sums_mut(&mut self) -> &mut D::BlockSums {
        &mut self.sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::{CpuBuffer, CpuDevice};
    use proptest::prelude::*;

    fn magnitude(value: f32) -> u8 {
        ((value.to_bits() >> 23) & 255) as u8
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn what_fits_never_saturates(
            bits in any::<u32>(), exponent in -126i8..=126, micro_batches in 1usize..5000, step in 0u64..20,
        ) {
            let grids = Grids::new(micro_batches);
            let value = f32::from_bits(bits);
            let cells = (f64::from(value.abs()) * 2f64.powi(-i32::from(exponent))).round_ties_even();
            if grids.fits(exponent, magnitude(value)) {
                prop_assert!(value.is_finite() && cells <= f64::from(grids.limit()));
            }
            if value.is_finite() && value.abs() < 1e30 {
                let next = grids.next(exponent, magnitude(value), step);
                prop_assert!(grids.fits(next, magnitude(value)));
                let room = grids.headroom as u8;
                prop_assert!(grids.fits(next, magnitude(value).saturating_add(room).min(254)) || next == 126);
                prop_assert!(next >= exponent - i8::from(exponent > -126 && step.is_multiple_of(FALL)));
                // What it called for, it keeps its bits on.
                prop_assert!(grids.bits - grids.headroom >= PRECISION.min(grids.bits - HEADROOM.0));
            }
        }

        #[test]
        fn sums_do_not_depend_on_order_or_threads(
            values in proptest::collection::vec(-8.0f32..8.0, 60), threads in 1usize..4,
        ) {
            let device = CpuDevice::new(threads).unwrap();
            let grads: Vec<CpuBuffer> = values.chunks(20).map(buffer).collect();
            let mut first = BlockGradient::new(&device, 20, 8, 3).unwrap();
            let mut second = BlockGradient::new(&device, 20, 8, 3).unwrap();
            // The first pass finds the magnitudes, the second is on the right grids.
            prop_assert_eq!(pass(&device, &mut first, grads.iter()), Verdict::Again);
            prop_assert_eq!(pass(&device, &mut first, grads.iter()), Verdict::Fits);
            prop_assert_eq!(pass(&device, &mut second, grads.iter().rev()), Verdict::Again);
            prop_assert_eq!(pass(&device, &mut second, grads.iter().rev()), Verdict::Fits);
            prop_assert_eq!(first.exponents(), second.exponents());
            let [mut a, mut b] = [buffer(&[0.0; 20]), buffer(&[0.0; 20])];
            device.gradient_from_blocks(20, 1.0 / 3.0, first.sums(), 0, &mut a).unwrap();
            device.gradient_from_blocks(20, 1.0 / 3.0, second.sums(), 0, &mut b).unwrap();
            prop_assert_eq!(&a[..], &b[..]);
            for i in 0..20 {
                let mean = (0..3).map(|m| f64::from(values[20 * m + i])).sum::<f64>() / 3.0;
                // Cells of 2^(3 + 5 - 29) at most, each value rounded by half of one; then the mean to float32.
                let bound = 2f64.powi(-22) + mean.abs() * 2f64.powi(-24);
                prop_assert!((f64::from(a[i]) - mean).abs() <= bound, "{} is {mean}", a[i]);
            }
        }
    }

    fn buffer(values: &[f32]) -> CpuBuffer {
        let mut buffer = CpuBuffer::zeroed(values.len(), "test").unwrap();
        buffer.copy_from_slice(values);
        buffer
    }

    fn pass<'a>(
        device: &CpuDevice,
        sum: &mut BlockGradient<CpuDevice>,
        gradients: impl Iterator<Item = &'a CpuBuffer>,
    ) -> Verdict {
        sum.restart(device).unwrap();
        for gradient in gradients {
            sum.add(device, gradient).unwrap();
        }
        let magnitudes = sum.magnitudes(device).unwrap().to_vec();
        sum.settle(&magnitudes, 1)
    }

    #[test]
    fn faults_name_their_block_and_growth_within_the_headroom_needs_no_second_pass() {
        let device = CpuDevice::new(2).unwrap();
        let mut sum = BlockGradient::new(&device, 30, 10, 4).unwrap();
        let mut values = vec![0.25f32; 30];
        assert_eq!(pass(&device, &mut sum, [buffer(&values)].iter()), Verdict::Again);
        values[12] = -3.9;
        assert_eq!(pass(&device, &mut sum, [buffer(&values)].iter()), Verdict::Fits);
        values[12] = 1e6;
        assert_eq!(pass(&device, &mut sum, [buffer(&values)].iter()), Verdict::Again);
        let before = sum.exponents().to_vec();
        for (bad, finite) in [(f32::NAN, false), (f32::NEG_INFINITY, false)] {
            values[21] = bad;
            assert_eq!(pass(&device, &mut sum, [buffer(&values)].iter()), Verdict::Fault { block: 2, finite });
            assert_eq!(sum.exponents(), before, "a fault leaves the grids");
        }
        assert!(!sum.resume(&[0; 4]) && sum.resume(&[7; 3]) && sum.exponents() == [7; 3]);
        assert!(sum.resume(&[]) && sum.exponents() == [FINEST; 3]);
    }
}
