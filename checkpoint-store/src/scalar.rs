//! The scalar state: everything of a training state that is not a tensor, and its canonical encoding.
//!
//! Randomness is counter-based and batches are a pure function of the seed and one global sample index, so a handful of
//! numbers is all there is: no generator states, no per-rank buffers. It is part of every manifest and of the digest.

use proto::ids::Step;
use serde::{Deserialize, Serialize};

/// The state outside the tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScalarState {
    /// Optimizer updates done.
    pub step: Step,
    /// The key of all randomness.
    pub seed: u64,
    /// The next sample of the seeded permutation, counted over all epochs.
    pub cursor: u64,
    /// The step at which the learning-rate schedule ends.
    pub horizon: u64,
    /// Per-block exponents of the reduction grid; empty for the fixed grid.
    pub exponents: Vec<i32>,
    /// Global indices of samples left out after a non-finite loss, in the order in which they were left out.
    pub samples_left_out: Vec<u64>,
}

impl ScalarState {
    /// The state before the first step of a job with `horizon` steps.
    pub fn start(seed: u64, horizon: u64) -> Self {
        Self { step: Step::ZERO, seed, cursor: 0, horizon, exponents: vec![], samples_left_out: vec![] }
    }

    /// The canonical encoding: fields in declared order, little-endian, every list preceded by its length.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::default();
        out.u64(self.step.get()).u64(self.seed).u64(self.cursor).u64(self.horizon).len(self.exponents.len());
        for exponent in &self.exponents {
            out.raw(&exponent.to_le_bytes());
        }
        out.u64s(&self.samples_left_out);
        out.take()
    }
}

/// Builds length-prefixed encodings, of which no two different values share one.
#[derive(Debug, Default)]
pub(crate) struct Encoder(Vec<u8>);

impl Encoder {
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn len(&mut self, length: usize) -> &mut Self {
        self.u64(length as u64)
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.len(bytes.len()).raw(bytes)
    }

    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        self.bytes(text.as_bytes())
    }

    pub(crate) fn u64s(&mut self, values: &[u64]) -> &mut Self {
        self.len(values.len());
        for value in values {
            self.u64(*value);
        }
        self
    }

    /// What was built so far.
    pub(crate) fn filled(&self) -> &[u8] {
        &self.0
    }

    /// Begins anew, in the same memory.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// What was built; the encoder is empty afterwards.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}
