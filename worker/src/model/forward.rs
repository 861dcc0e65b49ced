//! Forward: tokens to losses.
//!
//! A block's output is not added to the residual stream by itself: the next norm reads stream and output once and
//! writes the new stream and its norm. The output head runs over chunks of token rows, loss and gradient together, so
//! the logits of the whole micro-batch never exist.

use super::{Model, Sizes, whole};
use crate::device::{Device, DeviceResult, LossShape, MatmulShape, Part, PartMut, Product, Write};

/// Where the sum of a micro-batch's losses goes.
pub(super) struct LossAt<'a, D: Device>(pub(super) &'a mut D::Losses, pub(super) usize);

impl<D: Device> Model<D> {
    /// Runs all layers and the last norm, saving what the backward needs.
    pub(super) fn forward(&mut self, device: &D, parameters: &D::Activation) -> DeviceResult {
        let Sizes { rows, hidden, .. } = self.sizes;
        let norm = self.sizes.norm;
        let table = Part(parameters, self.offsets.embedding);
        let first = self.acts.layers.first_mut().map_or(&mut self.acts.last, |layer| &mut layer.stream);
        device.embedding_forward(hidden, rows, &self.acts.tokens, table, first)?;
        for index in 0..self.acts.layers.len() {
            self.layer_forward(device, parameters, index)?;
        }
        let acts = &mut self.acts;
        let weight = Part(parameters, self.offsets.final_norm);
        match acts.layers.last() {
            Some(layer) => device.rmsnorm_forward(
                norm,
                &layer.middle,
                Some((&acts.delta, &mut acts.last)),
                weight,
                &mut acts.last_normed,
                &mut acts.last_scale,
            ),
            None => device.rmsnorm_forward(norm, &acts.last, None, weight, &mut acts.last_normed, &mut acts.last_scale),
        }
    }

    /// One layer; leaves its last output in `delta`, not yet added to the stream.
    fn layer_forward(&mut self, device: &D, parameters: &D::Activation, index: usize) -> DeviceResult {
        let sizes = self.sizes;
        let Sizes { rows, hidden, inner, attention, norm, .. } = sizes;
        let at = self.offsets.layers[index];
        let acts = &mut self.acts;
        let (before, rest) = acts.layers.split_at_mut(index);
        let layer = &mut rest[0];
        let weight = |offset| Part(parameters, offset);

        let (normed, scale) = (&mut layer.input_normed, &mut layer.input_scale);
        if let Some(previous) = before.last() {
            let delta = Some((&acts.delta, &mut layer.stream));
            device.rmsnorm_forward(norm, &previous.middle, delta, weight(at.input_norm), normed, scale)?;
        } else {
            device.rmsnorm_forward(norm, &layer.stream, None, weight(at.input_norm), normed, scale)?;
        }
        let product = |shape, a: &D::Activation, w: usize, c: &mut D::Activation| {
            device.matmul(Product::NT, shape, whole(a), weight(w), Write::Replace, PartMut(c, 0))
        };
        product(sizes.by_rows(attention.row(), hidden), &layer.input_normed, at.qkv, &mut layer.qkv)?;
        device.rope(attention, false, &acts.rope, &mut layer.qkv)?;
        let (out, statistics) = (&mut layer.attention, &mut layer.statistics);
        device.attention_forward(attention, &layer.qkv, out, statistics, &mut acts.attention_workspace)?;
        product(sizes.by_rows(hidden, attention.output_row()), &layer.attention, at.output, &mut acts.delta)?;

        let delta = Some((&acts.delta, &mut layer.middle));
        let (normed, scale) = (&mut layer.post_normed, &mut layer.post_scale);
        device.rmsnorm_forward(norm, &layer.stream, delta, weight(at.post_norm), normed, scale)?;
        product(sizes.by_rows(2 * inner, hidden), &layer.post_normed, at.gate_up, &mut layer.gate_up)?;
        device.swiglu_forward(inner, rows, &layer.gate_up, &mut acts.act)?;
        product(sizes.by_rows(hidden, inner), &acts.act, at.down, &mut acts.delta)
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
