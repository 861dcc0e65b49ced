//! Loading: any range of a state, from a checkpoint saved by any number of workers, every byte verified.
//!
//! The chain's record names the manifest and its hash; the manifest names the objects and each block's hash; a block is
//! handed out only after its hash was right. So what a reader gets is what was committed, whatever lies between.

use std::ops::Range;

use bytes::Bytes;
use proto::ids::JobName;

use crate::aside::aside;
use crate::backend::Store;
use crate::digest::BlockHash;
use crate::error::StoreError;
use crate::layout;
use crate::loader::{Loader, verify_blocks};
use crate::manifest::{MAX_MANIFEST, Manifest};
use crate::plan::Read;
use crate::record::CheckpointRef;

/// Reads in flight at once of one call.
pub(crate) const READS_IN_FLIGHT: usize = 8;

/// Reads and checks the manifest of a committed checkpoint.
pub async fn open_checkpoint(store: &Store, job: &JobName, checkpoint: &CheckpointRef) -> Result<Manifest, StoreError> {
    open_sized(store, job, checkpoint).await.map(|(manifest, _)| manifest)
}

/// The manifest, and how many bytes it is in the store.
pub(crate) async fn open_sized(
    store: &Store,
    job: &JobName,
    checkpoint: &CheckpointRef,
) -> Result<(Manifest, u64), StoreError> {
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
        Ok((manifest, bytes.len() as u64))
    } else {
        Err(StoreError::Corrupt(format!("{path} is of another checkpoint than its record")))
    }
}

/// Reads elements of a state into `dst`, which holds exactly their bytes. The whole blocks around them are read, each
/// once, and verified. On an error `dst` may be partly written. [`Loader`] does the same for several states at once.
pub async fn read_range(
    store: &Store,
    manifest: &Manifest,
    state: &str,
    range: Range<u64>,
    dst: &mut [u8],
) -> Result<(), StoreError> {
    Loader::new(store, manifest).load(range, &mut [(state, dst)]).await.map(|_| ())
}

/// Fetches whole blocks and verifies their hashes, off the async threads.
pub(crate) async fn fetch(store: &Store, manifest: &Manifest, state: usize, read: &Read) -> Result<Bytes, StoreError> {
    let path = &manifest.objects[read.object].path;
    let bytes = store.get_range(path, read.bytes.clone()).await;
    let bytes = bytes.map_err(|e| e.missing_is_corrupt("the manifest"))?;
    let checked = bytes.clone();
    let hashes = manifest.hashes[state].0[read.blocks.start as usize..read.blocks.end as usize].to_vec();
    let block_bytes = manifest.block_elements * manifest.states[state].dtype.size();
    let good = aside(move || checked.chunks(block_bytes as usize).map(BlockHash::of).eq(hashes.iter().copied()));
    let good = good.await.map_err(|e| StoreError::unavailable(format!("verifying {path}"), e))?;
    // A second look names the block.
    if good { Ok(bytes) } else { verify_blocks(manifest, state, read, &bytes).map(|()| bytes) }
}
