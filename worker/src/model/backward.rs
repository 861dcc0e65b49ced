//! Backward: from the last norm's gradient to every parameter's.
//!
//! `d_stream` is the gradient of the residual stream; each block's norm adds to it what flows through the block. Weight
//! gradients are written where the parameters lie in the canonical space, each by one product, so nothing is zeroed
//! first but an untied embedding.

use super::{Model, Sizes, whole};
use crate::device::{Device, DeviceResult, MatmulShape, Part, PartMut, Product, Write};

impl<D: Device> Model<D> {
    /// Everything below the output head; expects the last norm's gradient in `delta`.
    pub(super) fn backward(&mut self, device: &D, parameters: &D::Activation, gradient: &mut D::Buffer) -> DeviceResult {
        let Sizes { rows, hidden, vocabulary, norm, .. } = self.sizes;
        let at = self.offsets.final_norm;
        let acts = &mut self.acts;
        device.rmsnorm_backward(
            norm,
            &acts.last,
            &acts.last_scale,
            Part(parameters, at),
            &acts.delta,
            Write::Replace,
            &mut acts.d_stream,
            PartMut(gradient, at),
            &mut acts.norm_workspace,
        )?;
        for index in (0..self.acts.layers.len()).rev() {
            self.feed_forward_backward(device, parameters, index, gradient)?;
            self.attention_block_backward(device, parameters, index, gradient)?;
        }
        let (at, acts) = (self.offsets.embedding, &mut self.acts);
        if self.offsets.head != at {
            device.zero(vocabulary * hidden, PartMut(gradient, at))?;
        }
        device.embedding_backward(hidden, rows, &acts.tokens, &acts.d_stream, PartMut(gradient, at))
    }

    fn feed_forward_backward(
        &mut self,
        device: &D,
        parameters: &D::Activation,
        index: usize,
        gradient: &mut D::Buffer,
    ) -> DeviceResult {
        let sizes = self.sizes;
        let Sizes { rows, hidden, inner, norm, .. } = sizes;
        let at = self.offsets.layers[index];
        let acts = &mut self.acts;
        let layer = &mut acts.layers[index];
        let products = Products { device, parameters };

        products.input(sizes.by_rows(inner, hidden), &acts.d_stream, at.down, &mut acts.act)?;
        device.swiglu_backward(inner, rows, &mut layer.gate_up, &mut acts.act)?;
        products.weight(sizes.over_rows(hidden, inner), &acts.d_stream, &acts.act, gradient, at.down)?;
        products.input(sizes.by_rows(hidden, 2 * inner), &layer.gate_up, at.gate_up, &mut acts.delta)?;
        let shape = sizes.over_rows(2 * inner, hidden);
        products.weight(shape, &layer.gate_up, &layer.post_normed, gradient, at.gate_up)?;
        device.rmsnorm_backward(
            norm,
            &layer.middle,
            &layer.post_scale,
            Part(parameters, at.post_norm),
            &acts.delta,
            Write::Add,
            &mut acts.d_stream,
            PartMut(gradient, at.post_norm),
            &mut acts.norm_workspace,
        )
    }

    fn attention_block_backward(
        &mut self,
        device: &D,
        parameters: &D::Activation,
        index: usize,
        gradient: &mut D::Buffer,
    ) -> DeviceResult {
        let sizes = self.sizes;
        let Sizes { hidden, attention, norm, .. } = sizes;
        let at = self.offsets.layers[index];
        let acts = &mut self.acts;
        let layer = &mut acts.layers[index];
        let products = Products { device, parameters };
        let width = attention.output_row();

        products.input(sizes.by_rows(width, hidden), &acts.d_stream, at.output, &mut acts.d_attention)?;
        products.weight(sizes.over_rows(hidden, width), &acts.d_stream, &layer.attention, gradient, at.output)?;
        device.attention_backward(
            attention,
            &layer.qkv,
            &layer.attention,
            &layer.statistics,
            &acts.d_attention,
            &mut acts.d_qkv,
            &mut acts.attention_workspace,
        )?;
        device.rope(attention, true, &acts.rope, &mut acts.d_qkv)?;
        products.input(sizes.by_rows(hidden, attention.row()), &acts.d_qkv, at.qkv, &mut acts.delta)?;
        let shape = sizes.over_rows(attention.row(), hidden);
        products.weight(shape, &acts.d_qkv, &layer.input_normed, gradient, at.qkv)?;
        device.rmsnorm_backward(
            norm,
            &layer.stream,
            &layer.input_scale,
            Part(parameters, at.input_norm),
            &acts.delta,
            Write::Add,
            &mut acts.d_stream,
            PartMut(gradient, at.input_norm),
            &mut acts.norm_workspace,
        )
    }
}

/// The two products of a linear layer's backward.
struct Products<'a, D: Device> {
    device: &'a D,
    parameters: &'a D::Activation,
}

impl<D: Device> Products<'_, D> {
    /// `d_input = d_output · W`.
    fn input(&self, shape: MatmulShape, d_output: &D::Activation, weight: usize, d_input: &mut D::Activation) -> DeviceResult {
        let weight = Part(self.parameters, weight);
        self.device.matmul(Product::NN, shape, whole(d_output), weight, Write::Replace, PartMut(d_input, 0))
    }

    /// `d_W = d_outputᵀ · input`.
    fn weight(
        &self,
        shape: MatmulShape,
        d_output: &D::Activation,
        input: &D::Activation,
        gradient: &mut D::Buffer,
        weight: usize,
    ) -> DeviceResult {
        let to = PartMut(gradient, weight);
        self.device.matmul_gradient(Product::TN, shape, whole(d_output), whole(input), Write::Replace, to)
    }
}
