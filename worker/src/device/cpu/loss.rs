//! Softmax cross-entropy, its gradient written over the logits.
//!
//! The caller runs it over chunks of token rows, so the logits of all tokens never exist at once. Each row's loss is
//! taken in float64; rows are added in blocks of [`ROWS`], blocks in order.

use super::elementwise::ROWS;
use super::lanes::{Isa, Lanes, kernel};
use super::pool::{Pool, Shared, chunk};
use crate::math;

/// One row: the loss, and the gradient in place if `scale` is not zero.
#[inline(always)]
unsafe fn row_loss<L: Lanes>(n: usize, target: usize, scale: f32, row: *mut f32) -> f64 {
    unsafe {
        let wanted = *row.add(target);
        let (whole, rest) = (n / 16 * 16, n % 16);
        let mut high = L::splat(*row);
        for j in (0..whole).step_by(16) {
            high = high.max(L::load(row.add(j)));
        }
        let mut most = high.largest();
        for j in whole..n {
            let x = *row.add(j);
            most = if most > x { most } else { x };
        }
        let (high, mut sum) = (L::splat(most), L::zero());
        for j in (0..whole).step_by(16) {
            let e = L::load(row.add(j)).sub(high).exp();
            e.store(row.add(j));
            sum = sum.add(e);
        }
        if rest > 0 {
            let e = L::load_first(row.add(whole), rest).sub(high).exp();
            e.store_first(row.add(whole), rest);
            sum = sum.add(L::load_first(row.add(whole), rest));
        }
        let total = sum.sum();
        if scale != 0.0 {
            let factor = L::splat(scale / total);
            for j in (0..n).step_by(16) {
                let m = 16.min(n - j);
                L::load_first(row.add(j), m).mul(factor).store_first(row.add(j), m);
            }
            *row.add(target) -= scale;
        }
        // At least one exponential is 1, so the sum is a normal number unless a logit was not finite.
        if !total.is_finite() || !wanted.is_finite() {
            return f64::NAN;
        }
        math::ln(f64::from(total)) + f64::from(most) - f64::from(wanted)
    }
}

kernel! {
    /// [`row_loss`] for an instruction set.
    fn row_loss_kernel(n: usize, target: usize, scale: f32, row: *mut f32) -> f64 = row_loss
}

/// The rows' losses, added; see [`crate::device::Device::cross_entropy`].
pub(super) fn cross_entropy(
    pool: &Pool,
    isa: Isa,
    vocabulary: usize,
    targets: &[u32],
    gradient: Option<f32>,
    logits: &mut [f32],
) -> f64 {
    let rows = targets.len();
    assert!(logits.len() >= rows * vocabulary && targets.iter().all(|t| (*t as usize) < vocabulary));
    let mut sums = vec![0.0f64; rows.div_ceil(ROWS)];
    let (logits, shared) = (Shared::new(logits), Shared::new(&mut sums));
    pool.each(rows.div_ceil(ROWS), |task| {
        let mut sum = 0.0;
        for i in chunk(task, ROWS, rows) {
            // SAFETY: the assertion covers row i and its target; row i belongs to this task.
            unsafe {
                let row = logits.at(i * vocabulary);
                sum += row_loss_kernel(isa, vocabulary, targets[i] as usize, gradient.unwrap_or(0.0), row);
            }
        }
        // SAFETY: entry `task` belongs to this task.
        unsafe { *shared.at(task) = sum };
    });
    sums.iter().sum()
}
