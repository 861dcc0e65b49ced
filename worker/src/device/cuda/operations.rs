//! The device's operations, each as the kernels it takes and how they are launched.
//!
//! How many blocks and threads a kernel wants, and how much shared memory, is told in the header of its file; the
//! numbers here repeat it. Where the number of blocks decides the order of a sum it follows from the shape alone.

use super::driver::{After, Driver, Element, Stream};
use super::memory::{Array, Bf16};
use super::norms::{self, Norm};
use super::{CudaBlockSums, CudaDevice, CudaRepeated, CudaTokens, arguments, attention, bf16, int, kernels, long};
use crate::device::{
    AttentionShape, Device, DeviceError, DeviceResult, LossShape, MatmulShape, NormShape, Part, PartMut, Product, Write,
};
use crate::exact::GradientFault;

/// Logits that exist at once: 1 GiB of bfloat16.
const LOGITS: usize = 1 << 29;
/// Rows of logits begin at multiples of so many, for whole tiles of the products.
const PITCH: usize = 128;
/// Sums on the fixed grid, which this device does not keep: its exact sums are in blocks.
#[derive(Debug)]
pub enum NoSums {}

/// Parts of the rows that a bias's gradient is first summed over: by the shape alone.
fn bias_parts(rows: usize) -> usize {
    rows.div_ceil(64).min(128)
}

fn flag(write: Write) -> i32 {
    i32::from(write == Write::Add)
}

type Floats<D> = Array<D, f32>;
type Halves<D> = Array<D, Bf16>;

impl<D: Driver> Device for CudaDevice<D> {
    const ACTIVATION_BYTES: usize = 2;

    type Buffer = Floats<D>;
    type Activation = Halves<D>;
    type Sums = NoSums;
    type BlockSums = CudaBlockSums<D>;
    type Tokens = CudaTokens<D>;
    type Losses = Array<D, f64>;
    type Repeated = CudaRepeated<D>;

    fn numeric_identity(&self) -> String {
        let identity = self.driver.identity();
        let (major, minor) = identity.capability;
        let name = identity.name.replace(' ', "-");
        let libraries: Vec<String> =
            identity.libraries.iter().map(|(name, version)| format!("{name}-{version}")).collect();
        let (count, sources, libraries) = (identity.multiprocessors, kernels::version(), libraries.join(" "));
        format!(
            "cuda {name} sm_{major}{minor}x{count} bf16 kernels-{sources} {libraries} {}",
            self.driver.plan_identity()
        )
    }

    fn threads(&self) -> usize {
        1
    }

    fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    fn repeat(
        &self,
        repeated: &mut CudaRepeated<D>,
        parameters: &Halves<D>,
        gradient: Option<&mut Floats<D>>,
        work: impl FnOnce(Option<&mut Floats<D>>) -> DeviceResult + Send,
    ) -> DeviceResult {
        self.play(repeated, parameters, gradient, work)
    }

    fn loss_rows(&self, vocabulary: usize, rows: usize) -> usize {
        let most = (LOGITS / self.logits_pitch(vocabulary)).max(PITCH);
        // Chunks of one size, so that none is too short for the products.
        rows.div_ceil(rows.div_ceil(most)).next_multiple_of(PITCH).min(rows)
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

    fn upload_tokens(&self, from: &[u32], ordered: bool, to: &mut CudaTokens<D>) -> DeviceResult {
        Ok(to.upload(from, ordered, self.patience)?)
    }

    fn copy(&self, elements: usize, from: Part<'_, Floats<D>>, to: PartMut<'_, Floats<D>>) -> DeviceResult {
        let (from, to) = (from.0.at(from.1, elements), to.0.at(to.1, elements));
        // SAFETY: both have so many elements, and are borrowed apart.
        Ok(unsafe { self.driver.copy(Stream::Compute, from, to, 4 * elements) }?)
    }

    fn copy_activation(&self, elements: usize, from: Part<'_, Halves<D>>, to: PartMut<'_, Halves<D>>) -> DeviceResult {
        let (from, to) = (from.0.at(from.1, elements), to.0.at(to.1, elements));
        // SAFETY: both have so many elements, and are borrowed apart.
        Ok(unsafe { self.driver.copy(Stream::Compute, from, to, 2 * elements) }?)
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
        let operands = [a.0.from(a.1), b.0.from(b.1), c.0.from(c.1)];
        self.multiply(product, shape, operands, (Element::Bfloat16, write, After::default())).map(drop)
    }

    fn matmul_bias(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, Halves<D>>,
        b: Part<'_, Halves<D>>,
        bias: Part<'_, Halves<D>>,
        c: &mut Halves<D>,
    ) -> DeviceResult {
        let operands = [a.0.from(a.1), b.0.from(b.1), c.from(0)];
        let after = After { bias: Some(bias.0.at(bias.1, shape.n)), pre: None };
        if self.multiply(product, shape, operands, (Element::Bfloat16, Write::Replace, after))? {
            return Ok(());
        }
        self.matmul(product, shape, a, b, Write::Replace, PartMut(c, 0))?;
        self.add_bias(shape.n, shape.m, bias, c)
    }

    fn matmul_gelu(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, Halves<D>>,
        b: Part<'_, Halves<D>>,
        bias: Part<'_, Halves<D>>,
        pre: &mut Halves<D>,
        act: &mut Halves<D>,
    ) -> DeviceResult {
        let (elements, operands) = (shape.m * shape.n, [a.0.from(a.1), b.0.from(b.1), act.from(0)]);
        let after = After { bias: Some(bias.0.at(bias.1, shape.n)), pre: Some(pre.at(0, elements)) };
        if self.multiply(product, shape, operands, (Element::Bfloat16, Write::Replace, after))? {
            return Ok(());
        }
        self.matmul_bias(product, shape, a, b, bias, pre)?;
        self.gelu_forward(elements, pre, act)
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
        let operands = [a.0.from(a.1), b.0.from(b.1), c.0.from(c.1)];
        self.multiply(product, shape, operands, (Element::Float32, write, After::default())).map(drop)
    }

    fn embedding_forward(
        &self,
        width: usize,
        rows: usize,
        tokens: &CudaTokens<D>,
        table: Part<'_, Halves<D>>,
        positions: Option<(Part<'_, Halves<D>>, usize)>,
        out: &mut Halves<D>,
    ) -> DeviceResult {
        let (table, _) = table.0.from(table.1);
        let position =
            |(table, sequence): (Part<'_, Halves<D>>, usize)| (table.0.at(table.1, sequence * width), sequence);
        let (positions, sequence) = positions.map_or((0, 1), position);
        let (out, ids, wide) = (out.at(0, rows * width), tokens.ids(0, rows), int(width));
        let arguments = arguments![out, table, positions, ids, int(rows), wide, int(sequence)];
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
        let (d_out, partial, (d_table, _)) =
            (d_out.at(0, rows * width), self.scratch.at(0, 0), d_table.0.from(d_table.1));
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

    fn position_backward(
        &self,
        width: usize,
        batch: usize,
        sequence: usize,
        d_out: &Halves<D>,
        d_positions: PartMut<'_, Floats<D>>,
    ) -> DeviceResult {
        let (d_out, to) = (d_out.at(0, batch * sequence * width), d_positions.0.at(d_positions.1, sequence * width));
        let arguments = arguments![to, d_out, int(batch), int(sequence), int(width)];
        self.run("position_backward", [(sequence * width.div_ceil(8)).div_ceil(128), 1, 1], 128, 0, arguments)
    }

    fn add_bias(&self, width: usize, rows: usize, bias: Part<'_, Halves<D>>, out: &mut Halves<D>) -> DeviceResult {
        let arguments = arguments![out.at(0, rows * width), bias.0.at(bias.1, width), int(rows), int(width)];
        self.run("bias_add", [(rows * width.div_ceil(8)).div_ceil(256), 1, 1], 256, 0, arguments)
    }

    fn bias_gradient(
        &self,
        width: usize,
        rows: usize,
        d_out: &Halves<D>,
        d_bias: PartMut<'_, Floats<D>>,
        workspace: &mut Floats<D>,
    ) -> DeviceResult {
        let (parts, d_out) = (bias_parts(rows), d_out.at(0, rows * width));
        let partial = workspace.at(0, parts * width);
        let arguments = arguments![partial, d_out, int(rows), int(width)];
        self.run("bias_gradient", [width.div_ceil(256), parts, 1], 256, 0, arguments)?;
        self.column_sums(parts, width, partial, d_bias.0.at(d_bias.1, width))
    }

    fn bias_workspace(&self, width: usize, rows: usize) -> usize {
        bias_parts(rows) * width
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
        self.norm_forward(Norm::Rms, norm, (x, delta), weight, normed, scale)
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
        let saved = norms::Saved { x, statistics: scale, affine: weight, d_normed };
        self.norm_backward(Norm::Rms, norm, saved, (write, d_x), d_weight, workspace)
    }

    fn norm_workspace(&self, norm: NormShape) -> usize {
        Norm::Rms.workspace(norm)
    }

    fn layernorm_forward(
        &self,
        norm: NormShape,
        x: &Halves<D>,
        delta: Option<(&Halves<D>, &mut Halves<D>)>,
        affine: Part<'_, Halves<D>>,
        normed: &mut Halves<D>,
        statistics: &mut Floats<D>,
    ) -> DeviceResult {
        self.norm_forward(Norm::Layer, norm, (x, delta), affine, normed, statistics)
    }

    fn layernorm_backward(
        &self,
        norm: NormShape,
        x: &Halves<D>,
        statistics: &Floats<D>,
        affine: Part<'_, Halves<D>>,
        d_normed: &Halves<D>,
        write: Write,
        d_x: &mut Halves<D>,
        d_affine: PartMut<'_, Floats<D>>,
        workspace: &mut Floats<D>,
    ) -> DeviceResult {
        let saved = norms::Saved { x, statistics, affine, d_normed };
        self.norm_backward(Norm::Layer, norm, saved, (write, d_x), d_affine, workspace)
    }

    fn layernorm_workspace(&self, norm: NormShape) -> usize {
        Norm::Layer.workspace(norm)
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
        self.attend(shape, qkv, out, statistics)
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
        self.attend_backward(shape, attention::Saved { qkv, out, statistics, d_out }, d_qkv, workspace)
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

    fn gelu_forward(&self, elements: usize, pre: &Halves<D>, act: &mut Halves<D>) -> DeviceResult {
        let arguments = arguments![act.at(0, elements), pre.at(0, elements), long(elements)];
        self.run("gelu_forward", [elements.div_ceil(2048), 1, 1], 256, 0, arguments)
    }

    fn gelu_backward(&self, elements: usize, pre: &mut Halves<D>, d_act: &mut Halves<D>) -> DeviceResult {
        let arguments = arguments![pre.at(0, elements), d_act.at(0, elements), long(elements)];
        self.run("gelu_backward", [elements.div_ceil(2048), 1, 1], 256, 0, arguments)
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

    fn block_square_sums(&self, elements: usize, block: usize, gradient: &Floats<D>, out: &mut [f64]) -> DeviceResult {
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
