//! Exact gradient sums: integers on a fixed power-of-two grid.
//!
//! Float addition is not associative, so a sum of gradients would depend on how many workers made it. Instead each
//! micro-batch's gradient is rounded once onto the grid of 2⁻⁴⁰ and added as 64-bit integers, which is associative:
//! any order, ring or world size gives the same sum. So that no partial sum can overflow, each of the M micro-batches
//! must stay within (2⁶³ − 1)/M; [`ExactGradient::add`] checks that before anything is used.

use crate::device::{Device, DeviceResult, Write};

/// Grid cells of one: gradients are multiples of 1/GRID.
pub const GRID: f64 = (1u64 << 40) as f64;

/// A gradient element that cannot be put on the grid.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "gradient element {element} is {value:e}, which is {}",
    if .value.is_finite() { "too large for the exact sum; lower the learning rate or use reduction = \"fast\"" }
    else { "not finite" }
)]
pub struct GradientFault {
    /// Index in the canonical space.
    pub element: usize,
    /// The gradient there.
    pub value: f32,
}

impl GradientFault {
    /// Whether the value is finite but too large, rather than infinite or not a number.
    pub fn is_overflow(&self) -> bool {
        self.value.is_finite()
    }
}

/// The largest magnitude on the grid that each of `micro_batches` gradients may have.
///
/// # Panics
/// If `micro_batches` is zero.
pub fn grid_limit(micro_batches: usize) -> i64 {
    i64::MAX / i64::try_from(micro_batches).expect("a count of micro-batches fits 64 bits")
}

/// What turns a sum over `micro_batches` micro-batches into the mean gradient.
pub fn mean_scale(micro_batches: usize) -> f64 {
    1.0 / GRID / micro_batches as f64
}

/// The sums of one step over the whole canonical space.
pub struct ExactGradient<D: Device> {
    sums: D::Sums,
    elements: usize,
    limit: i64,
    started: bool,
}

impl<D: Device> ExactGradient<D> {
    /// Sums over `elements` elements of a step of `micro_batches` micro-batches, over all workers.
    pub fn new(device: &D, elements: usize, micro_batches: usize) -> DeviceResult<Self> {
        let sums = device.allocate_sums(elements)?;
        Ok(Self { sums, elements, limit: grid_limit(micro_batches), started: false })
    }

    /// Begins a step: the next addition replaces the old sums.
    pub fn restart(&mut self) {
        self.started = false;
    }

    /// Adds one micro-batch's gradient; `Some` names the first element that does not fit, and the step must not be
    /// used.
    pub fn add(&mut self, device: &D, gradient: &D::Buffer) -> DeviceResult<Option<GradientFault>> {
        let write = if self.started { Write::Add } else { Write::Replace };
        self.started = true;
        device.accumulate_exact(self.elements, gradient, self.limit, write, &mut self.sums)
    }

    /// The sums, for the exchange. Stale until the first [`ExactGradient::add`] of a step: a worker without
    /// micro-batches must send zeros.
    pub fn sums(&self) -> &D::Sums {
        &self.sums
    }

    /// The sums, for the exchange to write into.
    pub fn sums_mut(&mut self) -> &mut D::Sums {
        &mut self.sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::{CpuBuffer, CpuDevice};
    use proptest::prelude::*;

    fn buffer(values: &[f32]) -> CpuBuffer {
        let mut b = CpuBuffer::zeroed(values.len(), "test").unwrap();
        b.copy_from_slice(values);
        b
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn sums_do_not_depend_on_order_or_threads(
            values in proptest::collection::vec(-8.0f32..8.0, 60), cut in 1usize..20, threads in 1usize..4,
        ) {
            let device = CpuDevice::new(threads).unwrap();
            let grads: Vec<CpuBuffer> = values.chunks(20).map(buffer).collect();
            let mut first = ExactGradient::new(&device, 20, 3).unwrap();
            let mut second = ExactGradient::new(&device, 20, 3).unwrap();
            for g in &grads {
                prop_assert_eq!(first.add(&device, g).unwrap(), None);
            }
            for g in grads.iter().rev() {
                prop_assert_eq!(second.add(&device, g).unwrap(), None);
            }
            prop_assert_eq!(first.sums(), second.sums());
            for i in 0..20 {
                let exact: i64 = (0..3).map(|m| (f64::from(values[20 * m + i]) * GRID).round_ties_even() as i64).sum();
                prop_assert_eq!(first.sums()[i], exact);
            }
            let mut mean = buffer(&[0.0; 20]);
            device.gradient_from_sums(20 - cut, mean_scale(3), first.sums(), cut, &mut mean).unwrap();
            for i in cut..20 {
                let m = (values[i] as f64 + values[20 + i] as f64 + values[40 + i] as f64) / 3.0;
                prop_assert!((f64::from(mean[i - cut]) - m).abs() <= 1e-6);
            }
        }
    }

    #[test]
    fn the_limit_is_exact_and_faults_name_the_first_element() {
        let device = CpuDevice::new(2).unwrap();
        for m in [1usize, 2, 3, 7, 1000] {
            let limit = grid_limit(m);
            assert!(limit.checked_mul(m as i64).is_some());
            // The largest float32 that fits, and the next.
            let mut fits = (limit as f64 / GRID) as f32;
            while f64::from(fits) * GRID > limit as f64 || (f64::from(fits) * GRID) as i128 > i128::from(limit) {
                fits = fits.next_down();
            }
            let above = fits.next_up();
            for sign in [1.0, -1.0] {
                let mut values = vec![0.5f32; 100_000];
                values[70_001] = fits * sign;
                let mut sums = ExactGradient::new(&device, values.len(), m).unwrap();
                assert_eq!(sums.add(&device, &buffer(&values)).unwrap(), None);
                values[70_001] = above * sign;
                values[70_005] = f32::NAN;
                let fault = sums.add(&device, &buffer(&values)).unwrap().unwrap();
                assert_eq!((fault.element, fault.value, fault.is_overflow()), (70_001, above * sign, true));
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut sums = ExactGradient::new(&device, 3, 1).unwrap();
            let fault = sums.add(&device, &buffer(&[0.0, 1.0, bad])).unwrap().unwrap();
            assert!(fault.element == 2 && !fault.is_overflow());
        }
    }

    #[test]
    fn block_norms_ignore_threads_and_shards() {
        let values: Vec<f32> = (0..10_000).map(|i| ((i * 37) % 101) as f32 * 0.013 - 0.5).collect();
        let mut whole = vec![0.0; 10];
        CpuDevice::new(1).unwrap().block_square_sums(10_000, 1024, &buffer(&values), &mut whole).unwrap();
        let mut shard = vec![0.0; 6];
        let tail = buffer(&values[4 * 1024..]);
        CpuDevice::new(3).unwrap().block_square_sums(tail.len(), 1024, &tail, &mut shard).unwrap();
        assert_eq!(shard, whole[4..]);
        let naive: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((whole.iter().sum::<f64>() - naive).abs() < 1e-9 * naive);
    }
}
