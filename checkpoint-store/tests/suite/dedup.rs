//! Deduplication: blocks that have not changed stay where they lie, and nothing is lost by it.

use std::collections::BTreeSet;

use bytes::Bytes;
use checkpoint_store::*;
use proptest::prelude::*;
use proto::ids::{Generation, Rank};
use uuid::Uuid;

use crate::support::*;

const BLOCK: u64 = 1 << 16;
const STATES: [&str; 2] = ["param", "exp_avg"];

/// A state is a number a block; a block's elements all hold it.
#[derive(Debug, Clone)]
struct Model {
    space: Space,
    values: [Vec<u32>; 2],
}

impl Model {
    /// Whole blocks and a short one, over two tensors that meet inside a block.
    fn new(blocks: u64) -> Self {
        let space = space(&[BLOCK * 3 + 17, BLOCK * (blocks - 4) + 30]);
        let count = space.blocks() as usize;
        assert_eq!(count as u64, blocks);
        Self { space, values: [(0..count as u32).collect(), (100..100 + count as u32).collect()] }
    }

    fn bytes(&self, state: usize, elements: std::ops::Range<u64>) -> Vec<u8> {
        elements.flat_map(|element| self.values[state][(element / BLOCK) as usize].to_le_bytes()).collect()
    }

    fn source(&self, rank: Rank, size: u32, generation: u64, step: u64) -> ShardSource {
        let shard = self.space.shard(rank, world(size));
        let state = |(index, name): (usize, &&str)| {
            let bytes = Bytes::from(self.bytes(index, shard.clone()));
            let hashes = HashList(hash_blocks(&bytes, BLOCK, Dtype::F32));
            ShardState { decl: StateDecl::f32(name), bytes, hashes }
        };
        ShardSource {
            job: job(),
            space: self.space.clone(),
            generation: Generation::new(generation),
            rank,
            world_size: world(size),
            scalar: scalar(step),
            states: STATES.iter().enumerate().map(state).collect(),
        }
    }

    /// All ranks upload what is not known; what they store makes a manifest.
    async fn upload(&self, chain: &Chain, step: u64, known: &KnownBlocks) -> (Manifest, Vec<Receipt>) {
        let (size, generation) = (chain.history().world_size.unwrap().get(), chain.history().generation.get());
        let mut receipts = vec![];
        for rank in world(size).ranks() {
            let source = self.source(rank, size, generation, step);
            let options = UploadOptions { known: Some(known), stages: &[] };
            let receipt = upload_changed(chain.store(), &source, Uuid::new_v4(), options).await.unwrap();
            receipts.push(Receipt::from_bytes(&receipt.to_bytes().unwrap()).unwrap());
        }
        (Manifest::assemble(&self.space, scalar(step), receipts.clone()).unwrap(), receipts)
    }

    async fn expect(&self, store: &Store, checkpoint: &CheckpointRef, size: u32) -> Manifest {
        let manifest = open_checkpoint(store, &job(), checkpoint).await.unwrap();
        for (index, name) in STATES.iter().enumerate() {
            for rank in world(size).ranks() {
                let shard = self.space.shard(rank, world(size));
                let mut bytes = vec![0; 4 * (shard.end - shard.start) as usize];
                read_range(store, &manifest, name, shard.clone(), &mut bytes).await.unwrap();
                assert!(bytes == self.bytes(index, shard), "{name} of rank {rank} of {size}");
            }
        }
        let report = verify(store, &job(), checkpoint).await.unwrap();
        assert_eq!(report.first_problem(), None);
        manifest
    }
}

async fn commit_now(chain: &mut Chain, manifest: &Manifest) -> Result<CheckpointRef, ChainError> {
    commit(chain, manifest, EPOCH, Uuid::new_v4()).await
}

async fn stored(store: &Store) -> BTreeSet<String> {
    let listed = store.list(&layout::objects(&job()), None, 10_000).await.unwrap();
    listed.into_iter().map(|object| object.path).collect()
}

fn learn(known: &mut KnownBlocks, model: &Model, receipts: &[Receipt]) {
    for receipt in receipts {
        known.learn(&model.space, receipt);
    }
}

/// One step of a job: how many workers from here on, and which blocks of which state change.
type Change = (u32, Vec<(usize, u64)>);

/// Plays a job, and after every step: any other size loads the state, and collection leaves just what is needed.
async fn play(changes: Vec<Change>) {
    let (store, mut model) = (Store::memory(), Model::new(14));
    let mut chain = running(&store, 2).await;
    let mut known = KnownBlocks::default().with_min_run(2 * BLOCK * 4);
    let (mut fresh, mut whole) = (0, 0);
    for (index, (size, changed)) in changes.into_iter().enumerate() {
        let step = index as u64 + 1;
        if chain.history().world_size != Some(world(size)) {
            let start = chain.history().newest_good().cloned();
            chain.append(formed(chain.history().generation.get() + 1, size, start)).await.unwrap();
        }
        for (state, block) in changed {
            let block = block as usize % model.values[state].len();
            model.values[state][block] += 1_000;
        }
        let (manifest, receipts) = model.upload(&chain, step, &known).await;
        let checkpoint = commit_now(&mut chain, &manifest).await.unwrap();
        learn(&mut known, &model, &receipts);
        fresh += receipts.iter().filter_map(|r| r.object.as_ref()).map(|o| o.bytes).sum::<u64>();
        whole += 2 * 4 * model.space.elements();
        let before = model.expect(&store, &checkpoint, size % 3 + 1).await;
        collect(&mut chain, EPOCH, 1, &BTreeSet::new()).await.unwrap();
        // What stays is the newest, and what the present generation started from.
        let mut needed: BTreeSet<String> = before.objects.iter().map(|o| o.path.clone()).collect();
        for kept in chain.history().checkpoints.clone() {
            let start = chain.history().start.as_ref().is_some_and(|start| *start == kept.checkpoint);
            assert!(kept.checkpoint == checkpoint || start, "step {} stays for no reason", kept.checkpoint.step);
            let manifest = open_checkpoint(&store, chain.job(), &kept.checkpoint).await.unwrap();
            needed.extend(manifest.objects.into_iter().map(|o| o.path));
        }
        assert_eq!(stored(&store).await, needed, "step {step}");
        model.expect(&store, &checkpoint, size).await;
        // What a whole save of the same state would have as its digest.
        let (plain, _) = model.upload(&chain, step, &KnownBlocks::default()).await;
        assert_eq!(plain.digest, manifest.digest);
        sweep(&chain, &BTreeSet::new()).await.unwrap();
    }
    assert!(fresh <= whole + (1 << 20), "deduplication never writes more: {fresh} of {whole}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn any_changes_at_any_size_load_and_collect(
        changes in proptest::collection::vec(
            (1u32..5, proptest::collection::vec((0usize..2, 0u64..14), 0..6)), 2..6)
    ) {
        tokio::runtime::Runtime::new().unwrap().block_on(play(changes));
    }
}

#[tokio::test]
async fn an_unchanged_shard_writes_nothing_and_a_frozen_state_stays_where_it_is() {
    let (store, mut model) = (Store::memory(), Model::new(14));
    let mut chain = running(&store, 2).await;
    let mut known = KnownBlocks::default();
    let (first, receipts) = model.upload(&chain, 1, &known).await;
    commit_now(&mut chain, &first).await.unwrap();
    learn(&mut known, &model, &receipts);
    let (same, receipts) = model.upload(&chain, 2, &known).await;
    assert!(receipts.iter().all(|r| r.object.is_none() && r.references.len() == 1));
    let paths = |m: &Manifest| m.objects.iter().map(|o| o.path.clone()).collect::<BTreeSet<_>>();
    assert_eq!(paths(&same), paths(&first));
    commit_now(&mut chain, &same).await.unwrap();
    learn(&mut known, &model, &receipts);
    for value in &mut model.values[1] {
        *value += 1;
    }
    let (half, receipts) = model.upload(&chain, 3, &known).await;
    for receipt in &receipts {
        let new = receipt.object.as_ref().unwrap();
        assert!(new.extents.iter().all(|e| e.state == "exp_avg") && receipt.references[0].extents[0].state == "param");
    }
    let checkpoint = commit_now(&mut chain, &half).await.unwrap();
    // Older objects stay for the half that the newest checkpoint uses, though their own checkpoints go.
    let (gone, _) = collect(&mut chain, EPOCH, 1, &BTreeSet::new()).await.unwrap();
    assert_eq!((gone.len(), stored(&store).await.len()), (2, 4));
    model.expect(&store, &checkpoint, 3).await;
}

#[tokio::test]
async fn a_condemned_object_is_not_referred_to() {
    let (store, mut model) = (Store::memory(), Model::new(14));
    let mut chain = running(&store, 2).await;
    let mut known = KnownBlocks::default();
    let (first, receipts) = model.upload(&chain, 1, &known).await;
    commit_now(&mut chain, &first).await.unwrap();
    learn(&mut known, &model, &receipts);
    // This rank does not know yet that the next checkpoint is there and the first one on its way out.
    let (second, _) = model.upload(&chain, 2, &KnownBlocks::default()).await;
    commit_now(&mut chain, &second).await.unwrap();
    model.values[0][0] += 1;
    let (late, _) = model.upload(&chain, 3, &known).await;
    assert_eq!(condemned_references(&late, &stored(&store).await.into_iter().collect()), Vec::<&str>::new());
    collect(&mut chain, EPOCH, 1, &[proto::ids::Step::new(3)].into()).await.unwrap();
    let error = commit_now(&mut chain, &late).await.unwrap_err();
    assert!(error.kind() == Kind::Corrupt && error.to_string().contains("must be uploaded whole"), "{error}");
    assert_eq!(chain.history().checkpoints.len(), 1, "nothing was committed");
    known.forget();
    let (whole, _) = model.upload(&chain, 3, &known).await;
    let checkpoint = commit_now(&mut chain, &whole).await.unwrap();
    model.expect(&store, &checkpoint, 1).await;
}

/// Damage does not spread: what a quarantined checkpoint reaches is written again.
#[tokio::test]
async fn a_quarantined_object_is_not_referred_to() {
    let (store, model) = (Store::memory(), Model::new(14));
    let mut chain = running(&store, 2).await;
    let mut known = KnownBlocks::default();
    let (first, receipts) = model.upload(&chain, 1, &known).await;
    let checkpoint = commit_now(&mut chain, &first).await.unwrap();
    learn(&mut known, &model, &receipts);
    let (second, _) = model.upload(&chain, 2, &known).await;
    let event = Event::Quarantined { manifest: checkpoint.manifest, reason: "a flipped bit".into() };
    chain.append(Record::new(EPOCH, chain.history().generation, event)).await.unwrap();
    let mut reached = Reached::default();
    assert_eq!(reached.condemned(&chain, &second).await.unwrap().len(), 2);
    assert!(commit_now(&mut chain, &second).await.is_err());
}

/// A checkpoint that uses part of an object finds damage in that part, and in the object's header.
#[tokio::test]
async fn verification_reads_headers_of_partly_used_objects() {
    let (store, mut model) = (Store::memory(), Model::new(14));
    let mut chain = running(&store, 1).await;
    let mut known = KnownBlocks::default().with_min_run(2 * BLOCK * 4);
    let (first, receipts) = model.upload(&chain, 1, &known).await;
    commit_now(&mut chain, &first).await.unwrap();
    learn(&mut known, &model, &receipts);
    for value in &mut model.values[0][..5] {
        *value += 1;
    }
    let (second, _) = model.upload(&chain, 2, &known).await;
    let checkpoint = commit_now(&mut chain, &second).await.unwrap();
    model.expect(&store, &checkpoint, 2).await;
    let old = second.objects.iter().find(|o| o.path == first.objects[0].path).unwrap();
    assert!(old.extents[0].offset > first.objects[0].extents[0].offset, "the object's first part is not used");
    let good = store.get(&old.path, 1 << 30).await.unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(good[8..8 + header].to_vec()).unwrap();
    let moved = text.replacen("@0\"", "@1\"", 1);
    let shape = text.replacen("\"F32\"", "\"I32\"", 1);
    assert!(moved != text && shape != text);
    for bad in [moved, shape] {
        let bytes = [&good[..8], bad.as_bytes(), &good[8 + header..]].concat();
        store.delete(&old.path).await.unwrap();
        store.create(&old.path, bytes.into()).await.unwrap();
        assert!(!verify(&store, &job(), &checkpoint).await.unwrap().is_good());
    }
}
