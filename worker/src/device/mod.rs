//! The device: the numeric operations a training step is made of.
//!
//! The model is written once over [`Device`]; an implementation supplies memory and kernels. Operations are as coarse
//! as a kernel on any device would be, work on buffers allocated once, and return no partial results. All matrices are
//! row-major. A *token row* is one position of one sequence: a micro-batch of B sequences of T tokens has B·T rows.
//!
//! Every implementation must keep P1: the bits of a result depend on the operation's shapes and operands only, never
//! on thread count or timing. Different device kinds may give different bits; [`Device::numeric_identity`] says which
//! arithmetic this one is.

pub mod choose;
pub mod cpu;
pub mod cuda;
mod shape;
pub mod timed;
mod train;

pub use shape::{AdamwParts, AttentionShape, LossShape, MatmulShape, NormShape, Part, PartMut, Product, Write};
pub use train::{Arrival, ExactForm, Frozen, HostDevice, HostParameters, RankState, TrainDevice, Update};

use crate::exact::GradientFault;

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The device has no room for a buffer.
    #[error("the device cannot allocate {bytes} bytes for {what}; use a smaller micro_batch or sequence_length")]
    OutOfMemory {
        /// Size asked for.
        bytes: usize,
        /// What it was for.
        what: &'static str,
    },
    /// The device cannot do what was asked of it.
    #[error("{0}")]
    Unsupported(String),
    /// The worker threads could not be started.
    #[error("cannot start {threads} compute threads")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// The cause.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
    /// CUDA failed.
    #[error(transparent)]
    Cuda(cuda::error::CudaError),
}

impl DeviceError {
    /// Whether the device is gone for this process, which has to be replaced by another.
    pub fn is_lost(&self) -> bool {
        use cuda::error::CudaError::{Hung, Lost};
        matches!(self, Self::Cuda(Lost { .. } | Hung { .. }))
    }
}

/// The result of a device operation.
pub type DeviceResult<T = ()> = Result<T, DeviceError>;

/// One kind of device. See the module's text for what every implementation promises.
pub trait Device: Send + Sync + Sized {
    /// Bytes of an element of [`Device::Activation`].
    const ACTIVATION_BYTES: usize;

    /// Float32 memory: gradients of parameters, statistics, workspaces.
    type Buffer: Send + Sync;
    /// Memory in the precision that products read: float32 on the CPU, bfloat16 on a GPU. Holds the parameters as the
    /// model reads them, activations and their gradients.
    type Activation: Send + Sync;
    /// Signed 64-bit memory: exact gradient sums on the fixed grid.
    type Sums: Send + Sync;
    /// Signed 32-bit memory, with an exponent and the largest magnitude of each block: exact sums on per-block grids.
    type BlockSums: Send + Sync;
    /// Token ids.
    type Tokens: Send + Sync;
    /// Float64 memory: sums of losses.
    type Losses: Send + Sync;

    /// Names the arithmetic: instruction set, kernel and library versions. Equal strings, equal bits.
    fn numeric_identity(&self) -> String;

    /// Host threads that compute; at least 1.
    fn threads(&self) -> usize;

    /// Runs `work` with the device's threads or context at hand, so that the operations inside start faster.
    fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R;

    /// What is kept of work that is the same every time.
    type Repeated: Default + Send + Sync;
    /// Does `work`, which asks for the same operations on the same memory each time it is called with these
    /// `parameters` and `gradient`: a device may take it down once and play it later, without asking again. It may ask
    /// for kernels and products only, and nothing that reaches the host.
    fn repeat(
        &self,
        repeated: &mut Self::Repeated,
        parameters: &Self::Activation,
        gradient: Option<&mut Self::Buffer>,
        work: impl FnOnce(Option<&mut Self::Buffer>) -> DeviceResult + Send,
    ) -> DeviceResult;

    /// Token rows whose logits exist at once, of `rows`.
    fn loss_rows(&self, vocabulary: usize, rows: usize) -> usize;
    /// Elements from one row of logits to the next; at least `vocabulary`.
    fn logits_pitch(&self, vocabulary: usize) -> usize;

    /// Zeroed float32 memory; `what` names it in errors.
    fn allocate(&self, elements: usize, what: &'static str) -> DeviceResult<Self::Buffer>;
    /// Zeroed memory in compute precision.
    fn allocate_activation(&self, elements: usize, what: &'static str) -> DeviceResult<Self::Activation>;
    /// Zeroed memory for sums of losses.
    fn allocate_losses(&self, elements: usize) -> DeviceResult<Self::Losses>;
    /// Zeroed 64-bit memory.
    fn allocate_sums(&self, elements: usize) -> DeviceResult<Self::Sums>;
    /// Zeroed 32-bit memory, in blocks of `block` elements (the last may be short).
    fn allocate_block_sums(&self, elements: usize, block: usize) -> DeviceResult<Self::BlockSums>;
    /// Memory for token ids.
    fn allocate_tokens(&self, elements: usize) -> DeviceResult<Self::Tokens>;

    /// Copies host values to the device.
    fn upload(&self, from: &[f32], to: PartMut<'_, Self::Buffer>) -> DeviceResult;
    /// Copies device values to the host, after all operations before it.
    fn download(&self, from: Part<'_, Self::Buffer>, to: &mut [f32]) -> DeviceResult;
    /// Copies host values to the device, rounded to nearest even where compute precision is lower.
    fn upload_activation(&self, from: &[f32], to: PartMut<'_, Self::Activation>) -> DeviceResult;
    /// Copies device values to the host, after all operations before it.
    fn download_activation(&self, from: Part<'_, Self::Activation>, to: &mut [f32]) -> DeviceResult;
    /// Copies token ids to the device; ids must be below the vocabulary size. Ids that are `ordered` can be given to
    /// [`Device::embedding_backward`].
    fn upload_tokens(&self, from: &[u32], ordered: bool, to: &mut Self::Tokens) -> DeviceResult;
    /// Copies `elements` elements from one place to another.
    fn copy(&self, elements: usize, from: Part<'_, Self::Buffer>, to: PartMut<'_, Self::Buffer>) -> DeviceResult;
    /// The same in compute precision.
    fn copy_activation(
        &self,
        elements: usize,
        from: Part<'_, Self::Activation>,
        to: PartMut<'_, Self::Activation>,
    ) -> DeviceResult;
    /// Sets `elements` elements to zero.
    fn zero(&self, elements: usize, to: PartMut<'_, Self::Buffer>) -> DeviceResult;
    /// `y += alpha·x`.
    fn axpy(
        &self,
        elements: usize,
        alpha: f32,
        x: Part<'_, Self::Buffer>,
        y: PartMut<'_, Self::Buffer>,
    ) -> DeviceResult;

    /// A matrix product of activations.
    fn matmul(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, Self::Activation>,
        b: Part<'_, Self::Activation>,
        write: Write,
        c: PartMut<'_, Self::Activation>,
    ) -> DeviceResult;
    /// A dense product with `bias`, a number for each column, added to every row, at best before sums are rounded.
    fn matmul_bias(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, Self::Activation>,
        b: Part<'_, Self::Activation>,
        bias: Part<'_, Self::Activation>,
        c: &mut Self::Activation,
    ) -> DeviceResult {
        self.matmul(product, shape, a, b, Write::Replace, PartMut(c, 0))?;
        self.add_bias(shape.n, shape.m, bias, c)
    }
    /// As [`Device::matmul_bias`] into `pre`, and [`Device::gelu_forward`] of that into `act`, at best of the sums
    /// before they are rounded.
    #[allow(clippy::too_many_arguments)] // the operands of one product
    fn matmul_gelu(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, Self::Activation>,
        b: Part<'_, Self::Activation>,
        bias: Part<'_, Self::Activation>,
        pre: &mut Self::Activation,
        act: &mut Self::Activation,
    ) -> DeviceResult {
        self.matmul_bias(product, shape, a, b, bias, pre)?;
        self.gelu_forward(shape.m * shape.n, pre, act)
    }
    /// A matrix product whose result is a gradient of parameters, in float32.
    fn matmul_gradient(
        &self,
        product: Product,
        shape: MatmulShape,
        a: Part<'_, Self::Activation>,
        b: Part<'_, Self::Activation>,
        write: Write,
        c: PartMut<'_, Self::Buffer>,
    ) -> DeviceResult;

    /// `out[i] = table[tokens[i]]`, rows of `width`. With learned `positions`, given with the tokens of a sequence, row
    /// `i` also gets the vector of position `i mod sequence`.
    fn embedding_forward(
        &self,
        width: usize,
        rows: usize,
        tokens: &Self::Tokens,
        table: Part<'_, Self::Activation>,
        positions: Option<(Part<'_, Self::Activation>, usize)>,
        out: &mut Self::Activation,
    ) -> DeviceResult;
    /// `d_table[tokens[i]] += d_out[i]`, in row order.
    fn embedding_backward(
        &self,
        width: usize,
        rows: usize,
        tokens: &Self::Tokens,
        d_out: &Self::Activation,
        d_table: PartMut<'_, Self::Buffer>,
    ) -> DeviceResult;

    /// The gradient of learned positions: `d_positions[t] = Σ d_out[b·sequence + t]` over the sequences in order, for
    /// the first `sequence` positions.
    fn position_backward(
        &self,
        width: usize,
        batch: usize,
        sequence: usize,
        d_out: &Self::Activation,
        d_positions: PartMut<'_, Self::Buffer>,
    ) -> DeviceResult;

    /// `out[i] += bias` for each of `rows` rows of `width`.
    fn add_bias(
        &self,
        width: usize,
        rows: usize,
        bias: Part<'_, Self::Activation>,
        out: &mut Self::Activation,
    ) -> DeviceResult;
    /// The bias's gradient, `Σ d_out[i]` over the rows in an order of the shape's own, replaces `d_bias`. `workspace`
    /// holds [`Device::bias_workspace`] elements.
    fn bias_gradient(
        &self,
        width: usize,
        rows: usize,
        d_out: &Self::Activation,
        d_bias: PartMut<'_, Self::Buffer>,
        workspace: &mut Self::Buffer,
    ) -> DeviceResult;
    /// Elements of workspace a bias's gradient needs.
    fn bias_workspace(&self, width: usize, rows: usize) -> usize;

    /// Residual addition and RMSNorm (Zhang and Sennrich, 2019) in one pass:
    /// `sum = x + delta` (or `x` itself where `delta` is absent: then `sum` is not written), `scale =
    /// 1/√(mean(sum²)+ε)` per row, `normed = sum·scale·weight`.
    #[allow(clippy::too_many_arguments)] // the operands of one kernel
    fn rmsnorm_forward(
        &self,
        norm: NormShape,
        x: &Self::Activation,
        delta: Option<(&Self::Activation, &mut Self::Activation)>,
        weight: Part<'_, Self::Activation>,
        normed: &mut Self::Activation,
        scale: &mut Self::Buffer,
    ) -> DeviceResult;
    /// The backward of [`Device::rmsnorm_forward`]: `d_x` gets (or is increased by) the gradient of `x`; the gain's
    /// gradient replaces `d_weight`. `workspace` holds [`Device::norm_workspace`] elements.
    #[allow(clippy::too_many_arguments)] // the operands of one kernel
    fn rmsnorm_backward(
        &self,
        norm: NormShape,
        x: &Self::Activation,
        scale: &Self::Buffer,
        weight: Part<'_, Self::Activation>,
        d_normed: &Self::Activation,
        write: Write,
        d_x: &mut Self::Activation,
        d_weight: PartMut<'_, Self::Buffer>,
        workspace: &mut Self::Buffer,
    ) -> DeviceResult;
    /// Elements of workspace a norm's backward needs.
    fn norm_workspace(&self, norm: NormShape) -> usize;

    /// Residual addition and LayerNorm (Ba, Kiros and Hinton, 2016) in one pass, as [`Device::rmsnorm_forward`]:
    /// `normed = (sum − mean)/σ·gain + bias` with `σ² = mean((sum − mean)²)+ε`. `affine` is the gain and, behind it,
    /// the bias; `statistics` gets mean and `1/σ` of each row, `[rows, 2]`.
    #[allow(clippy::too_many_arguments)] // the operands of one kernel
    fn layernorm_forward(
        &self,
        norm: NormShape,
        x: &Self::Activation,
        delta: Option<(&Self::Activation, &mut Self::Activation)>,
        affine: Part<'_, Self::Activation>,
        normed: &mut Self::Activation,
        statistics: &mut Self::Buffer,
    ) -> DeviceResult;
    /// The backward of [`Device::layernorm_forward`]: `d_x` gets (or is increased by) the gradient of `x`; those of
    /// gain and bias, one behind the other, replace `d_affine`. `workspace` holds [`Device::layernorm_workspace`]
    /// elements.
    #[allow(clippy::too_many_arguments)] // the operands of one kernel
    fn layernorm_backward(
        &self,
        norm: NormShape,
        x: &Self::Activation,
        statistics: &Self::Buffer,
        affine: Part<'_, Self::Activation>,
        d_normed: &Self::Activation,
        write: Write,
        d_x: &mut Self::Activation,
        d_affine: PartMut<'_, Self::Buffer>,
        workspace: &mut Self::Buffer,
    ) -> DeviceResult;
    /// Elements of workspace a LayerNorm's backward needs.
    fn layernorm_workspace(&self, norm: NormShape) -> usize;

    /// Rotates queries and keys in place (Su et al., 2021), in the half-split layout of Hugging Face: element `i` of a
    /// head pairs with `i + head_dim/2`. `table` holds, for each position, `head_dim/2` cosines then as many sines.
    /// `inverse` rotates back, which is the backward.
    fn rope(
        &self,
        shape: AttentionShape,
        inverse: bool,
        table: &Self::Buffer,
        qkv: &mut Self::Activation,
    ) -> DeviceResult;

    /// Causal softmax attention, scaled by `1/√head_dim`; also stores what the backward needs to compute each row's
    /// probabilities again: two numbers a row, `[batch, heads, sequence, 2]`, in a form of the device's own.
    fn attention_forward(
        &self,
        shape: AttentionShape,
        qkv: &Self::Activation,
        out: &mut Self::Activation,
        statistics: &mut Self::Buffer,
        workspace: &mut Self::Buffer,
    ) -> DeviceResult;
    /// The backward of [`Device::attention_forward`]; probabilities are computed again from `statistics`.
    #[allow(clippy::too_many_arguments)] // the operands of one kernel
    fn attention_backward(
        &self,
        shape: AttentionShape,
        qkv: &Self::Activation,
        out: &Self::Activation,
        statistics: &Self::Buffer,
        d_out: &Self::Activation,
        d_qkv: &mut Self::Activation,
        workspace: &mut Self::Buffer,
    ) -> DeviceResult;
    /// Elements of workspace attention needs, forward and backward.
    fn attention_workspace(&self, shape: AttentionShape) -> usize;

    /// `act = silu(gate)·up` with rows `[gate | up]` of twice `width` (Shazeer, 2020).
    fn swiglu_forward(
        &self,
        width: usize,
        rows: usize,
        gate_up: &Self::Activation,
        act: &mut Self::Activation,
    ) -> DeviceResult;
    /// The backward, in place: `gate_up` becomes its own gradient, and `d_act` becomes `act` again (which the gradient
    /// of the next matrix needs, and which is cheaper to compute than to keep).
    fn swiglu_backward(
        &self,
        width: usize,
        rows: usize,
        gate_up: &mut Self::Activation,
        d_act: &mut Self::Activation,
    ) -> DeviceResult;

    /// `act = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))` of `elements` elements (Hendrycks and Gimpel, 2016).
    fn gelu_forward(&self, elements: usize, pre: &Self::Activation, act: &mut Self::Activation) -> DeviceResult;
    /// The backward, in place as [`Device::swiglu_backward`]: `pre` becomes its own gradient, `d_act` becomes `act`.
    fn gelu_backward(&self, elements: usize, pre: &mut Self::Activation, d_act: &mut Self::Activation) -> DeviceResult;

    /// Softmax cross-entropy of `shape.rows` rows of logits against `targets[shape.first..]`. The losses' sum, added in
    /// float64 in an order of the shape's own, is written or added to `losses[index]`. With `gradient = Some(scale)`,
    /// logits become `scale·(softmax − one-hot)`.
    #[allow(clippy::too_many_arguments)] // the operands of one kernel
    fn cross_entropy(
        &self,
        shape: LossShape,
        targets: &Self::Tokens,
        gradient: Option<f32>,
        logits: &mut Self::Activation,
        write: Write,
        losses: &mut Self::Losses,
        index: usize,
    ) -> DeviceResult;
    /// Copies the first losses to the host, after all operations before it.
    fn read_losses(&self, losses: &Self::Losses, to: &mut [f64]) -> DeviceResult;

    /// Rounds `elements` gradients onto the exact grid and writes or adds them to `sums`. Every rounded value must be
    /// finite and at most `limit` in magnitude; otherwise the first that is not is returned and `sums` is not to be
    /// used. See [`crate::exact`].
    fn accumulate_exact(
        &self,
        elements: usize,
        gradient: &Self::Buffer,
        limit: i64,
        write: Write,
        sums: &mut Self::Sums,
    ) -> DeviceResult<Option<GradientFault>>;
    /// `gradient[i] = sums[at + i]·scale`, from float64.
    fn gradient_from_sums(
        &self,
        elements: usize,
        scale: f64,
        sums: &Self::Sums,
        at: usize,
        gradient: &mut Self::Buffer,
    ) -> DeviceResult;
    /// Sets the grids of the blocks, one exponent each, and forgets the magnitudes seen; see [`crate::exact32`].
    fn set_exponents(&self, exponents: &[i8], sums: &mut Self::BlockSums) -> DeviceResult;
    /// Rounds `elements` gradients onto their blocks' grids, within ±`limit`, and writes or adds them to `sums`. Notes
    /// each block's largest magnitude; values that are not finite count as zero and are noted as such.
    fn accumulate_blocks(
        &self,
        elements: usize,
        gradient: &Self::Buffer,
        limit: i32,
        write: Write,
        sums: &mut Self::BlockSums,
    ) -> DeviceResult;
    /// Copies the biased float32 exponent of each block's largest magnitude since [`Device::set_exponents`] to the
    /// host: 255 for one that is not finite.
    fn read_magnitudes(&self, sums: &Self::BlockSums, to: &mut [u8]) -> DeviceResult;
    /// `gradient[i] = sums[at + i]·2^exponent·scale`, from float64, each with its block's exponent.
    fn gradient_from_blocks(
        &self,
        elements: usize,
        scale: f64,
        sums: &Self::BlockSums,
        at: usize,
        gradient: &mut Self::Buffer,
    ) -> DeviceResult;
    /// `to[i] = alpha·from[at + i]`.
    fn scale(&self, elements: usize, alpha: f32, from: Part<'_, Self::Buffer>, to: &mut Self::Buffer) -> DeviceResult;
    /// The sum of squares of each block of `block` elements (the last may be short), in float64, in a fixed order.
    fn block_square_sums(
        &self,
        elements: usize,
        block: usize,
        gradient: &Self::Buffer,
        out: &mut [f64],
    ) -> DeviceResult;
}
