//! A save, from a captured shard to a checkpoint that can be seen.
//!
//! ```text
//! every rank:   upload_shard   object (synced or acknowledged)  → receipt
//! coordinator:  Manifest::assemble(receipts)                    → manifest: complete, of one state
//!               commit         manifest object, then the chain's `committed` record with its hash
//! ```
//!
//! A crash before the record leaves objects that nothing names, which collection removes; a crash after it leaves a
//! whole checkpoint. There is no moment at which a part of one can be seen.

use proto::ids::Epoch;
use uuid::Uuid;

use crate::backend::{Create, Store};
use crate::chain::{Chain, ChainError};
use crate::digest::BlockHash;
use crate::error::StoreError;
use crate::layout;
use crate::manifest::Manifest;
use crate::object::{OBJECT_FORMAT, Receipt, ShardSource};
use crate::record::{CheckpointRef, Event, Record};

/// Stores one rank's shard as an object named by `id`, a fresh UUID, and returns the receipt for it. A rank without
/// blocks stores nothing and gets a receipt all the same.
pub async fn upload_shard(store: &Store, source: &ShardSource, id: Uuid) -> Result<Receipt, StoreError> {
    let object = match source.layout(id)? {
        None => None,
        Some((parts, entry)) => {
            store.upload(&entry.path, parts).await?;
            Some(entry)
        }
    };
    let shard = source.shard();
    Ok(Receipt {
        format: OBJECT_FORMAT,
        job: source.job.clone(),
        generation: source.generation,
        rank: source.rank,
        world_size: source.world_size,
        shard: (shard.start, shard.end),
        scalar: source.scalar.clone(),
        states: source.states.iter().map(|s| s.decl.clone()).collect(),
        hashes: source.states.iter().map(|s| s.hashes.clone()).collect(),
        object,
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
    let name = layout::manifest_name(manifest.step, manifest.generation, id);
    let bytes = manifest.to_json()?;
    let checkpoint = CheckpointRef {
        step: manifest.step,
        generation: manifest.generation,
        manifest: name.clone(),
        hash: BlockHash::of(&bytes),
        digest: manifest.digest,
        bytes: manifest.bytes(),
    };
    let path = layout::manifest(chain.job(), &name);
    if chain.store().create(&path, bytes).await? == Create::AlreadyExists {
        return Err(StoreError::Bug(format!("{path} exists: commits need a fresh UUID")).into());
    }
    chain.append(Record::new(epoch, manifest.generation, Event::Committed(checkpoint.clone()))).await?;
    Ok(checkpoint)
}
