//! Forward: tokens to losses.
//!
//! A block's output is not added to the residual stream by itself: the next norm reads stream and output once and
//! writes the new stream and its norm. The output head runs over chunks of token rows, loss and gradient together, so
//! the logits of the whole micro-batch never exist.

use super::{Model, Sizes, whole};
use crate::device::{Device, DeviceResult, MatmulShape, Part, PartMut, Product, Write};

impl<D: Device> Model<D> {
    /// Runs all layers and the last norm, saving what the backward needs.
    pub(super) fn forward(&mut self, device: &D, parameters: &D::Buffer) -> DeviceResult {
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
    fn layer_forward(&mut self, device: &D, parameters: &D::Buffer, index: usize) -> DeviceResult {
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
        let product = |shape, a: &D::Buffer, w: usize, c: &mut D::Buffer| {
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

    /// The losses' sum, chunk by chunk.
    pub(super) fn head(&mut self, device: &D, parameters: &D::Buffer) -> DeviceResult<f64> {
        let mut sum = 0.0;
        for first in (0..self.sizes.rows).step_by(self.sizes.loss_rows) {
            let count = self.sizes.loss_rows.min(self.sizes.rows - first);
            self.logits(device, parameters, first, count)?;
            let acts = &mut self.acts;
            sum += device.cross_entropy(self.sizes.vocabulary, count, &acts.targets, first, None, &mut acts.logits)?;
        }
        Ok(sum)
    }

    /// The losses' sum; the gradient of the mean loss by the output head replaces its part of `gradient`, and that by
    /// the last norm is left in `delta`.
    pub(super) fn head_with_gradient(
        &mut self,
        device: &D,
        parameters: &D::Buffer,
        gradient: &mut D::Buffer,
    ) -> DeviceResult<f64> {
        let Sizes { rows, hidden, vocabulary, loss_rows, .. } = self.sizes;
        let scale = 1.0 / rows as f32;
        let mut sum = 0.0;
        for first in (0..rows).step_by(loss_rows) {
            let count = loss_rows.min(rows - first);
            self.logits(device, parameters, first, count)?;
            let acts = &mut self.acts;
            sum += device.cross_entropy(vocabulary, count, &acts.targets, first, Some(scale), &mut acts.logits)?;
            device.matmul(
                Product::NN,
                MatmulShape { m: count, n: hidden, k: vocabulary },
                whole(&acts.logits),
                Part(parameters, self.offsets.head),
                Write::Replace,
                PartMut(&mut acts.delta, first * hidden),
            )?;
            device.matmul(
                Product::TN,
                MatmulShape { m: vocabulary, n: hidden, k: count },
                whole(&acts.logits),
                Part(&acts.last_normed, first * hidden),
                if first == 0 { Write::Replace } else { Write::Add },
                PartMut(gradient, self.offsets.head),
            )?;
        }
        Ok(sum)
    }

    /// The logits of `count` rows from row `first`.
    fn logits(&mut self, device: &D, parameters: &D::Buffer, first: usize, count: usize) -> DeviceResult {
        let Sizes { hidden, vocabulary, .. } = self.sizes;
        let acts = &mut self.acts;
        device.matmul(
            Product::NT,
            MatmulShape { m: count, n: vocabulary, k: hidden },
            Part(&acts.last_normed, first * hidden),
            Part(parameters, self.offsets.head),
            Write::Replace,
            PartMut(&mut acts.logits, 0),
        )
    }
}
