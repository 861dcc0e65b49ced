//! RMSNorm and LayerNorm: two kernels of one form, which differ in their names and in how many numbers go with a row
//! and with a column.

use super::driver::Driver;
use super::memory::{Array, Bf16};
use super::{CudaDevice, arguments, int};
use crate::device::{DeviceError, DeviceResult, NormShape, Part, PartMut, Write};

/// Blocks of a backward, at most: two for each multiprocessor of an H100, and three where rows are narrow.
const BLOCKS: usize = 264;
const NARROW_BLOCKS: usize = 396;
/// The widest rows that the kernels hold in registers.
const WIDEST: usize = 8192;

/// Which norm.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Norm {
    /// One scale a row; a gain.
    Rms,
    /// Mean and scale of each row; a gain and, behind it, a bias.
    Layer,
}

impl Norm {
    /// Statistics of a row, and parameters of a column.
    fn numbers(self) -> usize {
        if self == Self::Rms { 1 } else { 2 }
    }

    /// Elements of workspace of a backward.
    pub(super) fn workspace(self, norm: NormShape) -> usize {
        backward(self, norm).map_or(0, |launch| launch.blocks) * norm.width * self.numbers()
    }
}

/// What is added to the stream, and where the sum goes.
type Fused<'a, D> = Option<(&'a Array<D, Bf16>, &'a mut Array<D, Bf16>)>;

/// What a backward reads.
pub(super) struct Saved<'a, D: Driver> {
    pub(super) x: &'a Array<D, Bf16>,
    pub(super) statistics: &'a Array<D, f32>,
    pub(super) affine: Part<'a, Array<D, Bf16>>,
    pub(super) d_normed: &'a Array<D, Bf16>,
}

/// Rows that a block has at a time.
fn rows_of_block(norm: NormShape) -> DeviceResult<usize> {
    match norm.width {
        0..=1024 => Ok(8),
        1025..=2048 => Ok(4),
        2049..=4096 => Ok(2),
        4097..=WIDEST => Ok(1),
        width => Err(DeviceError::Unsupported(format!("rows of {width} numbers: the norms take up to {WIDEST}"))),
    }
}

/// How a backward is launched.
struct Backward {
    kernel: &'static str,
    threads: u32,
    blocks: usize,
}

/// Its blocks decide the order of its sums: all is by the shape alone.
fn backward(kind: Norm, norm: NormShape) -> DeviceResult<Backward> {
    let NormShape { rows, width, .. } = norm;
    let narrow = match (kind, width) {
        (_, width) if width % 8 != 0 => None,
        (Norm::Rms, 0..=768) => Some("rmsnorm_backward_768"),
        (Norm::Rms, 769..=1024) => Some("rmsnorm_backward_1024"),
        (Norm::Layer, 0..=768) => Some("layernorm_backward_768"),
        (Norm::Layer, 769..=1024) => Some("layernorm_backward_1024"),
        _ => None,
    };
    if let Some(kernel) = narrow {
        return Ok(Backward { kernel, threads: 128, blocks: rows.div_ceil(4).min(NARROW_BLOCKS) });
    }
    let blocks = rows.div_ceil(rows_of_block(norm)?).min(BLOCKS);
    Ok(match kind {
        Norm::Rms => Backward { kernel: "rmsnorm_backward", threads: 256, blocks },
        Norm::Layer => Backward { kernel: "layernorm_backward", threads: 512, blocks },
    })
}

/// Parts of the rows that a bias's gradient is first summed over: by the shape alone, and so that an H100 has one wave
/// of blocks.
pub(super) fn bias_parts(width: usize, rows: usize) -> usize {
    rows.div_ceil(64).min((528 / width.div_ceil(256).max(1)).max(1))
}

impl<D: Driver> CudaDevice<D> {
    pub(super) fn norm_forward(
        &self,
        kind: Norm,
        norm: NormShape,
        streams: (&Array<D, Bf16>, Fused<'_, D>),
        affine: Part<'_, Array<D, Bf16>>,
        normed: &mut Array<D, Bf16>,
        statistics: &mut Array<D, f32>,
    ) -> DeviceResult {
        let (NormShape { rows, width, epsilon }, (x, delta)) = (norm, streams);
        let n = rows * width;
        let (delta, sum) = delta.map_or((0, 0), |(delta, sum)| (delta.at(0, n), sum.at(0, n)));
        let (x, gain, normed) = (x.at(0, n), affine.0.at(affine.1, width * kind.numbers()), normed.at(0, n));
        let statistics = statistics.at(0, rows * kind.numbers());
        let (count, wide, grid) = (int(rows), int(width), [rows.div_ceil(rows_of_block(norm)?), 1, 1]);
        match kind {
            Norm::Rms => {
                let arguments = arguments![normed, sum, statistics, x, delta, gain, count, wide, epsilon];
                self.run("rmsnorm_forward", grid, 256, 0, arguments)
            }
            Norm::Layer => {
                let bias = affine.0.at(affine.1 + width, width);
                let arguments = arguments![normed, sum, statistics, x, delta, gain, bias, count, wide, epsilon];
                self.run("layernorm_forward", grid, 256, 0, arguments)
            }
        }
    }

    pub(super) fn norm_backward(
        &self,
        kind: Norm,
        norm: NormShape,
        saved: Saved<'_, D>,
        (write, d_x): (Write, &mut Array<D, Bf16>),
        d_affine: PartMut<'_, Array<D, f32>>,
        workspace: &mut Array<D, f32>,
    ) -> DeviceResult {
        let NormShape { rows, width, .. } = norm;
        let Backward { kernel, threads, blocks } = backward(kind, norm)?;
        let (n, columns) = (rows * width, width * kind.numbers());
        let partial = workspace.at(0, blocks * columns);
        let Saved { x, statistics, affine, d_normed } = saved;
        let (x, statistics, gain) =
            (x.at(0, n), statistics.at(0, rows * kind.numbers()), affine.0.at(affine.1, columns));
        let (d_x, d_normed, add) = (d_x.at(0, n), d_normed.at(0, n), i32::from(write == Write::Add));
        let arguments = arguments![d_x, partial, x, statistics, gain, d_normed, int(rows), int(width), add];
        self.run(kernel, [blocks, 1, 1], threads, 4 * columns, arguments)?;
        self.column_sums(blocks, columns, partial, d_affine.0.at(d_affine.1, columns))
    }

    /// `parts` rows of partial sums, added in order.
    pub(super) fn column_sums(&self, parts: usize, width: usize, partial: u64, to: u64) -> DeviceResult {
        self.run("column_sums", [width.div_ceil(32), 1, 1], 256, 0, arguments![to, partial, int(parts), int(width)])
    }
}
