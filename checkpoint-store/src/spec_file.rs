//! The stored specification: what was asked, by the hash of its bytes.
//!
//! The first one is `spec.json`. A resume may change a few keys; its specification gets a name with its hash, because
//! no object is ever overwritten. The chain's records say by hash which one holds.

use bytes::Bytes;
use proto::ids::JobName;

use crate::backend::{Create, Store};
use crate::digest::BlockHash;
use crate::error::StoreError;
use crate::layout;

/// A specification larger than this is refused.
pub const MAX_SPEC: u64 = 1 << 20;

/// Stores a specification and returns its hash, for the record that will name it.
pub async fn write_spec(store: &Store, job: &JobName, bytes: Bytes) -> Result<BlockHash, StoreError> {
    let hash = BlockHash::of(&bytes);
    let path = layout::spec(job);
    if store.create(&path, bytes.clone()).await? == Create::AlreadyExists && store.get(&path, MAX_SPEC).await? != bytes
    {
        // Named by its content: whoever made it made the same.
        store.create(&layout::spec_by_hash(job, &hash.to_string()), bytes).await?;
    }
    Ok(hash)
}

/// Reads the specification with this hash.
pub async fn read_spec(store: &Store, job: &JobName, hash: BlockHash) -> Result<Bytes, StoreError> {
    let (first, later) = (layout::spec(job), layout::spec_by_hash(job, &hash.to_string()));
    for path in [&later, &first] {
        match store.get(path, MAX_SPEC).await {
            Ok(bytes) if BlockHash::of(&bytes) == hash => return Ok(bytes),
            Ok(_) => {}
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e),
        }
    }
    Err(StoreError::Corrupt(format!("job {job}: neither {first} nor {later} has the hash {hash} that the chain names")))
}
