//! Forward: tokens to losses.
//!
//! A block's output is not added to the residual stream by itself: the next norm reads stream and output once and
//! writes the new stream and its norm. The output head runs over chunks of token rows, loss and gradient together, so
//! the logits of the whole micro-batch never exist.

use super::parts::{Normed, Parts};
use super::{Model, Sizes, whole};
use crate::device::{Device, DeviceResult, LossShape, MatmulShape, Part, PartMut, Product, Write};

/// Where the sum of a micro-batch's losses goes.
pub(super) struct LossAt<'a, D: Device>(pub(super) &'a mut D::Losses, pub(super) usize);

impl<D: Device> Model<D> {
    /// Runs all layers and the last norm, saving what the backward needs.
    pub(super) fn forward(&mut self, device: &D, parameters: &D::Activation) -> DeviceResult {
        let Sizes { rows, hidden, attention, .. } = self.sizes;
        let parts = Parts { device, parameters, sizes: self.sizes };
        let positions = self.offsets.positions.map(|(at, _)| (parts.at(at), attention.sequence));
        let table = parts.at(self.offsets.embedding);
        let first = self.acts.layers.first_mut().map_or(&mut self.acts.last, |layer| &mut layer.stream);
        device.embedding_forward(hidden, rows, &self.acts.tokens, table, positions, first)?;
        for index in 0..self.acts.layers.len() {
            self.layer_forward(&parts, index)?;
        }
        let acts = &mut self.acts;
        let to = Normed { normed: &mut acts.last_normed, statistics: &mut acts.last_statistics };
        match acts.layers.last() {
            Some(layer) => {
                let delta = Some((&acts.delta, &mut acts.last));
                parts.norm(self.offsets.final_norm, &layer.middle, delta, to)
            }
            None => parts.norm(self.offsets.final_norm, &acts.last, None, to),
        }
    }

    /// One layer; leaves its last output in `delta`, not yet added to the stream.
    fn layer_forward(&mut self, parts: &Parts<'_, D>, index: usize) -> DeviceResult {
        let attention = self.sizes.attention;
        let at = self.offsets.layers[index];
        let acts = &mut self.acts;
        let (before, rest) = acts.layers.split_at_mut(index);
        let layer = &mut rest[0];

        let to = Normed { normed: &mut layer.input_normed, statistics: &mut layer.input_statistics };
        if let Some(previous) = before.last() {
            let delta = Some((&acts.delta, &mut layer.stream));
            parts.norm(at.input_norm, &previous.middle, delta, to)?;
        } else {
            parts.norm(at.input_norm, &layer.stream, None, to)?;
        }
        parts.linear(at.qkv, &layer.input_normed, &mut layer.qkv)?;
        if let Some(table) = &acts.rope {
            parts.device.rope(attention, false, table, &mut layer.qkv)?;
        }
        let (out, softmax) = (&mut layer.attention, &mut layer.softmax);
        parts.device.attention_forward(attention, &layer.qkv, out, softmax, &mut acts.attention_workspace)?;
        parts.linear(at.output, &layer.attention, &mut acts.delta)?;

        let to = Normed { normed: &mut layer.post_normed, statistics: &mut layer.post_statistics };
        parts.norm(at.post_norm, &layer.stream, Some((&acts.delta, &mut layer.middle)), to)?;
        parts.linear(at.up, &layer.post_normed, &mut layer.up)?;
        parts.activate(&layer.up, &mut acts.act)?;
        parts.linear(at.down, &acts.act, &mut acts.delta)
    }

    /// The losses' sum, chunk by chunk, into `to`.
    pub(super) fn head(&mut self, device: &D, parameters: &D::Activation, to: LossAt<'_, D>) -> DeviceResult {
        self.chunks(|model, shape, write| {
            model.logits(device, parameters, shape)?;
            let acts = &mut model.acts;
            device.cross_entropy(shape, &acts.targets, None, &mut acts.logits, write, to.0, to.1)
        })
    }

    /// The losses' sum, into `to`; the gradient of the mean loss by the output head replaces its part of `gradient`,
    /// and that by the last norm is left in `delta`.
    pub(super) fn head_with_gradient(
        &mut self,
        device: &D,
        parameters: &D::Activation,
        gradient: &mut D::Buffer,
        to: LossAt<'_, D>,
    ) -> DeviceResult {
        let Sizes { rows, hidden, vocabulary, logits_pitch, .. } = self.sizes;
        let scale = 1.0 / rows as f32;
        self.chunks(|model, shape, write| {
            model.logits(device, parameters, shape)?;
            let (acts, head) = (&mut model.acts, model.offsets.head);
            device.cross_entropy(shape, &acts.targets, Some(scale), &mut acts.logits, write, to.0, to.1)?;
            let logits = |m, n, k| MatmulShape { a_pitch: Some(logits_pitch), ..MatmulShape::dense(m, n, k) };
            device.matmul(
                Product::NN,
                logits(shape.rows, hidden, vocabulary),
                whole(&acts.logits),
                Part(parameters, head),
                Write::Replace,
                PartMut(&mut acts.delta, shape.first * hidden),
            )?;
            device.matmul_gradient(
                Product::TN,
                logits(vocabulary, hidden, shape.rows),
                whole(&acts.logits),
                Part(&acts.last_normed, shape.first * hidden),
                write,
                PartMut(gradient, head),
            )
        })
    }

    /// Works through the token rows in chunks; the first one's results replace what was there, the others are added.
    fn chunks(&mut self, mut work: impl FnMut(&mut Self, LossShape, Write) -> DeviceResult) -> DeviceResult {
        let Sizes { rows: all, vocabulary, loss_rows, logits_pitch: pitch, .. } = self.sizes;
        for first in (0..all).step_by(loss_rows) {
            let rows = loss_rows.min(all - first);
            let write = if first == 0 { Write::Replace } else { Write::Add };
            work(self, LossShape { vocabulary, pitch, rows, first }, write)?;
        }
        Ok(())
    }

    /// The logits of a chunk of rows.
    fn logits(&mut self, device: &D, parameters: &D::Activation, shape: LossShape) -> DeviceResult {
        let hidden = self.sizes.hidden;
        let acts = &mut self.acts;
        device.matmul(
            Product::NT,
            MatmulShape { c_pitch: Some(shape.pitch), ..MatmulShape::dense(shape.rows, shape.vocabulary, hidden) },
            Part(&acts.last_normed, shape.first * hidden),
            Part(parameters, self.offsets.head),
            Write::Replace,
            PartMut(&mut acts.logits, 0),
        )
    }
}
