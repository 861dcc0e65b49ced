//! Causal attention, backward: the probabilities of a strip are computed again, then five small products.
//!
//! With `P` the probabilities and `D = rowsum(dO∘O)`: `dV += Pᵀ·dO`, `dP = dO·Vᵀ`, `dS = P∘(dP − D)`, `dQ = dS·K` and
//! `dK += dSᵀ·Q` (Dao et al., "FlashAttention", 2022, appendix B). One task has one key head of one sequence with all
//! its query heads, so the sums into `dK` and `dV` are made by one thread in one order.

use super::attention::{Padded, Pieces, Rows, STRIP, copy_rows, pack_rows, pack_transposed, scores};
use super::lanes::{Isa, Lanes, kernel};
use super::micro::{Left, PANEL, panels};
use super::pool::{Pool, Shared};
use crate::device::AttentionShape;

/// Where one sequence and key head's operands begin; query-side pointers are at the group's first head.
#[derive(Clone, Copy)]
struct Group {
    q: *const f32,
    k: *const f32,
    v: *const f32,
    out: *const f32,
    d_out: *const f32,
    statistics: *const f32,
    d_q: *mut f32,
    d_k: *mut f32,
    d_v: *mut f32,
    scratch: *mut f32,
}

/// Turns scores into probabilities and `dP` into `dS` for the first `n` of a row, zero up to `limit`.
#[inline(always)]
unsafe fn row_backward<L: Lanes>(s: *mut f32, dp: *mut f32, n: usize, limit: usize, stats: [f32; 2], d: f32) {
    unsafe {
        let (most, inverse, d) = (L::splat(stats[0]), L::splat(stats[1]), L::splat(d));
        let mut j = 0;
        while j + 16 <= n {
            let p = L::load(s.add(j)).sub(most).exp().mul(inverse);
            p.store(s.add(j));
            L::load(dp.add(j)).sub(d).mul(p).store(dp.add(j));
            j += 16;
        }
        if j < n {
            let p = L::load(s.add(j)).sub(most).exp().mul(inverse);
            let ds = L::load(dp.add(j)).sub(d).mul(p);
            L::zero().store(s.add(j));
            L::zero().store(dp.add(j));
            p.store_first(s.add(j), n - j);
            ds.store_first(dp.add(j), n - j);
            j += 16;
        }
        while j < limit {
            L::zero().store(s.add(j));
            L::zero().store(dp.add(j));
            j += 16;
        }
    }
}

/// `Σ a·b` over `n` elements.
#[inline(always)]
unsafe fn dot<L: Lanes>(a: *const f32, b: *const f32, n: usize) -> f32 {
    unsafe {
        let mut sum = L::zero();
        let mut j = 0;
        while j + 16 <= n {
            sum = L::load(a.add(j)).fma(L::load(b.add(j)), sum);
            j += 16;
        }
        if j < n {
            sum = L::load_first(a.add(j), n - j).fma(L::load_first(b.add(j), n - j), sum);
        }
        sum.sum()
    }
}

/// Copies `count` rows out of panels of `rows` rows, times `scale`.
#[inline(always)]
unsafe fn unpack_rows<L: Lanes>(
    from: *const f32,
    rows: usize,
    count: usize,
    width: usize,
    padded: usize,
    scale: f32,
    (to, to_row): (*mut f32, usize),
) {
    unsafe {
        for j in (0..width).step_by(16) {
            let panel = j / PANEL * PANEL;
            let wide = PANEL.min(padded - panel);
            let from = from.add(panel * rows + (j - panel));
            for i in 0..count {
                L::load(from.add(i * wide)).mul(L::splat(scale)).store_first(to.add(i * to_row + j), 16.min(width - j));
            }
        }
    }
}

#[inline(always)]
unsafe fn group_backward<L: Lanes>(shape: AttentionShape, g: Group) {
    let p = Padded::new(shape);
    let (t, hd, row, out_row) = (shape.sequence, shape.head_dim, shape.row(), shape.output_row());
    let (whole, part) = (p.tokens * p.width, STRIP * p.width);
    let scale = 1.0 / (hd as f32).sqrt();
    unsafe {
        let mut pieces = Pieces(g.scratch);
        let (kt, vt, kp) = (pieces.next(whole), pieces.next(whole), pieces.next(whole));
        let (dk, dv) = (pieces.next(whole), pieces.next(whole));
        let (s, dp) = (pieces.next(STRIP * p.stride), pieces.next(STRIP * p.stride));
        let (q_rows, q_panels, do_rows) = (pieces.next(part), pieces.next(part), pieces.next(part));
        let (do_panels, dq) = (pieces.next(part), pieces.next(part));
        pack_transposed(Rows { at: g.k, row }, t, hd, p.tokens, kt);
        pack_transposed(Rows { at: g.v, row }, t, hd, p.tokens, vt);
        pack_rows::<L>(Rows { at: g.k, row }, t, hd, p.width, p.tokens, 1.0, kp);
        std::ptr::write_bytes(dk, 0, whole);
        std::ptr::write_bytes(dv, 0, whole);
        for head in 0..shape.heads / shape.kv_heads {
            for first in (0..t).step_by(STRIP) {
                let (count, limit) = (STRIP.min(t - first), first + STRIP);
                let query = Rows { at: g.q.add(first * row + head * hd), row };
                let gradient = Rows { at: g.d_out.add(first * out_row + head * hd), row: out_row };
                copy_rows(query, count, hd, scale, q_rows);
                pack_rows::<L>(query, count, hd, p.width, STRIP, scale, q_panels);
                copy_rows(gradient, count, hd, 1.0, do_rows);
                pack_rows::<L>(gradient, count, hd, p.width, STRIP, 1.0, do_panels);
                scores::<L>(q_rows, hd, kt, limit, s, p);
                scores::<L>(do_rows, hd, vt, limit, dp, p);
                for i in 0..STRIP {
                    let (s, dp) = (s.add(i * p.stride), dp.add(i * p.stride));
                    if i >= count {
                        row_backward::<L>(s, dp, 0, limit, [0.0; 2], 0.0);
                        continue;
                    }
                    let at = g.statistics.add(2 * (head * t + first + i));
                    let output = g.out.add((first + i) * out_row + head * hd);
                    let d = dot::<L>(output, do_rows.add(i * hd), hd);
                    row_backward::<L>(s, dp, first + i + 1, limit, [*at, *at.add(1)], d);
                }
                let across = |at: *mut f32| Left { at, row: p.stride, column: 1 };
                let down = |at: *mut f32| Left { at, row: 1, column: p.stride };
                panels::<L>(limit, p.width, STRIP, down(s), (do_panels, STRIP), (dv, p.tokens), true);
                panels::<L>(limit, p.width, STRIP, down(dp), (q_panels, STRIP), (dk, p.tokens), true);
                panels::<L>(STRIP, p.width, limit, across(dp), (kp, p.tokens), (dq, STRIP), false);
                let to = g.d_q.add(first * row + head * hd);
                unpack_rows::<L>(dq, STRIP, count, hd, p.width, scale, (to, row));
            }
        }
        unpack_rows::<L>(dk, p.tokens, t, hd, p.width, 1.0, (g.d_k, row));
        unpack_rows::<L>(dv, p.tokens, t, hd, p.width, 1.0, (g.d_v, row));
    }
}

kernel! {
    /// [`group_backward`] for an instruction set.
    fn group_backward_kernel(shape: AttentionShape, group: Group) = group_backward
}

/// The gradients of all sequences and heads; see [`crate::device::Device::attention_backward`].
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    pool: &Pool,
    isa: Isa,
    shape: AttentionShape,
    qkv: &[f32],
    out: &[f32],
    statistics: &[f32],
    d_out: &[f32],
    d_qkv: &mut [f32],
    workspace: &mut [f32],
) {
    let (t, hd, tokens) = (shape.sequence, shape.head_dim, shape.batch * shape.sequence);
    let (group, scratch) = (shape.heads / shape.kv_heads, Padded::new(shape).scratch());
    assert!(qkv.len() >= tokens * shape.row() && d_qkv.len() >= tokens * shape.row());
    assert!(out.len() >= tokens * shape.output_row() && d_out.len() >= tokens * shape.output_row());
    assert!(statistics.len() >= 2 * tokens * shape.heads && workspace.len() >= scratch * pool.len());
    let (d_qkv, workspace) = (Shared::new(d_qkv), Shared::new(workspace));
    pool.each(shape.batch * shape.kv_heads, |task| {
        let (sequence, kv) = (task / shape.kv_heads, task % shape.kv_heads);
        let first = sequence * t * shape.row();
        let columns = [kv * group * hd, (shape.heads + kv) * hd, (shape.heads + shape.kv_heads + kv) * hd];
        let output = sequence * t * shape.output_row() + kv * group * hd;
        // SAFETY: the assertions cover every row; tasks write their own heads' columns, each thread its own scratch.
        unsafe {
            let g = Group {
                q: qkv.as_ptr().add(first + columns[0]),
                k: qkv.as_ptr().add(first + columns[1]),
                v: qkv.as_ptr().add(first + columns[2]),
                out: out.as_ptr().add(output),
                d_out: d_out.as_ptr().add(output),
                statistics: statistics.as_ptr().add(2 * (sequence * shape.heads + kv * group) * t),
                d_q: d_qkv.at(first + columns[0]),
                d_k: d_qkv.at(first + columns[1]),
                d_v: d_qkv.at(first + columns[2]),
                scratch: workspace.at(pool.index() * scratch),
            };
            group_backward_kernel(isa, shape, g);
        }
    });
}
