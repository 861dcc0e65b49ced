//! Causal attention, forward: one strip of 32 queries at a time.
//!
//! For each sequence and key head, keys and values are packed once into panels; then each strip of 32 queries takes its
//! scores against the keys it may see (later keys are never computed), a softmax by rows, and the product with the
//! values. The scores of a strip are the most that exists at once: 32·T numbers a thread, not T·T a head. The backward
//! is in [`super::attention_backward`]. Strips, panels and sums are cut by the shape alone.

use super::lanes::{Isa, Lanes, kernel};
use super::micro::{Left, PANEL, panels, product};
use super::pool::{Pool, Shared};
use crate::device::AttentionShape;

/// Queries of a strip.
pub(super) const STRIP: usize = 32;

/// Padded sizes of one head's scratch memory.
#[derive(Clone, Copy)]
pub(super) struct Padded {
    /// Tokens, rounded up to whole strips.
    pub(super) tokens: usize,
    /// Head width, rounded up to whole registers.
    pub(super) width: usize,
    /// Distance of a strip's rows: off the powers of two, which would crowd one set of the cache.
    pub(super) stride: usize,
}

impl Padded {
    pub(super) fn new(shape: AttentionShape) -> Self {
        let tokens = shape.sequence.next_multiple_of(STRIP);
        Self { tokens, width: shape.head_dim.next_multiple_of(16), stride: tokens + 16 }
    }

    /// Scratch elements of one thread, for the backward, which needs more than the forward.
    pub(super) fn scratch(self) -> usize {
        5 * self.tokens * self.width + 2 * STRIP * self.stride + 5 * STRIP * self.width
    }
}

/// Cuts consecutive pieces off a thread's scratch memory.
pub(super) struct Pieces(pub(super) *mut f32);

impl Pieces {
    /// The next `n` elements.
    ///
    /// # Safety
    /// All pieces together must fit the scratch.
    pub(super) unsafe fn next(&mut self, n: usize) -> *mut f32 {
        let start = self.0;
        // SAFETY: within the scratch, as the caller promises.
        self.0 = unsafe { start.add(n) };
        start
    }
}

/// One head's rows in a row-major matrix: the first element and the distance of rows.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) at: *const f32,
    pub(super) row: usize,
}

/// Copies `count` rows into panels of `rows` rows each, padding with zeros.
///
/// # Safety
/// `from` must cover `count` rows of `width`, `to` must cover `rows · padded` elements.
#[inline(always)]
pub(super) unsafe fn pack_rows<L: Lanes>(
    from: Rows,
    count: usize,
    width: usize,
    padded: usize,
    rows: usize,
    scale: f32,
    to: *mut f32,
) {
    unsafe {
        for left in (0..padded).step_by(16) {
            let panel = left / PANEL * PANEL;
            let wide = PANEL.min(padded - panel);
            let n = width.saturating_sub(left).min(16);
            let to = to.add(panel * rows + (left - panel));
            for i in 0..count {
                let source = from.at.add(i * from.row + left);
                let value = if n == 16 { L::load(source) } else { L::load_first(source, n) };
                value.mul(L::splat(scale)).store(to.add(i * wide));
            }
            for i in count..rows {
                L::zero().store(to.add(i * wide));
            }
        }
    }
}

/// Copies `count` rows of `width` as they are, times `scale`, followed by zero rows up to a whole strip.
///
/// # Safety
/// `from` must cover `count` rows of `width`, `to` a strip of `width`.
#[inline(always)]
pub(super) unsafe fn copy_rows(from: Rows, count: usize, width: usize, scale: f32, to: *mut f32) {
    unsafe {
        for i in 0..count {
            for j in 0..width {
                *to.add(i * width + j) = *from.at.add(i * from.row + j) * scale;
            }
        }
        std::ptr::write_bytes(to.add(count * width), 0, (STRIP - count) * width);
    }
}

/// Packs the transpose of `count` rows: panels of 32 tokens, each of `width` rows.
///
/// # Safety
/// `from` must cover `count` rows of `width`, `to` must cover `tokens · width` elements.
#[inline(always)]
pub(super) unsafe fn pack_transposed(from: Rows, count: usize, width: usize, tokens: usize, to: *mut f32) {
    unsafe {
        for panel in (0..tokens).step_by(PANEL) {
            let to = to.add(panel * width);
            for i in 0..PANEL {
                let there = panel + i < count;
                for j in 0..width {
                    *to.add(j * PANEL + i) = if there { *from.at.add((panel + i) * from.row + j) } else { 0.0 };
                }
            }
        }
    }
}

/// `strip = queries · keysᵀ` for the first `limit` keys.
///
/// # Safety
/// The pointers must cover a strip of queries, `limit` transposed keys and a strip of scores.
#[inline(always)]
pub(super) unsafe fn scores<L: Lanes>(
    q: *const f32,
    width: usize,
    kt: *const f32,
    limit: usize,
    s: *mut f32,
    p: Padded,
) {
    for panel in (0..limit).step_by(PANEL) {
        let left = Left { at: q, row: width, column: 1 };
        // SAFETY: the caller vouches for the shapes.
        unsafe { product::<L, 2>(STRIP, width, left, kt.add(panel * width), s.add(panel), p.stride, false) };
    }
}

/// Turns the first `n` scores of a row into exponentials less their maximum, the rest up to `limit` into zero; returns
/// (maximum, one over the sum).
#[inline(always)]
unsafe fn softmax_row<L: Lanes>(row: *mut f32, n: usize, limit: usize) -> (f32, f32) {
    unsafe {
        let (whole, rest) = (n / 16 * 16, n % 16);
        // Lanes past the row's end repeat its first score, which cannot change the maximum.
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
        let mut after = whole;
        if rest > 0 {
            let e = L::load(row.add(whole)).sub(high).exp();
            L::zero().store(row.add(whole));
            e.store_first(row.add(whole), rest);
            sum = sum.add(L::load(row.add(whole)));
            after += 16;
        }
        for j in (after..limit).step_by(16) {
            L::zero().store(row.add(j));
        }
        (most, 1.0 / sum.sum())
    }
}

/// One sequence and key head. `out` points at the group's first query head, `statistics` at its first row.
#[inline(always)]
unsafe fn group_forward<L: Lanes>(
    shape: AttentionShape,
    q: *const f32,
    k: *const f32,
    v: *const f32,
    out: *mut f32,
    statistics: *mut f32,
    scratch: *mut f32,
) {
    let p = Padded::new(shape);
    let (t, hd, row) = (shape.sequence, shape.head_dim, shape.row());
    let scale = 1.0 / (hd as f32).sqrt();
    unsafe {
        let mut pieces = Pieces(scratch);
        let (kt, vp) = (pieces.next(p.tokens * p.width), pieces.next(p.tokens * p.width));
        let (strip, qs) = (pieces.next(STRIP * p.stride), pieces.next(STRIP * p.width));
        let o = pieces.next(STRIP * p.width);
        pack_transposed(Rows { at: k, row }, t, hd, p.tokens, kt);
        pack_rows::<L>(Rows { at: v, row }, t, hd, p.width, p.tokens, 1.0, vp);
        for head in 0..shape.heads / shape.kv_heads {
            for first in (0..t).step_by(STRIP) {
                let count = STRIP.min(t - first);
                let limit = first + STRIP;
                copy_rows(Rows { at: q.add(first * row + head * hd), row }, count, hd, scale, qs);
                scores::<L>(qs, hd, kt, limit, strip, p);
                let mut inverse = [0.0f32; STRIP];
                for (i, inverse) in inverse.iter_mut().enumerate().take(count) {
                    let (most, one_over) = softmax_row::<L>(strip.add(i * p.stride), first + i + 1, limit);
                    *inverse = one_over;
                    let at = statistics.add(2 * (head * t + first + i));
                    *at = most;
                    *at.add(1) = one_over;
                }
                let left = Left { at: strip, row: p.stride, column: 1 };
                panels::<L>(STRIP, p.width, limit, left, (vp, p.tokens), (o, STRIP), false);
                for (i, one_over) in inverse.iter().enumerate().take(count) {
                    let to = out.add((first + i) * shape.output_row() + head * hd);
                    for j in (0..hd).step_by(16) {
                        let panel = j / PANEL * PANEL;
                        let from = o.add(panel * STRIP + i * PANEL.min(p.width - panel) + (j - panel));
                        L::load(from).mul(L::splat(*one_over)).store_first(to.add(j), 16.min(hd - j));
                    }
                }
            }
        }
    }
}

kernel! {
    /// [`group_forward`] for an instruction set.
    fn group_forward_kernel(
        shape: AttentionShape, q: *const f32, k: *const f32, v: *const f32, out: *mut f32, statistics: *mut f32,
        scratch: *mut f32,
    ) = group_forward
}

/// Attention of all sequences and heads; see [`crate::device::Device::attention_forward`].
pub(super) fn forward(
    pool: &Pool,
    isa: Isa,
    shape: AttentionShape,
    qkv: &[f32],
    out: &mut [f32],
    statistics: &mut [f32],
    workspace: &mut [f32],
) {
    let (t, hd, tokens) = (shape.sequence, shape.head_dim, shape.batch * shape.sequence);
    let (group, scratch) = (shape.heads / shape.kv_heads, Padded::new(shape).scratch());
    assert!(qkv.len() >= tokens * shape.row() && out.len() >= tokens * shape.output_row());
    assert!(statistics.len() >= 2 * tokens * shape.heads && workspace.len() >= scratch * pool.len());
    let (out, statistics, workspace) = (Shared::new(out), Shared::new(statistics), Shared::new(workspace));
    pool.each(shape.batch * shape.kv_heads, |task| {
        let (sequence, kv) = (task / shape.kv_heads, task % shape.kv_heads);
        // SAFETY: the assertions cover every row; tasks write their own heads' columns and rows, each thread its own
        // scratch.
        unsafe {
            let first = qkv.as_ptr().add(sequence * t * shape.row());
            group_forward_kernel(
                isa,
                shape,
                first.add(kv * group * hd),
                first.add((shape.heads + kv) * hd),
                first.add((shape.heads + shape.kv_heads + kv) * hd),
                out.at(sequence * t * shape.output_row() + kv * group * hd),
                statistics.at(2 * (sequence * shape.heads + kv * group) * t),
                workspace.at(pool.index() * scratch),
            );
        }
    });
}
