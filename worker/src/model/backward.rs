//! Backward: from the last norm's gradient to every parameter's.
//!
//! `d_stream` is the gradient of the residual stream; each block's norm adds to it what flows through the block. Weight
//! gradients are written where the parameters lie in the canonical space, each by one product, so nothing is zeroed
//! first but an untied embedding and the positions beyond the sequence.

use super::parts::{Gradients, Norming, Parts};
use super::{Model, Sizes};
use crate::device::{Device, DeviceResult, PartMut, Write};

impl<D: Device> Model<D> {
    /// Everything between output head and embedding; expects the last norm's gradient in `delta`.
    pub(super) fn backward(
        &mut self,
        device: &D,
        parameters: &D::Activation,
        gradient: &mut D::Buffer,
    ) -> DeviceResult {
        let parts = Parts { device, parameters, sizes: self.sizes };
        let acts = &mut self.acts;
        let from = Norming { x: &acts.last, statistics: &acts.last_statistics };
        let mut to = Gradients { gradient, workspace: &mut acts.sums_workspace };
        parts.norm_backward(self.offsets.final_norm, from, &acts.delta, Write::Replace, &mut acts.d_stream, &mut to)?;
        for index in (0..self.offsets.layers.len()).rev() {
            let kept = self.saved(&parts, index)?;
            self.feed_forward_backward(&parts, (index, kept), gradient)?;
            self.attention_block_backward(&parts, (index, kept), gradient)?;
        }
        Ok(())
    }

    fn feed_forward_backward(
        &mut self,
        parts: &Parts<'_, D>,
        (index, kept): (usize, usize),
        gradient: &mut D::Buffer,
    ) -> DeviceResult {
        let at = self.offsets.layers[index];
        let acts = &mut self.acts;
        let layer = &mut acts.layers[kept];
        let mut to = Gradients { gradient, workspace: &mut acts.sums_workspace };

        parts.linear_input(at.down, &acts.d_stream, &mut acts.act)?;
        parts.activate_backward(&mut layer.up, &mut acts.act)?;
        parts.linear_gradient(at.down, &acts.act, &acts.d_stream, &mut to)?;
        parts.linear_input(at.up, &layer.up, &mut acts.delta)?;
        parts.linear_gradient(at.up, &layer.post_normed, &layer.up, &mut to)?;
        let from = Norming { x: &acts.middles[kept], statistics: &layer.post_statistics };
        parts.norm_backward(at.post_norm, from, &acts.delta, Write::Add, &mut acts.d_stream, &mut to)
    }

    fn attention_block_backward(
        &mut self,
        parts: &Parts<'_, D>,
        (index, kept): (usize, usize),
        gradient: &mut D::Buffer,
    ) -> DeviceResult {
        let attention = self.sizes.attention;
        let at = self.offsets.layers[index];
        let acts = &mut self.acts;
        let layer = &mut acts.layers[kept];
        let mut to = Gradients { gradient, workspace: &mut acts.sums_workspace };

        parts.linear_input(at.output, &acts.d_stream, &mut acts.d_attention)?;
        parts.linear_gradient(at.output, &layer.attention, &acts.d_stream, &mut to)?;
        parts.device.attention_backward(
            attention,
            &layer.qkv,
            &layer.attention,
            &layer.softmax,
            &acts.d_attention,
            &mut acts.d_qkv,
            &mut acts.attention_workspace,
        )?;
        if let Some(table) = &acts.rope {
            parts.device.rope(attention, true, table, &mut acts.d_qkv)?;
        }
        parts.linear_input(at.qkv, &acts.d_qkv, &mut acts.delta)?;
        parts.linear_gradient(at.qkv, &layer.input_normed, &acts.d_qkv, &mut to)?;
        let from = Norming { x: &acts.streams[index], statistics: &layer.input_statistics };
        parts.norm_backward(at.input_norm, from, &acts.delta, Write::Add, &mut acts.d_stream, &mut to)
    }

    /// From the stream's gradient to those of the embedding and of learned positions.
    pub(super) fn embedding_backward(&mut self, device: &D, gradient: &mut D::Buffer) -> DeviceResult {
        let Sizes { rows, hidden, vocabulary, attention, .. } = self.sizes;
        let (at, acts) = (self.offsets.embedding, &self.acts);
        if self.offsets.head != at {
            device.zero(vocabulary * hidden, PartMut(gradient, at))?;
        }
        device.embedding_backward(hidden, rows, &acts.tokens, &acts.d_stream, PartMut(gradient, at))?;
        let Some((at, most)) = self.offsets.positions else { return Ok(()) };
        let sequence = attention.sequence;
        device.position_backward(hidden, attention.batch, sequence, &acts.d_stream, PartMut(gradient, at))?;
        device.zero((most - sequence) * hidden, PartMut(gradient, at + sequence * hidden))
    }
}
