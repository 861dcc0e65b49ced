//! Attention: kernels compiled for heads of up to 32, 64 and 128 numbers.

use super::driver::Driver;
use super::memory::{Array, Bf16};
use super::{CudaDevice, arguments, int};
use crate::device::{AttentionShape, DeviceError, DeviceResult};

/// A kernel's names, by the width it is compiled for.
type Names = [(usize, &'static str); 3];
const FORWARD: Names = [(32, "attention_forward_32"), (64, "attention_forward_64"), (128, "attention_forward_128")];
const BACKWARD_KV: Names =
    [(32, "attention_backward_kv_32"), (64, "attention_backward_kv_64"), (128, "attention_backward_kv_128")];
const BACKWARD_Q: Names =
    [(32, "attention_backward_q_32"), (64, "attention_backward_q_64"), (128, "attention_backward_q_128")];
/// Threads of a block, and its queries.
const THREADS: u32 = 128;
const QUERIES: usize = 128;

/// What a backward reads.
pub(super) struct Saved<'a, D: Driver> {
    pub(super) qkv: &'a Array<D, Bf16>,
    pub(super) out: &'a Array<D, Bf16>,
    pub(super) statistics: &'a Array<D, f32>,
    pub(super) d_out: &'a Array<D, Bf16>,
}

/// The kernel for heads of this width, and the width it is compiled for.
fn kernel(names: Names, head_dim: usize) -> DeviceResult<(usize, &'static str)> {
    let none = || DeviceError::Unsupported(format!("heads of {head_dim} numbers: attention takes up to 128"));
    names.into_iter().find(|(width, _)| head_dim <= *width).ok_or_else(none)
}

/// Sizes as the kernels take them: sequences, tokens, query heads, key heads, width.
fn sizes(shape: AttentionShape) -> [i32; 5] {
    let AttentionShape { batch, sequence, heads, kv_heads, head_dim } = shape;
    [batch, sequence, heads, kv_heads, head_dim].map(int)
}

fn inverse_root(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

impl<D: Driver> CudaDevice<D> {
    /// `lse` takes one number a row and head: the first half of the statistics.
    pub(super) fn attend(
        &self,
        shape: AttentionShape,
        qkv: &Array<D, Bf16>,
        out: &mut Array<D, Bf16>,
        statistics: &mut Array<D, f32>,
    ) -> DeviceResult {
        let AttentionShape { batch, sequence, heads, head_dim, .. } = shape;
        let rows = batch * sequence;
        let (width, kernel) = kernel(FORWARD, head_dim)?;
        let (qkv, out) = (qkv.at(0, rows * shape.row()), out.at(0, rows * shape.output_row()));
        let lse = statistics.at(0, rows * heads);
        let [b, t, h, kv, wide] = sizes(shape);
        let arguments = arguments![out, lse, qkv, b, t, h, kv, wide, inverse_root(head_dim)];
        self.run(kernel, [sequence.div_ceil(QUERIES), heads, batch], THREADS, 768 * width, arguments)
    }

    pub(super) fn attend_backward(
        &self,
        shape: AttentionShape,
        saved: Saved<'_, D>,
        d_qkv: &mut Array<D, Bf16>,
        workspace: &mut Array<D, f32>,
    ) -> DeviceResult {
        let AttentionShape { batch, sequence, heads, kv_heads, head_dim } = shape;
        let (rows, Saved { qkv, out, statistics, d_out }) = (batch * sequence, saved);
        let (dot, lse) = (workspace.at(0, rows * heads), statistics.at(0, rows * heads));
        let (qkv, d_qkv) = (qkv.at(0, rows * shape.row()), d_qkv.at(0, rows * shape.row()));
        let (out, d_out) = (out.at(0, rows * shape.output_row()), d_out.at(0, rows * shape.output_row()));
        let [b, t, h, kv, wide] = sizes(shape);
        let lanes = if head_dim <= 64 { 8 } else { 16 };
        let arguments = arguments![dot, d_out, out, int(rows), t, h, wide];
        self.run("attention_dot", [(rows * heads * lanes).div_ceil(256), 1, 1], 256, 0, arguments)?;

        let arguments = arguments![d_qkv, qkv, d_out, lse, dot, b, t, h, kv, wide, inverse_root(head_dim)];
        let (width, kv_kernel) = kernel(BACKWARD_KV, head_dim)?;
        let (keys, shared) = backward_kv(width);
        self.run(kv_kernel, [sequence.div_ceil(keys), kv_heads, batch], THREADS, shared, arguments)?;
        let (width, q_kernel) = kernel(BACKWARD_Q, head_dim)?;
        self.run(q_kernel, [sequence.div_ceil(QUERIES), heads, batch], THREADS, backward_q(width), arguments)
    }
}

/// Keys of a block of the keys' backward, and its shared memory.
fn backward_kv(width: usize) -> (usize, usize) {
    let keys = if width == 128 { 64 } else { 128 };
    (keys, 4 * (keys + 128) * width + 1024)
}

/// Shared memory of the queries' backward.
fn backward_q(width: usize) -> usize {
    let keys = if width == 128 { 32 } else { 64 };
    4 * (QUERIES + 2 * keys) * width
}
