//! Batches are a pure function of (seed, step), and an epoch has every sample once.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use proto::ids::Step;
use worker::data::{
    BatchShape, Batches, DataError, ElementType, IndexedDataset, IndexedWriter, Permutation, ValidationBatches,
};

const SHAPE: BatchShape = BatchShape { sequence_length: 4, global_batch: 6, micro_batch: 2, vocabulary: 1000 };

/// A dataset of the tokens 0, 1, 2, … in two documents.
fn counting(folder: &Path, tokens: u32) -> Arc<IndexedDataset> {
    let prefix = folder.join("counting");
    let mut writer = IndexedWriter::create(&prefix, ElementType::U16).unwrap();
    writer.push(&(0..tokens / 3).collect::<Vec<_>>()).unwrap();
    writer.end_document();
    writer.push(&(tokens / 3..tokens).collect::<Vec<_>>()).unwrap();
    writer.finish().unwrap();
    Arc::new(IndexedDataset::open(&prefix).unwrap())
}

fn starts(batches: &Batches, step: u64) -> Vec<u32> {
    let (mut tokens, mut targets) = ([0; 8], [0; 8]);
    let mut out = Vec::new();
    for m in 0..3 {
        batches.micro_batch(Step::new(step), m, &mut tokens, &mut targets).unwrap();
        for row in 0..2 {
            let row = row * 4..row * 4 + 4;
            let first = tokens[row.start];
            assert!(tokens[row.clone()].iter().zip(first..).all(|(token, want)| *token == want));
            assert!(targets[row].iter().zip(first + 1..).all(|(token, want)| *token == want));
            out.push(first);
        }
    }
    out
}

#[test]
fn each_epoch_has_each_sample_once_in_an_order_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    // 42 tokens make 10 samples (one token is over): an update of 6 spans epochs.
    let batches = Batches::new(counting(folder.path(), 42), SHAPE, 7).unwrap();
    assert_eq!(batches.samples(), 10);
    let stream: Vec<u32> = (0..10).flat_map(|step| starts(&batches, step)).collect();
    let epochs: Vec<&[u32]> = stream.chunks(10).collect();
    for epoch in &epochs {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).map(|sample| sample * 4).collect::<Vec<_>>());
    }
    assert!(epochs.windows(2).any(|pair| pair[0] != pair[1]));
    let again = Batches::new(counting(folder.path(), 42), SHAPE, 7).unwrap();
    assert_eq!(starts(&again, 3), starts(&batches, 3));
    let other = Batches::new(counting(folder.path(), 42), SHAPE, 8).unwrap();
    assert!((0..10).any(|step| starts(&other, step) != starts(&batches, step)));
}

#[test]
fn a_cursor_is_a_step_that_may_be_shifted() {
    let folder = tempfile::tempdir().unwrap();
    let batches = Batches::new(counting(folder.path(), 42), SHAPE, 7).unwrap();
    let (mut a, mut b, mut targets) = ([0; 8], [0; 8], [0; 8]);
    batches.micro_batch(Step::new(3), 1, &mut a, &mut targets).unwrap();
    batches.micro_batch_at(18, 1, &mut b, &mut targets).unwrap();
    assert_eq!(a, b);
    batches.micro_batch_at(20, 0, &mut b, &mut targets).unwrap();
    assert_eq!(a, b, "the same samples, two further on");
    assert!(batches.micro_batch(Step::new(0), 3, &mut a, &mut targets).is_err());
    assert!(batches.micro_batch(Step::new(u64::MAX), 0, &mut a, &mut targets).is_err());
    assert!(batches.micro_batch_at(u64::MAX, 0, &mut a, &mut targets).is_err());
    assert!(batches.micro_batch(Step::new(0), 0, &mut a[..7], &mut targets).is_err());
}

#[test]
fn validation_goes_in_file_order() {
    let folder = tempfile::tempdir().unwrap();
    let data = counting(folder.path(), 42);
    for (sequences, micro_batches) in [(4, 2), (5, 2), (1, 1), (1000, 5)] {
        let validation = ValidationBatches::new(Arc::clone(&data), SHAPE, sequences).unwrap();
        assert_eq!(validation.micro_batches(), micro_batches, "{sequences}");
    }
    let validation = ValidationBatches::new(data, SHAPE, 100).unwrap();
    let (mut tokens, mut targets) = ([0; 8], [0; 8]);
    validation.micro_batch(1, &mut tokens, &mut targets).unwrap();
    assert_eq!((tokens, targets), ([8, 9, 10, 11, 12, 13, 14, 15], [9, 10, 11, 12, 13, 14, 15, 16]));
    assert!(validation.micro_batch(5, &mut tokens, &mut targets).is_err());
}

#[test]
fn too_little_text_and_impossible_shapes_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let error = Batches::new(counting(folder.path(), 4), SHAPE, 7).unwrap_err();
    assert!(error.to_string().contains("4 tokens make 0 samples of 4"), "{error}");
    assert!(Batches::new(counting(folder.path(), 5), SHAPE, 7).is_ok(), "five tokens are one sample");
    let error = ValidationBatches::new(counting(folder.path(), 8), SHAPE, 8).unwrap_err();
    assert!(error.to_string().contains("2 are needed"), "{error}");
    for shape in [
        BatchShape { sequence_length: 0, ..SHAPE },
        BatchShape { micro_batch: 0, ..SHAPE },
        BatchShape { global_batch: 0, ..SHAPE },
        BatchShape { global_batch: 5, ..SHAPE },
    ] {
        let error = Batches::new(counting(folder.path(), 42), shape, 7).unwrap_err();
        assert!(matches!(error, DataError::Shape(_)), "{error}");
    }
}

#[test]
fn a_token_beyond_the_vocabulary_stops_the_batch_that_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let shape = BatchShape { vocabulary: 41, ..SHAPE };
    let validation = ValidationBatches::new(counting(folder.path(), 42), shape, 100).unwrap();
    let (mut tokens, mut targets) = ([0; 8], [0; 8]);
    assert!(validation.micro_batch(0, &mut tokens, &mut targets).is_ok());
    let shape = BatchShape { vocabulary: 16, ..SHAPE };
    let validation = ValidationBatches::new(counting(folder.path(), 42), shape, 100).unwrap();
    let error = validation.micro_batch(1, &mut tokens, &mut targets).unwrap_err().to_string();
    assert!(error.contains("document 1, token 2: id 16"), "{error}");
}

proptest! {
    #[test]
    fn the_order_is_a_bijection(len in 1_u64..5000, seed: u64, epoch: u64) {
        let order = Permutation::new(len, seed, epoch);
        let mut seen = vec![false; len as usize];
        for index in 0..len {
            let at = order.apply(index);
            prop_assert!(at < len && !seen[at as usize]);
            seen[at as usize] = true;
        }
    }

    #[test]
    fn large_orders_stay_inside(len in 1_u64.., seed: u64, index: u64) {
        prop_assert!(Permutation::new(len, seed, 0).apply(index % len) < len);
    }
}

#[test]
fn the_order_looks_random() {
    // Neighbours stay neighbours about as often as chance has it (1 in 10,000), and places are spread evenly.
    let order = Permutation::new(10_000, 1, 0);
    let mapped: Vec<u64> = (0..10_000).map(|index| order.apply(index)).collect();
    assert!(mapped.windows(2).filter(|pair| pair[1] == pair[0] + 1).count() < 10);
    assert!(mapped.iter().zip(0..).filter(|(at, index)| **at == *index).count() < 10);
    let low = mapped[..1000].iter().filter(|at| **at < 5000).count();
    assert!((400..600).contains(&low), "{low} of 1000 in the lower half");
}
