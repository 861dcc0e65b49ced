//! LayerNorm (Ba, Kiros and Hinton, 2016), forward and backward, one row at a time.
//!
//! A row's mean is taken first and its variance from the centred values, not as the mean of squares less the square of
//! the mean: that difference would lose its digits where the mean is large. The row stays in the first cache meanwhile,
//! so memory is still read once. Gain and bias lie one behind the other, as do their gradients, which are made like
//! RMSNorm's: by blocks of [`ROWS`] rows added in block order.

use super::elementwise::ROWS;
use super::lanes::{Isa, Lanes, kernel};
use super::pool::{Pool, Shared, chunk};
use crate::device::{NormShape, Write};

/// One row: `sum = x + delta`, `normed = (sum − mean)/σ·gain + bias`; returns mean and `1/σ`. `delta` may be null: then
/// `sum` is unused. `affine` is the gain and behind it the bias.
#[inline(always)]
unsafe fn norm_row<L: Lanes>(
    n: usize,
    epsilon: f32,
    x: *const f32,
    delta: *const f32,
    sum: *mut f32,
    affine: *const f32,
    normed: *mut f32,
) -> [f32; 2] {
    unsafe {
        let source = if delta.is_null() { x } else { sum.cast_const() };
        let (mut sums, mut squares) = ([L::zero(); 2], [L::zero(); 2]);
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let mut value = L::load_first(x.add(j), m);
            if !delta.is_null() {
                value = value.add(L::load_first(delta.add(j), m));
                value.store_first(sum.add(j), m);
            }
            let s = &mut sums[j / 16 % 2];
            *s = s.add(value);
        }
        let mean = sums[0].add(sums[1]).sum() / n as f32;
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let mut centred = L::load_first(source.add(j), m).sub(L::splat(mean));
            centred.store_first(normed.add(j), m);
            if m < 16 {
                // The lanes beyond the row became −mean; read back, they are zero.
                centred = L::load_first(normed.add(j), m);
            }
            let s = &mut squares[j / 16 % 2];
            *s = centred.fma(centred, *s);
        }
        let variance = squares[0].add(squares[1]).sum() / n as f32;
        let inverse = 1.0 / (variance + epsilon).sqrt();
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let scaled = L::load_first(normed.add(j), m).mul(L::splat(inverse));
            let (gain, bias) = (L::load_first(affine.add(j), m), L::load_first(affine.add(n + j), m));
            scaled.fma(gain, bias).store_first(normed.add(j), m);
        }
        [mean, inverse]
    }
}

kernel! {
    /// [`norm_row`] for an instruction set.
    fn norm_row_kernel(
        n: usize, epsilon: f32, x: *const f32, delta: *const f32, sum: *mut f32, affine: *const f32, normed: *mut f32,
    ) -> [f32; 2] = norm_row
}

/// Residual addition and LayerNorm; see [`crate::device::Device::layernorm_forward`].
#[allow(clippy::too_many_arguments)] // the operands of one kernel
pub(super) fn forward(
    pool: &Pool,
    isa: Isa,
    norm: NormShape,
    x: &[f32],
    delta: Option<(&[f32], &mut [f32])>,
    affine: &[f32],
    normed: &mut [f32],
    statistics: &mut [f32],
) {
    let NormShape { rows, width, epsilon } = norm;
    assert!(x.len() >= rows * width && affine.len() >= 2 * width);
    assert!(normed.len() >= rows * width && statistics.len() >= 2 * rows);
    let (delta, sum) = match delta {
        Some((delta, sum)) => {
            assert!(delta.len() >= rows * width && sum.len() >= rows * width);
            (Some(delta), Some(Shared::new(sum)))
        }
        None => (None, None),
    };
    let (normed, statistics) = (Shared::new(normed), Shared::new(statistics));
    pool.each(rows.div_ceil(ROWS), |task| {
        for i in chunk(task, ROWS, rows) {
            // SAFETY: the assertions cover row i, which belongs to this task.
            unsafe {
                let delta = delta.map_or(std::ptr::null(), |d| d.as_ptr().add(i * width));
                let sum = sum.map_or(std::ptr::null_mut(), |s| s.at(i * width));
                let (x, to) = (x.as_ptr().add(i * width), normed.at(i * width));
                let row = norm_row_kernel(isa, width, epsilon, x, delta, sum, affine.as_ptr(), to);
                statistics.part(2 * i, 2).copy_from_slice(&row);
            }
        }
    });
}

/// One row of the backward; adds the row's part to the gradients of gain and bias, one behind the other.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // the operands of one kernel
unsafe fn norm_row_backward<L: Lanes>(
    n: usize,
    add: bool,
    mean: f32,
    inverse: f32,
    x: *const f32,
    gain: *const f32,
    d_normed: *const f32,
    d_x: *mut f32,
    d_affine: *mut f32,
) {
    unsafe {
        // normed = x̂·w + b with x̂ = (x − mean)/σ, so with g = w·dy: dx = (g − mean(g) − x̂·mean(g·x̂))/σ.
        let (mean, inverse) = (L::splat(mean), L::splat(inverse));
        let (mut sums, mut products) = (L::zero(), L::zero());
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let hat = L::load_first(x.add(j), m).sub(mean).mul(inverse);
            let dy = L::load_first(d_normed.add(j), m);
            hat.fma(dy, L::load_first(d_affine.add(j), m)).store_first(d_affine.add(j), m);
            L::load_first(d_affine.add(n + j), m).add(dy).store_first(d_affine.add(n + j), m);
            let g = dy.mul(L::load_first(gain.add(j), m));
            sums = sums.add(g);
            products = hat.fma(g, products);
        }
        let (mean_g, mean_product) = (L::splat(sums.sum() / n as f32), L::splat(-(products.sum() / n as f32)));
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let hat = L::load_first(x.add(j), m).sub(mean).mul(inverse);
            let g = L::load_first(d_normed.add(j), m).mul(L::load_first(gain.add(j), m));
            let mut d = hat.fma(mean_product, g.sub(mean_g)).mul(inverse);
            if add {
                d = d.add(L::load_first(d_x.add(j), m));
            }
            d.store_first(d_x.add(j), m);
        }
    }
}

kernel! {
    /// [`norm_row_backward`] for an instruction set.
    fn norm_row_backward_kernel(
        n: usize, add: bool, mean: f32, inverse: f32, x: *const f32, gain: *const f32, d_normed: *const f32,
        d_x: *mut f32, d_affine: *mut f32,
    ) = norm_row_backward
}

/// Elements of workspace for the gradients of gain and bias.
pub(super) fn workspace(norm: NormShape) -> usize {
    norm.rows.div_ceil(ROWS) * 2 * norm.width
}

/// The backward of the norm; see [`crate::device::Device::layernorm_backward`].
#[allow(clippy::too_many_arguments)] // the operands of one kernel
pub(super) fn backward(
    pool: &Pool,
    isa: Isa,
    norm: NormShape,
    x: &[f32],
    statistics: &[f32],
    gain: &[f32],
    d_normed: &[f32],
    write: Write,
    d_x: &mut [f32],
    d_affine: &mut [f32],
    parts: &mut [f32],
) {
    let NormShape { rows, width, .. } = norm;
    assert!(x.len() >= rows * width && d_normed.len() >= rows * width && d_x.len() >= rows * width);
    assert!(gain.len() >= width && statistics.len() >= 2 * rows);
    let parts = &mut parts[..workspace(norm)];
    let (d_x, shared) = (Shared::new(d_x), Shared::new(parts));
    pool.each(rows.div_ceil(ROWS), |task| {
        // SAFETY: the assertions cover the rows of this task; its part of the workspace is its own.
        unsafe {
            let part = shared.part(task * 2 * width, 2 * width);
            part.fill(0.0);
            for i in chunk(task, ROWS, rows) {
                let (x, dy) = (x.as_ptr().add(i * width), d_normed.as_ptr().add(i * width));
                let (mean, inverse) = (statistics[2 * i], statistics[2 * i + 1]);
                let (add, to, gain) = (write == Write::Add, part.as_mut_ptr(), gain.as_ptr());
                norm_row_backward_kernel(isa, width, add, mean, inverse, x, gain, dy, d_x.at(i * width), to);
            }
        }
    });
    let d_affine = &mut d_affine[..2 * width];
    d_affine.fill(0.0);
    for part in parts.chunks_exact(2 * width) {
        for (sum, value) in d_affine.iter_mut().zip(part) {
            *sum += value;
        }
    }
}
