//! A device that measures another: every operation is passed on and its time added up by name.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use worker::device::{
    AttentionShape, Device, DeviceResult, LossShape, MatmulShape, NormShape, Part, PartMut, Product, Write,
};
use worker::exact::GradientFault;

/// Calls, seconds and, for products, multiply-adds.
type Row = (usize, f64, f64);

pub(crate) struct Timed<'a, D> {
    inner: &'a D,
    table: Mutex<BTreeMap<String, Row>>,
}

impl<'a, D: Device> Timed<'a, D> {
    pub(crate) fn new(inner: &'a D) -> Self {
        Self { inner, table: Mutex::default() }
    }

    fn time<R>(&self, name: impl Into<String>, work: f64, run: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = run();
        let seconds = start.elapsed().as_secs_f64();
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let row = table.entry(name.into()).or_default();
        *row = (row.0 + 1, row.1 + seconds, row.2 + work);
        result
    }

    /// Prints the table, longest first, per step.
    pub(crate) fn print(&self, steps: usize, total: f64) {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows: Vec<_> = table.iter().collect();
        rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        let known = Cell::new(0.0);
        println!("{:<40} {:>7} {:>10} {:>6} {:>8}", "operation", "calls", "ms a step", "%", "GFLOP/s");
        for (name, (calls, seconds, work)) in rows {
            known.set(known.get() + seconds);
            let (ms, share) = (seconds * 1e3 / steps as f64, 100.0 * seconds / total);
            let rate = if *work > 0.0 { format!("{:.0}", 2.0 * work / seconds / 1e9) } else { String::new() };
            println!("{name:<40} {:>7} {ms:>10.2} {share:>6.1} {rate:>8}", calls / steps);
        }
        println!(
            "{:<40} {:>7} {:>10.2} {:>6.1}",
            "outside",
            "",
            (total - known.get()) * 1e3 / steps as f64,
            100.0 * (1.0 - known.get() / total)
        );
    }
}

/// Passes operations on, timed under their own names.
macro_rules! pass {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty;)*) => {
        $(fn $name(&self, $($arg: $ty),*) -> $ret {
            self.time(stringify!($name), 0.0, || self.inner.$name($($arg),*))
        })*
    };
}

impl<D: Device> Device for Timed<'_, D> {
    type Buffer = D::Buffer;
    type Activation = D::Activation;
    type Sums = D::Sums;
    type BlockSums = D::BlockSums;
    type Tokens = D::Tokens;
    type Losses = D::Losses;

    fn threads(&self) -> usize {
        self.inner.threads()
    }

    fn numeric_identity(&self) -> String {
        self.inner.numeric_identity()
    }
    fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.inner.enter(work)
    }
    fn loss_rows(&self, vocabulary: usize, rows: usize) -> usize {
        self.inner.loss_rows(vocabulary, rows)
    }
    fn logits_pitch(&self, vocabulary: usize) -> usize {
        self.inner.logits_pitch(vocabulary)
    }
    fn norm_workspace(&self, norm: NormShape) -> usize {
        self.inner.norm_workspace(norm)
    }
    fn layernorm_workspace(&self, norm: NormShape) -> usize {
        self.inner.layernorm_workspace(norm)
    }
    fn bias_workspace(&self, width: usize, rows: usize) -> usize {
        self.inner.bias_workspace(width, rows)
    }
    fn attention_workspace(&self, shape: AttentionShape) -> usize {
        self.inner.attention_workspace(shape)
    }
    fn matmul(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, D::Activation>,
        b: Part<'_, D::Activation>,
        write: Write,
        c: PartMut<'_, D::Activation>,
    ) -> DeviceResult {
        let MatmulShape { m, n, k, .. } = shape;
        let work = (m * n * k) as f64;
        let name = format!("matmul {product:?} {m} x {n} x {k}");
        self.time(name, work, || self.inner.matmul(product, shape, a, b, write, c))
    }

    fn matmul_gradient(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, D::Activation>,
        b: Part<'_, D::Activation>,
        write: Write,
        c: PartMut<'_, D::Buffer>,
    ) -> DeviceResult {
        let MatmulShape { m, n, k, .. } = shape;
        let work = (m * n * k) as f64;
        let name = format!("matmul {product:?} {m} x {n} x {k}");
        self.time(name, work, || self.inner.matmul_gradient(product, shape, a, b, write, c))
    }

    pass! {
        fn allocate(elements: usize, what: &'static str) -> DeviceResult<D::Buffer>;
        fn allocate_activation(elements: usize, what: &'static str) -> DeviceResult<D::Activation>;
        fn allocate_losses(elements: usize) -> DeviceResult<D::Losses>;
        fn allocate_block_sums(elements: usize, block: usize) -> DeviceResult<D::BlockSums>;
        fn allocate_sums(elements: usize) -> DeviceResult<D::Sums>;
        fn allocate_tokens(elements: usize) -> DeviceResult<D::Tokens>;
        fn upload(from: &[f32], to: PartMut<'_, D::Buffer>) -> DeviceResult;
        fn download(from: Part<'_, D::Buffer>, to: &mut [f32]) -> DeviceResult;
        fn upload_activation(from: &[f32], to: PartMut<'_, D::Activation>) -> DeviceResult;
        fn download_activation(from: Part<'_, D::Activation>, to: &mut [f32]) -> DeviceResult;
        fn upload_tokens(from: &[u32], to: &mut D::Tokens) -> DeviceResult;
        fn zero(elements: usize, to: PartMut<'_, D::Buffer>) -> DeviceResult;
        fn axpy(elements: usize, alpha: f32, x: Part<'_, D::Buffer>, y: PartMut<'_, D::Buffer>) -> DeviceResult;
        fn embedding_forward(
            width: usize, rows: usize, tokens: &D::Tokens, table: Part<'_, D::Activation>,
            positions: Option<(Part<'_, D::Activation>, usize)>, out: &mut D::Activation,
        ) -> DeviceResult;
        fn embedding_backward(
            width: usize, rows: usize, tokens: &D::Tokens, d_out: &D::Activation, d_table: PartMut<'_, D::Buffer>,
        ) -> DeviceResult;
        fn position_backward(
            width: usize, batch: usize, sequence: usize, d_out: &D::Activation, d_positions: PartMut<'_, D::Buffer>,
        ) -> DeviceResult;
        fn add_bias(width: usize, rows: usize, bias: Part<'_, D::Activation>, out: &mut D::Activation) -> DeviceResult;
        fn bias_gradient(
            width: usize, rows: usize, d_out: &D::Activation, d_bias: PartMut<'_, D::Buffer>, workspace: &mut D::Buffer,
        ) -> DeviceResult;
        fn layernorm_forward(
            norm: NormShape, x: &D::Activation, delta: Option<(&D::Activation, &mut D::Activation)>,
            affine: Part<'_, D::Activation>, normed: &mut D::Activation, statistics: &mut D::Buffer,
        ) -> DeviceResult;
        fn layernorm_backward(
            norm: NormShape, x: &D::Activation, statistics: &D::Buffer, affine: Part<'_, D::Activation>,
            d_normed: &D::Activation, write: Write, d_x: &mut D::Activation, d_affine: PartMut<'_, D::Buffer>,
            workspace: &mut D::Buffer,
        ) -> DeviceResult;
        fn rmsnorm_forward(
            norm: NormShape, x: &D::Activation, delta: Option<(&D::Activation, &mut D::Activation)>, weight: Part<'_, D::Activation>,
            normed: &mut D::Activation, scale: &mut D::Buffer,
        ) -> DeviceResult;
        fn rmsnorm_backward(
            norm: NormShape, x: &D::Activation, scale: &D::Buffer, weight: Part<'_, D::Activation>, d_normed: &D::Activation,
            write: Write, d_x: &mut D::Activation, d_weight: PartMut<'_, D::Buffer>, workspace: &mut D::Buffer,
        ) -> DeviceResult;
        fn rope(shape: AttentionShape, inverse: bool, table: &D::Buffer, qkv: &mut D::Activation) -> DeviceResult;
        fn attention_forward(
            shape: AttentionShape, qkv: &D::Activation, out: &mut D::Activation, statistics: &mut D::Buffer,
            workspace: &mut D::Buffer,
        ) -> DeviceResult;
        fn attention_backward(
            shape: AttentionShape, qkv: &D::Activation, out: &D::Activation, statistics: &D::Buffer, d_out: &D::Activation,
            d_qkv: &mut D::Activation, workspace: &mut D::Buffer,
        ) -> DeviceResult;
        fn swiglu_forward(width: usize, rows: usize, gate_up: &D::Activation, act: &mut D::Activation) -> DeviceResult;
        fn swiglu_backward(width: usize, rows: usize, gate_up: &mut D::Activation, d_act: &mut D::Activation) -> DeviceResult;
        fn gelu_forward(elements: usize, pre: &D::Activation, act: &mut D::Activation) -> DeviceResult;
        fn gelu_backward(elements: usize, pre: &mut D::Activation, d_act: &mut D::Activation) -> DeviceResult;
        fn cross_entropy(
            shape: LossShape, targets: &D::Tokens, gradient: Option<f32>, logits: &mut D::Activation, write: Write,
            losses: &mut D::Losses, index: usize,
        ) -> DeviceResult;
        fn read_losses(losses: &D::Losses, to: &mut [f64]) -> DeviceResult;
        fn accumulate_exact(
            elements: usize, gradient: &D::Buffer, limit: i64, write: Write, sums: &mut D::Sums,
        ) -> DeviceResult<Option<GradientFault>>;
        fn gradient_from_sums(
            elements: usize, scale: f64, sums: &D::Sums, at: usize, gradient: &mut D::Buffer,
        ) -> DeviceResult;
        fn block_square_sums(elements: usize, block: usize, gradient: &D::Buffer, out: &mut [f64]) -> DeviceResult;
        fn set_exponents(exponents: &[i8], sums: &mut D::BlockSums) -> DeviceResult;
        fn accumulate_blocks(
            elements: usize, gradient: &D::Buffer, limit: i32, write: Write, sums: &mut D::BlockSums,
        ) -> DeviceResult;
        fn read_magnitudes(sums: &D::BlockSums, to: &mut [u8]) -> DeviceResult;
        fn gradient_from_blocks(
            elements: usize, scale: f64, sums: &D::BlockSums, at: usize, gradient: &mut D::Buffer,
        ) -> DeviceResult;
        fn scale(elements: usize, alpha: f32, from: Part<'_, D::Buffer>, to: &mut D::Buffer) -> DeviceResult;
    }
}
