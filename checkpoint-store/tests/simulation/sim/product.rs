//! The calls into the product that a simulated process makes, and the faults that can be planted in them.
//!
//! All of the store's API that the simulation uses is here, so that a change of it is a change of this file.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use bytes::Bytes;
use checkpoint_store::{
    BlockHash, Chain, ChainError, CheckpointRef, Digest, Dtype, Event, HashList, History, Manifest, Receipt, Record,
    ScalarState, ShardSource, ShardState, Space, StateDecl, Store, StoreError, TensorDecl, collect, commit, condemned,
    hash_blocks, layout, open_checkpoint, read_range, retention, state_digest, upload_shard,
};
use proto::ids::{Epoch, Generation, JobName, Rank, Step, WorldSize};
use uuid::Uuid;

/// Good checkpoints kept.
pub(crate) const KEEP_LAST: usize = 2;
/// The state's name.
pub(crate) const STATE: &str = "param";
/// Steps past the newest commit whose objects a collection leaves alone.
const OPEN_STEPS: u64 = 1_000;

/// A mistake put in on purpose, to see that the invariants notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plant {
    /// A receipt is sent before its object is stored.
    ReceiptBeforeObject,
    /// Collection takes the objects of saves that are still open.
    CollectsOpenSaves,
    /// The store overwrites what a create finds.
    CreateOverwrites,
    /// Bytes are deleted before the record says so.
    BytesBeforeRecord,
    /// A leader that has been superseded goes on under its successor's epoch.
    IgnoresFencing,
    /// A resent set of receipts is committed again, with a manifest of its own.
    CommitsTwice,
    /// Receipts of a step that is past are committed, though a collection may have taken their objects.
    CommitsLate,
    /// The memory of a shard is used again while it is uploaded.
    SlotReused,
    /// Nothing is ever swept.
    NeverSweeps,
    /// Retention lets the newest good checkpoint go.
    DeletesNewest,
}

impl Plant {
    pub(crate) const ALL: [Self; 10] = [
        Self::ReceiptBeforeObject,
        Self::CollectsOpenSaves,
        Self::CreateOverwrites,
        Self::BytesBeforeRecord,
        Self::IgnoresFencing,
        Self::CommitsTwice,
        Self::CommitsLate,
        Self::SlotReused,
        Self::NeverSweeps,
        Self::DeletesNewest,
    ];

    /// What the violation it leads to says.
    pub(crate) fn signs(self) -> &'static [&'static str] {
        match self {
            Self::ReceiptBeforeObject | Self::SlotReused => &["was committed but does not verify"],
            // Its objects before the commit, or its manifest just after, whichever comes first.
            Self::CollectsOpenSaves => &["was committed but does not verify", "is reachable, but was deleted"],
            Self::CreateOverwrites => &["was overwritten"],
            Self::BytesBeforeRecord => &["is reachable, but was deleted"],
            Self::IgnoresFencing => &["superseded"],
            Self::CommitsTwice => &["was committed twice"],
            // Twice, or torn, whichever comes first.
            Self::CommitsLate => &["was committed"],
            Self::NeverSweeps => &["was never collected"],
            Self::DeletesNewest => &["the newest good checkpoint was deleted"],
        }
    }
}

pub(crate) fn job() -> JobName {
    JobName::new("sim").expect("a good name")
}

/// Two blocks, the second one short: a world of three has a rank that owns nothing.
pub(crate) fn space() -> Space {
    static SPACE: LazyLock<Space> = LazyLock::new(|| {
        let tensor = |name: &str, n: u64| TensorDecl { name: name.into(), shape: vec![n], dtype: Dtype::F32 };
        Space::new(vec![tensor("a", 40_000), tensor("b", 26_000)]).expect("a good space")
    });
    SPACE.clone()
}

/// What training makes of a step, whoever computes it and how often.
pub(crate) struct Truth {
    pub(crate) bytes: Bytes,
    pub(crate) hashes: HashList,
    pub(crate) digest: Digest,
}

pub(crate) fn truth(step: u64) -> Arc<Truth> {
    static KNOWN: LazyLock<Mutex<BTreeMap<u64, Arc<Truth>>>> = LazyLock::new(Mutex::default);
    let make = || {
        let space = space();
        let value = |i: u64| ((i ^ step << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
        let bytes: Bytes = (0..space.elements()).flat_map(|i| value(i).to_le_bytes()).collect::<Vec<u8>>().into();
        let hashes = HashList(hash_blocks(&bytes, space.block_elements(), Dtype::F32));
        let digest = state_digest(&scalar(step), &space, &[StateDecl::f32(STATE)], std::slice::from_ref(&hashes));
        Arc::new(Truth { bytes, hashes, digest })
    };
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(known.entry(step).or_insert_with(make))
}

fn scalar(step: u64) -> ScalarState {
    ScalarState { step: Step::new(step), cursor: step * 16, ..ScalarState::start(7, 1_000) }
}

/// One rank's shard of a step.
pub(crate) fn shard(generation: u64, world: WorldSize, rank: Rank, step: u64, torn: bool) -> ShardSource {
    let (space, truth) = (space(), truth(step));
    let (range, blocks) = (space.shard(rank, world), space.shard_blocks(rank, world));
    let mut bytes = truth.bytes.slice(range.start as usize * 4..range.end as usize * 4);
    if torn && !bytes.is_empty() {
        let mut changed = bytes.to_vec();
        changed[0] ^= 1;
        bytes = changed.into();
    }
    let hashes = HashList(truth.hashes.0[blocks.start as usize..blocks.end as usize].to_vec());
    ShardSource {
        job: job(),
        space,
        generation: Generation::new(generation),
        rank,
        world_size: world,
        scalar: scalar(step),
        states: vec![ShardState { decl: StateDecl::f32(STATE), bytes, hashes }],
    }
}

/// Stores a shard. The receipt is what the agent sends.
pub(crate) async fn save(store: &Store, source: &ShardSource, id: Uuid) -> Result<Receipt, StoreError> {
    let receipt = upload_shard(store, source, id).await?;
    // How long it took is the real clock's, which is not a seed's to say.
    Ok(Receipt { stages: vec![], ..receipt })
}

/// The receipt of a shard that is not stored.
pub(crate) async fn receipt_alone(source: &ShardSource, id: Uuid) -> Result<Receipt, StoreError> {
    save(&Store::memory(), source, id).await
}

/// Commits a complete set of receipts.
pub(crate) async fn commit_set(
    chain: &mut Chain,
    epoch: Epoch,
    receipts: Vec<Receipt>,
    id: Uuid,
    plant: Option<Plant>,
) -> Result<CheckpointRef, ChainError> {
    let scalar = receipts.first().map_or_else(|| scalar(0), |receipt| receipt.scalar.clone());
    let manifest = Manifest::assemble(&space(), scalar, receipts)
        .map_err(|e| StoreError::Bug(format!("receipts of good shards make no manifest: {e}")))?;
    let late = manifest.step.get() < newest_here(chain.history());
    if plant == Some(Plant::CommitsTwice) || (plant == Some(Plant::CommitsLate) && late) {
        return commit_anyway(chain, epoch, &manifest, id).await;
    }
    commit(chain, &manifest, epoch, id).await
}

/// A commit that does not look whether the state was committed before.
async fn commit_anyway(
    chain: &mut Chain,
    epoch: Epoch,
    manifest: &Manifest,
    id: Uuid,
) -> Result<CheckpointRef, ChainError> {
    let (name, bytes) = (layout::manifest_name(manifest.step, manifest.generation, id), manifest.to_json()?);
    let checkpoint = CheckpointRef {
        step: manifest.step,
        generation: manifest.generation,
        manifest: name.clone(),
        hash: BlockHash::of(&bytes),
        digest: manifest.digest,
        bytes: manifest.bytes(),
    };
    chain.store().create(&layout::manifest(chain.job(), &name), bytes).await?;
    chain.append(Record::new(epoch, manifest.generation, Event::Committed(checkpoint.clone()))).await?;
    Ok(checkpoint)
}

/// The newest step this generation has committed; a set of receipts at or before it is settled.
pub(crate) fn newest_here(history: &History) -> u64 {
    let here = history.checkpoints.iter().filter(|c| c.checkpoint.generation == history.generation);
    here.map(|c| c.checkpoint.step.get()).max().unwrap_or(0)
}

/// Retention and collection.
pub(crate) async fn retain(chain: &mut Chain, epoch: Epoch, plant: Option<Plant>) -> Result<(), ChainError> {
    let first = newest_here(chain.history()) + 1;
    let mut open: BTreeSet<Step> = (first..first + OPEN_STEPS).map(Step::new).collect();
    match plant {
        Some(Plant::CollectsOpenSaves) => open.clear(),
        Some(Plant::NeverSweeps) => {
            let condemned = condemned(chain.history(), KEEP_LAST);
            return retention::delete(chain, epoch, &condemned).await;
        }
        Some(Plant::DeletesNewest) => {
            let newest: Vec<_> = chain.history().newest_good().cloned().into_iter().collect();
            retention::delete(chain, epoch, &newest).await?;
        }
        Some(Plant::BytesBeforeRecord) => {
            for checkpoint in condemned(chain.history(), KEEP_LAST) {
                let manifest = open_checkpoint(chain.store(), chain.job(), &checkpoint).await?;
                for object in &manifest.objects {
                    chain.store().delete(&object.path).await?;
                }
            }
        }
        _ => {}
    }
    collect(chain, epoch, KEEP_LAST, &open).await.map(|_| ())
}

/// The record that a leader has taken the job over.
pub(crate) fn led(epoch: Epoch, history: &History) -> Record {
    Record::new(epoch, history.generation, Event::Led { epoch, leader: "simulated".into() })
}

/// The record of the next generation, from the newest good checkpoint.
pub(crate) fn formed(epoch: Epoch, history: &History, world_size: WorldSize) -> Record {
    let generation = Generation::new(history.generation.get() + 1);
    let (start, identity, fingerprint) = (history.newest_good().cloned(), "cpu".into(), "data".into());
    Record::new(
        epoch,
        generation,
        Event::Generation { generation, world_size, members: vec![], start, memory: None, identity, fingerprint },
    )
}

/// The first record.
pub(crate) fn submitted(epoch: Epoch) -> Record {
    let event = Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
    Record::new(epoch, Generation::ZERO, event)
}

/// Reads a range of a checkpoint and compares it; an error in the comparison is `Ok(false)`.
pub(crate) async fn loads_truly(
    store: &Store,
    manifest: &Manifest,
    elements: std::ops::Range<u64>,
) -> Result<bool, StoreError> {
    let mut found = vec![0; 4 * (elements.end - elements.start) as usize];
    read_range(store, manifest, STATE, elements.clone(), &mut found).await?;
    let truth = truth(manifest.step.get());
    Ok(found == truth.bytes[4 * elements.start as usize..4 * elements.end as usize])
}
