//! Samples of a verification, the differences of two checkpoints, and collections that read each manifest once.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use checkpoint_store::*;
use proto::ids::{Generation, Step, WorldSize};

use crate::support::*;

/// Saves a step whose parameters are `param` and whose moments are zero.
async fn save_values(chain: &mut Chain, space: &Space, step: u64, param: &[f32]) -> CheckpointRef {
    let size = WorldSize::new(2).unwrap();
    let zeros = vec![0.0; param.len()];
    let mut receipts = vec![];
    for rank in size.ranks() {
        let shard = space.shard(rank, size);
        let part = |(decl, values): (StateDecl, &[f32])| {
            let own = &values[shard.start as usize..shard.end as usize];
            let bytes: Bytes = own.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into();
            let hashes = HashList(hash_blocks(&bytes, space.block_elements(), Dtype::F32));
            ShardState { decl, bytes, hashes }
        };
        let states = StateDecl::adamw().into_iter().zip([param, &zeros, &zeros]).map(part).collect();
        let source = ShardSource {
            job: job(),
            space: space.clone(),
            generation: Generation::new(1),
            rank,
            world_size: size,
            scalar: scalar(step),
            states,
        };
        receipts.push(upload_shard(chain.store(), &source, uuid::Uuid::new_v4()).await.unwrap());
    }
    let manifest = Manifest::assemble(space, scalar(step), receipts).unwrap();
    commit(chain, &manifest, EPOCH, uuid::Uuid::new_v4()).await.unwrap()
}

#[tokio::test]
async fn a_difference_reads_only_the_blocks_that_differ_and_counts_exactly() {
    let store = Store::memory();
    let space = medium();
    let mut chain = running(&store, 2).await;
    let mut values: Vec<f32> = (0..space.elements()).map(|i| (i % 1000) as f32).collect();
    let first = save_values(&mut chain, &space, 10, &values).await;
    // One element of the first tensor, three of the fourth, one of them no number any more.
    let fourth = space.tensor_range(3).start as usize;
    values[5] += 3.0;
    values[fourth + 70_000] += 0.5;
    values[fourth + 70_001] -= 4.0;
    values[fourth + 70_002] = f32::NAN;
    let second = save_values(&mut chain, &space, 20, &values).await;
    let a = open_checkpoint(&store, &job(), &first).await.unwrap();
    let b = open_checkpoint(&store, &job(), &second).await.unwrap();
    let (left, right) = (Side { store: &store, manifest: &a }, Side { store: &store, manifest: &b });
    let last = AtomicU64::new(0);
    let report = diff(left, right, &|done, total| last.store(done * 1000 / total, Ordering::Relaxed)).await.unwrap();
    assert_eq!(last.into_inner(), 1000);
    assert!(!report.equal && report.only_a.is_empty() && report.only_b.is_empty());
    assert_eq!(report.scalars.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["cursor", "step"]);
    assert_eq!(report.compared, 15);
    let names: Vec<_> = report.tensors.iter().map(|t| (t.state.as_str(), t.tensor.as_str(), t.differing)).collect();
    assert_eq!(names, [("param", "model.layers.0.weight", 1), ("param", "model.layers.3.weight", 3)]);
    let (one, three) = (&report.tensors[0], &report.tensors[1]);
    assert_eq!((one.max_abs, one.not_finite, one.elements), (3.0, 0, 100_000));
    assert_eq!(one.rms, (9.0f64 / 100_000.0).sqrt());
    assert_eq!((three.max_abs, three.not_finite), (4.0, 1));
    assert_eq!(three.rms, (16.25f64 / 150_001.0).sqrt());
    // Two blocks of 2^16 elements on each side, whatever tensors they hold.
    assert!(report.bytes_read <= 2 * 2 * 4 * 65_536, "{}", report.bytes_read);

    let same = diff(left, left, &|_, _| panic!("nothing is read")).await.unwrap();
    assert!(same.equal && same.tensors.is_empty() && same.bytes_read == 0);
}

#[tokio::test]
async fn models_of_other_shapes_are_compared_by_name() {
    let (store, other) = (Store::memory(), Store::memory());
    let (mut here, mut there) = (running(&store, 2).await, running(&other, 2).await);
    let (small, large) = (space(&[1000, 70_001, 8]), space(&[1000, 70_001, 10, 5]));
    let zeros = |space: &Space| vec![0f32; space.elements() as usize];
    let mut changed = zeros(&large);
    changed[1_500] = 2.0;
    let first = save_values(&mut here, &small, 10, &zeros(&small)).await;
    let second = save_values(&mut there, &large, 10, &changed).await;
    let a = open_checkpoint(&store, &job(), &first).await.unwrap();
    let b = open_checkpoint(&other, &job(), &second).await.unwrap();
    let (left, right) = (Side { store: &store, manifest: &a }, Side { store: &other, manifest: &b });
    let report = diff(left, right, &|_, _| {}).await.unwrap();
    assert_eq!(report.compared, 6);
    assert_eq!(report.only_a.len(), 3, "{:?}", report.only_a);
    assert_eq!(report.only_b.len(), 6, "{:?}", report.only_b);
    assert_eq!(report.tensors.len(), 1);
    assert_eq!((report.tensors[0].tensor.as_str(), report.tensors[0].max_abs), ("model.layers.1.weight", 2.0));
}

#[tokio::test]
async fn a_sample_is_a_function_of_its_seed_and_finds_damage_where_it_looks() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&normalize_url("store", folder.path()).unwrap()).unwrap();
    let space = space(&[65_536 * 20]);
    let mut chain = running(&store, 2).await;
    let checkpoint = save(&mut chain, &space, 10).await;
    let sample = |share, seed| Sample { share, seed };
    let read = AtomicU64::new(0);
    let count = |bytes: u64| {
        read.fetch_add(bytes, Ordering::Relaxed);
    };
    let full = verify_sample(&store, &job(), &checkpoint, Sample::ALL, &count).await.unwrap();
    assert_eq!((full.proved, full.blocks, full.share()), (60, 60, 1.0));
    assert_eq!(read.swap(0, Ordering::Relaxed), 60 * 4 * 65_536);
    let some = verify_sample(&store, &job(), &checkpoint, sample(0.2, 7), &count).await.unwrap();
    assert!(some.is_good() && (3..30).contains(&some.proved), "{}", some.proved);
    assert_eq!(read.swap(0, Ordering::Relaxed), some.proved * 4 * 65_536);
    let again = verify_sample(&store, &job(), &checkpoint, sample(0.2, 7), &|_| {}).await.unwrap();
    assert_eq!(again.proved, some.proved);
    let least = verify_sample(&store, &job(), &checkpoint, sample(1e-12, 7), &|_| {}).await.unwrap();
    assert_eq!(least.proved, 3, "one block of each state");
    for share in [0.0, -1.0, f64::NAN] {
        assert!(verify_sample(&store, &job(), &checkpoint, sample(share, 7), &|_| {}).await.is_err());
    }
    // Damage one block: the samples that choose it say so, the others do not, and the whole finds it.
    let path = folder.path().join("store").join(&full.manifest.objects[1].path);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() - 10;
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(!verify(&store, &job(), &checkpoint).await.unwrap().is_good());
    let mut found = 0;
    for seed in 0..40 {
        found +=
            u32::from(!verify_sample(&store, &job(), &checkpoint, sample(0.1, seed), &|_| {}).await.unwrap().is_good());
    }
    assert!((1..30).contains(&found), "{found} of 40 samples of a tenth found one damaged block");
}

#[tokio::test]
async fn a_collection_reads_each_manifest_once() {
    let memory = std::sync::Arc::new(object_store::memory::InMemory::new());
    let store = Store::from_object_store("memory://", memory);
    let space = space(&[10]);
    let mut chain = running(&store, 1).await;
    for step in 1..=40 {
        save(&mut chain, &space, step).await;
    }
    let mut collector = Collector::default();
    let open = BTreeSet::new();
    let policy = Policy::last(30);
    let done = collector.collect(&mut chain, EPOCH, &policy, Open::Steps(&open)).await.unwrap();
    assert_eq!((done.deleted.len(), done.files), (10, 20));
    // All manifests but the newest are damaged now. What was read before is not read again.
    for c in chain.history().checkpoints.clone() {
        let path = layout::manifest(&job(), &c.checkpoint.manifest);
        store.delete(&path).await.unwrap();
        store.create(&path, "damaged".into()).await.unwrap();
    }
    save(&mut chain, &space, 41).await;
    let done = collector.collect(&mut chain, EPOCH, &policy, Open::Steps(&open)).await.unwrap();
    assert_eq!((done.deleted.len(), done.files), (1, 2));
    assert!(Collector::default().sweep(&chain, Open::After(Step::ZERO)).await.is_err(), "a new one reads, and stops");
}
