//! From a manifest of boxes to a checkpoint that can be seen, and back.
//!
//! As with canonical checkpoints, the record of the chain that names the manifest with its hash is the commit. It is a
//! record of its own kind, kept in a list of its own: no job resumes from it by itself.

use proto::ids::{Epoch, Generation, JobName, Step};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::manifest::TensorManifest;
use crate::backend::{Create, Store};
use crate::chain::{Chain, ChainError};
use crate::digest::BlockHash;
use crate::error::StoreError;
use crate::layout;
use crate::manifest::MAX_MANIFEST;
use crate::record::{Event, Record};

/// A checkpoint of boxes as the chain names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRef {
    /// The step whose state it holds.
    pub step: Step,
    /// The generation that saved it.
    pub generation: Generation,
    /// The manifest's file name under the job's `checkpoints/`.
    pub manifest: String,
    /// The BLAKE3 hash of the manifest's bytes.
    pub hash: BlockHash,
    /// Bytes of all its objects.
    pub bytes: u64,
}

/// Makes a manifest of boxes a checkpoint. If this generation has committed this step before, it must be the same
/// manifest, and the existing checkpoint is returned: a repeated commit is harmless.
pub async fn commit_tensors(
    chain: &mut Chain,
    manifest: &TensorManifest,
    epoch: Epoch,
    id: Uuid,
) -> Result<TensorRef, ChainError> {
    if manifest.job != *chain.job() {
        let why = format!("a manifest of job {} cannot be committed to job {}", manifest.job, chain.job());
        return Err(StoreError::Bug(why).into());
    }
    let bytes = manifest.to_json()?;
    let hash = BlockHash::of(&bytes);
    let same = |c: &&TensorRef| (c.step, c.generation) == (manifest.step, manifest.generation);
    if let Some(before) = chain.history().tensor_checkpoints.iter().find(same) {
        if before.hash == hash {
            return Ok(before.clone());
        }
        let why = format!("step {} was committed by this generation with other tensors", manifest.step);
        return Err(StoreError::Bug(why).into());
    }
    let name = layout::manifest_name(manifest.step, manifest.generation, id);
    let path = layout::manifest(chain.job(), &name);
    if chain.store().create(&path, bytes).await? == Create::AlreadyExists {
        return Err(StoreError::Bug(format!("{path} exists: commits need a fresh UUID")).into());
    }
    let (step, generation) = (manifest.step, manifest.generation);
    let checkpoint = TensorRef { step, generation, manifest: name, hash, bytes: manifest.bytes() };
    chain.append(Record::new(epoch, generation, Event::CommittedTensors(checkpoint.clone()))).await?;
    Ok(checkpoint)
}

/// Reads and checks the manifest of a committed checkpoint of boxes.
pub async fn open_tensors(store: &Store, job: &JobName, checkpoint: &TensorRef) -> Result<TensorManifest, StoreError> {
    let path = layout::manifest(job, &checkpoint.manifest);
    if !layout::is_safe(&path) || checkpoint.manifest.contains('/') {
        return Err(StoreError::Corrupt(format!("job {job}: a record names a manifest outside checkpoints/")));
    }
    let bytes = store.get(&path, MAX_MANIFEST).await.map_err(|e| e.missing_is_corrupt("the job's chain"))?;
    let (found, right) = (BlockHash::of(&bytes), checkpoint.hash);
    if found != right {
        return Err(StoreError::Corrupt(format!("{path} is damaged: its hash is {found}, the chain says {right}")));
    }
    let manifest = TensorManifest::parse(&path, &bytes)?;
    if manifest.job == *job && (manifest.step, manifest.generation) == (checkpoint.step, checkpoint.generation) {
        return Ok(manifest);
    }
    Err(StoreError::Corrupt(format!("{path} is of another checkpoint than its record")))
}

/// Every path that the checkpoints of boxes in a history reach: what collection must keep.
pub async fn reached_by_tensors(chain: &Chain) -> Result<Vec<String>, StoreError> {
    let mut paths = vec![];
    for checkpoint in &chain.history().tensor_checkpoints {
        let manifest = open_tensors(chain.store(), chain.job(), checkpoint).await?;
        paths.push(layout::manifest(chain.job(), &checkpoint.manifest));
        paths.extend(manifest.objects.into_iter().map(|o| o.path));
    }
    Ok(paths)
}
