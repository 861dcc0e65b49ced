//! A job's indexed datasets as a source of micro-batches.

use std::path::Path;
use std::sync::Arc;

use proto::ids::Step;
use proto::spec::JobSpec;

use crate::data::{BatchShape, Batches, DataError, Fingerprint, IndexedDataset, SCAN_LIMIT, ValidationBatches};
use crate::feed::{FeedError, Source};

/// The training set and, where the job validates, the held-out set.
struct Datasets {
    training: Batches,
    held_out: Option<ValidationBatches>,
    fingerprint: String,
}

/// Opens and checks the data of a job. Every token of a set of ordinary size is checked against the vocabulary here;
/// those of a very large one when they are read.
pub fn open(spec: &JobSpec) -> Result<Box<dyn Source>, DataError> {
    let shape = BatchShape {
        sequence_length: spec.training.sequence_length,
        global_batch: spec.training.global_batch,
        micro_batch: spec.training.micro_batch,
        vocabulary: u32::try_from(spec.model.vocab_size).unwrap_or(u32::MAX),
    };
    let training = open_set(&spec.data.train, shape.vocabulary)?;
    let mut fingerprint = Fingerprint::of(&training).to_string();
    let training = Batches::new(training, shape, spec.training.seed)?;
    let held_out = match &spec.data.validation {
        None => None,
        Some(prefix) => {
            let set = open_set(prefix, shape.vocabulary)?;
            fingerprint = format!("{fingerprint}+{}", Fingerprint::of(&set));
            Some(ValidationBatches::new(set, shape, spec.training.validate_sequences)?)
        }
    };
    Ok(Box::new(Datasets { training, held_out, fingerprint }))
}

fn open_set(prefix: &str, vocabulary: u32) -> Result<Arc<IndexedDataset>, DataError> {
    let set = IndexedDataset::open(Path::new(prefix))?;
    if set.len() <= SCAN_LIMIT {
        set.check_vocabulary(vocabulary)?;
    }
    Ok(Arc::new(set))
}

fn boxed(error: DataError) -> FeedError {
    FeedError(Box::new(error))
}

impl Source for Datasets {
    fn micro_batch(&self, step: u64, m: usize, tokens: &mut [u32], targets: &mut [u32]) -> Result<(), FeedError> {
        // The data counts updates from the state they start at, the trainer by the state they lead to.
        let from = Step::new(step.saturating_sub(1));
        self.training.micro_batch(from, m, tokens, targets).map_err(boxed)
    }

    fn validation_units(&self) -> usize {
        self.held_out.as_ref().map_or(0, ValidationBatches::micro_batches)
    }

    fn validation_unit(&self, unit: usize, tokens: &mut [u32], targets: &mut [u32]) -> Result<(), FeedError> {
        match &self.held_out {
            Some(set) => set.micro_batch(unit, tokens, targets).map_err(boxed),
            None => Ok(()), // there are no units to ask for
        }
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}
