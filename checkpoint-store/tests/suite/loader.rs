//! The loader reads what was asked for, no more than it may, and says what it did.

use std::sync::Arc;

use checkpoint_store::*;
use object_store::memory::InMemory;

use crate::counting::Counting;
use crate::support::*;

/// The states by name, with memory for a range.
async fn load(
    store: &Store,
    manifest: &Manifest,
    range: std::ops::Range<u64>,
    states: &[&str],
) -> (Vec<Vec<u8>>, LoadReport) {
    let bytes = 4 * (range.end - range.start) as usize;
    let mut memory = vec![vec![0u8; bytes]; states.len()];
    let mut targets: Vec<_> = states.iter().copied().zip(memory.iter_mut().map(Vec::as_mut_slice)).collect();
    let report = Loader::new(store, manifest).load(range, &mut targets).await.unwrap();
    (memory, report)
}

const STATES: [&str; 3] = ["param", "exp_avg", "exp_avg_sq"];

/// Loads the shards of `size` ranks and compares every byte; returns bytes read over bytes needed.
async fn expect_shards(store: &Store, manifest: &Manifest, space: &Space, size: u32) -> f64 {
    let (mut read, mut needed) = (0, 0);
    for rank in world(size).ranks() {
        let shard = space.shard(rank, world(size));
        let (memory, report) = load(store, manifest, shard.clone(), &STATES).await;
        for (state, bytes) in memory.iter().enumerate() {
            let all = values(space, state, manifest.step.get());
            assert!(*bytes == all[shard.start as usize * 4..shard.end as usize * 4], "{state} of rank {rank}");
        }
        assert_eq!(report.verify.bytes, report.bytes_needed, "every byte is verified, once");
        read += report.bytes_read;
        needed += report.bytes_needed;
    }
    assert_eq!(needed, space.elements() * 12);
    read as f64 / needed as f64
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_of_any_size_load_from_any_other_reading_what_they_need() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Store::open(&normalize_url("store", folder.path()).unwrap()).unwrap();
    let space = space(&[700_000, 7, 300_001, 65_536]);
    for store in [disk, Store::memory()] {
        for (saved_at, loaded_at) in [(4, 3), (8, 3), (3, 8), (1, 1)] {
            let mut chain = match Chain::load(&store, &job()).await.unwrap() {
                None => running(&store, saved_at).await,
                Some(mut chain) => {
                    let next = chain.history().generation.get() + 1;
                    chain.append(formed(next, saved_at, None)).await.unwrap();
                    chain
                }
            };
            let checkpoint = save(&mut chain, &space, 10 * u64::from(saved_at)).await;
            let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
            let ratio = expect_shards(&store, &manifest, &space, loaded_at).await;
            assert!((1.0..=1.05).contains(&ratio), "{saved_at} to {loaded_at}: {ratio}");
        }
    }
}

/// A range off the blocks' edges, from a runtime of one thread.
#[tokio::test]
async fn a_range_within_blocks_costs_its_edges_only() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&normalize_url("store", folder.path()).unwrap()).unwrap();
    let space = space(&[1_000_000]);
    let mut chain = running(&store, 3).await;
    let checkpoint = save(&mut chain, &space, 10).await;
    let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
    let range = 65_537..900_001;
    let (memory, report) = load(&store, &manifest, range.clone(), &STATES).await;
    for (state, bytes) in memory.iter().enumerate() {
        assert!(*bytes == values(&space, state, 10)[range.start as usize * 4..range.end as usize * 4]);
    }
    let whole_blocks = (14 - 1) * 3 * 65_536 * 4;
    assert_eq!(report.bytes_needed, 12 * (range.end - range.start));
    // From a disk whole pages may come along.
    assert!(
        (whole_blocks..=whole_blocks * 105 / 100 + 8_192 * report.requests).contains(&report.bytes_read),
        "{report:?}"
    );
    let mut memory = vec![0; 4 * (range.end - range.start) as usize];
    let mut targets = [("param", memory.as_mut_slice())];
    let exact = Loader::new(&store, &manifest).over_read(1.0).load(range, &mut targets).await.unwrap();
    assert!((whole_blocks / 3..=whole_blocks / 3 + 8_192 * exact.requests).contains(&exact.bytes_read), "{exact:?}");
}

#[tokio::test]
async fn weights_alone_touch_the_weights_alone() {
    let counting = Arc::new(Counting::new(InMemory::new()));
    let store = Store::from_object_store("memory://counted", counting.clone());
    let space = medium();
    let mut chain = running(&store, 3).await;
    let checkpoint = save(&mut chain, &space, 10).await;
    let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
    counting.take();
    let (memory, report) = load(&store, &manifest, 0..space.elements(), &["param"]).await;
    assert!(memory[0] == values(&space, 0, 10));
    let (requests, bytes) = counting.take();
    assert_eq!((requests, bytes), (report.requests, report.bytes_read));
    assert_eq!(bytes, space.elements() * 4);
    assert!(requests <= 3, "one for each object: {requests}");
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_and_loss_are_named_and_nothing_wrong_is_handed_out() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&normalize_url("store", folder.path()).unwrap()).unwrap();
    let space = space(&[1_000_000]);
    let mut chain = running(&store, 1).await;
    let checkpoint = save(&mut chain, &space, 10).await;
    let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
    let path = folder.path().join("store").join(&manifest.objects[0].path);
    let good = std::fs::read(&path).unwrap();
    let error = async || {
        let mut memory = vec![0; 4_000_000];
        let mut targets = [("exp_avg", memory.as_mut_slice())];
        Loader::new(&store, &manifest).load(0..1_000_000, &mut targets).await.unwrap_err()
    };
    let mut bad = good.clone();
    let at = manifest.objects[0].extents[1].offset as usize + 65_536 * 4 * 3 + 5;
    bad[at] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    let damaged = error().await;
    assert!(damaged.to_string().contains("element 196608 of the model"), "{damaged}");
    std::fs::write(&path, &good[..at]).unwrap();
    let short = error().await;
    assert!(short.kind() == Kind::Corrupt && short.to_string().contains("is short"), "{short}");
    std::fs::remove_file(&path).unwrap();
    let missing = error().await;
    assert!(missing.kind() == Kind::Corrupt && missing.to_string().contains("is missing"), "{missing}");
}
