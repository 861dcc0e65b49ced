//! Memory of one micro-batch: what the forward saves for the backward, and scratch shared by all layers.
//!
//! Saved per layer are the inputs of every product and norm. The feed-forward block's inner activation is not: the
//! backward computes it again in the buffer of its own gradient. With `recompute` only the stream entering each layer
//! is saved, and one set of the rest serves all layers: the backward runs a layer's forward again before it reads it.

use proto::spec::{ModelSpec, Norm, Positions};

use super::Sizes;
use super::parameters::inner_inputs;
use crate::device::{AttentionShape, Device, DeviceResult, PartMut};
use crate::math;

/// What one layer saves beside its streams.
pub(super) struct LayerActs<D: Device> {
    /// What its norm's backward needs of each of its rows.
    pub(super) input_statistics: D::Buffer,
    /// Its norm.
    pub(super) input_normed: D::Activation,
    /// Queries and keys, rotated if positions are, and values, `[rows, (heads + 2·kv_heads)·head_dim]`.
    pub(super) qkv: D::Activation,
    /// Attention's output, `[rows, heads·head_dim]`.
    pub(super) attention: D::Activation,
    /// Softmax statistics of attention.
    pub(super) softmax: D::Buffer,
    /// What its norm's backward needs of each of its rows.
    pub(super) post_statistics: D::Buffer,
    /// Its norm.
    pub(super) post_normed: D::Activation,
    /// What the feed-forward block's activation reads, `[rows, inner]`, or of SwiGLU `[gate | up]`, twice as wide; the
    /// backward turns it into its gradient.
    pub(super) up: D::Activation,
}

/// The output head's table, and its gradient, with rows of zeros for the tokens that fill the rows of logits: products
/// of odd sizes run at a fraction of the speed.
pub(super) struct Padded<D: Device> {
    /// `[logits pitch, hidden]`.
    pub(super) table: D::Activation,
    /// The same.
    pub(super) d_table: D::Buffer,
}

/// Everything of one micro-batch.
pub(super) struct Activations<D: Device> {
    pub(super) tokens: D::Tokens,
    pub(super) targets: D::Tokens,
    /// The residual stream entering each layer, `[rows, hidden]`.
    pub(super) streams: Vec<D::Activation>,
    /// The stream after each layer's attention, or one for all.
    pub(super) middles: Vec<D::Activation>,
    /// The rest of what each layer saves, or one for all.
    pub(super) layers: Vec<LayerActs<D>>,
    /// The stream after the last layer, what its norm's backward needs of it, and its norm.
    pub(super) last: D::Activation,
    pub(super) last_statistics: D::Buffer,
    pub(super) last_normed: D::Activation,
    /// What a block adds to the stream; its gradient's norm-side scratch in the backward.
    pub(super) delta: D::Activation,
    /// The feed-forward block's activation, and its gradient.
    pub(super) act: D::Activation,
    /// The gradient of the stream.
    pub(super) d_stream: D::Activation,
    /// The gradient of attention's output.
    pub(super) d_attention: D::Activation,
    /// The gradient of queries, keys and values.
    pub(super) d_qkv: D::Activation,
    /// Logits of one chunk of rows, and their gradient.
    pub(super) logits: D::Activation,
    /// The output head, where the vocabulary is shorter than a row of logits.
    pub(super) padded: Option<Padded<D>>,
    /// Cosines and sines of every position, if positions are rotary.
    pub(super) rope: Option<D::Buffer>,
    /// For sums over rows: gradients of gains and biases.
    pub(super) sums_workspace: D::Buffer,
    pub(super) attention_workspace: D::Buffer,
}

impl<D: Device> Activations<D> {
    pub(super) fn new(spec: &ModelSpec, sizes: &Sizes, device: &D) -> DeviceResult<Self> {
        let rows = sizes.rows;
        let attention = sizes.attention;
        let buffer = |width: usize| device.allocate_activation(rows.saturating_mul(width), "activations");
        let floats = |width: usize| device.allocate(rows.saturating_mul(width), "activations");
        let (hidden, heads, qkv) = (sizes.hidden, attention.output_row(), attention.row());
        let up = inner_inputs(sizes.block.feed_forward, sizes.inner);
        let per_row = match sizes.block.norm {
            Norm::Rms => 1,
            Norm::Layer => 2,
        };
        let kept = if sizes.recompute { spec.num_hidden_layers.min(1) } else { spec.num_hidden_layers };
        let streams = |count| (0..count).map(|_| buffer(hidden)).collect::<DeviceResult<Vec<_>>>();
        let layers = (0..kept)
            .map(|_| {
                Ok(LayerActs {
                    input_statistics: floats(per_row)?,
                    input_normed: buffer(hidden)?,
                    qkv: buffer(qkv)?,
                    attention: buffer(heads)?,
                    softmax: floats(2 * attention.heads)?,
                    post_statistics: floats(per_row)?,
                    post_normed: buffer(hidden)?,
                    up: buffer(up)?,
                })
            })
            .collect::<DeviceResult<Vec<_>>>()?;
        let (pitch, width) = (sizes.logits_pitch, sizes.hidden);
        let padded = || -> DeviceResult<Padded<D>> {
            let table = device.allocate_activation(pitch * width, "the padded output head")?;
            Ok(Padded { table, d_table: device.allocate(pitch * width, "the padded output head's gradient")? })
        };
        let rope = match sizes.block.positions {
            Positions::Rotary { theta } => Some(upload_rope(device, &rope_table(theta, attention))?),
            Positions::Learned { .. } => None,
        };
        Ok(Self {
            tokens: device.allocate_tokens(rows)?,
            targets: device.allocate_tokens(rows)?,
            streams: streams(spec.num_hidden_layers)?,
            middles: streams(kept)?,
            layers,
            last: buffer(hidden)?,
            last_statistics: floats(per_row)?,
            last_normed: buffer(hidden)?,
            delta: buffer(hidden)?,
            act: buffer(sizes.inner)?,
            d_stream: buffer(hidden)?,
            d_attention: buffer(heads)?,
            d_qkv: buffer(qkv)?,
            logits: device.allocate_activation(sizes.loss_rows * sizes.logits_pitch, "logits")?,
            padded: (pitch > sizes.vocabulary).then(padded).transpose()?,
            rope,
            sums_workspace: device.allocate(sums_workspace(sizes, device), "workspace of sums over rows")?,
            attention_workspace: device.allocate(device.attention_workspace(attention), "attention workspace")?,
        })
    }
}

/// Elements for the sums over rows of the widest gradient of gains or biases.
fn sums_workspace<D: Device>(sizes: &Sizes, device: &D) -> usize {
    let norm = match sizes.block.norm {
        Norm::Rms => device.norm_workspace(sizes.norm),
        Norm::Layer => device.layernorm_workspace(sizes.norm),
    };
    if !sizes.block.biases {
        return norm;
    }
    let up = inner_inputs(sizes.block.feed_forward, sizes.inner);
    let widths = [sizes.attention.row(), sizes.hidden, up];
    widths.into_iter().map(|width| device.bias_workspace(width, sizes.rows)).fold(norm, usize::max)
}

fn upload_rope<D: Device>(device: &D, table: &[f32]) -> DeviceResult<D::Buffer> {
    let mut rope = device.allocate(table.len(), "rotary table")?;
    device.upload(table, PartMut(&mut rope, 0))?;
    Ok(rope)
}

/// For each position, the cosines then the sines of its `head_dim/2` angles `position·θ^(−2i/head_dim)`.
fn rope_table(theta: f64, shape: AttentionShape) -> Vec<f32> {
    let AttentionShape { sequence, head_dim, .. } = shape;
    let log_theta = math::ln(theta);
    let frequencies: Vec<f64> =
        (0..head_dim / 2).map(|i| math::exp(-log_theta * 2.0 * i as f64 / head_dim as f64)).collect();
    let mut table = Vec::with_capacity(sequence * head_dim);
    for position in 0..sequence {
        let angles: Vec<(f64, f64)> = frequencies.iter().map(|f| math::sin_cos(position as f64 * f)).collect();
        table.extend(angles.iter().map(|(_, cosine)| *cosine as f32));
        table.extend(angles.iter().map(|(sine, _)| *sine as f32));
    }
    table
}
