//! The Llama model: forward and backward written by hand over a [`Device`].
//!
//! One [`Model`] serves micro-batches of one shape. Everything it needs is allocated by [`Model::new`] (see
//! `activations`), and [`Model::loss_and_gradient`] runs `forward`, then `backward`, which reads the saved activations
//! in reverse. Both read the parameters as views at offsets of one flat buffer in canonical order (see `parameters`).

mod activations;
mod backward;
mod forward;
mod parameters;

use proto::spec::ModelSpec;

pub use parameters::{ParamDecl, parameter_count, parameters};

use self::activations::Activations;
use self::parameters::Offsets;
use crate::device::{AttentionShape, Device, DeviceError, MatmulShape, NormShape, Part};

/// Why a micro-batch could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Too few or too many tokens.
    #[error("a micro-batch has {expected} {what}, but {given} were given")]
    Length {
        /// `tokens` or `targets`.
        what: &'static str,
        /// Micro-batch times sequence length.
        expected: usize,
        /// Number given.
        given: usize,
    },
    /// A token the model has no row for.
    #[error("{what}[{position}] is token {token}, but the vocabulary has {vocabulary} (ids 0 to {})", vocabulary - 1)]
    Token {
        /// `tokens` or `targets`.
        what: &'static str,
        /// Position in the micro-batch.
        position: usize,
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
}

/// The sizes of one micro-batch's computation.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Token rows: sequences times their length.
    rows: usize,
    hidden: usize,
    inner: usize,
    vocabulary: usize,
    /// Token rows whose logits exist at once.
    loss_rows: usize,
    attention: AttentionShape,
    norm: NormShape,
}

impl Sizes {
    fn new(spec: &ModelSpec, micro_batch: usize, sequence_length: usize) -> Self {
        let rows = micro_batch * sequence_length;
        Self {
            rows,
            hidden: spec.hidden_size,
            inner: spec.intermediate_size,
            vocabulary: spec.vocab_size,
            // 4 Mi logits are 16 MiB; fewer than 128 rows would make thin products.
            loss_rows: ((4 << 20) / spec.vocab_size).max(128).min(rows),
            attention: AttentionShape {
                batch: micro_batch,
                sequence: sequence_length,
                heads: spec.num_attention_heads,
                kv_heads: spec.num_key_value_heads,
                head_dim: spec.head_dim,
            },
            norm: NormShape { rows, width: spec.hidden_size, epsilon: spec.rms_norm_eps as f32 },
        }
    }

    /// The shape of `rows × n` from sums of length `k`.
    fn by_rows(&self, n: usize, k: usize) -> MatmulShape {
        MatmulShape { m: self.rows, n, k }
    }

    /// The shape of a weight gradient `m × n`.
    fn over_rows(&self, m: usize, n: usize) -> MatmulShape {
        MatmulShape { m, n, k: self.rows }
    }
}

/// A model for micro-batches of one shape on one device.
pub struct Model<D: Device> {
    sizes: Sizes,
    offsets: Offsets,
    acts: Activations<D>,
}

impl<D: Device> Model<D> {
    /// Allocates all memory for micro-batches of `micro_batch` sequences of `sequence_length` tokens.
    ///
    /// The specification is taken to be valid, as `JobSpec::load` checks it.
    pub fn new(spec: &ModelSpec, micro_batch: usize, sequence_length: usize, device: &D) -> Result<Self, ModelError> {
        let sizes = Sizes::new(spec, micro_batch, sequence_length);
        let acts = Activations::new(spec, &sizes, device)?;
        Ok(Self { sizes, offsets: Offsets::new(spec), acts })
    }

    /// Elements of the canonical space: the length of `parameters` and `gradient`.
    pub fn parameter_count(&self) -> usize {
        self.offsets.total
    }

    /// The mean loss over the micro-batch's tokens and its gradient, which replaces `gradient`.
    ///
    /// `tokens` and `targets` are row-major `[micro_batch, sequence_length]`; the target of a token is the one after
    /// it. The bits depend on the arguments and the shape alone, not on threads. A non-finite loss is returned as NaN.
    pub fn loss_and_gradient(
        &mut self,
        device: &D,
        parameters: &D::Buffer,
        tokens: &[u32],
        targets: &[u32],
        gradient: &mut D::Buffer,
    ) -> Result<f64, ModelError> {
        self.load(device, tokens, targets)?;
        let loss = device.enter(|| {
            self.forward(device, parameters)?;
            let sum = self.head_with_gradient(device, parameters, gradient)?;
            self.backward(device, parameters, gradient)?;
            Ok::<f64, DeviceError>(sum)
        })?;
        Ok(loss / self.sizes.rows as f64)
    }

    /// The mean loss over the micro-batch's tokens, without a gradient.
    pub fn loss(
        &mut self,
        device: &D,
        parameters: &D::Buffer,
        tokens: &[u32],
        targets: &[u32],
    ) -> Result<f64, ModelError> {
        self.load(device, tokens, targets)?;
        let loss = device.enter(|| {
            self.forward(device, parameters)?;
            self.head(device, parameters)
        })?;
        Ok(loss / self.sizes.rows as f64)
    }

    /// Checks a micro-batch and copies it to the device.
    fn load(&mut self, device: &D, tokens: &[u32], targets: &[u32]) -> Result<(), ModelError> {
        let Sizes { rows, vocabulary, .. } = self.sizes;
        for (what, list) in [("tokens", tokens), ("targets", targets)] {
            if list.len() != rows {
                return Err(ModelError::Length { what, expected: rows, given: list.len() });
            }
            if let Some(position) = list.iter().position(|t| *t as usize >= vocabulary) {
                return Err(ModelError::Token { what, position, token: list[position], vocabulary });
            }
        }
        device.upload_tokens(tokens, &mut self.acts.tokens)?;
        device.upload_tokens(targets, &mut self.acts.targets)?;
        Ok(())
    }
}

/// The start of a buffer.
fn whole<B>(buffer: &B) -> Part<'_, B> {
    Part(buffer, 0)
}
