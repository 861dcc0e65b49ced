//! A device that measures another: every operation is passed on, waited for, and its time added up by name.
//!
//! Beside its time each operation has its floor: the arithmetic it cannot do without, and the bytes it has to move at
//! least. A GPU's operations are timed by its own clock, from when it begins one to when it is done; since each is
//! waited for, a whole step takes longer here than it does in training.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::{
    AttentionShape, Device, DeviceResult, LossShape, MatmulShape, NormShape, Part, PartMut, Product, TrainDevice, Write,
};
use crate::exact::GradientFault;

/// The name of the optimizer's update, which is no operation of the model's.
pub const UPDATE: &str = "adamw";

/// What an operation came to, over all its calls.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Row {
    /// How often it was asked for.
    pub calls: usize,
    /// Seconds.
    pub seconds: f64,
    /// Floating-point operations it cannot do without, where these bound it.
    pub operations: f64,
    /// Bytes it moves at least.
    pub bytes: f64,
}

/// Passes operations on to another device, and keeps a table of them.
pub struct Timed<'a, D> {
    inner: &'a D,
    table: Mutex<BTreeMap<String, Row>>,
}

impl<'a, D: TrainDevice> Timed<'a, D> {
    /// Measures `inner`.
    pub fn new(inner: &'a D) -> Self {
        Self { inner, table: Mutex::default() }
    }

    /// Forgets what was measured so far.
    pub fn restart(&self) {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// How often the update was measured, which every step has once.
    pub fn rounds(&self) -> usize {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).get(UPDATE).map_or(0, |row| row.calls)
    }

    /// What was measured, by name.
    pub fn rows(&self) -> BTreeMap<String, Row> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs an operation of this floor, in operations and bytes.
    pub fn time<R>(
        &self,
        name: impl Into<String>,
        floor: (usize, usize),
        run: impl FnOnce() -> DeviceResult<R>,
    ) -> DeviceResult<R> {
        let (result, seconds) = self.inner.time(run)?;
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let row = table.entry(name.into()).or_default();
        row.calls += 1;
        row.seconds += seconds;
        row.operations += floor.0 as f64;
        row.bytes += floor.1 as f64;
        Ok(result)
    }
}

/// Operations of one product of causal attention over all heads: of each pair of rows only half counts.
fn triangle(shape: AttentionShape) -> usize {
    shape.batch * shape.heads * shape.sequence * shape.sequence * shape.head_dim
}

/// A product's name and floor.
fn product_floor(product: Product, shape: MatmulShape, result: usize, operand: usize) -> (String, (usize, usize)) {
    let MatmulShape { m, n, k, .. } = shape;
    let bytes = operand * (m * k + n * k) + result * m * n;
    (format!("product {product:?} {m} × {n} × {k}"), (2 * m * n * k, bytes))
}

/// Passes operations on, timed under their own names, each with its floor; `a` is the size of an activation's element.
macro_rules! pass {
    ($a:ident; $(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty = $floor:expr;)*) => {
        $(fn $name(&self, $($arg: $ty),*) -> $ret {
            let $a = D::ACTIVATION_BYTES;
            let _ = $a;
            let floor = $floor;
            self.time(stringify!($name), floor, || self.inner.$name($($arg),*))
        })*
    };
}

impl<D: TrainDevice> Device for Timed<'_, D> {
    const ACTIVATION_BYTES: usize = D::ACTIVATION_BYTES;

    type Buffer = D::Buffer;
    type Activation = D::Activation;
    type Sums = D::Sums;
    type BlockSums = D::BlockSums;
    type Tokens = D::Tokens;
    type Losses = D::Losses;
    type Repeated = ();

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
        let (name, floor) = product_floor(product, shape, D::ACTIVATION_BYTES, D::ACTIVATION_BYTES);
        self.time(name, floor, || self.inner.matmul(product, shape, a, b, write, c))
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
        let (name, floor) = product_floor(product, shape, 4, D::ACTIVATION_BYTES);
        self.time(name, floor, || self.inner.matmul_gradient(product, shape, a, b, write, c))
    }

    fn matmul_bias(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, D::Activation>,
        b: Part<'_, D::Activation>,
        bias: Part<'_, D::Activation>,
        c: &mut D::Activation,
    ) -> DeviceResult {
        let (name, floor) = product_floor(product, shape, D::ACTIVATION_BYTES, D::ACTIVATION_BYTES);
        self.time(name + " bias", floor, || self.inner.matmul_bias(product, shape, a, b, bias, c))
    }

    fn matmul_gelu(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, D::Activation>,
        b: Part<'_, D::Activation>,
        bias: Part<'_, D::Activation>,
        pre: &mut D::Activation,
        act: &mut D::Activation,
    ) -> DeviceResult {
        let (name, floor) = product_floor(product, shape, 2 * D::ACTIVATION_BYTES, D::ACTIVATION_BYTES);
        self.time(name + " bias gelu", floor, || self.inner.matmul_gelu(product, shape, a, b, bias, pre, act))
    }

    fn repeat(
        &self,
        (): &mut (),
        _parameters: &D::Activation,
        gradient: Option<&mut D::Buffer>,
        work: impl FnOnce(Option<&mut D::Buffer>) -> DeviceResult + Send,
    ) -> DeviceResult {
        // Each operation by itself.
        work(gradient)
    }

    pass! { a;
        fn copy(elements: usize, from: Part<'_, D::Buffer>, to: PartMut<'_, D::Buffer>) -> DeviceResult =
            (0, 8 * elements);
        fn copy_activation(
            elements: usize, from: Part<'_, D::Activation>, to: PartMut<'_, D::Activation>,
        ) -> DeviceResult =
            (0, 2 * elements * a);
        fn allocate(elements: usize, what: &'static str) -> DeviceResult<D::Buffer> = (0, 0);
        fn allocate_activation(elements: usize, what: &'static str) -> DeviceResult<D::Activation> = (0, 0);
        fn allocate_losses(elements: usize) -> DeviceResult<D::Losses> = (0, 0);
        fn allocate_block_sums(elements: usize, block: usize) -> DeviceResult<D::BlockSums> = (0, 0);
        fn allocate_sums(elements: usize) -> DeviceResult<D::Sums> = (0, 0);
        fn allocate_tokens(elements: usize) -> DeviceResult<D::Tokens> = (0, 0);
        fn upload(from: &[f32], to: PartMut<'_, D::Buffer>) -> DeviceResult = (0, 0);
        fn download(from: Part<'_, D::Buffer>, to: &mut [f32]) -> DeviceResult = (0, 0);
        fn upload_activation(from: &[f32], to: PartMut<'_, D::Activation>) -> DeviceResult = (0, 0);
        fn download_activation(from: Part<'_, D::Activation>, to: &mut [f32]) -> DeviceResult = (0, 0);
        fn upload_tokens(from: &[u32], ordered: bool, to: &mut D::Tokens) -> DeviceResult = (0, 0);
        fn zero(elements: usize, to: PartMut<'_, D::Buffer>) -> DeviceResult = (0, 4 * elements);
        fn axpy(
            elements: usize, alpha: f32, x: Part<'_, D::Buffer>, y: PartMut<'_, D::Buffer>,
        ) -> DeviceResult =
            (0, 12 * elements);
        fn embedding_forward(
            width: usize, rows: usize, tokens: &D::Tokens, table: Part<'_, D::Activation>,
            positions: Option<(Part<'_, D::Activation>, usize)>, out: &mut D::Activation,
        ) -> DeviceResult =
            (0, 2 * rows * width * a);
        fn embedding_backward(
            width: usize, rows: usize, tokens: &D::Tokens, d_out: &D::Activation, d_table: PartMut<'_, D::Buffer>,
        ) -> DeviceResult =
            (0, rows * width * (a + 8));
        fn position_backward(
            width: usize, batch: usize, sequence: usize, d_out: &D::Activation,
            d_positions: PartMut<'_, D::Buffer>,
        ) -> DeviceResult =
            (0, batch * sequence * width * a + 4 * sequence * width);
        fn add_bias(
            width: usize, rows: usize, bias: Part<'_, D::Activation>, out: &mut D::Activation,
        ) -> DeviceResult =
            (0, 2 * rows * width * a);
        fn bias_gradient(
            width: usize, rows: usize, d_out: &D::Activation, d_bias: PartMut<'_, D::Buffer>,
            workspace: &mut D::Buffer,
        ) -> DeviceResult =
            (0, rows * width * a);
        fn layernorm_forward(
            norm: NormShape, x: &D::Activation, delta: Option<(&D::Activation, &mut D::Activation)>,
            affine: Part<'_, D::Activation>, normed: &mut D::Activation, statistics: &mut D::Buffer,
        ) -> DeviceResult =
            (0, norm.rows * norm.width * a * if delta.is_some() { 4 } else { 2 });
        fn layernorm_backward(
            norm: NormShape, x: &D::Activation, statistics: &D::Buffer, affine: Part<'_, D::Activation>,
            d_normed: &D::Activation, write: Write, d_x: &mut D::Activation, d_affine: PartMut<'_, D::Buffer>,
            workspace: &mut D::Buffer,
        ) -> DeviceResult =
            (0, norm.rows * norm.width * a * if write == Write::Add { 4 } else { 3 });
        fn rmsnorm_forward(
            norm: NormShape, x: &D::Activation, delta: Option<(&D::Activation, &mut D::Activation)>,
            weight: Part<'_, D::Activation>, normed: &mut D::Activation, scale: &mut D::Buffer,
        ) -> DeviceResult =
            (0, norm.rows * norm.width * a * if delta.is_some() { 4 } else { 2 });
        fn rmsnorm_backward(
            norm: NormShape, x: &D::Activation, scale: &D::Buffer, weight: Part<'_, D::Activation>,
            d_normed: &D::Activation, write: Write, d_x: &mut D::Activation, d_weight: PartMut<'_, D::Buffer>,
            workspace: &mut D::Buffer,
        ) -> DeviceResult =
            (0, norm.rows * norm.width * a * if write == Write::Add { 4 } else { 3 });
        fn rope(
            shape: AttentionShape, inverse: bool, table: &D::Buffer, qkv: &mut D::Activation,
        ) -> DeviceResult =
            (0, 2 * shape.batch * shape.sequence * (shape.heads + shape.kv_heads) * shape.head_dim * a);
        fn attention_forward(
            shape: AttentionShape, qkv: &D::Activation, out: &mut D::Activation, statistics: &mut D::Buffer,
            workspace: &mut D::Buffer,
        ) -> DeviceResult =
            (2 * triangle(shape), 0);
        fn attention_backward(
            shape: AttentionShape, qkv: &D::Activation, out: &D::Activation, statistics: &D::Buffer,
            d_out: &D::Activation, d_qkv: &mut D::Activation, workspace: &mut D::Buffer,
        ) -> DeviceResult =
            (5 * triangle(shape), 0);
        fn swiglu_forward(
            width: usize, rows: usize, gate_up: &D::Activation, act: &mut D::Activation,
        ) -> DeviceResult =
            (0, 3 * rows * width * a);
        fn swiglu_backward(
            width: usize, rows: usize, gate_up: &mut D::Activation, d_act: &mut D::Activation,
        ) -> DeviceResult =
            (0, 6 * rows * width * a);
        fn gelu_forward(
            elements: usize, pre: &D::Activation, act: &mut D::Activation,
        ) -> DeviceResult =
            (0, 2 * elements * a);
        fn gelu_backward(
            elements: usize, pre: &mut D::Activation, d_act: &mut D::Activation,
        ) -> DeviceResult =
            (0, 4 * elements * a);
        fn cross_entropy(
            shape: LossShape, targets: &D::Tokens, gradient: Option<f32>, logits: &mut D::Activation, write: Write,
            losses: &mut D::Losses, index: usize,
        ) -> DeviceResult =
            (0, shape.rows * shape.vocabulary * a * if gradient.is_some() { 2 } else { 1 });
        fn read_losses(losses: &D::Losses, to: &mut [f64]) -> DeviceResult = (0, 0);
        fn accumulate_exact(
            elements: usize, gradient: &D::Buffer, limit: i64, write: Write, sums: &mut D::Sums,
        ) -> DeviceResult<Option<GradientFault>> =
            (0, elements * if write == Write::Add { 20 } else { 12 });
        fn gradient_from_sums(
            elements: usize, scale: f64, sums: &D::Sums, at: usize, gradient: &mut D::Buffer,
        ) -> DeviceResult =
            (0, 12 * elements);
        fn block_square_sums(
            elements: usize, block: usize, gradient: &D::Buffer, out: &mut [f64],
        ) -> DeviceResult =
            (0, 4 * elements);
        fn set_exponents(exponents: &[i8], sums: &mut D::BlockSums) -> DeviceResult = (0, 0);
        fn accumulate_blocks(
            elements: usize, gradient: &D::Buffer, limit: i32, write: Write, sums: &mut D::BlockSums,
        ) -> DeviceResult =
            (0, elements * if write == Write::Add { 12 } else { 8 });
        fn read_magnitudes(sums: &D::BlockSums, to: &mut [u8]) -> DeviceResult = (0, 0);
        fn gradient_from_blocks(
            elements: usize, scale: f64, sums: &D::BlockSums, at: usize, gradient: &mut D::Buffer,
        ) -> DeviceResult =
            (0, 8 * elements);
        fn scale(
            elements: usize, alpha: f32, from: Part<'_, D::Buffer>, to: &mut D::Buffer,
        ) -> DeviceResult =
            (0, 8 * elements);
    }
}
