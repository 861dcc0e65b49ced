//! A save, from a captured shard to a checkpoint that can be seen.
//!
//! ```text
//! every rank:   upload_shard   object (synced or acknowledged)  → receipt
//! coordinator:  Manifest::assemble(receipts)                    → manifest: complete, of one state
//!               commit         manifest object, then the chain's `committed` record with its hash
//! ```
//!
//! A crash before the record leaves objects that nothing names, which collection removes; a crash after it leaves a
//! whole checkpoint. There is no moment at which a part of one can be seen. A rank that knows what older objects hold
//! writes only what changed ([`crate::known`]), and the commit refuses a reference to an object that is on its way out.

use std::time::Instant;

use proto::ids::Epoch;
use uuid::Uuid;

use crate::backend::{Create, Store};
use crate::chain::{Chain, ChainError};
use crate::error::StoreError;
use crate::known::{KnownBlocks, split};
use crate::layout;
use crate::manifest::{Encoded, Manifest};
use crate::object::ShardSource;
use crate::receipt::Receipt;
use crate::record::{CheckpointRef, Event, Record};
use crate::references::Reached;
use crate::timeline::{Stage, UPLOAD};

/// A manifest larger than this goes to the store in parts.
const LARGE: usize = 8 << 20;

/// What else an upload may be told.
#[derive(Debug, Clone, Copy, Default)]
pub struct UploadOptions<'a> {
    /// What older objects hold; with nothing known the whole shard is written.
    pub known: Option<&'a KnownBlocks>,
    /// The stages before the upload, for the receipt.
    pub stages: &'a [Stage],
}

/// Stores one rank's shard as an object named by `id`, a fresh UUID, and returns the receipt for it. A rank without
/// blocks stores nothing and gets a receipt all the same.
pub async fn upload_shard(store: &Store, source: &ShardSource, id: Uuid) -> Result<Receipt, StoreError> {
    upload_changed(store, source, id, UploadOptions::default()).await
}

/// As [`upload_shard`], but refers to older objects for blocks they hold, and adds the times of the stages before. A
/// rank of which no block has changed stores nothing.
pub async fn upload_changed(
    store: &Store,
    source: &ShardSource,
    id: Uuid,
    options: UploadOptions<'_>,
) -> Result<Receipt, StoreError> {
    let began = Instant::now();
    let (layout, references) = match options.known.filter(|known| !known.is_empty()) {
        None => (source.layout(id)?, vec![]),
        Some(known) => {
            source.check()?;
            let blocks = source.space.shard_blocks(source.rank, source.world_size);
            let states: Vec<_> = source.states.iter().map(|s| (s.decl.clone(), &s.hashes)).collect();
            let split = split(known, &source.space, blocks, &states);
            (source.layout_of(id, &split.fresh)?, split.references)
        }
    };
    let object = match layout {
        None => None,
        Some((parts, entry)) => {
            store.upload(&entry.path, parts).await?;
            Some(entry)
        }
    };
    let start = options.stages.iter().map(Stage::end_micros).max().unwrap_or(0) as f64 / 1e6;
    let bytes = object.as_ref().map_or(0, |object| object.bytes);
    let mut stages = options.stages.to_vec();
    stages.push(Stage::new(UPLOAD, start, began.elapsed().as_secs_f64(), bytes));
    let shard = source.shard();
    Ok(Receipt {
        job: source.job.clone(),
        generation: source.generation,
        rank: source.rank,
        world_size: source.world_size,
        shard: (shard.start, shard.end),
        scalar: source.scalar.clone(),
        states: source.decls(),
        hashes: source.states.iter().map(|s| s.hashes.clone()).collect(),
        object,
        references,
        stages,
    })
}

/// Makes a manifest a checkpoint. A state that this generation has already committed is not committed again: the
/// existing checkpoint is returned, so a repeated commit is harmless. A generation commits its steps in order: one
/// before its newest is refused, because a collection may have taken its objects.
pub async fn commit(
    chain: &mut Chain,
    manifest: &Manifest,
    epoch: Epoch,
    id: Uuid,
) -> Result<CheckpointRef, ChainError> {
    let encoded = manifest.encode()?;
    commit_encoded(chain, manifest, encoded, epoch, id, &mut Reached::default()).await
}

/// As [`commit`], of a manifest that was encoded before, with what the job's checkpoints reach as remembered from one
/// commit to the next.
pub async fn commit_encoded(
    chain: &mut Chain,
    manifest: &Manifest,
    encoded: Encoded,
    epoch: Epoch,
    id: Uuid,
    reached: &mut Reached,
) -> Result<CheckpointRef, ChainError> {
    if manifest.job != *chain.job() {
        let why = format!("a manifest of job {} cannot be committed to job {}", manifest.job, chain.job());
        return Err(StoreError::Bug(why).into());
    }
    let same = |c: &&CheckpointRef| (c.step, c.generation) == (manifest.step, manifest.generation);
    if let Some(before) = chain.history().checkpoints.iter().map(|c| &c.checkpoint).find(same) {
        if before.digest == manifest.digest {
            return Ok(before.clone());
        }
        let (step, was, is) = (manifest.step, before.digest, manifest.digest);
        return Err(StoreError::Bug(format!("step {step} was committed with digest {was}, now it has {is}")).into());
    }
    // Collection leaves alone only what a generation saves after its newest commit.
    let of_this = chain.history().checkpoints.iter().filter(|c| c.checkpoint.generation == manifest.generation);
    if let Some(newest) = of_this.map(|c| c.checkpoint.step).max().filter(|newest| *newest > manifest.step) {
        let (step, generation) = (manifest.step, manifest.generation);
        let why = format!("step {step} comes too late: generation {generation} has committed step {newest}");
        return Err(StoreError::Bug(why).into());
    }
    let condemned = reached.condemned(chain, manifest).await?;
    if let Some(first) = condemned.first() {
        let (step, count) = (manifest.step, condemned.len());
        return Err(StoreError::Corrupt(format!(
            "the checkpoint of step {step} refers to {count} older objects that no good checkpoint keeps, first of all \
             {first}; its shards must be uploaded whole"
        ))
        .into());
    }
    let name = layout::manifest_name(manifest.step, manifest.generation, id);
    let checkpoint = CheckpointRef {
        step: manifest.step,
        generation: manifest.generation,
        manifest: name.clone(),
        hash: encoded.hash,
        digest: manifest.digest,
        bytes: manifest.bytes(),
    };
    let path = layout::manifest(chain.job(), &name);
    if encoded.bytes.len() > LARGE {
        chain.store().upload(&path, vec![encoded.bytes]).await?;
    } else if chain.store().create(&path, encoded.bytes).await? == Create::AlreadyExists {
        return Err(StoreError::Bug(format!("{path} exists: commits need a fresh UUID")).into());
    }
    chain.append(Record::new(epoch, manifest.generation, Event::Committed(checkpoint.clone()))).await?;
    reached.remember(&name, manifest);
    Ok(checkpoint)
}
