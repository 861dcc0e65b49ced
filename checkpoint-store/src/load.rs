//! Loading: any range of a state, from a checkpoint saved by any number of workers, every byte verified.
//!
//! The chain's record names the manifest and its hash; the manifest names the objects and each block's hash; a block is
//! handed out only after its hash was right. So what a reader gets is what was committed, whatever lies between.

use std::ops::Range;

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use proto::ids::JobName;

use crate::backend::Store;
use crate::digest::BlockHash;
use crate::error::StoreError;
use crate::layout;
use crate::manifest::{MAX_MANIFEST, Manifest};
use crate::plan::{Read, plan};
use crate::record::CheckpointRef;

/// Reads in flight at once of one call.
pub(crate) const READS_IN_FLIGHT: usize = 8;

/// Reads and checks the manifest of a committed checkpoint.
pub async fn open_checkpoint(store: &Store, job: &JobName, checkpoint: &CheckpointRef) -> Result<Manifest, StoreError> {
    let path = layout::manifest(job, &checkpoint.manifest);
    if !layout::is_safe(&path) || checkpoint.manifest.contains('/') {
        return Err(StoreError::Corrupt(format!("job {job}: a record names a manifest outside checkpoints/")));
    }
    let bytes = store.get(&path, MAX_MANIFEST).await;
    let bytes = bytes.map_err(|e| e.missing_is_corrupt("the job's chain"))?;
    let hash = BlockHash::of(&bytes);
    if hash != checkpoint.hash {
        let right = checkpoint.hash;
        return Err(StoreError::Corrupt(format!("{path} is damaged: its hash is {hash}, the chain says {right}")));
    }
    let manifest = Manifest::parse(&path, &bytes)?;
    let same = manifest.job == *job
        && manifest.step == checkpoint.step
        && manifest.generation == checkpoint.generation
        && manifest.digest == checkpoint.digest;
    if same {
        Ok(manifest)
    } else {
        Err(StoreError::Corrupt(format!("{path} is of another checkpoint than its record")))
    }
}

/// Reads elements of a state into `dst`, which holds exactly their bytes. The whole blocks around them are read, each
/// once, and verified. On an error `dst` may be partly written.
pub async fn read_range(
    store: &Store,
    manifest: &Manifest,
    state: &str,
    range: Range<u64>,
    dst: &mut [u8],
) -> Result<(), StoreError> {
    let index = manifest.state_index(state).ok_or_else(|| {
        let have: Vec<_> = manifest.states.iter().map(|s| s.name.as_str()).collect();
        StoreError::Input(format!("the checkpoint has no state {state:?}; it has {}", have.join(", ")))
    })?;
    let size = manifest.states[index].dtype.size();
    let elements = range.end.saturating_sub(range.start);
    if range.end > manifest.space.elements() || elements * size != dst.len() as u64 {
        let why = format!("elements {range:?} of state {state} do not fit {} bytes or the model", dst.len());
        return Err(StoreError::Bug(why));
    }
    let reads = plan(manifest, index, range.clone());
    let mut arriving = stream::iter(reads)
        .map(|read| async move { fetch(store, manifest, index, &read).await.map(|bytes| (read, bytes)) })
        .buffer_unordered(READS_IN_FLIGHT);
    while let Some((read, bytes)) = arriving.try_next().await? {
        let first = read.elements.start.max(range.start);
        let end = read.elements.end.min(range.end);
        let from = ((first - read.elements.start) * size) as usize;
        let to = ((first - range.start) * size) as usize;
        let length = ((end - first) * size) as usize;
        dst[to..to + length].copy_from_slice(&bytes[from..from + length]);
    }
    Ok(())
}

/// Fetches whole blocks and verifies their hashes, off the async threads.
pub(crate) async fn fetch(store: &Store, manifest: &Manifest, state: usize, read: &Read) -> Result<Bytes, StoreError> {
    let path = &manifest.objects[read.object].path;
    let bytes = store.get_range(path, read.bytes.clone()).await;
    let bytes = bytes.map_err(|e| e.missing_is_corrupt("the manifest"))?;
    let expected = manifest.hashes[state].0[read.blocks.start as usize..read.blocks.end as usize].to_vec();
    let block_bytes = manifest.block_elements * manifest.states[state].dtype.size();
    let checked = bytes.clone();
    let wrong = tokio::task::spawn_blocking(move || {
        let blocks = checked.chunks(block_bytes as usize).map(BlockHash::of);
        blocks.zip(&expected).position(|(found, right)| found != *right)
    });
    let wrong = wrong.await.map_err(|e| StoreError::unavailable(format!("verifying {path}"), e))?;
    let Some(at) = wrong else { return Ok(bytes) };
    let element = read.elements.start + at as u64 * manifest.block_elements;
    Err(StoreError::Corrupt(format!(
        "{path} is damaged: the block at byte {} (state {}, from tensor {} on, element {element} of the model) \
         does not have its hash",
        read.bytes.start + at as u64 * block_bytes,
        manifest.states[state].name,
        manifest.space.tensor_at(element),
    )))
}
