//! The loss: how many logits there are at a time, and its kernel.

use super::driver::Driver;
use super::memory::{Array, Bf16};
use super::{CudaDevice, CudaTokens, arguments, int};
use crate::device::{DeviceResult, LossShape, Write};

/// Logits that exist at once: 1 GiB of bfloat16.
const LOGITS: usize = 1 << 29;
/// Rows of logits begin at multiples of so many, for whole tiles of the products.
const PITCH: usize = 128;

pub(super) fn pitch(vocabulary: usize) -> usize {
    vocabulary.next_multiple_of(PITCH)
}

/// Rows of logits at a time.
pub(super) fn rows(vocabulary: usize, rows: usize) -> usize {
    let most = (LOGITS / pitch(vocabulary)).max(PITCH);
    // Chunks of one size, so that none is too short for the products.
    rows.div_ceil(rows.div_ceil(most)).next_multiple_of(PITCH).min(rows)
}

/// Bytes of a row that a block keeps in shared memory, two blocks a multiprocessor. They decide no bits.
fn kept(capability: (u32, u32)) -> usize {
    match capability {
        (9, 0) | (10, 0 | 3) => 111 << 10,
        (8, 0 | 7) => 80 << 10,
        _ => 48 << 10,
    }
}

impl<D: Driver> CudaDevice<D> {
    /// See `Device::cross_entropy`; the losses' sum goes to the place that is named last.
    pub(super) fn lose(
        &self,
        shape: LossShape,
        targets: &CudaTokens<D>,
        gradient: Option<f32>,
        logits: &mut Array<D, Bf16>,
        (write, losses, index): (Write, &mut Array<D, f64>, usize),
    ) -> DeviceResult {
        let LossShape { vocabulary, pitch, rows, first } = shape;
        let (logits, row_losses) = (logits.at(0, rows * pitch), self.scratch.at(0, rows));
        let (targets, count) = (targets.ids(first, rows), int(rows));
        let (scale, wanted) = (gradient.unwrap_or(0.0), i32::from(gradient.is_some()));
        let kept = (kept(self.capability) / 2).min(pitch) / 8 * 8;
        let (columns, width) = (int(vocabulary), int(pitch));
        let arguments = arguments![logits, row_losses, targets, count, columns, width, scale, wanted, int(kept)];
        self.run("cross_entropy", [rows, 1, 1], 512, 2 * kept, arguments)?;
        losses.at(index, 1);
        let add = i32::from(write == Write::Add);
        let arguments = arguments![losses.at(0, losses.len()), row_losses, count, int(index), add];
        self.run("sum_losses", [1, 1, 1], 256, 0, arguments)
    }
}
