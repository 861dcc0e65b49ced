//! Vectors that are added to rows, and their gradients: a linear layer's bias to every row, a position's vector to the
//! rows of its place in every sequence.
//!
//! The gradients are sums over rows. Tasks own columns or positions, so that each sum is made by one task in an order
//! that the shape decides.

use super::elementwise::ROWS;
use super::lanes::{Isa, Lanes, kernel};
use super::pool::{Pool, Shared, chunk};

/// Vectors of columns of one task of the bias's gradient.
const VECTORS: usize = 4;
/// Their columns: four cache lines of a row.
const COLUMNS: usize = 16 * VECTORS;

/// `out[i] += bias` for every row; see [`crate::device::Device::add_bias`].
pub(super) fn add(pool: &Pool, width: usize, rows: usize, bias: &[f32], out: &mut [f32]) {
    let bias = &bias[..width];
    let out = Shared::new(&mut out[..rows * width]);
    pool.each(rows.div_ceil(ROWS), |task| {
        for i in chunk(task, ROWS, rows) {
            // SAFETY: row i belongs to this task.
            let row = unsafe { out.part(i * width, width) };
            for (value, bias) in row.iter_mut().zip(bias) {
                *value += bias;
            }
        }
    });
}

/// Sums of `n` columns, at most [`COLUMNS`], of `rows` rows `pitch` apart: [`ROWS`] rows at a time in row order, and
/// those sums in their order, which keeps more digits than one long sum.
#[inline(always)]
unsafe fn column_sums<L: Lanes>(rows: usize, pitch: usize, n: usize, from: *const f32, to: *mut f32) {
    unsafe {
        let vectors = n.div_ceil(16);
        let mut total = [L::zero(); VECTORS];
        for first in (0..rows).step_by(ROWS) {
            let mut part = [L::zero(); VECTORS];
            for i in first..rows.min(first + ROWS) {
                for (v, sum) in part.iter_mut().enumerate().take(vectors) {
                    *sum = sum.add(L::load_first(from.add(i * pitch + 16 * v), 16.min(n - 16 * v)));
                }
            }
            for (total, part) in total.iter_mut().zip(part) {
                *total = total.add(part);
            }
        }
        for (v, sum) in total.iter().enumerate().take(vectors) {
            sum.store_first(to.add(16 * v), 16.min(n - 16 * v));
        }
    }
}

kernel! {
    /// [`column_sums`] for an instruction set.
    fn column_sums_kernel(rows: usize, pitch: usize, n: usize, from: *const f32, to: *mut f32) = column_sums
}

/// `d_bias = Σ d_out[i]`; see [`crate::device::Device::bias_gradient`].
pub(super) fn gradient(pool: &Pool, isa: Isa, width: usize, rows: usize, d_out: &[f32], d_bias: &mut [f32]) {
    assert!(d_out.len() >= rows * width && d_bias.len() >= width);
    let to = Shared::new(d_bias);
    pool.each(width.div_ceil(COLUMNS), |task| {
        let columns = chunk(task, COLUMNS, width);
        // SAFETY: the assertion covers these columns of every row; they belong to this task.
        unsafe {
            let from = d_out.as_ptr().add(columns.start);
            column_sums_kernel(isa, rows, width, columns.len(), from, to.at(columns.start));
        }
    });
}

/// `d_positions[t] = Σ d_out[b·sequence + t]` over the sequences in order; see
/// [`crate::device::Device::position_backward`].
pub(super) fn position_backward(
    pool: &Pool,
    width: usize,
    batch: usize,
    sequence: usize,
    d_out: &[f32],
    d_positions: &mut [f32],
) {
    assert!(d_out.len() >= batch * sequence * width);
    let table = Shared::new(&mut d_positions[..sequence * width]);
    pool.each(sequence.div_ceil(ROWS), |task| {
        for position in chunk(task, ROWS, sequence) {
            // SAFETY: this position belongs to this task.
            let to = unsafe { table.part(position * width, width) };
            to.fill(0.0);
            for b in 0..batch {
                for (sum, g) in to.iter_mut().zip(&d_out[(b * sequence + position) * width..]) {
                    *sum += g;
                }
            }
        }
    });
}
