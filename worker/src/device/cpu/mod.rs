//! The CPU device: faer's matrix products, and vectorised kernels on a pool of threads.
//!
//! `lanes` and `x86` are the vector types, `pool` the threads, `gemm` the products, `attention*` with `micro`
//! attention, `elementwise`, `layernorm`, `gelu`, `bias` and `loss` the rest of the model, `state` the update, `train`
//! what training asks of a device beyond the model. A kernel's bits depend on its shape: not on threads, and, but for
//! matrix products, not on the instruction set either.

// Vector code must inline into the function that enables its instruction set; see `lanes`.
#![allow(clippy::inline_always)]

mod attention;
mod attention_backward;
mod bias;
mod blocks;
mod buffer;
mod elementwise;
mod gelu;
mod gemm;
mod lanes;
mod layernorm;
mod loss;
mod micro;
mod pool;
mod state;
#[cfg(test)]
mod tests;
mod train;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use blocks::BlockSums;
pub use buffer::CpuBuffer;
use buffer::reserve;

use self::lanes::Isa;
use self::pool::Pool;
use super::{
    AttentionShape, Device, DeviceResult, ExactForm, LossShape, MatmulShape, NormShape, Part, PartMut, Product, Write,
};
use crate::exact::GradientFault;

/// Version of the kernels' arithmetic; raised by any change that changes bits.
const KERNELS: u32 = 1;
/// The locked versions of the libraries that make the matrix products; a test holds them to the lock file.
const LIBRARIES: [(&str, &str); 3] = [("faer", "0.24.4"), ("private-gemm-x86", "0.1.22"), ("nano-gemm", "0.2.2")];

/// The CPU as a [`Device`].
pub struct CpuDevice {
    pool: Pool,
    isa: Isa,
    form: ExactForm,
}

impl std::fmt::Debug for CpuDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuDevice({} threads, {})", self.pool.len(), self.isa.name())
    }
}

impl CpuDevice {
    /// A device of `threads` threads; 0 counts as 1.
    pub fn new(threads: usize) -> DeviceResult<Self> {
        Ok(Self { pool: Pool::new(threads)?, isa: Isa::detect(), form: ExactForm::Fixed })
    }

    /// The same device keeping exact sums in another form: the twin of a GPU's.
    #[must_use]
    pub fn with_form(self, form: ExactForm) -> Self {
        Self { form, ..self }
    }
}

impl Device for CpuDevice {
    const ACTIVATION_BYTES: usize = 4;

    type Buffer = CpuBuffer;
    type Activation = CpuBuffer;
    type Sums = Vec<i64>;
    type BlockSums = BlockSums;
    type Tokens = Vec<u32>;
    type Losses = Vec<f64>;
    type Repeated = ();

    fn numeric_identity(&self) -> String {
        let libraries: Vec<String> = LIBRARIES.iter().map(|(name, version)| format!("{name}-{version}")).collect();
        let (architecture, isa, products) = (std::env::consts::ARCH, self.isa.name(), gemm::identity());
        format!("cpu {architecture} {isa} kernels-{KERNELS} {products} {}", libraries.join(" "))
    }

    fn threads(&self) -> usize {
        self.pool.len()
    }

    fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.enter(work)
    }

    fn repeat(
        &self,
        (): &mut (),
        _parameters: &CpuBuffer,
        gradient: Option<&mut CpuBuffer>,
        work: impl FnOnce(Option<&mut CpuBuffer>) -> DeviceResult + Send,
    ) -> DeviceResult {
        self.enter(|| work(gradient))
    }

    fn loss_rows(&self, vocabulary: usize, rows: usize) -> usize {
        // 4 Mi logits are 16 MiB; fewer than 128 rows would make thin products.
        ((4 << 20) / vocabulary).max(128).min(rows)
    }

    fn logits_pitch(&self, vocabulary: usize) -> usize {
        vocabulary
    }

    fn allocate(&self, elements: usize, what: &'static str) -> DeviceResult<CpuBuffer> {
        CpuBuffer::zeroed(elements, what)
    }

    fn allocate_activation(&self, elements: usize, what: &'static str) -> DeviceResult<CpuBuffer> {
        CpuBuffer::zeroed(elements, what)
    }

    fn allocate_losses(&self, elements: usize) -> DeviceResult<Vec<f64>> {
        reserve(elements, "losses")
    }

    fn allocate_sums(&self, elements: usize) -> DeviceResult<Vec<i64>> {
        reserve(elements, "gradient sums")
    }

    fn allocate_block_sums(&self, elements: usize, block: usize) -> DeviceResult<BlockSums> {
        BlockSums::zeroed(elements, block)
    }

    fn allocate_tokens(&self, elements: usize) -> DeviceResult<Vec<u32>> {
        reserve(elements, "tokens")
    }

    fn upload(&self, from: &[f32], to: PartMut<'_, CpuBuffer>) -> DeviceResult {
        to.0[to.1..to.1 + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&self, from: Part<'_, CpuBuffer>, to: &mut [f32]) -> DeviceResult {
        to.copy_from_slice(&from.0[from.1..from.1 + to.len()]);
        Ok(())
    }

    fn upload_activation(&self, from: &[f32], to: PartMut<'_, CpuBuffer>) -> DeviceResult {
        self.upload(from, to)
    }

    fn download_activation(&self, from: Part<'_, CpuBuffer>, to: &mut [f32]) -> DeviceResult {
        self.download(from, to)
    }

    fn copy(&self, elements: usize, from: Part<'_, CpuBuffer>, to: PartMut<'_, CpuBuffer>) -> DeviceResult {
        to.0[to.1..to.1 + elements].copy_from_slice(&from.0[from.1..from.1 + elements]);
        Ok(())
    }

    fn copy_activation(&self, elements: usize, from: Part<'_, CpuBuffer>, to: PartMut<'_, CpuBuffer>) -> DeviceResult {
        self.copy(elements, from, to)
    }

    fn upload_tokens(&self, from: &[u32], _ordered: bool, to: &mut Vec<u32>) -> DeviceResult {
        to[..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn zero(&self, elements: usize, to: PartMut<'_, CpuBuffer>) -> DeviceResult {
        to.0[to.1..to.1 + elements].fill(0.0);
        Ok(())
    }

    fn axpy(&self, elements: usize, alpha: f32, x: Part<'_, CpuBuffer>, y: PartMut<'_, CpuBuffer>) -> DeviceResult {
        state::axpy(&self.pool, alpha, &x.0[x.1..][..elements], &mut y.0[y.1..][..elements]);
        Ok(())
    }

    fn matmul(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, CpuBuffer>,
        b: Part<'_, CpuBuffer>,
        write: Write,
        c: PartMut<'_, CpuBuffer>,
    ) -> DeviceResult {
        gemm::gemm(&self.pool, product, shape, &a.0[a.1..], &b.0[b.1..], write, &mut c.0[c.1..]);
        Ok(())
    }

    fn matmul_gradient(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, CpuBuffer>,
        b: Part<'_, CpuBuffer>,
        write: Write,
        c: PartMut<'_, CpuBuffer>,
    ) -> DeviceResult {
        self.matmul(product, shape, a, b, write, c)
    }

    fn embedding_forward(
        &self,
        width: usize,
        rows: usize,
        tokens: &Vec<u32>,
        table: Part<'_, CpuBuffer>,
        positions: Option<(Part<'_, CpuBuffer>, usize)>,
        out: &mut CpuBuffer,
    ) -> DeviceResult {
        let positions = positions.map(|(table, sequence)| (&table.0[table.1..], sequence));
        elementwise::embedding_forward(&self.pool, width, &tokens[..rows], &table.0[table.1..], positions, out);
        Ok(())
    }

    fn embedding_backward(
        &self,
        width: usize,
        rows: usize,
        tokens: &Vec<u32>,
        d_out: &CpuBuffer,
        d_table: PartMut<'_, CpuBuffer>,
    ) -> DeviceResult {
        elementwise::embedding_backward(&self.pool, width, &tokens[..rows], d_out, &mut d_table.0[d_table.1..]);
        Ok(())
    }

    fn position_backward(
        &self,
        width: usize,
        batch: usize,
        sequence: usize,
        d_out: &CpuBuffer,
        d_positions: PartMut<'_, CpuBuffer>,
    ) -> DeviceResult {
        bias::position_backward(&self.pool, width, batch, sequence, d_out, &mut d_positions.0[d_positions.1..]);
        Ok(())
    }

    fn add_bias(&self, width: usize, rows: usize, bias: Part<'_, CpuBuffer>, out: &mut CpuBuffer) -> DeviceResult {
        bias::add(&self.pool, width, rows, &bias.0[bias.1..], out);
        Ok(())
    }

    fn bias_gradient(
        &self,
        width: usize,
        rows: usize,
        d_out: &CpuBuffer,
        d_bias: PartMut<'_, CpuBuffer>,
        _: &mut CpuBuffer,
    ) -> DeviceResult {
        bias::gradient(&self.pool, self.isa, width, rows, d_out, &mut d_bias.0[d_bias.1..]);
        Ok(())
    }

    fn bias_workspace(&self, _: usize, _: usize) -> usize {
        0
    }

    fn rmsnorm_forward(
        &self,
        norm: NormShape,
        x: &CpuBuffer,
        delta: Option<(&CpuBuffer, &mut CpuBuffer)>,
        weight: Part<'_, CpuBuffer>,
        normed: &mut CpuBuffer,
        scale: &mut CpuBuffer,
    ) -> DeviceResult {
        let delta = delta.map(|(delta, sum)| (&delta[..], &mut sum[..]));
        let weight = &weight.0[weight.1..];
        elementwise::rmsnorm_forward(&self.pool, self.isa, norm, x, delta, weight, normed, scale);
        Ok(())
    }

    fn rmsnorm_backward(
        &self,
        norm: NormShape,
        x: &CpuBuffer,
        scale: &CpuBuffer,
        weight: Part<'_, CpuBuffer>,
        d_normed: &CpuBuffer,
        write: Write,
        d_x: &mut CpuBuffer,
        d_weight: PartMut<'_, CpuBuffer>,
        workspace: &mut CpuBuffer,
    ) -> DeviceResult {
        let (weight, d_weight) = (&weight.0[weight.1..], &mut d_weight.0[d_weight.1..]);
        let (pool, isa) = (&self.pool, self.isa);
        elementwise::rmsnorm_backward(pool, isa, norm, x, scale, weight, d_normed, write, d_x, d_weight, workspace);
        Ok(())
    }

    fn norm_workspace(&self, norm: NormShape) -> usize {
        elementwise::norm_workspace(norm)
    }

    fn layernorm_forward(
        &self,
        norm: NormShape,
        x: &CpuBuffer,
        delta: Option<(&CpuBuffer, &mut CpuBuffer)>,
        affine: Part<'_, CpuBuffer>,
        normed: &mut CpuBuffer,
        statistics: &mut CpuBuffer,
    ) -> DeviceResult {
        let delta = delta.map(|(delta, sum)| (&delta[..], &mut sum[..]));
        let affine = &affine.0[affine.1..];
        layernorm::forward(&self.pool, self.isa, norm, x, delta, affine, normed, statistics);
        Ok(())
    }

    fn layernorm_backward(
        &self,
        norm: NormShape,
        x: &CpuBuffer,
        statistics: &CpuBuffer,
        affine: Part<'_, CpuBuffer>,
        d_normed: &CpuBuffer,
        write: Write,
        d_x: &mut CpuBuffer,
        d_affine: PartMut<'_, CpuBuffer>,
        workspace: &mut CpuBuffer,
    ) -> DeviceResult {
        let (gain, d_affine) = (&affine.0[affine.1..], &mut d_affine.0[d_affine.1..]);
        let (pool, isa) = (&self.pool, self.isa);
        layernorm::backward(pool, isa, norm, x, statistics, gain, d_normed, write, d_x, d_affine, workspace);
        Ok(())
    }

    fn layernorm_workspace(&self, norm: NormShape) -> usize {
        layernorm::workspace(norm)
    }

    fn rope(&self, shape: AttentionShape, inverse: bool, table: &CpuBuffer, qkv: &mut CpuBuffer) -> DeviceResult {
        elementwise::rope(&self.pool, self.isa, shape, inverse, table, qkv);
        Ok(())
    }

    fn attention_forward(
        &self,
        shape: AttentionShape,
        qkv: &CpuBuffer,
        out: &mut CpuBuffer,
        statistics: &mut CpuBuffer,
        workspace: &mut CpuBuffer,
    ) -> DeviceResult {
        attention::forward(&self.pool, self.isa, shape, qkv, out, statistics, workspace);
        Ok(())
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        qkv: &CpuBuffer,
        out: &CpuBuffer,
        statistics: &CpuBuffer,
        d_out: &CpuBuffer,
        d_qkv: &mut CpuBuffer,
        workspace: &mut CpuBuffer,
    ) -> DeviceResult {
        let (pool, isa) = (&self.pool, self.isa);
        attention_backward::backward(pool, isa, shape, qkv, out, statistics, d_out, d_qkv, workspace);
        Ok(())
    }

    fn attention_workspace(&self, shape: AttentionShape) -> usize {
        attention::Padded::new(shape).scratch() * self.pool.len()
    }

    fn swiglu_forward(&self, width: usize, rows: usize, gate_up: &CpuBuffer, act: &mut CpuBuffer) -> DeviceResult {
        elementwise::swiglu_forward(&self.pool, self.isa, width, rows, gate_up, act);
        Ok(())
    }

    fn swiglu_backward(
        &self,
        width: usize,
        rows: usize,
        gate_up: &mut CpuBuffer,
        d_act: &mut CpuBuffer,
    ) -> DeviceResult {
        elementwise::swiglu_backward(&self.pool, self.isa, width, rows, gate_up, d_act);
        Ok(())
    }

    fn gelu_forward(&self, elements: usize, pre: &CpuBuffer, act: &mut CpuBuffer) -> DeviceResult {
        gelu::forward(&self.pool, self.isa, &pre[..elements], act);
        Ok(())
    }

    fn gelu_backward(&self, elements: usize, pre: &mut CpuBuffer, d_act: &mut CpuBuffer) -> DeviceResult {
        gelu::backward(&self.pool, self.isa, &mut pre[..elements], d_act);
        Ok(())
    }

    fn cross_entropy(
        &self,
        shape: LossShape,
        targets: &Vec<u32>,
        gradient: Option<f32>,
        logits: &mut CpuBuffer,
        write: Write,
        losses: &mut Vec<f64>,
        index: usize,
    ) -> DeviceResult {
        let LossShape { vocabulary, pitch, rows, first } = shape;
        assert_eq!(pitch, vocabulary, "logits on the CPU are dense");
        let targets = &targets[first..first + rows];
        let sum = loss::cross_entropy(&self.pool, self.isa, vocabulary, targets, gradient, logits);
        losses[index] = if write == Write::Add { losses[index] + sum } else { sum };
        Ok(())
    }

    fn read_losses(&self, losses: &Vec<f64>, to: &mut [f64]) -> DeviceResult {
        to.copy_from_slice(&losses[..to.len()]);
        Ok(())
    }

    fn accumulate_exact(
        &self,
        elements: usize,
        gradient: &CpuBuffer,
        limit: i64,
        write: Write,
        sums: &mut Vec<i64>,
    ) -> DeviceResult<Option<GradientFault>> {
        Ok(state::accumulate_exact(&self.pool, self.isa, &gradient[..elements], limit, write, sums))
    }

    fn gradient_from_sums(
        &self,
        elements: usize,
        scale: f64,
        sums: &Vec<i64>,
        at: usize,
        gradient: &mut CpuBuffer,
    ) -> DeviceResult {
        state::gradient_from_sums(&self.pool, scale, &sums[at..at + elements], &mut gradient[..elements]);
        Ok(())
    }

    fn block_square_sums(&self, elements: usize, block: usize, gradient: &CpuBuffer, out: &mut [f64]) -> DeviceResult {
        state::block_square_sums(&self.pool, block, &gradient[..elements], out);
        Ok(())
    }

    fn set_exponents(&self, exponents: &[i8], sums: &mut BlockSums) -> DeviceResult {
        sums.set_exponents(exponents);
        Ok(())
    }

    fn accumulate_blocks(
        &self,
        elements: usize,
        gradient: &CpuBuffer,
        limit: i32,
        write: Write,
        sums: &mut BlockSums,
    ) -> DeviceResult {
        sums.accumulate(&self.pool, &gradient[..elements], limit, write);
        Ok(())
    }

    fn read_magnitudes(&self, sums: &BlockSums, to: &mut [u8]) -> DeviceResult {
        to.copy_from_slice(sums.magnitudes());
        Ok(())
    }

    fn gradient_from_blocks(
        &self,
        elements: usize,
        scale: f64,
        sums: &BlockSums,
        at: usize,
        gradient: &mut CpuBuffer,
    ) -> DeviceResult {
        sums.gradient(&self.pool, scale, at, &mut gradient[..elements]);
        Ok(())
    }

    fn scale(&self, elements: usize, alpha: f32, from: Part<'_, CpuBuffer>, to: &mut CpuBuffer) -> DeviceResult {
        for (to, from) in to[..elements].iter_mut().zip(&from.0[from.1..]) {
            *to = from * alpha;
        }
        Ok(())
    }
}
