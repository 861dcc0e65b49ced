//! Attention: kernels compiled for heads of up to 32, 64 and 128 numbers, and others on products of warpgroups.

use super::driver::Driver;
use super::memory::{Array, Bf16};
use super::{CudaDevice, arguments, int};
use crate::device::{AttentionShape, DeviceError, DeviceResult};

/// Threads of a block.
const THREADS: u32 = 128;
/// The widest heads that products of warpgroups take, which devices of this one capability have.
const GROUP_WIDTH: usize = 64;
const GROUP_CAPABILITY: (u32, u32) = (9, 0);

/// A kernel, and its launch: rows of a block, and its shared memory.
struct Kernel {
    name: &'static str,
    rows: usize,
    shared: usize,
}

/// The three kernels of one kind.
struct Kernels {
    forward: Kernel,
    backward_kv: Kernel,
    backward_q: Kernel,
}

/// As the header of `attention.cu` tells, for a width that it is compiled for.
macro_rules! kernels {
    ($width:literal, $keys:literal, $stage:literal) => {
        Kernels {
            forward: Kernel { name: concat!("attention_forward_", $width), rows: 128, shared: 768 * $width },
            backward_kv: Kernel {
                name: concat!("attention_backward_kv_", $width),
                rows: $keys,
                shared: 4 * ($keys + 128) * $width + 1024,
            },
            backward_q: Kernel {
                name: concat!("attention_backward_q_", $width),
                rows: 128,
                shared: 4 * (128 + 2 * $stage) * $width,
            },
        }
    };
}

/// By the widest head that they take.
static KERNELS: [(usize, Kernels); 3] =
    [(32, kernels!(32, 128, 64)), (64, kernels!(64, 128, 64)), (128, kernels!(128, 64, 32))];
/// Those of `attention_group.cu`.
static GROUPED: Kernels = Kernels {
    forward: Kernel { name: "attention_forward_group", rows: 64, shared: 40_960 },
    backward_kv: Kernel { name: "attention_backward_kv_group", rows: 64, shared: 50_176 },
    backward_q: Kernel { name: "attention_backward_q_group", rows: 64, shared: 49_152 },
};

/// The kernels for heads of this width on a device of this capability.
fn kernels(capability: (u32, u32), head_dim: usize) -> DeviceResult<&'static Kernels> {
    if capability == GROUP_CAPABILITY && head_dim <= GROUP_WIDTH && head_dim.is_multiple_of(8) {
        return Ok(&GROUPED);
    }
    let none = || DeviceError::Unsupported(format!("heads of {head_dim} numbers: attention takes up to 128"));
    KERNELS.iter().find(|(width, _)| head_dim <= *width).map(|(_, kernels)| kernels).ok_or_else(none)
}

/// What a backward reads.
pub(super) struct Saved<'a, D: Driver> {
    pub(super) qkv: &'a Array<D, Bf16>,
    pub(super) out: &'a Array<D, Bf16>,
    pub(super) statistics: &'a Array<D, f32>,
    pub(super) d_out: &'a Array<D, Bf16>,
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
        let kernel = &kernels(self.capability, head_dim)?.forward;
        let (qkv, out) = (qkv.at(0, rows * shape.row()), out.at(0, rows * shape.output_row()));
        let lse = statistics.at(0, rows * heads);
        let [b, t, h, kv, wide] = sizes(shape);
        let arguments = arguments![out, lse, qkv, b, t, h, kv, wide, inverse_root(head_dim)];
        self.run(kernel.name, [sequence.div_ceil(kernel.rows), heads, batch], THREADS, kernel.shared, arguments)
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
        let Kernels { backward_kv: kv, backward_q: q, .. } = kernels(self.capability, head_dim)?;
        self.run(kv.name, [sequence.div_ceil(kv.rows), kv_heads, batch], THREADS, kv.shared, arguments)?;
        self.run(q.name, [sequence.div_ceil(q.rows), heads, batch], THREADS, q.shared, arguments)
    }
}
