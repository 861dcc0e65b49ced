//! Verification: everything a checkpoint consists of is read again and proved.
//!
//! Unlike a load it does not stop at the first damage, and it also checks what no load reads: the objects' sizes and
//! their safetensors headers, which other tools rely on.

use futures::stream::{self, StreamExt, TryStreamExt};
use proto::ids::JobName;

use crate::backend::Store;
use crate::error::{Kind, StoreError};
use crate::load::{READS_IN_FLIGHT, fetch, open_checkpoint};
use crate::manifest::Manifest;
use crate::object::{MAX_HEADER, ObjectEntry, check_header};
use crate::plan::plan;
use crate::record::CheckpointRef;

/// What was found of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectReport {
    /// Its path.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// What is wrong with it, if anything is.
    pub problem: Option<String>,
}

/// What was found of a checkpoint.
#[derive(Debug, Clone)]
pub struct VerifyReport {
    /// Its manifest, which was good.
    pub manifest: Manifest,
    /// One report an object, in the manifest's order.
    pub objects: Vec<ObjectReport>,
}

impl VerifyReport {
    /// Whether all of it is good.
    pub fn is_good(&self) -> bool {
        self.objects.iter().all(|o| o.problem.is_none())
    }

    /// The first problem, for a quarantine's reason.
    pub fn first_problem(&self) -> Option<&str> {
        self.objects.iter().find_map(|o| o.problem.as_deref())
    }
}

/// Re-reads a checkpoint. A damaged or missing manifest is an error; damaged or missing objects are in the report. A
/// store that does not answer is an error too: it proves nothing.
pub async fn verify(store: &Store, job: &JobName, checkpoint: &CheckpointRef) -> Result<VerifyReport, StoreError> {
    let manifest = open_checkpoint(store, job, checkpoint).await?;
    let mut objects = Vec::with_capacity(manifest.objects.len());
    for object in &manifest.objects {
        let checked = verify_object(store, &manifest, object).await;
        // It may go while it is read.
        let problem = match checked.map_err(|e| e.missing_is_corrupt("the manifest")) {
            Ok(()) => None,
            Err(e) if e.kind() == Kind::Corrupt => Some(e.to_string()),
            Err(e) => return Err(e),
        };
        objects.push(ObjectReport { path: object.path.clone(), bytes: object.bytes, problem });
    }
    Ok(VerifyReport { manifest, objects })
}

async fn verify_object(store: &Store, manifest: &Manifest, object: &ObjectEntry) -> Result<(), StoreError> {
    let path = &object.path;
    let size = store.head(path).await?;
    if size != object.bytes {
        return Err(StoreError::Corrupt(format!("{path} has {size} bytes, the manifest says {}", object.bytes)));
    }
    let length = store.get_range(path, 0..8).await?;
    let length = length.as_ref().try_into().map_or(u64::MAX, u64::from_le_bytes);
    let first = object.extents.iter().map(|e| e.offset).min().unwrap_or(8);
    if length > MAX_HEADER || length != first - 8 {
        return Err(StoreError::Corrupt(format!(
            "{path}: its header says it has {length} bytes, it has {}",
            first - 8
        )));
    }
    let header = store.get_range(path, 8..8 + length).await?;
    check_header(&manifest.space, &manifest.states, object, &header)?;
    for extent in &object.extents {
        let Some(state) = manifest.state_index(&extent.state) else { continue };
        let reads = plan(manifest, state, extent.first..extent.first + extent.elements);
        let checks = stream::iter(reads)
            .map(|read| async move { fetch(store, manifest, state, &read).await.map(|_| ()) })
            .buffered(READS_IN_FLIGHT);
        checks.try_collect::<()>().await?;
    }
    Ok(())
}
