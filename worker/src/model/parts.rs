//! The parts that layers are put together from. Each asks the device for the operation of its kind, so that the chain
//! in `forward` and `backward` is the same for every architecture.

use proto::spec::{FeedForward, Layout, Norm};

use super::parameters::LinearAt;
use super::{Sizes, whole};
use crate::device::{Device, DeviceResult, MatmulShape, Part, PartMut, Product, Write};

/// A device and the model's parameters on it.
pub(super) struct Parts<'a, D: Device> {
    pub(super) device: &'a D,
    pub(super) parameters: &'a D::Activation,
    pub(super) sizes: Sizes,
}

/// What a norm saves for its backward: its output, and the numbers of each row.
pub(super) struct Normed<'a, D: Device> {
    pub(super) normed: &'a mut D::Activation,
    pub(super) statistics: &'a mut D::Buffer,
}

/// Where a norm's backward reads from: the input it had, and the numbers of each row.
pub(super) struct Norming<'a, D: Device> {
    pub(super) x: &'a D::Activation,
    pub(super) statistics: &'a D::Buffer,
}

/// Where parameters' gradients go, and what their sums over rows need meanwhile.
pub(super) struct Gradients<'a, D: Device> {
    pub(super) gradient: &'a mut D::Buffer,
    pub(super) workspace: &'a mut D::Buffer,
}

impl<D: Device> Parts<'_, D> {
    /// The parameters from element `at` on.
    pub(super) fn at(&self, at: usize) -> Part<'_, D::Activation> {
        Part(self.parameters, at)
    }

    /// A linear layer of all token rows: `output = input·W (+ bias)`.
    pub(super) fn linear(&self, layer: LinearAt, input: &D::Activation, output: &mut D::Activation) -> DeviceResult {
        let (rows, LinearAt { inputs, outputs, .. }) = (self.sizes.rows, layer);
        let product = match layer.layout {
            Layout::OutIn => Product::NT,
            Layout::InOut => Product::NN,
        };
        let (shape, weight) = (MatmulShape::new(rows, outputs, inputs), self.at(layer.weight));
        match layer.bias {
            Some(bias) => self.device.matmul_bias(product, shape, whole(input), weight, self.at(bias), output),
            None => self.device.matmul(product, shape, whole(input), weight, Write::Replace, PartMut(output, 0)),
        }
    }

    /// The feed-forward block's first layer, to `pre`, and its activation.
    pub(super) fn feed_forward(
        &self,
        layer: LinearAt,
        input: &D::Activation,
        pre: &mut D::Activation,
        act: &mut D::Activation,
    ) -> DeviceResult {
        let (Sizes { rows, inner, .. }, LinearAt { inputs, outputs, .. }) = (self.sizes, layer);
        let (shape, weight) = (MatmulShape::new(rows, outputs, inputs), self.at(layer.weight));
        match (self.sizes.block.feed_forward, layer.bias, layer.layout) {
            (FeedForward::Gelu, Some(bias), Layout::InOut) => {
                self.device.matmul_gelu(Product::NN, shape, whole(input), weight, self.at(bias), pre, act)
            }
            (kind, ..) => {
                self.linear(layer, input, pre)?;
                match kind {
                    FeedForward::SwiGlu => self.device.swiglu_forward(inner, rows, pre, act),
                    FeedForward::Gelu => self.device.gelu_forward(rows * inner, pre, act),
                }
            }
        }
    }

    /// The gradient of a linear layer's input.
    pub(super) fn linear_input(
        &self,
        layer: LinearAt,
        d_output: &D::Activation,
        d_input: &mut D::Activation,
    ) -> DeviceResult {
        let product = match layer.layout {
            Layout::OutIn => Product::NN,
            Layout::InOut => Product::NT,
        };
        let shape = MatmulShape::new(self.sizes.rows, layer.inputs, layer.outputs);
        let to = PartMut(d_input, 0);
        self.device.matmul(product, shape, whole(d_output), self.at(layer.weight), Write::Replace, to)
    }

    /// The gradients of a linear layer's matrix, a product of input and gradient in the matrix's own layout, and bias.
    pub(super) fn linear_gradient(
        &self,
        layer: LinearAt,
        input: &D::Activation,
        d_output: &D::Activation,
        to: &mut Gradients<'_, D>,
    ) -> DeviceResult {
        let (rows, LinearAt { inputs, outputs, .. }) = (self.sizes.rows, layer);
        let (shape, a, b) = match layer.layout {
            Layout::OutIn => (MatmulShape::new(outputs, inputs, rows), d_output, input),
            Layout::InOut => (MatmulShape::new(inputs, outputs, rows), input, d_output),
        };
        let place = PartMut(&mut *to.gradient, layer.weight);
        self.device.matmul_gradient(Product::TN, shape, whole(a), whole(b), Write::Replace, place)?;
        match layer.bias {
            Some(bias) => {
                let place = PartMut(&mut *to.gradient, bias);
                self.device.bias_gradient(outputs, rows, d_output, place, to.workspace)
            }
            None => Ok(()),
        }
    }

    /// The norm whose gain is at `at`, of `x` or, with a `delta`, of their sum, which is written too.
    pub(super) fn norm(
        &self,
        at: usize,
        x: &D::Activation,
        delta: Option<(&D::Activation, &mut D::Activation)>,
        to: Normed<'_, D>,
    ) -> DeviceResult {
        let (norm, Normed { normed, statistics }) = (self.sizes.norm, to);
        match self.sizes.block.norm {
            Norm::Rms => self.device.rmsnorm_forward(norm, x, delta, self.at(at), normed, statistics),
            Norm::Layer => self.device.layernorm_forward(norm, x, delta, self.at(at), normed, statistics),
        }
    }

    /// The backward of a norm: replaces or adds to `d_x`.
    pub(super) fn norm_backward(
        &self,
        at: usize,
        from: Norming<'_, D>,
        d_normed: &D::Activation,
        write: Write,
        d_x: &mut D::Activation,
        to: &mut Gradients<'_, D>,
    ) -> DeviceResult {
        let (norm, gain, Norming { x, statistics }) = (self.sizes.norm, self.at(at), from);
        let (place, workspace) = (PartMut(&mut *to.gradient, at), &mut *to.workspace);
        let device = self.device;
        match self.sizes.block.norm {
            Norm::Rms => device.rmsnorm_backward(norm, x, statistics, gain, d_normed, write, d_x, place, workspace),
            Norm::Layer => device.layernorm_backward(norm, x, statistics, gain, d_normed, write, d_x, place, workspace),
        }
    }

    /// The backward of the feed-forward block's activation, in place: `pre` becomes its gradient, `d_act` becomes the
    /// activation again.
    pub(super) fn activate_backward(&self, pre: &mut D::Activation, d_act: &mut D::Activation) -> DeviceResult {
        let Sizes { rows, inner, .. } = self.sizes;
        match self.sizes.block.feed_forward {
            FeedForward::SwiGlu => self.device.swiglu_backward(inner, rows, pre, d_act),
            FeedForward::Gelu => self.device.gelu_backward(rows * inner, pre, d_act),
        }
    }
}
