//! Small matrix products held in registers, for attention's tiles.
//!
//! `B` and `C` are stored in *panels*: runs of up to 32 columns, each row of a panel contiguous, rows following each
//! other. A panel's row is two registers of sixteen lanes (the last panel may be one), so that no product has ragged
//! edges: packing pads with zeros.

use super::lanes::Lanes;

/// Columns of a full panel.
pub(super) const PANEL: usize = 32;
/// Rows of a register tile; packed heights are multiples of it.
pub(super) const TILE: usize = 8;

/// The left operand: element `(i, l)` is `at[i·row + l·column]`.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) at: *const f32,
    pub(super) row: usize,
    pub(super) column: usize,
}

/// `C (+)= A·B` for one panel of `V` registers: `m` rows (a multiple of 8), inner length `k`. `c_row` is the distance
/// of C's rows; B's rows are `16·V` apart.
///
/// # Safety
/// The pointers must cover these shapes.
#[inline(always)]
pub(super) unsafe fn product<L: Lanes, const V: usize>(
    m: usize,
    k: usize,
    a: Left,
    b: *const f32,
    c: *mut f32,
    c_row: usize,
    add: bool,
) {
    unsafe {
        for top in (0..m).step_by(TILE) {
            let mut sums = [[L::zero(); V]; TILE];
            if add {
                for (i, row) in sums.iter_mut().enumerate() {
                    for (v, lane) in row.iter_mut().enumerate() {
                        *lane = L::load(c.add((top + i) * c_row + 16 * v));
                    }
                }
            }
            let mut left = a.at.add(top * a.row);
            let mut right = b;
            for _ in 0..k {
                let mut row = [L::zero(); V];
                for (v, lane) in row.iter_mut().enumerate() {
                    *lane = L::load(right.add(16 * v));
                }
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = L::splat(*left.add(i * a.row));
                    for v in 0..V {
                        sum[v] = x.fma(row[v], sum[v]);
                    }
                }
                left = left.add(a.column);
                right = right.add(16 * V);
            }
            for (i, row) in sums.iter().enumerate() {
                for (v, lane) in row.iter().enumerate() {
                    lane.store(c.add((top + i) * c_row + 16 * v));
                }
            }
        }
    }
}

/// `C (+)= A·B` over all panels of B and C, `n` columns (a multiple of 16). Panel `p` of B starts at `p·32·b_rows`, of
/// C at `p·32·c_rows`.
///
/// # Safety
/// The pointers must cover these shapes.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn panels<L: Lanes>(
    m: usize,
    n: usize,
    k: usize,
    a: Left,
    (b, b_rows): (*const f32, usize),
    (c, c_rows): (*mut f32, usize),
    add: bool,
) {
    unsafe {
        let mut left = 0;
        while left < n {
            let (b, c) = (b.add(left * b_rows), c.add(left * c_rows));
            if n - left >= PANEL {
                product::<L, 2>(m, k, a, b, c, PANEL, add);
            } else {
                product::<L, 1>(m, k, a, b, c, 16, add);
            }
            left += PANEL;
        }
    }
}
