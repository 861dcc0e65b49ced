//! The one small message of a step: what each rank found, gathered by all.
//!
//! Losses of its micro-batches, squared norms of its blocks, whether it was asked to stop, its word on the next
//! capture, how fast it is, the magnitudes of its gradients, and the first number it could not use. Encoded
//! little-endian: flags, three counts, the capture's numbers, the pace, the values, the magnitudes, the fault's text.
//! What a peer sends is checked: the data plane is authenticated, but a length is never believed.

use crate::collective::{Collective, CollectiveError};
use crate::exact::GradientFault;
use crate::machine::cadence::Wish;
use crate::machine::kept::{OPEN, Steps};

/// The longest fault text that travels.
const LONGEST_FAULT: usize = 1024;
/// Flags, three counts, the numbers of the capture, the pace, and the grids' name.
const HEAD: usize = 1 + 4 + 4 + 4 + 4 + 4 + 8 * 2 * OPEN + 4 + 8;
/// Flags: asked to stop, a fault, ready to capture.
const STOP: u8 = 1;
const FAULT: u8 = 2;
const READY: u8 = 4;

/// A number that ends the job.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Fault {
    /// The loss itself.
    #[error("the loss of micro-batch {micro_batch} is {loss}; lower the learning rate, or check the data")]
    Loss {
        /// Which micro-batch of the step.
        micro_batch: usize,
        /// Its loss.
        loss: f64,
    },
    /// An element of the gradient.
    #[error("micro-batch {micro_batch}, tensor {tensor}: {fault}")]
    Gradient {
        /// Which micro-batch of the step.
        micro_batch: usize,
        /// The tensor the element belongs to.
        tensor: String,
        /// The element and its value.
        fault: GradientFault,
    },
}

/// What one rank found in a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Word {
    /// It was asked to stop.
    pub stop: bool,
    /// Whether and how often it can capture.
    pub wish: Wish,
    /// Seconds that one of its micro-batches took it, the exchange left out.
    pub pace: f32,
    /// The first number it could not use, in words.
    pub fault: Option<String>,
    /// Loss of each of its micro-batches, in order.
    pub losses: Vec<f64>,
    /// Squared norm of each of its blocks, in order.
    pub norms: Vec<f64>,
    /// Names the grids that it summed on, which must be everyone's; 0 where the grid is fixed.
    pub grids: u64,
    /// Largest magnitude it saw in each block of the whole space, where sums are on per-block grids.
    pub magnitudes: Vec<u8>,
}

impl Word {
    /// Notes a fault; the first one counts.
    pub fn fault(&mut self, fault: Fault) {
        if self.fault.is_none() {
            self.fault = Some(fault.to_string().chars().take(LONGEST_FAULT / 4).collect());
        }
    }

    /// Gives this rank's word and gets everyone's, in rank order.
    pub fn gather(mine: &Self, ring: &mut dyn Collective) -> Result<Vec<Self>, CollectiveError> {
        let all = ring.all_gather_bytes(&mine.encode())?;
        all.iter()
            .enumerate()
            .map(|(rank, bytes)| {
                Self::decode(bytes).ok_or_else(|| {
                    CollectiveError::Protocol(format!(
                        "rank {rank} sent {} bytes that are no step message",
                        bytes.len()
                    ))
                })
            })
            .collect()
    }

    fn encode(&self) -> Vec<u8> {
        let fault = self.fault.as_deref().unwrap_or_default();
        let mut out =
            Vec::with_capacity(HEAD + 8 * (self.losses.len() + self.norms.len()) + self.magnitudes.len() + fault.len());
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        out.push(flag(self.stop, STOP) | flag(self.fault.is_some(), FAULT) | flag(self.wish.ready, READY));
        let counts = [self.losses.len(), self.norms.len(), self.magnitudes.len()].map(|count| count as u32);
        for count in counts.into_iter().chain([self.wish.interval, self.wish.guard]) {
            out.extend_from_slice(&count.to_le_bytes());
        }
        self.wish.steps.numbers().iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        out.extend_from_slice(&self.pace.to_le_bytes());
        out.extend_from_slice(&self.grids.to_le_bytes());
        for value in self.losses.iter().chain(&self.norms) {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.magnitudes);
        out.extend_from_slice(fault.as_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (flags, rest) = bytes.split_first()?;
        let (losses, rest) = rest.split_first_chunk()?;
        let (norms, rest) = rest.split_first_chunk()?;
        let (magnitudes, rest) = rest.split_first_chunk()?;
        let (interval, rest) = rest.split_first_chunk()?;
        let (guard, rest) = rest.split_first_chunk()?;
        let (steps, rest) = rest.split_first_chunk::<{ 8 * 2 * OPEN }>()?;
        let (pace, rest) = rest.split_first_chunk()?;
        let (grids, rest) = rest.split_first_chunk()?;
        let (losses, norms) = (u32::from_le_bytes(*losses) as usize, u32::from_le_bytes(*norms) as usize);
        let length = losses.checked_add(norms)?.checked_mul(8).filter(|length| *length <= rest.len())?;
        let (values, rest) = rest.split_at(length);
        let (magnitudes, fault) = rest.split_at_checked(u32::from_le_bytes(*magnitudes) as usize)?;
        let known = *flags <= STOP | FAULT | READY;
        if !known || fault.len() > LONGEST_FAULT || (flags & FAULT == 0 && !fault.is_empty()) {
            return None;
        }
        let mut numbers = [0; 2 * OPEN];
        for (number, bytes) in numbers.iter_mut().zip(steps.as_chunks::<8>().0) {
            *number = u64::from_le_bytes(*bytes);
        }
        let mut values = values.as_chunks::<8>().0.iter().map(|value| f64::from_le_bytes(*value));
        Some(Self {
            stop: flags & STOP != 0,
            wish: Wish {
                ready: flags & READY != 0,
                interval: u32::from_le_bytes(*interval),
                guard: u32::from_le_bytes(*guard),
                steps: Steps::from_numbers(numbers),
            },
            pace: f32::from_le_bytes(*pace),
            losses: values.by_ref().take(losses).collect(),
            norms: values.collect(),
            grids: u64::from_le_bytes(*grids),
            magnitudes: magnitudes.to_vec(),
            fault: (flags & FAULT != 0).then(|| String::from_utf8_lossy(fault).into_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_word_reads_back() {
        let wish = Wish { ready: true, interval: 3, guard: u32::MAX, steps: Steps::of(&[1, 2], &[3, u64::MAX]) };
        let (losses, norms) = (vec![1.5, -0.0], vec![f64::MAX]);
        let mut word = Word {
            stop: true,
            wish,
            pace: 0.25,
            losses,
            norms,
            grids: 9,
            magnitudes: vec![0, 255, 7],
            ..Word::default()
        };
        assert_eq!(Word::decode(&word.encode()).as_ref(), Some(&word));
        let fault = GradientFault { element: 7, value: f32::INFINITY };
        word.fault(Fault::Gradient { micro_batch: 3, tensor: "lm_head.weight".into(), fault });
        word.fault(Fault::Loss { micro_batch: 4, loss: f64::NAN });
        assert!(word.fault.as_ref().is_some_and(|text| text.contains("lm_head.weight")));
        assert_eq!(Word::decode(&word.encode()).as_ref(), Some(&word));
        assert_eq!(Word::decode(&[]), None);
        assert_eq!(Word::decode(&[0, 255, 255, 255, 255, 255, 255, 255, 255, 1]), None);
        assert_eq!(Word::decode(&[[0; 1 + 4].as_slice(), &[255; 24], &[1]].concat()), None);
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_read_but_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Word::decode(&bytes);
        }
    }
}
