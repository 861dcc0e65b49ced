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
        let first = self.acts.streams.first_mut().unwrap_or(&mut self.acts.last);
        device.embedding_forward(hidden, rows, &self.acts.tokens, table, positions, first)?;
        for index in 0..self.offsets.layers.len() {
            self.layer_input(&parts, index, index > 0)?;
            self.layer_body(&parts, index)?;
            let (kept, at, acts) = (self.kept(index), self.offsets.layers[index], &mut self.acts);
            let layer = &mut acts.layers[kept];
            parts.feed_forward(at.up, &layer.post_normed, &mut layer.up, &mut acts.act)?;
            // Left in `delta`, not yet added to the stream.
            parts.linear(at.down, &acts.act, &mut acts.delta)?;
        }
        let acts = &mut self.acts;
        let to = Normed { normed: &mut acts.last_normed, statistics: &mut acts.last_statistics };
        match acts.middles.last() {
            Some(middle) => {
                let delta = Some((&acts.delta, &mut acts.last));
                parts.norm(self.offsets.final_norm, middle, delta, to)
            }
            None => parts.norm(self.offsets.final_norm, &acts.last, None, to),
        }
    }

    /// Where a layer's activations are kept.
    fn kept(&self, layer: usize) -> usize {
        if self.sizes.recompute { 0 } else { layer }
    }

    /// A layer's first norm. With `add` its stream is made of what the layer before left, else it is there already.
    fn layer_input(&mut self, parts: &Parts<'_, D>, index: usize, add: bool) -> DeviceResult {
        let (norm, kept) = (self.offsets.layers[index].input_norm, self.kept(index));
        let before = self.kept(index.saturating_sub(1));
        let acts = &mut self.acts;
        let layer = &mut acts.layers[kept];
        let to = Normed { normed: &mut layer.input_normed, statistics: &mut layer.input_statistics };
        if add {
            let delta = Some((&acts.delta, &mut acts.streams[index]));
            parts.norm(norm, &acts.middles[before], delta, to)
        } else {
            parts.norm(norm, &acts.streams[index], None, to)
        }
    }

    /// From a layer's first norm to its second.
    fn layer_body(&mut self, parts: &Parts<'_, D>, index: usize) -> DeviceResult {
        let (attention, at, kept) = (self.sizes.attention, self.offsets.layers[index], self.kept(index));
        let acts = &mut self.acts;
        let layer = &mut acts.layers[kept];
        parts.linear(at.qkv, &layer.input_normed, &mut layer.qkv)?;
        if let Some(table) = &acts.rope {
            parts.device.rope(attention, false, table, &mut layer.qkv)?;
        }
        let (out, softmax) = (&mut layer.attention, &mut layer.softmax);
        parts.device.attention_forward(attention, &layer.qkv, out, softmax, &mut acts.attention_workspace)?;
        parts.linear(at.output, &layer.attention, &mut acts.delta)?;

        let to = Normed { normed: &mut layer.post_normed, statistics: &mut layer.post_statistics };
        parts.norm(at.post_norm, &acts.streams[index], Some((&acts.delta, &mut acts.middles[kept])), to)
    }

    /// Makes a layer's activations those that the backward is to read; returns where they are.
    pub(super) fn saved(&mut self, parts: &Parts<'_, D>, index: usize) -> DeviceResult<usize> {
        // The last layer's are there still.
        if self.sizes.recompute && index + 1 < self.offsets.layers.len() {
            self.layer_input(parts, index, false)?;
            self.layer_body(parts, index)?;
            let layer = &mut self.acts.layers[0];
            parts.linear(self.offsets.layers[index].up, &layer.post_normed, &mut layer.up)?;
        }
        Ok(self.kept(index))
    }

    /// The losses' sum, chunk by chunk, into `to`.
    pub(super) fn head(&mut self, device: &D, parameters: &D::Activation, to: LossAt<'_, D>) -> DeviceResult {
        self.pad_head(device, parameters)?;
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
        let Sizes { rows, hidden, vocabulary, logits_pitch: pitch, .. } = self.sizes;
        let (scale, head) = (1.0 / rows as f32, self.offsets.head);
        self.pad_head(device, parameters)?;
        self.chunks(|model, shape, write| {
            model.logits(device, parameters, shape)?;
            let acts = &mut model.acts;
            device.cross_entropy(shape, &acts.targets, Some(scale), &mut acts.logits, write, to.0, to.1)?;
            let d_normed = PartMut(&mut acts.delta, shape.first * hidden);
            let by_input = MatmulShape::new(shape.rows, hidden, pitch);
            let table = padded_or(acts.padded.as_ref().map(|padded| &padded.table), parameters, head);
            device.matmul(Product::NN, by_input, whole(&acts.logits), table, Write::Replace, d_normed)?;
            let by_table = MatmulShape::new(pitch, hidden, shape.rows);
            let input = Part(&acts.last_normed, shape.first * hidden);
            let d_table = match &mut acts.padded {
                Some(padded) => PartMut(&mut padded.d_table, 0),
                None => PartMut(&mut *gradient, head),
            };
            device.matmul_gradient(Product::TN, by_table, whole(&acts.logits), input, write, d_table)
        })?;
        let Some(padded) = &self.acts.padded else { return Ok(()) };
        device.copy(vocabulary * hidden, whole(&padded.d_table), PartMut(gradient, head))
    }

    /// Brings what the output head reads up to date, where it is not the parameters themselves.
    fn pad_head(&mut self, device: &D, parameters: &D::Activation) -> DeviceResult {
        let Sizes { hidden, vocabulary, .. } = self.sizes;
        let Some(padded) = &mut self.acts.padded else { return Ok(()) };
        let table = Part(parameters, self.offsets.head);
        device.copy_activation(vocabulary * hidden, table, PartMut(&mut padded.table, 0))
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
        let (hidden, acts) = (self.sizes.hidden, &mut self.acts);
        let table = padded_or(acts.padded.as_ref().map(|padded| &padded.table), parameters, self.offsets.head);
        let input = Part(&acts.last_normed, shape.first * hidden);
        let (shape, to) = (MatmulShape::new(shape.rows, shape.pitch, hidden), PartMut(&mut acts.logits, 0));
        device.matmul(Product::NT, shape, input, table, Write::Replace, to)
    }
}

/// The output head's table: padded, or where it lies among the parameters.
fn padded_or<'a, A>(padded: Option<&'a A>, parameters: &'a A, head: usize) -> Part<'a, A> {
    padded.map_or(Part(parameters, head), whole)
}
