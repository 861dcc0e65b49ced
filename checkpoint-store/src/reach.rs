//! What kept checkpoints reach, remembered from one collection to the next.
//!
//! A manifest never changes, so what it names needs to be read once. For each kept manifest its objects' paths are
//! remembered as 64-bit fingerprints: two paths that share one can only make a collection spare a file it could have
//! deleted, never the other way round. The memory is bounded: 16 Mi fingerprints (128 MiB), which is a thousand
//! checkpoints of 16,384 objects each; what does not fit is read again each time.

use std::collections::{BTreeMap, BTreeSet};

use futures::stream::{self, StreamExt, TryStreamExt};
use proto::ids::JobName;

use crate::backend::Store;
use crate::digest::BlockHash;
use crate::error::{Kind, StoreError};
use crate::history::Checkpoint;
use crate::layout;
use crate::load::open_checkpoint;

/// Fingerprints remembered at most.
const MOST: usize = 16 << 20;
/// Manifests read at once.
const READS_IN_FLIGHT: usize = 8;

/// The memory of one job's manifests.
#[derive(Debug)]
pub(crate) struct Reach {
    most: usize,
    held: usize,
    /// By manifest, its objects' fingerprints.
    lists: BTreeMap<String, Box<[u64]>>,
}

impl Default for Reach {
    fn default() -> Self {
        Self::bounded(MOST)
    }
}

/// All that a set of checkpoints reaches.
#[derive(Debug)]
pub(crate) struct Reached {
    manifests: BTreeSet<String>,
    /// Sorted.
    objects: Vec<u64>,
}

impl Reached {
    /// Whether one of the checkpoints needs this file.
    pub(crate) fn holds(&self, path: &str) -> bool {
        self.manifests.contains(path) || self.objects.binary_search(&fingerprint(path)).is_ok()
    }
}

impl Reach {
    fn bounded(most: usize) -> Self {
        Self { most, held: 0, lists: BTreeMap::new() }
    }

    /// What the checkpoints reach. Only manifests that are not remembered are read; those of checkpoints that are no
    /// longer `kept` are forgotten. A manifest that cannot be read is an error, unless its checkpoint is quarantined:
    /// then its objects are of no use without it.
    pub(crate) async fn of(
        &mut self,
        store: &Store,
        job: &JobName,
        kept: &[&Checkpoint],
    ) -> Result<Reached, StoreError> {
        let names: BTreeSet<&str> = kept.iter().map(|c| c.checkpoint.manifest.as_str()).collect();
        self.lists.retain(|name, _| names.contains(name.as_str()));
        self.held = self.lists.values().map(|list| list.len()).sum();
        let manifests = names.iter().map(|name| layout::manifest(job, name)).collect();
        let mut objects: Vec<u64> = self.lists.values().flat_map(|list| list.iter().copied()).collect();
        let unread: Vec<Checkpoint> = kept
            .iter()
            .filter(|c| !self.lists.contains_key(&c.checkpoint.manifest))
            .map(|c| Checkpoint::clone(c))
            .collect();
        let mut lists = stream::iter(unread)
            .map(|c| async move { list(store, job, &c).await.map(|list| (c.checkpoint.manifest, list)) })
            .buffer_unordered(READS_IN_FLIGHT);
        while let Some((manifest, list)) = lists.try_next().await? {
            let Some(list) = list else { continue };
            objects.extend(list.iter().copied());
            if self.held + list.len() <= self.most {
                self.held += list.len();
                self.lists.insert(manifest, list.into());
            }
        }
        objects.sort_unstable();
        objects.dedup();
        Ok(Reached { manifests, objects })
    }
}

/// The fingerprints of what one checkpoint reaches; `None` if it is quarantined and its manifest is gone.
async fn list(store: &Store, job: &JobName, checkpoint: &Checkpoint) -> Result<Option<Vec<u64>>, StoreError> {
    match open_checkpoint(store, job, &checkpoint.checkpoint).await {
        Ok(manifest) => Ok(Some(manifest.objects.iter().map(|o| fingerprint(&o.path)).collect())),
        // What does not answer now may answer later: only damage is known to stay.
        Err(e) if checkpoint.quarantined.is_some() && e.kind() != Kind::Retry => Ok(None),
        Err(e) => Err(e),
    }
}

fn fingerprint(path: &str) -> u64 {
    BlockHash::of(path.as_bytes()).as_bytes().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}
