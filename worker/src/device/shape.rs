//! What operations of a [`super::Device`] are told: places in buffers, and the shapes of what lies there.

/// A place in a buffer to read from: the buffer and the first element.
#[derive(Debug)]
pub struct Part<'a, B>(pub &'a B, pub usize);

/// A place in a buffer to write to: the buffer and the first element.
#[derive(Debug)]
pub struct PartMut<'a, B>(pub &'a mut B, pub usize);

/// Which operand of a product is transposed. `C` is always `m × n`, the inner dimension is `k`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Product {
    /// `C = A·B`, A is `m × k`, B is `k × n`: the gradient of a layer's input.
    NN,
    /// `C = A·Bᵀ`, A is `m × k`, B is `n × k`: a layer's output from its weights.
    NT,
    /// `C = Aᵀ·B`, A is `k × m`, B is `k × n`: the gradient of a layer's weights.
    TN,
}

/// The shape of a product of dense matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatmulShape {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

impl MatmulShape {
    /// From its three sizes.
    pub fn new(m: usize, n: usize, k: usize) -> Self {
        Self { m, n, k }
    }
}

/// The shape of a chunk of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossShape {
    /// Columns of logits.
    pub vocabulary: usize,
    /// Elements from one row of logits to the next; what lies between rows becomes zero with the gradient.
    pub pitch: usize,
    /// Rows of logits.
    pub rows: usize,
    /// The first row's place in the targets.
    pub first: usize,
}

/// Whether an operation overwrites its output or adds to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// The output's old value is not read.
    Replace,
    /// The result is added to the output.
    Add,
}

/// The shape of causal attention. Rows of the query-key-value matrix are `[q heads | k heads | v heads]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`, query head `h` uses key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Width of a row of the query-key-value matrix.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Width of a row of the output.
    pub fn output_row(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// The operands of an AdamW update.
#[derive(Debug)]
pub struct AdamwParts<'a, B> {
    /// Updated in place.
    pub parameters: PartMut<'a, B>,
    /// Gets the new parameters too, for a snapshot.
    pub mirror: Option<PartMut<'a, B>>,
    /// First and second moment before the update; in place if not given.
    pub from: Option<[Part<'a, B>; 2]>,
    /// First and second moment after it.
    pub to: [PartMut<'a, B>; 2],
    /// The mean gradient.
    pub gradient: Part<'a, B>,
}

/// The shape of a norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormShape {
    /// Token rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Added to the mean square.
    pub epsilon: f32,
}
