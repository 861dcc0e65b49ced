//! A small job to save and load.

use bytes::Bytes;
use checkpoint_store::*;
use proto::ids::{Epoch, Generation, JobName, Step, WorldSize};
use uuid::Uuid;

pub(crate) const EPOCH: Epoch = Epoch::new(1);

pub(crate) fn job() -> JobName {
    JobName::new("tiny").unwrap()
}

pub(crate) fn world(n: u32) -> WorldSize {
    WorldSize::new(n).unwrap()
}

/// Tensors of awkward sizes over `sizes`.
pub(crate) fn space(sizes: &[u64]) -> Space {
    let tensor = |(i, &n): (usize, &u64)| {
        let shape = if n % 2 == 0 { vec![2, n / 2] } else { vec![n] };
        TensorDecl { name: format!("model.layers.{i}.weight"), shape, dtype: Dtype::F32 }
    };
    Space::new(sizes.iter().enumerate().map(tensor).collect()).unwrap()
}

pub(crate) fn medium() -> Space {
    space(&[100_000, 7, 65_536, 150_001, 33_333])
}

/// The bytes of a state at a step: arbitrary, and different everywhere.
pub(crate) fn values(space: &Space, state: usize, step: u64) -> Vec<u8> {
    let mix = |i: u64| (i ^ step << 40 ^ (state as u64) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (0..space.elements()).flat_map(|i| (mix(i) as u32).to_le_bytes()).collect()
}

pub(crate) fn submitted() -> Record {
    let event = Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
    Record::new(EPOCH, Generation::ZERO, event)
}

pub(crate) fn formed(generation: u64, size: u32, start: Option<CheckpointRef>) -> Record {
    let generation = Generation::new(generation);
    let (identity, fingerprint) = ("cpu".into(), "data".into());
    let event = Event::Generation {
        generation,
        world_size: world(size),
        members: vec![],
        start,
        memory: None,
        identity,
        fingerprint,
    };
    Record::new(EPOCH, generation, event)
}

/// A chain with one generation of `size` workers.
pub(crate) async fn running(store: &Store, size: u32) -> Chain {
    let mut chain = Chain::create(store, &job(), submitted()).await.unwrap();
    chain.append(formed(1, size, None)).await.unwrap();
    chain
}

pub(crate) fn scalar(step: u64) -> ScalarState {
    ScalarState { step: Step::new(step), cursor: step * 16, ..ScalarState::start(7, 1000) }
}

/// Uploads all shards and returns the receipts.
pub(crate) async fn receipts(store: &Store, space: &Space, generation: u64, size: u32, step: u64) -> Vec<Receipt> {
    let all: Vec<_> = (0..3).map(|state| values(space, state, step)).collect();
    let mut receipts = vec![];
    for rank in world(size).ranks() {
        let shard = space.shard(rank, world(size));
        let part = |(decl, all): (StateDecl, &Vec<u8>)| {
            let bytes = Bytes::copy_from_slice(&all[shard.start as usize * 4..shard.end as usize * 4]);
            let hashes = HashList(hash_blocks(&bytes, space.block_elements(), Dtype::F32));
            ShardState { decl, bytes, hashes }
        };
        let source = ShardSource {
            job: job(),
            space: space.clone(),
            generation: Generation::new(generation),
            rank,
            world_size: world(size),
            scalar: scalar(step),
            states: StateDecl::adamw().into_iter().zip(&all).map(part).collect(),
        };
        let receipt = upload_shard(store, &source, Uuid::new_v4()).await.unwrap();
        assert_eq!(Receipt::from_bytes(&receipt.to_bytes().unwrap()).unwrap(), receipt);
        receipts.push(receipt);
    }
    receipts
}

/// A whole save by the chain's present generation.
pub(crate) async fn save(chain: &mut Chain, space: &Space, step: u64) -> CheckpointRef {
    let size = chain.history().world_size.unwrap().get();
    let generation = chain.history().generation.get();
    let receipts = receipts(&chain.store().clone(), space, generation, size, step).await;
    let manifest = Manifest::assemble(space, scalar(step), receipts).unwrap();
    commit(chain, &manifest, EPOCH, Uuid::new_v4()).await.unwrap()
}

/// Loads all of it as `size` ranks do and compares every byte.
pub(crate) async fn expect_loads(store: &Store, checkpoint: &CheckpointRef, space: &Space, size: u32) {
    let manifest = open_checkpoint(store, &job(), checkpoint).await.unwrap();
    for (state, name) in ["param", "exp_avg", "exp_avg_sq"].into_iter().enumerate() {
        let expected = values(space, state, checkpoint.step.get());
        for rank in world(size).ranks() {
            let shard = space.shard(rank, world(size));
            let mut bytes = vec![0; 4 * (shard.end - shard.start) as usize];
            read_range(store, &manifest, name, shard.clone(), &mut bytes).await.unwrap();
            assert!(
                bytes == expected[shard.start as usize * 4..shard.end as usize * 4],
                "{name} rank {rank} of {size}"
            );
        }
    }
}
