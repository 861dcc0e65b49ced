//! Where the trainer's micro-batches come from.
//!
//! A [`Source`] fills token and target rows as a pure function of (step, micro-batch); [`Feed`] owns the rows, so that
//! a step allocates nothing. [`Synthetic`] is a source without files, for measuring and for tests.

use crate::rng::philox;

/// Why a micro-batch could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FeedError(#[from] pub Box<dyn std::error::Error + Send + Sync>);

/// Fills the rows of micro-batches; `tokens` and `targets` are `[micro_batch, sequence_length]`, row-major.
pub trait Source: Send {
    /// Micro-batch `micro_batch` of step `step` (the first is 1).
    fn micro_batch(
        &self,
        step: u64,
        micro_batch: usize,
        tokens: &mut [u32],
        targets: &mut [u32],
    ) -> Result<(), FeedError>;

    /// How many micro-batches one validation reads; 0 if there is no held-out set.
    fn validation_units(&self) -> usize;

    /// Micro-batch `unit` of the held-out set.
    fn validation_unit(&self, unit: usize, tokens: &mut [u32], targets: &mut [u32]) -> Result<(), FeedError>;

    /// What the data is: equal fingerprints, equal micro-batches.
    fn fingerprint(&self) -> String;
}

/// Rows of one micro-batch: tokens and their targets.
pub type Rows<'a> = (&'a [u32], &'a [u32]);

/// A source with the rows it fills.
pub struct Feed {
    source: Box<dyn Source>,
    tokens: Vec<u32>,
    targets: Vec<u32>,
}

impl Feed {
    /// Rows for micro-batches of `tokens` tokens.
    pub fn new(source: Box<dyn Source>, tokens: usize) -> Self {
        Self { source, tokens: vec![0; tokens], targets: vec![0; tokens] }
    }

    /// See [`Source::micro_batch`].
    pub fn micro_batch(&mut self, step: u64, micro_batch: usize) -> Result<Rows<'_>, FeedError> {
        self.source.micro_batch(step, micro_batch, &mut self.tokens, &mut self.targets)?;
        Ok((&self.tokens, &self.targets))
    }

    /// See [`Source::validation_units`].
    pub fn validation_units(&self) -> usize {
        self.source.validation_units()
    }

    /// See [`Source::validation_unit`].
    pub fn validation_unit(&mut self, unit: usize) -> Result<Rows<'_>, FeedError> {
        self.source.validation_unit(unit, &mut self.tokens, &mut self.targets)?;
        Ok((&self.tokens, &self.targets))
    }

    /// See [`Source::fingerprint`].
    pub fn fingerprint(&self) -> String {
        self.source.fingerprint()
    }
}

/// Sequences that count upwards from a random token: learnable, and there without a file.
#[derive(Debug, Clone, Copy)]
pub struct Synthetic {
    /// Token ids are below this.
    pub vocabulary: u32,
    /// Tokens of one sequence.
    pub sequence: usize,
    /// Micro-batches of the held-out set.
    pub held_out: usize,
}

impl Synthetic {
    fn fill(&self, stream: u64, index: u64, tokens: &mut [u32], targets: &mut [u32]) {
        let rows = tokens.chunks_mut(self.sequence).zip(targets.chunks_mut(self.sequence));
        for (row, (tokens, targets)) in rows.enumerate() {
            let first = philox([stream as u32, (stream >> 32) as u32], [index as u32, row as u32, 0, 0])[0];
            for (at, (token, target)) in tokens.iter_mut().zip(targets).enumerate() {
                let value = |at: usize| (u64::from(first) + at as u64) % u64::from(self.vocabulary);
                (*token, *target) = (value(at) as u32, value(at + 1) as u32);
            }
        }
    }
}

impl Source for Synthetic {
    fn micro_batch(&self, step: u64, m: usize, tokens: &mut [u32], targets: &mut [u32]) -> Result<(), FeedError> {
        self.fill(step, m as u64, tokens, targets);
        Ok(())
    }

    fn validation_units(&self) -> usize {
        self.held_out
    }

    fn validation_unit(&self, unit: usize, tokens: &mut [u32], targets: &mut [u32]) -> Result<(), FeedError> {
        self.fill(0, unit as u64, tokens, targets);
        Ok(())
    }

    fn fingerprint(&self) -> String {
        format!("synthetic-{}-{}", self.vocabulary, self.sequence)
    }
}
