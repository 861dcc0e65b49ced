//! Embedding, RMSNorm, rotary positions and SwiGLU: kernels that walk rows.
//!
//! Each is memory-bound, so each is one pass, with neighbouring operations fused into it. Rows are independent; the
//! only sum across rows, the gain's gradient, is made by blocks of [`ROWS`] rows added in block order.

use super::lanes::{Isa, Lanes, kernel};
use super::pool::{Pool, Shared, chunk};
use crate::device::{AttentionShape, NormShape, Write};

/// Rows of one task.
pub(super) const ROWS: usize = 32;
/// Columns of one task where work is cut by columns.
const COLUMNS: usize = 64;

/// `out[i] = table[tokens[i]]`, plus the vector of the row's place in its sequence if there are learned positions: the
/// table of them and the tokens of a sequence.
pub(super) fn embedding_forward(
    pool: &Pool,
    width: usize,
    tokens: &[u32],
    table: &[f32],
    positions: Option<(&[f32], usize)>,
    out: &mut [f32],
) {
    let rows = Shared::new(&mut out[..tokens.len() * width]);
    pool.each(tokens.len().div_ceil(ROWS), |task| {
        for i in chunk(task, ROWS, tokens.len()) {
            let from = tokens[i] as usize * width;
            // SAFETY: row i belongs to this task.
            let row = unsafe { rows.part(i * width, width) };
            row.copy_from_slice(&table[from..from + width]);
            if let Some((positions, sequence)) = positions {
                for (value, position) in row.iter_mut().zip(&positions[i % sequence * width..]) {
                    *value += position;
                }
            }
        }
    });
}

/// `d_table[tokens[i]] += d_out[i]`: tasks own columns, so rows are added in order.
pub(super) fn embedding_backward(pool: &Pool, width: usize, tokens: &[u32], d_out: &[f32], d_table: &mut [f32]) {
    let table = Shared::new(d_table);
    pool.each(width.div_ceil(COLUMNS), |task| {
        let columns = chunk(task, COLUMNS, width);
        for (i, token) in tokens.iter().enumerate() {
            // SAFETY: these columns belong to this task.
            let to = unsafe { table.part(*token as usize * width + columns.start, columns.len()) };
            for (t, g) in to.iter_mut().zip(&d_out[i * width..][columns.clone()]) {
                *t += g;
            }
        }
    });
}

/// One row: `sum = x + delta`, its scale, `normed = sum·scale·weight`. `delta` may be null: then `sum` is unused.
#[inline(always)]
unsafe fn norm_row<L: Lanes>(
    n: usize,
    epsilon: f32,
    x: *const f32,
    delta: *const f32,
    sum: *mut f32,
    weight: *const f32,
    normed: *mut f32,
) -> f32 {
    unsafe {
        let (mut squares, mut j) = ([L::zero(); 2], 0);
        let source = if delta.is_null() { x } else { sum.cast_const() };
        while j < n {
            let m = 16.min(n - j);
            let mut value = L::load_first(x.add(j), m);
            if !delta.is_null() {
                value = value.add(L::load_first(delta.add(j), m));
                value.store_first(sum.add(j), m);
            }
            let s = &mut squares[j / 16 % 2];
            *s = value.fma(value, *s);
            j += 16;
        }
        let mean = squares[0].add(squares[1]).sum() / n as f32;
        let scale = 1.0 / (mean + epsilon).sqrt();
        j = 0;
        while j < n {
            let m = 16.min(n - j);
            let scaled = L::load_first(source.add(j), m).mul(L::splat(scale));
            scaled.mul(L::load_first(weight.add(j), m)).store_first(normed.add(j), m);
            j += 16;
        }
        scale
    }
}

kernel! {
    /// [`norm_row`] for an instruction set.
    fn norm_row_kernel(
        n: usize, epsilon: f32, x: *const f32, delta: *const f32, sum: *mut f32, weight: *const f32, normed: *mut f32,
    ) -> f32 = norm_row
}

/// Residual addition and RMSNorm; see [`crate::device::Device::rmsnorm_forward`].
#[allow(clippy::too_many_arguments)]
pub(super) fn rmsnorm_forward(
    pool: &Pool,
    isa: Isa,
    norm: NormShape,
    x: &[f32],
    delta: Option<(&[f32], &mut [f32])>,
    weight: &[f32],
    normed: &mut [f32],
    scale: &mut [f32],
) {
    let NormShape { rows, width, epsilon } = norm;
    assert!(x.len() >= rows * width && weight.len() >= width && normed.len() >= rows * width && scale.len() >= rows);
    let (delta, sum) = match delta {
        Some((delta, sum)) => {
            assert!(delta.len() >= rows * width && sum.len() >= rows * width);
            (Some(delta), Some(Shared::new(sum)))
        }
        None => (None, None),
    };
    let (normed, scale) = (Shared::new(normed), Shared::new(scale));
    pool.each(rows.div_ceil(ROWS), |task| {
        for i in chunk(task, ROWS, rows) {
            // SAFETY: the assertions cover row i, which belongs to this task.
            unsafe {
                let delta = delta.map_or(std::ptr::null(), |d| d.as_ptr().add(i * width));
                let sum = sum.map_or(std::ptr::null_mut(), |s| s.at(i * width));
                let (x, to) = (x.as_ptr().add(i * width), normed.at(i * width));
                *scale.at(i) = norm_row_kernel(isa, width, epsilon, x, delta, sum, weight.as_ptr(), to);
            }
        }
    });
}

/// One row of the backward; adds the row's part to the gain's gradient.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn norm_row_backward<L: Lanes>(
    n: usize,
    add: bool,
    scale: f32,
    x: *const f32,
    weight: *const f32,
    d_normed: *const f32,
    d_x: *mut f32,
    d_weight: *mut f32,
) {
    unsafe {
        // normed = x·s·w with s = (mean(x²)+ε)^-½, so dx = s·(w·dy) − x·s³·mean(x·w·dy).
        let (mut products, s, mut j) = (L::zero(), L::splat(scale), 0);
        while j < n {
            let m = 16.min(n - j);
            let (x, dy) = (L::load_first(x.add(j), m), L::load_first(d_normed.add(j), m));
            let dw = x.mul(s).fma(dy, L::load_first(d_weight.add(j), m));
            dw.store_first(d_weight.add(j), m);
            products = x.mul(dy).fma(L::load_first(weight.add(j), m), products);
            j += 16;
        }
        let factor = L::splat(-(products.sum() / n as f32) * scale * scale * scale);
        j = 0;
        while j < n {
            let m = 16.min(n - j);
            let (x, dy) = (L::load_first(x.add(j), m), L::load_first(d_normed.add(j), m));
            let mut d = x.fma(factor, dy.mul(L::load_first(weight.add(j), m)).mul(s));
            if add {
                d = d.add(L::load_first(d_x.add(j), m));
            }
            d.store_first(d_x.add(j), m);
            j += 16;
        }
    }
}

kernel! {
    /// [`norm_row_backward`] for an instruction set.
    fn norm_row_backward_kernel(
        n: usize, add: bool, scale: f32, x: *const f32, weight: *const f32, d_normed: *const f32, d_x: *mut f32,
        d_weight: *mut f32,
    ) = norm_row_backward
}

/// Elements of workspace for the gain's gradient.
pub(super) fn norm_workspace(norm: NormShape) -> usize {
    norm.rows.div_ceil(ROWS) * norm.width
}

/// The backward of the norm; see [`crate::device::Device::rmsnorm_backward`].
#[allow(clippy::too_many_arguments)]
pub(super) fn rmsnorm_backward(
    pool: &Pool,
    isa: Isa,
    norm: NormShape,
    x: &[f32],
    scale: &[f32],
    weight: &[f32],
    d_normed: &[f32],
    write: Write,
    d_x: &mut [f32],
    d_weight: &mut [f32],
    workspace: &mut [f32],
) {
    let NormShape { rows, width, .. } = norm;
    assert!(x.len() >= rows * width && d_normed.len() >= rows * width && d_x.len() >= rows * width);
    assert!(weight.len() >= width && scale.len() >= rows);
    let parts = &mut workspace[..norm_workspace(norm)];
    let (d_x, shared) = (Shared::new(d_x), Shared::new(parts));
    pool.each(rows.div_ceil(ROWS), |task| {
        // SAFETY: the assertions cover the rows of this task; its part of the workspace is its own.
        unsafe {
            let part = shared.part(task * width, width);
            part.fill(0.0);
            for i in chunk(task, ROWS, rows) {
                let (x, dy) = (x.as_ptr().add(i * width), d_normed.as_ptr().add(i * width));
                let (add, to) = (write == Write::Add, part.as_mut_ptr());
                norm_row_backward_kernel(isa, width, add, scale[i], x, weight.as_ptr(), dy, d_x.at(i * width), to);
            }
        }
    });
    let d_weight = &mut d_weight[..width];
    d_weight.fill(0.0);
    for part in parts.chunks_exact(width) {
        for (sum, value) in d_weight.iter_mut().zip(part) {
            *sum += value;
        }
    }
}

/// Rotates `heads` heads of one row.
#[inline(always)]
unsafe fn rope_row<L: Lanes>(heads: usize, head_dim: usize, sign: f32, table: *const f32, row: *mut f32) {
    unsafe {
        let half = head_dim / 2;
        for j in (0..half).step_by(16) {
            let m = 16.min(half - j);
            let cosine = L::load_first(table.add(j), m);
            let sine = L::load_first(table.add(half + j), m).mul(L::splat(sign));
            for head in 0..heads {
                let (low, high) = (row.add(head * head_dim + j), row.add(head * head_dim + half + j));
                let (a, b) = (L::load_first(low, m), L::load_first(high, m));
                a.mul(cosine).sub(b.mul(sine)).store_first(low, m);
                b.mul(cosine).add(a.mul(sine)).store_first(high, m);
            }
        }
    }
}

kernel! {
    /// [`rope_row`] for an instruction set.
    fn rope_row_kernel(heads: usize, head_dim: usize, sign: f32, table: *const f32, row: *mut f32) = rope_row
}

/// Rotary positions; see [`crate::device::Device::rope`].
pub(super) fn rope(pool: &Pool, isa: Isa, shape: AttentionShape, inverse: bool, table: &[f32], qkv: &mut [f32]) {
    let rows = shape.batch * shape.sequence;
    let (width, sign) = (shape.row(), if inverse { -1.0 } else { 1.0 });
    assert!(qkv.len() >= rows * width && table.len() >= shape.sequence * shape.head_dim);
    let qkv = Shared::new(qkv);
    pool.each(rows.div_ceil(ROWS), |task| {
        for i in chunk(task, ROWS, rows) {
            // SAFETY: the assertion covers row i, which belongs to this task.
            unsafe {
                let angles = table.as_ptr().add(i % shape.sequence * shape.head_dim);
                let heads = shape.heads + shape.kv_heads;
                rope_row_kernel(isa, heads, shape.head_dim, sign, angles, qkv.at(i * width));
            }
        }
    });
}

#[inline(always)]
unsafe fn swiglu_row<L: Lanes>(n: usize, gate: *const f32, up: *const f32, act: *mut f32) {
    unsafe {
        let one = L::splat(1.0);
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let (g, u) = (L::load_first(gate.add(j), m), L::load_first(up.add(j), m));
            let sigmoid = one.div(one.add(L::zero().sub(g).exp()));
            g.mul(sigmoid).mul(u).store_first(act.add(j), m);
        }
    }
}

#[inline(always)]
unsafe fn swiglu_row_backward<L: Lanes>(n: usize, gate: *mut f32, up: *mut f32, d_act: *mut f32) {
    unsafe {
        let one = L::splat(1.0);
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let (g, u) = (L::load_first(gate.add(j), m), L::load_first(up.add(j), m));
            let d = L::load_first(d_act.add(j), m);
            let sigmoid = one.div(one.add(L::zero().sub(g).exp()));
            let silu = g.mul(sigmoid);
            // d silu/dg = σ·(1 + g·(1 − σ))
            let slope = sigmoid.mul(g.fma(one.sub(sigmoid), one));
            d.mul(u).mul(slope).store_first(gate.add(j), m);
            d.mul(silu).store_first(up.add(j), m);
            silu.mul(u).store_first(d_act.add(j), m);
        }
    }
}

kernel! {
    /// One row of SwiGLU.
    fn swiglu_row_kernel(n: usize, gate: *const f32, up: *const f32, act: *mut f32) = swiglu_row
}
kernel! {
    /// One row of SwiGLU's backward.
    fn swiglu_row_backward_kernel(n: usize, gate: *mut f32, up: *mut f32, d_act: *mut f32) = swiglu_row_backward
}

/// SwiGLU; see [`crate::device::Device::swiglu_forward`].
pub(super) fn swiglu_forward(pool: &Pool, isa: Isa, width: usize, rows: usize, gate_up: &[f32], act: &mut [f32]) {
    assert!(gate_up.len() >= 2 * rows * width && act.len() >= rows * width);
    let act = Shared::new(act);
    pool.each(rows.div_ceil(ROWS), |task| {
        for i in chunk(task, ROWS, rows) {
            // SAFETY: the assertion covers row i, which belongs to this task.
            unsafe {
                let gate = gate_up.as_ptr().add(2 * i * width);
                swiglu_row_kernel(isa, width, gate, gate.add(width), act.at(i * width));
            }
        }
    });
}

/// SwiGLU's backward in place; see [`crate::device::Device::swiglu_backward`].
pub(super) fn swiglu_backward(
    pool: &Pool,
    isa: Isa,
    width: usize,
    rows: usize,
    gate_up: &mut [f32],
    d_act: &mut [f32],
) {
    assert!(gate_up.len() >= 2 * rows * width && d_act.len() >= rows * width);
    let (gate_up, d_act) = (Shared::new(gate_up), Shared::new(d_act));
    pool.each(rows.div_ceil(ROWS), |task| {
        for i in chunk(task, ROWS, rows) {
            // SAFETY: the assertion covers row i, which belongs to this task.
            unsafe {
                let gate = gate_up.at(2 * i * width);
                swiglu_row_backward_kernel(isa, width, gate, gate.add(width), d_act.at(i * width));
            }
        }
    });
}
