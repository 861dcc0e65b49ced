//! The device's operations, each as the kernels it takes and how they are launched.
//!
//! How many blocks and threads a kernel wants, and how much shared memory, is told in the header of its file; the numbers
//! here repeat it. Where the number of blocks decides the order of a sum it follows from the shape alone.

use super::driver::{Driver, Element};
use super::memory::{Array, Bf16};
use super::{CudaBlockSums, CudaDevice, CudaTokens, arguments, bf16, int, kernels, long};
use crate::device::{
    AttentionShape, Device, DeviceError, DeviceResult, LossShape, MatmulShape, NormShape, Part, PartMut, Product, Write,
};
use crate::exact::GradientFault;

/// Logits that exist at once: 1 GiB of bfloat16.
const LOGITS: usize = 1 << 29;
/// Rows of logits begin at multiples of so many, for whole tiles of the products.
const PITCH: usize = 128;
/// Blocks of a norm's backward, at most: two for each multiprocessor of an H100.
const NORM_BLOCKS: usize = 264;
/// The widest rows that the norms' kernels hold in registers.
const WIDEST: usize = 8192;

/// Sums on the fixed grid, which this device does not keep: its exact sums are in blocks.
#[derive(Debug)]
pub enum NoSums {}

fn flag(write: Write) -> i32 {
    i32::from(write == Write::Add)
}

/// Rows that a norm's block has at a time.
fn norm_rows(norm: NormShape) -> DeviceResult<usize> {
    match norm.width {
        0..=1024 => Ok(8),
        1025..=2048 => Ok(4),
        2049..=4096 => Ok(2),
        4097..=WIDEST => Ok(1),
        width => Err(DeviceError::Unsupported(format!("rows of {width} numbers: the norms take up to {WIDEST}"))),
    }
}

fn norm_blocks(norm: NormShape) -> DeviceResult<usize> {
    Ok(norm.rows.div_ceil(norm_rows(norm)?).min(NORM_BLOCKS))
}

/// An attention kernel's name for heads of this width, and the width it is compiled for.
fn attention_kernel(of: [&'static str; 3], head_dim: usize) -> DeviceResult<(&'static str, usize)> {
    let widths = [32, 64, 128];
    let fitting = widths.iter().zip(of).find(|(width, _)| head_dim <= **width);
    let none = || DeviceError::Unsupported(format!("heads of {head_dim} numbers: attention takes up to 128"));
    fitting.map(|(width, name)| (name, *width)).ok_or_else(none)
}

type Floats<D> = Array<D, f32>;
type Halves<D> = Array<D, Bf16>;

impl<D: Driver> CudaDevice<D> {
    /// `parts` rows of partial sums, added in order.
    fn column_sums(&self, parts: usize, width: usize, partial: u64, to: u64) -> DeviceResult {
        self.run("column_sums", [width.div_ceil(32), 1, 1], 256, 0, arguments![to, partial, int(parts), int(width)])
    }
}

impl<D: Driver> Device for CudaDevice<D> {
    type Buffer = Floats<D>;
    type Activation = Halves<D>;
    type Sums = NoSums;
    type BlockSums = CudaBlockSums<D>;
    type Tokens = CudaTokens<D>;
    type Losses = Array<D, f64>;

    fn numeric_identity(&self) -> String {
        let identity = self.driver.identity();
        let (major, minor) = identity.capability;
        let name = identity.name.replace(' ', "-");
        let libraries: Vec<String> = identity.libraries.iter().map(|(name, version)| format!("{name}-{version}")).collect();
        let (count, sources, libraries) = (identity.multiprocessors, kernels::version(), libraries.join(" "));
        format!("cuda {name} sm_{major}{minor}x{count} bf16 kernels-{sources} {libraries} {}", self.driver.plan_identity())
    }

    fn threads(&self) -> usize {
        1
    }

    fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    fn loss_rows(&self, vocabulary: usize, rows: usize) -> usize {
        (LOGITS / self.logits_pitch(vocabulary) / PITCH * PITCH).max(PITCH).min(rows)
    }

    fn logits_pitch(&self, vocabulary: usize) -> usize {
        vocabulary.next_multiple_of(PITCH)
    }

    fn allocate(&self, elements: usize, what: &'static str) -> DeviceResult<Floats<D>> {
        Ok(Array::zeroed(&self.driver, elements, what)?)
    }

    fn allocate_activation(&self, elements: usize, what: &'static str) -> DeviceResult<Halves<D>> {
        Ok(Array::zeroed(&self.driver, elements, what)?)
    }

    fn allocate_losses(&self, elements: usize) -> DeviceResult<Array<D, f64>> {
        Ok(Array::zeroed(&self.driver, elements, "losses")?)
    }

    fn allocate_sums(&self, _elements: usize) -> DeviceResult<NoSums> {
        Err(DeviceError::Unsupported("a CUDA device keeps exact sums in blocks, not on the fixed grid".into()))
    }

    fn allocate_block_sums(&self, elements: usize, block: usize) -> DeviceResult<CudaBlockSums<D>> {
        Ok(CudaBlockSums::zeroed(&self.driver, elements, block)?)
    }

    fn allocate_tokens(&self, elements: usize) -> DeviceResult<CudaTokens<D>> {
        Ok(CudaTokens::new(&self.driver, elements)?)
    }

    fn upload(&self, from: &[f32], to: PartMut<'_, Floats<D>>) -> DeviceResult {
        self.send(from.len(), to.0, to.1, |i| from[i])
    }

    fn download(&self, from: Part<'_, Floats<D>>, to: &mut [f32]) -> DeviceResult {
        self.receive(to.len(), from.0, from.1, |i, value: f32| to[i] = value)
    }

    fn upload_activation(&self, from: &[f32], to: PartMut<'_, Halves<D>>) -> DeviceResult {
        self.send(from.len(), to.0, to.1, |i| bf16::round(from[i]))
    }

    fn download_activation(&self, from: Part<'_, Halves<D>>, to: &mut [f32]) -> DeviceResult {
        self.receive(to.len(), from.0, from.1, |i, bits: u16| to[i] = bf16::widen(bits))
    }

    fn upload_tokens(&self, from: &[u32], to: &mut CudaTokens<D>) -> DeviceResult {
        Ok(to.upload(from, self.patience)?)
    }

    fn zero(&self, elements: usize, to: PartMut<'_, Floats<D>>) -> DeviceResult {
        self.clear(to.0.at(to.1, elements), 4 * elements)
    }

    fn axpy(&self, elements: usize, alpha: f32, x: Part<'_, Floats<D>>, y: PartMut<'_, Floats<D>>) -> DeviceResult {
        let (x, y) = (x.0.at(x.1, elements), y.0.at(y.1, elements));
        self.run("axpy", [elements.div_ceil(2048), 1, 1], 256, 0, arguments![y, x, alpha, long(elements)])
    }

    fn matmul(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, Halves<D>>,
        b: Part<'_, Halves<D>>,
        write: Write,
        c: PartMut<'_, Halves<D>>,
    ) -> DeviceResult {
        self.multiply(product, shape, [a.0.from(a.1), b.0.from(b.1), c.0.from(c.1)], Element::Bfloat16, write)
    }

    fn matmul_gradient(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, Halves<D>>,
        b: Part<'_, Halves<D>>,
        write: Write,
        c: PartMut<'_, Floats<D>>,
    ) -> DeviceResult {
        self.multiply(product, shape, [a.0.from(a.1), b.0.from(b.1), c.0.from(c.1)], Element::Float32, write)
    }

    fn embedding_forward(
        &self,
        width: usize,
        rows: usize,
        tokens: &CudaTokens<D>,
        table: Part<'_, Halves<D>>,
        out: &mut Halves<D>,
    ) -> DeviceResult {
        let (table, _) = table.0.from(table.1);
        let arguments = arguments![out.at(0, rows * width), table, 0u64, tokens.ids(0, rows), int(rows), int(width), 0];
        self.run("embedding_forward", [(rows * width.div_ceil(8)).div_ceil(128), 1, 1], 128, 0, arguments)
    }

    fn embedding_backward(
        &self,
        width: usize,
        rows: usize,
        tokens: &CudaTokens<D>,
        d_out: &Halves<D>,
        d_table: PartMut<'_, Floats<D>>,
    ) -> DeviceResult {
        // Partial sums go through the scratch memory, as many runs at a time as fit.
        let most = self.scratch.len() / width.max(1);
        let unfit = || DeviceError::Unsupported(format!("{rows} rows of {width} numbers with one token"));
        let (d_out, partial, (d_table, _)) = (d_out.at(0, rows * width), self.scratch.at(0, 0), d_table.0.from(d_table.1));
        for group in tokens.runs.groups(most).ok_or_else(unfit)? {
            let (pieces, columns) = (tokens.runs.pieces(&group), width.div_ceil(1024));
            let [order, piece_start, run_piece, run_token] = tokens.order(rows, &group);
            let arguments = arguments![partial, d_out, order, piece_start, int(pieces.len()), int(width)];
            self.run("embedding_backward_pieces", [pieces.len(), columns, 1], 128, 0, arguments)?;
            // The runs count their pieces from the first of all.
            let first = partial.wrapping_sub((pieces.start * width * 4) as u64);
            let arguments = arguments![d_table, first, run_piece, run_token, int(group.len()), int(width)];
            self.run("embedding_backward_join", [group.len(), columns, 1], 128, 0, arguments)?;
        }
        Ok(())
    }

    fn rmsnorm_forward(
        &self,
        norm: NormShape,
        x: &Halves<D>,
        delta: Option<(&Halves<D>, &mut Halves<D>)>,
        weight: Part<'_, Halves<D>>,
        normed: &mut Halves<D>,
        scale: &mut Floats<D>,
    ) -> DeviceResult {
        let NormShape { rows, width, epsilon } = norm;
        let n = rows * width;
        let (delta, sum) = delta.map_or((0, 0), |(delta, sum)| (delta.at(0, n), sum.at(0, n)));
        let (x, weight, normed) = (x.at(0, n), weight.0.at(weight.1, width), normed.at(0, n));
        let scale = scale.at(0, rows);
        let arguments = arguments![normed, sum, scale, x, delta, weight, int(rows), int(width), epsilon];
        self.run("rmsnorm_forward", [rows.div_ceil(norm_rows(norm)?), 1, 1], 256, 0, arguments)
    }

    fn rmsnorm_backward(
        &self,
        norm: NormShape,
        x: &Halves<D>,
        scale: &Floats<D>,
        weight: Part<'_, Halves<D>>,
        d_normed: &Halves<D>,
        write: Write,
        d_x: &mut Halves<D>,
        d_weight: PartMut<'_, Floats<D>>,
        workspace: &mut Floats<D>,
    ) -> DeviceResult {
        let NormShape { rows, width, .. } = norm;
        let (n, blocks) = (rows * width, norm_blocks(norm)?);
        let partial = workspace.at(0, blocks * width);
        let (x, scale, weight) = (x.at(0, n), scale.at(0, rows), weight.0.at(weight.1, width));
        let (d_x, d_normed) = (d_x.at(0, n), d_normed.at(0, n));
        let arguments = arguments![d_x, partial, x, scale, weight, d_normed, int(rows), int(width), flag(write)];
        self.run("rmsnorm_backward", [blocks, 1, 1], 256, 4 * width, arguments)?;
        self.column_sums(blocks, width, partial, d_weight.0.at(d_weight.1, width))
    }

    fn norm_workspace(&self, norm: NormShape) -> usize {
        norm_blocks(norm).unwrap_or(0) * norm.width
    }

    fn rope(&self, shape: AttentionShape, inverse: bool, table: &Floats<D>, qkv: &mut Halves<D>) -> DeviceResult {
        let AttentionShape { batch, sequence, heads, kv_heads, head_dim } = shape;
        let rows = batch * sequence;
        let (qkv, table) = (qkv.at(0, rows * shape.row()), table.at(0, sequence * head_dim));
        let [heads, kv_heads, head_dim] = [heads, kv_heads, head_dim].map(int);
        let (count, sequence) = (int(rows), int(sequence));
        let arguments = arguments![qkv, table, count, sequence, heads, kv_heads, head_dim, i32::from(inverse)];
        self.run("rope", [rows.div_ceil(8), 1, 1], 256, 0, arguments)
    }

    fn attention_forward(
        &self,
        shape: AttentionShape,
        qkv: &Halves<D>,
        out: &mut Halves<D>,
        statistics: &mut Floats<D>,
        _workspace: &mut Floats<D>,
    ) -> DeviceResult {
        let AttentionShape { batch, sequence, heads, head_dim, .. } = shape;
        let rows = batch * sequence;
        let names = ["attention_forward_32", "attention_forward_64", "attention_forward_128"];
        let (kernel, width) = attention_kernel(names, head_dim)?;
        let (qkv, out) = (qkv.at(0, rows * shape.row()), out.at(0, rows * shape.output_row()));
        let lse = statistics.at(0, rows * heads);
        let [batches, length, heads_, kv_heads, wide] = sizes(shape);
        let arguments = arguments![out, lse, qkv, batches, length, heads_, kv_heads, wide, inverse_root(head_dim)];
        self.run(kernel, [sequence.div_ceil(128), heads, batch], 128, 768 * width, arguments)
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        qkv: &Halves<D>,
        out: &Halves<D>,
        statistics: &Floats<D>,
        d_out: &Halves<D>,
        d_qkv: &mut Halves<D>,
        workspace: &mut Floats<D>,
    ) -> DeviceResult {
        let AttentionShape { batch, sequence, heads, kv_heads, head_dim } = shape;
        let rows = batch * sequence;
        let (dot, lse) = (workspace.at(0, rows * heads), statistics.at(0, rows * heads));
        let (qkv, d_qkv) = (qkv.at(0, rows * shape.row()), d_qkv.at(0, rows * shape.row()));
        let (out, d_out) = (out.at(0, rows * shape.output_row()), d_out.at(0, rows * shape.output_row()));
        let [batches, length, heads_, kv_heads_, wide] = sizes(shape);
        let arguments = arguments![dot, d_out, out, int(rows), length, heads_, wide];
        let lanes = if head_dim <= 64 { 8 } else { 16 };
        self.run("attention_dot", [(rows * heads * lanes).div_ceil(256), 1, 1], 256, 0, arguments)?;

        let scale = inverse_root(head_dim);
        let arguments = arguments![d_qkv, qkv, d_out, lse, dot, batches, length, heads_, kv_heads_, wide, scale];
        let names = ["attention_backward_kv_32", "attention_backward_kv_64", "attention_backward_kv_128"];
        let (kernel, width) = attention_kernel(names, head_dim)?;
        let keys = if width == 128 { 64 } else { 128 };
        let shared = 4 * (keys + 128) * width + 1024;
        self.run(kernel, [sequence.div_ceil(keys), kv_heads, batch], 128, shared, arguments)?;
        let names = ["attention_backward_q_32", "attention_backward_q_64", "attention_backward_q_128"];
        let (kernel, width) = attention_kernel(names, head_dim)?;
        let keys = if width == 128 { 32 } else { 64 };
        self.run(kernel, [sequence.div_ceil(128), heads, batch], 128, 4 * (128 + 2 * keys) * width, arguments)
    }

    fn attention_workspace(&self, shape: AttentionShape) -> usize {
        shape.batch * shape.sequence * shape.heads
    }

    fn swiglu_forward(&self, width: usize, rows: usize, gate_up: &Halves<D>, act: &mut Halves<D>) -> DeviceResult {
        let (gate_up, act) = (gate_up.at(0, 2 * rows * width), act.at(0, rows * width));
        let arguments = arguments![act, gate_up, int(rows), int(width)];
        self.run("swiglu_forward", [(rows * width.div_ceil(8)).div_ceil(256), 1, 1], 256, 0, arguments)
    }

    fn swiglu_backward(
        &self,
        width: usize,
        rows: usize,
        gate_up: &mut Halves<D>,
        d_act: &mut Halves<D>,
    ) -> DeviceResult {
        let (gate_up, d_act) = (gate_up.at(0, 2 * rows * width), d_act.at(0, rows * width));
        let arguments = arguments![gate_up, d_act, int(rows), int(width)];
        self.run("swiglu_backward", [(rows * width.div_ceil(8)).div_ceil(256), 1, 1], 256, 0, arguments)
    }

    fn cross_entropy(
        &self,
        shape: LossShape,
        targets: &CudaTokens<D>,
        gradient: Option<f32>,
        logits: &mut Halves<D>,
        write: Write,
        losses: &mut Array<D, f64>,
        index: usize,
    ) -> DeviceResult {
        let LossShape { vocabulary, pitch, rows, first } = shape;
        let (logits, row_losses) = (logits.at(0, rows * pitch), self.scratch.at(0, rows));
        let (targets, count) = (targets.ids(first, rows), int(rows));
        let (scale, wanted) = (gradient.unwrap_or(0.0), i32::from(gradient.is_some()));
        let arguments = arguments![logits, row_losses, targets, count, int(vocabulary), int(pitch), scale, wanted];
        self.run("cross_entropy", [rows, 1, 1], 512, 0, arguments)?;
        losses.at(index, 1);
        let arguments = arguments![losses.at(0, losses.len()), row_losses, count, int(index), flag(write)];
        self.run("sum_losses", [1, 1, 1], 256, 0, arguments)
    }

    fn read_losses(&self, losses: &Array<D, f64>, to: &mut [f64]) -> DeviceResult {
        self.receive(to.len(), losses, 0, |i, sum: f64| to[i] = sum)
    }

    fn accumulate_exact(
        &self,
        _elements: usize,
        _gradient: &Floats<D>,
        _limit: i64,
        _write: Write,
        sums: &mut NoSums,
    ) -> DeviceResult<Option<GradientFault>> {
        match *sums {}
    }

    fn gradient_from_sums(
        &self,
        _elements: usize,
        _scale: f64,
        sums: &NoSums,
        _at: usize,
        _gradient: &mut Floats<D>,
    ) -> DeviceResult {
        match *sums {}
    }

    fn set_exponents(&self, exponents: &[i8], sums: &mut CudaBlockSums<D>) -> DeviceResult {
        self.send(exponents.len(), &sums.exponents, 0, |block| exponents[block])?;
        let blocks = sums.maxima.len();
        self.clear(sums.maxima.at(0, blocks), 4 * blocks)
    }

    fn accumulate_blocks(
        &self,
        elements: usize,
        gradient: &Floats<D>,
        limit: i32,
        write: Write,
        sums: &mut CudaBlockSums<D>,
    ) -> DeviceResult {
        let (gradient, to) = (gradient.at(0, elements), sums.sums.at(0, elements));
        let blocks = elements.div_ceil(sums.block);
        let (maxima, exponents, block) = (sums.maxima.at(0, blocks), sums.exponents.at(0, blocks), int(sums.block));
        let arguments = arguments![to, maxima, gradient, exponents, long(elements), block, limit, flag(write)];
        self.run("accumulate_blocks", [elements.div_ceil(4096), 1, 1], 256, 0, arguments)
    }

    fn read_magnitudes(&self, sums: &CudaBlockSums<D>, to: &mut [u8]) -> DeviceResult {
        self.receive(to.len(), &sums.maxima, 0, |block, bits: u32| to[block] = (bits >> 23) as u8)
    }

    fn gradient_from_blocks(
        &self,
        elements: usize,
        scale: f64,
        sums: &CudaBlockSums<D>,
        at: usize,
        gradient: &mut Floats<D>,
    ) -> DeviceResult {
        sums.sums.at(at, elements);
        let (gradient, from) = (gradient.at(0, elements), sums.sums.at(0, at + elements));
        let exponents = sums.exponents.at(0, (at + elements).div_ceil(sums.block));
        let arguments = arguments![gradient, from, exponents, long(at), long(elements), int(sums.block), scale];
        self.run("gradient_from_blocks", [elements.div_ceil(1024), 1, 1], 256, 0, arguments)
    }

    fn scale(&self, elements: usize, alpha: f32, from: Part<'_, Floats<D>>, to: &mut Floats<D>) -> DeviceResult {
        let (from, to) = (from.0.at(from.1, elements), to.at(0, elements));
        self.run("scale", [elements.div_ceil(2048), 1, 1], 256, 0, arguments![to, from, alpha, long(elements)])
    }

    fn block_square_sums(
        &self,
        elements: usize,
        block: usize,
        gradient: &Floats<D>,
        out: &mut [f64],
    ) -> DeviceResult {
        assert_eq!(out.len(), elements.div_ceil(block), "one sum for each block");
        // A sum is as long as two of the scratch memory's numbers.
        for start in (0..out.len()).step_by(self.scratch.len() / 2) {
            let sums = &mut out[start..];
            let count = sums.len().min(self.scratch.len() / 2);
            let n = (count * block).min(elements - start * block);
            let (gradient, to) = (gradient.at(start * block, n), self.scratch.at(0, 2 * count));
            self.run("square_sums", [count, 1, 1], 256, 0, arguments![to, gradient, long(n), int(block)])?;
            let halves: &mut [u32] = bytemuck::cast_slice_mut(&mut sums[..count]);
            self.receive(2 * count, &self.scratch, 0, |i, bits: u32| halves[i] = bits)?;
        }
        Ok(())
    }
}

/// An attention's sizes as its kernels take them: sequences, tokens, query heads, key heads, width.
fn sizes(shape: AttentionShape) -> [i32; 5] {
    let AttentionShape { batch, sequence, heads, kv_heads, head_dim } = shape;
    [batch, sequence, heads, kv_heads, head_dim].map(int)
}

fn inverse_root(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}
