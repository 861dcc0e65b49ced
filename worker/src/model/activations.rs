//! Memory of one micro-batch: what the forward saves for the backward, and scratch shared by all layers.
//!
//! Saved per layer are the inputs of every product and norm. The inner activation of SwiGLU is not: the backward
//! computes it again in the buffer of its own gradient.

use proto::spec::ModelSpec;

use super::Sizes;
use crate::device::{Device, DeviceResult, PartMut};
use crate::math;

/// What one layer saves.
pub(super) struct LayerActs<D: Device> {
    /// The residual stream entering the layer, `[rows, hidden]`.
    pub(super) stream: D::Activation,
    /// `1/rms` of each of its rows.
    pub(super) input_scale: D::Buffer,
    /// Its norm.
    pub(super) input_normed: D::Activation,
    /// Rotated queries and keys, and values, `[rows, (heads + 2·kv_heads)·head_dim]`.
    pub(super) qkv: D::Activation,
    /// Attention's output, `[rows, heads·head_dim]`.
    pub(super) attention: D::Activation,
    /// Softmax statistics of attention.
    pub(super) statistics: D::Buffer,
    /// The stream after attention.
    pub(super) middle: D::Activation,
    /// `1/rms` of each of its rows.
    pub(super) post_scale: D::Buffer,
    /// Its norm.
    pub(super) post_normed: D::Activation,
    /// `[gate | up]`, `[rows, 2·inner]`; the backward turns it into its gradient.
    pub(super) gate_up: D::Activation,
}

/// Everything of one micro-batch.
pub(super) struct Activations<D: Device> {
    pub(super) tokens: D::Tokens,
    pub(super) targets: D::Tokens,
    pub(super) layers: Vec<LayerActs<D>>,
    /// The stream after the last layer, its scale and norm.
    pub(super) last: D::Activation,
    pub(super) last_scale: D::Buffer,
    pub(super) last_normed: D::Activation,
    /// What a block adds to the stream; its gradient's norm-side scratch in the backward.
    pub(super) delta: D::Activation,
    /// SwiGLU's output, and its gradient.
    pub(super) act: D::Activation,
    /// The gradient of the stream.
    pub(super) d_stream: D::Activation,
    /// The gradient of attention's output.
    pub(super) d_attention: D::Activation,
    /// The gradient of queries, keys and values.
    pub(super) d_qkv: D::Activation,
    /// Logits of one chunk of rows, and their gradient.
    pub(super) logits: D::Activation,
    /// Cosines and sines of every position.
    pub(super) rope: D::Buffer,
    pub(super) norm_workspace: D::Buffer,
    pub(super) attention_workspace: D::Buffer,
}

impl<D: Device> Activations<D> {
    pub(super) fn new(spec: &ModelSpec, sizes: &Sizes, device: &D) -> DeviceResult<Self> {
        let rows = sizes.rows;
        let attention = sizes.attention;
        let buffer = |width: usize| device.allocate_activation(rows.saturating_mul(width), "activations");
        let floats = |width: usize| device.allocate(rows.saturating_mul(width), "activations");
        let (hidden, heads, qkv) = (sizes.hidden, attention.output_row(), attention.row());
        let layers = (0..spec.num_hidden_layers)
            .map(|_| {
                Ok(LayerActs {
                    stream: buffer(hidden)?,
                    input_scale: floats(1)?,
                    input_normed: buffer(hidden)?,
                    qkv: buffer(qkv)?,
                    attention: buffer(heads)?,
                    statistics: floats(2 * attention.heads)?,
                    middle: buffer(hidden)?,
                    post_scale: floats(1)?,
                    post_normed: buffer(hidden)?,
                    gate_up: buffer(2 * sizes.inner)?,
                })
            })
            .collect::<DeviceResult<Vec<_>>>()?;
        let table = rope_table(spec, attention.sequence);
        let mut rope = device.allocate(table.len(), "rotary table")?;
        device.upload(&table, PartMut(&mut rope, 0))?;
        Ok(Self {
            tokens: device.allocate_tokens(rows)?,
            targets: device.allocate_tokens(rows)?,
            layers,
            last: buffer(hidden)?,
            last_scale: floats(1)?,
            last_normed: buffer(hidden)?,
            delta: buffer(hidden)?,
            act: buffer(sizes.inner)?,
            d_stream: buffer(hidden)?,
            d_attention: buffer(heads)?,
            d_qkv: buffer(qkv)?,
            logits: device.allocate_activation(sizes.loss_rows * sizes.logits_pitch, "logits")?,
            rope,
            norm_workspace: device.allocate(device.norm_workspace(sizes.norm), "norm workspace")?,
            attention_workspace: device.allocate(device.attention_workspace(attention), "attention workspace")?,
        })
    }
}

/// For each position, the cosines then the sines of its `head_dim/2` angles `position·θ^(−2i/head_dim)`.
fn rope_table(spec: &ModelSpec, sequence_length: usize) -> Vec<f32> {
    let half = spec.head_dim / 2;
    let log_theta = math::ln(spec.rope_theta);
    let frequencies: Vec<f64> =
        (0..half).map(|i| math::exp(-log_theta * 2.0 * i as f64 / spec.head_dim as f64)).collect();
    let mut table = Vec::with_capacity(sequence_length * spec.head_dim);
    for position in 0..sequence_length {
        let angles: Vec<(f64, f64)> = frequencies.iter().map(|f| math::sin_cos(position as f64 * f)).collect();
        table.extend(angles.iter().map(|(_, cosine)| *cosine as f32));
        table.extend(angles.iter().map(|(sine, _)| *sine as f32));
    }
    table
}
