//! The model: forward and backward written by hand over a [`Device`], for Llama and GPT-2 alike. What a layer is made
//! of is data ([`Block`]); `parts` has the device operation of each kind.
//!
//! One [`Model`] serves micro-batches of one shape. Everything it needs is allocated by [`Model::new`] (see
//! `activations`), and [`Model::loss_and_gradient`] runs `forward`, then `backward`, which reads the saved activations
//! in reverse. Both read the parameters as views at offsets of one flat buffer in canonical order (see `parameters`).

mod activations;
mod backward;
mod forward;
mod parameters;
mod parts;
#[cfg(test)]
pub(crate) mod recorded;

use proto::spec::{Block, ModelSpec};

pub use parameters::{ParamDecl, parameter_count, parameters};

use self::activations::Activations;
use self::forward::LossAt;
use self::parameters::Offsets;
use crate::device::{AttentionShape, Device, DeviceError, DeviceResult, NormShape, Part};

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
    /// More tokens in a sequence than the model has positions.
    #[error("sequences of {sequence} tokens need as many positions, but the model has {positions}")]
    Positions {
        /// Tokens of a sequence.
        sequence: usize,
        /// Learned positions.
        positions: usize,
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
    /// Elements from one row of logits to the next.
    logits_pitch: usize,
    attention: AttentionShape,
    norm: NormShape,
    block: Block,
    /// One layer's activations serve all; see `activations`.
    recompute: bool,
}

impl Sizes {
    fn new<D: Device>(spec: &ModelSpec, micro_batch: usize, sequence_length: usize, device: &D) -> Self {
        let (rows, block) = (micro_batch * sequence_length, spec.block());
        Self {
            rows,
            hidden: spec.hidden_size,
            inner: spec.intermediate_size,
            vocabulary: spec.vocab_size,
            loss_rows: device.loss_rows(spec.vocab_size, rows).clamp(1, rows),
            logits_pitch: device.logits_pitch(spec.vocab_size),
            attention: AttentionShape {
                batch: micro_batch,
                sequence: sequence_length,
                heads: spec.num_attention_heads,
                kv_heads: spec.num_key_value_heads,
                head_dim: spec.head_dim,
            },
            norm: NormShape { rows, width: spec.hidden_size, epsilon: block.epsilon as f32 },
            block,
            recompute: false,
        }
    }
}

/// A model for micro-batches of one shape on one device.
pub struct Model<D: Device> {
    sizes: Sizes,
    offsets: Offsets,
    acts: Activations<D>,
    /// The layers' forward and backward, the same for every micro-batch.
    repeated: [D::Repeated; 2],
    /// The loss of a micro-batch that is computed alone, between two uses.
    loss: Option<D::Losses>,
}

/// Token rows to compute on, each list `[micro_batch, sequence_length]`.
#[derive(Debug, Clone, Copy)]
pub struct MicroBatch<'a> {
    /// What is read.
    pub tokens: &'a [u32],
    /// What is to be predicted: for each token, the one after it.
    pub targets: &'a [u32],
}

impl<D: Device> Model<D> {
    /// Allocates all memory for micro-batches of `micro_batch` sequences of `sequence_length` tokens.
    ///
    /// The specification is taken to be valid, as `JobSpec::load` checks it.
    pub fn new(spec: &ModelSpec, micro_batch: usize, sequence_length: usize, device: &D) -> Result<Self, ModelError> {
        Self::with(spec, Sizes::new(spec, micro_batch, sequence_length, device), device)
    }

    /// As [`Model::new`], for a third more computing in a fraction of the memory: of all but one layer only the input
    /// is kept, and the backward computes the rest again (Chen et al., 2016).
    pub fn recomputing(
        spec: &ModelSpec,
        micro_batch: usize,
        sequence_length: usize,
        device: &D,
    ) -> Result<Self, ModelError> {
        let sizes = Sizes::new(spec, micro_batch, sequence_length, device);
        Self::with(spec, Sizes { recompute: true, ..sizes }, device)
    }

    fn with(spec: &ModelSpec, sizes: Sizes, device: &D) -> Result<Self, ModelError> {
        let sequence_length = sizes.attention.sequence;
        let offsets = Offsets::new(spec);
        if let Some((_, positions)) = offsets.positions.filter(|(_, most)| *most < sequence_length) {
            return Err(ModelError::Positions { sequence: sequence_length, positions });
        }
        let acts = Activations::new(spec, &sizes, device)?;
        Ok(Self { sizes, offsets, acts, repeated: Default::default(), loss: None })
    }

    /// Elements of the canonical space: the length of `parameters` and `gradient`.
    pub fn parameter_count(&self) -> usize {
        self.offsets.total
    }

    /// Computes the micro-batch that was loaded: the sum of its tokens' losses goes to `losses[index]`, and the
    /// gradient of their mean replaces `gradient`. Returns when the work is handed to the device, which may still be at
    /// it.
    /// The bits depend on the arguments and the shape alone, not on threads.
    pub fn compute(
        &mut self,
        device: &D,
        parameters: &D::Activation,
        gradient: &mut D::Buffer,
        losses: &mut D::Losses,
        index: usize,
    ) -> Result<(), ModelError> {
        device.enter(|| {
            self.repeat_forward(device, parameters)?;
            self.head_with_gradient(device, parameters, gradient, LossAt(losses, index))?;
            let mut repeated = std::mem::take(&mut self.repeated[1]);
            let work = |gradient: Option<&mut D::Buffer>| match gradient {
                Some(gradient) => self.backward(device, parameters, gradient),
                None => Ok(()),
            };
            let done = device.repeat(&mut repeated, parameters, Some(&mut *gradient), work);
            self.repeated[1] = repeated;
            done?;
            self.embedding_backward(device, gradient)
        })?;
        Ok(())
    }

    fn repeat_forward(&mut self, device: &D, parameters: &D::Activation) -> DeviceResult {
        let mut repeated = std::mem::take(&mut self.repeated[0]);
        let done = device.repeat(&mut repeated, parameters, None, |_| self.forward(device, parameters));
        self.repeated[0] = repeated;
        done
    }

    /// Turns the sum of a micro-batch's losses into their mean. A loss that is not finite is NaN.
    pub fn mean(&self, sum: f64) -> f64 {
        sum / self.sizes.rows as f64
    }

    /// The mean loss over the micro-batch's tokens and its gradient, which replaces `gradient`; see
    /// [`Model::compute`].
    pub fn loss_and_gradient(
        &mut self,
        device: &D,
        parameters: &D::Activation,
        tokens: &[u32],
        targets: &[u32],
        gradient: &mut D::Buffer,
    ) -> Result<f64, ModelError> {
        self.load(device, MicroBatch { tokens, targets })?;
        self.alone(device, |model, losses| model.compute(device, parameters, gradient, losses, 0))
    }

    /// The mean loss over the micro-batch's tokens, without a gradient.
    pub fn loss(
        &mut self,
        device: &D,
        parameters: &D::Activation,
        tokens: &[u32],
        targets: &[u32],
    ) -> Result<f64, ModelError> {
        self.load(device, MicroBatch { tokens, targets })?;
        self.alone(device, |model, losses| {
            Ok(device.enter(|| {
                model.repeat_forward(device, parameters)?;
                model.head(device, parameters, LossAt(losses, 0))
            })?)
        })
    }

    /// The mean loss of one micro-batch, waited for.
    fn alone(
        &mut self,
        device: &D,
        compute: impl FnOnce(&mut Self, &mut D::Losses) -> Result<(), ModelError>,
    ) -> Result<f64, ModelError> {
        let mut losses = match self.loss.take() {
            Some(losses) => losses,
            None => device.allocate_losses(1)?,
        };
        compute(self, &mut losses)?;
        let mut sum = [0.0];
        device.read_losses(&losses, &mut sum)?;
        self.loss = Some(losses);
        Ok(self.mean(sum[0]))
    }

    /// Checks a micro-batch and copies it to the device, behind all work that is with the device already.
    ///
    /// `tokens` and `targets` are row-major `[micro_batch, sequence_length]`; the target of a token is the one after
    /// it.
    pub fn load(&mut self, device: &D, batch: MicroBatch<'_>) -> Result<(), ModelError> {
        let MicroBatch { tokens, targets } = batch;
        let Sizes { rows, vocabulary, .. } = self.sizes;
        for (what, list) in [("tokens", tokens), ("targets", targets)] {
            if list.len() != rows {
                return Err(ModelError::Length { what, expected: rows, given: list.len() });
            }
            if let Some(position) = list.iter().position(|t| *t as usize >= vocabulary) {
                return Err(ModelError::Token { what, position, token: list[position], vocabulary });
            }
        }
        device.upload_tokens(tokens, true, &mut self.acts.tokens)?;
        device.upload_tokens(targets, false, &mut self.acts.targets)?;
        Ok(())
    }
}

/// The start of a buffer.
fn whole<B>(buffer: &B) -> Part<'_, B> {
    Part(buffer, 0)
}
