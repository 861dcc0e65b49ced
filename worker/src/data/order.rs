//! Which tokens make which batch: a pure function of (seed, step).
//!
//! The documents end to end are cut into samples of T+1 tokens with stride T (the last token of one is the first
//! target's input of the next), S = (tokens - 1) / T of them. The g-th sample of a job, g counted over all its steps,
//! is sample π(g mod S) of epoch g / S, where π is a pseudorandom permutation of 0..S keyed by (seed, epoch): every
//! sample once an epoch, in an order that needs no memory, so that any worker can compute any micro-batch of any step.
//!
//! π is a Feistel network (Luby and Rackoff, 1988) over the next even number of bits, applied again while the result is
//! outside 0..S (cycle walking: Black and Rogaway, 2002).

use std::sync::Arc;

use proto::ids::Step;

use super::error::{DataError, Result};
use super::indexed::IndexedDataset;

const ROUNDS: usize = 8;

/// A keyed permutation of `0..len`.
#[derive(Debug, Clone)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..len` for an epoch of a seed.
    pub fn new(len: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let mut hasher = blake3::Hasher::new_derive_key("cairn sample order v1");
        hasher.update(&seed.to_le_bytes()).update(&epoch.to_le_bytes());
        let mut stream = hasher.finalize_xof();
        let keys = std::array::from_fn(|_| {
            let mut raw = [0; 8];
            stream.fill(&mut raw);
            u64::from_le_bytes(raw)
        });
        Self { len, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Where `index` goes. `index` must be below the length; fewer than four rounds of the network are expected.
    pub fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.len, "a permutation of 0..{} has no {index}", self.len);
        let mut value = index;
        loop {
            value = self.network(value);
            if value < self.len || self.len == 0 {
                return value;
            }
        }
    }

    fn network(&self, value: u64) -> u64 {
        let mask = u64::MAX >> (u64::BITS - self.half_bits);
        let (mut left, mut right) = (value >> self.half_bits & mask, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each output bit depends on every input bit.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The shape of a job's batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShape {
    /// T, tokens of a sample.
    pub sequence_length: usize,
    /// Samples of one update.
    pub global_batch: usize,
    /// B, samples of one micro-batch; divides `global_batch`.
    pub micro_batch: usize,
    /// Token ids must be below this.
    pub vocabulary: u32,
}

impl BatchShape {
    fn check(&self) -> Result<()> {
        if self.sequence_length == 0 || self.micro_batch == 0 || self.global_batch == 0 {
            return Err(DataError::Shape("sequence length, global batch and micro-batch must be at least 1".into()));
        }
        if !self.global_batch.is_multiple_of(self.micro_batch) {
            let Self { global_batch, micro_batch, .. } = self;
            let problem = format!("global batch {global_batch} is not a multiple of micro-batch {micro_batch}");
            return Err(DataError::Shape(problem));
        }
        Ok(())
    }

    fn samples(&self, data: &IndexedDataset, needed: u64) -> Result<u64> {
        let (tokens, sequence_length) = (data.len(), self.sequence_length);
        let samples = tokens.saturating_sub(1) / sequence_length as u64;
        if samples >= needed {
            return Ok(samples);
        }
        Err(DataError::TooSmall { path: data.path().to_owned(), tokens, samples, sequence_length, needed })
    }

    /// Fills one micro-batch with the samples that `pick` names.
    fn fill(
        &self,
        data: &IndexedDataset,
        pick: impl Fn(u64) -> u64,
        tokens: &mut [u32],
        targets: &mut [u32],
    ) -> Result<()> {
        let (rows, length) = (self.micro_batch, self.sequence_length);
        if tokens.len() != rows * length || targets.len() != rows * length {
            let (a, b) = (tokens.len(), targets.len());
            let problem = format!("buffers of {a} and {b} for {rows} samples of {length} tokens");
            return Err(DataError::Shape(problem));
        }
        let rows = tokens.chunks_exact_mut(length).zip(targets.chunks_exact_mut(length));
        for (row, (tokens, targets)) in rows.enumerate() {
            let start = pick(row as u64) * length as u64;
            data.read(start, self.vocabulary, tokens)?;
            // The targets are the same window one token on: all but its last are there already.
            targets[..length - 1].copy_from_slice(&tokens[1..]);
            data.read(start + length as u64, self.vocabulary, &mut targets[length - 1..])?;
        }
        Ok(())
    }
}

/// A training set's batches.
#[derive(Debug, Clone)]
pub struct Batches {
    data: Arc<IndexedDataset>,
    shape: BatchShape,
    samples: u64,
    seed: u64,
}

impl Batches {
    /// The batches of a dataset; an error if it has not a single sample.
    pub fn new(data: Arc<IndexedDataset>, shape: BatchShape, seed: u64) -> Result<Self> {
        shape.check()?;
        let samples = shape.samples(&data, 1)?;
        Ok(Self { data, shape, samples, seed })
    }

    /// S, the samples of one epoch.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Fills micro-batch `m` of the update that takes the state from `step` to `step + 1`: B rows of T tokens each, and
    /// for each the token that follows it.
    pub fn micro_batch(&self, step: Step, m: usize, tokens: &mut [u32], targets: &mut [u32]) -> Result<()> {
        let cursor = u128::from(step.get()) * self.shape.global_batch as u128;
        match u64::try_from(cursor) {
            Ok(cursor) => self.micro_batch_at(cursor, m, tokens, targets),
            Err(_) => Err(DataError::Shape(format!("step {step} is beyond the range of samples"))),
        }
    }

    /// As [`Batches::micro_batch`], for an update whose first sample is the job's `cursor`-th: what a job that has left
    /// samples out goes by.
    pub fn micro_batch_at(&self, cursor: u64, m: usize, tokens: &mut [u32], targets: &mut [u32]) -> Result<()> {
        let micro_batches = self.shape.global_batch / self.shape.micro_batch;
        let first = cursor.checked_add((m * self.shape.micro_batch) as u64);
        let Some(first) = first.filter(|first| m < micro_batches && *first <= u64::MAX - self.shape.micro_batch as u64)
        else {
            return Err(DataError::Shape(format!("there is no micro-batch {m} at sample {cursor}")));
        };
        let order = Permutation::new(self.samples, self.seed, first / self.samples);
        let pick = |row| {
            let (epoch, place) = ((first + row) / self.samples, (first + row) % self.samples);
            if epoch == first / self.samples {
                order.apply(place)
            } else {
                Permutation::new(self.samples, self.seed, epoch).apply(place)
            }
        };
        self.shape.fill(&self.data, pick, tokens, targets)
    }
}

/// A held-out set's batches, in file order.
#[derive(Debug, Clone)]
pub struct ValidationBatches {
    data: Arc<IndexedDataset>,
    shape: BatchShape,
    micro_batches: usize,
}

impl ValidationBatches {
    /// The first `sequences` samples of a dataset, as far as they go and fill micro-batches; an error if not even one
    /// is filled.
    pub fn new(data: Arc<IndexedDataset>, shape: BatchShape, sequences: usize) -> Result<Self> {
        shape.check()?;
        let samples = shape.samples(&data, shape.micro_batch as u64)?;
        let samples = usize::try_from(samples).unwrap_or(usize::MAX).min(sequences.max(shape.micro_batch));
        Ok(Self { data, shape, micro_batches: samples / shape.micro_batch })
    }

    /// How many micro-batches one validation has; at least one.
    pub fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    /// Fills micro-batch `m`, as [`Batches::micro_batch`] does.
    pub fn micro_batch(&self, m: usize, tokens: &mut [u32], targets: &mut [u32]) -> Result<()> {
        if m >= self.micro_batches {
            let problem = format!("there is no validation micro-batch {m} among {}", self.micro_batches);
            return Err(DataError::Shape(problem));
        }
        let first = (m * self.shape.micro_batch) as u64;
        self.shape.fill(&self.data, |row| first + row, tokens, targets)
    }
}
