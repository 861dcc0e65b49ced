//! May a checkpoint refer to this object? The committer's check of deduplicated checkpoints.
//!
//! An object stays as long as a checkpoint of the chain reaches it: so a new checkpoint may refer to an older object
//! only if some committed checkpoint that is not deleted reaches it now. The leader checks that in the queue in which
//! it commits and collects, so nothing changes in between. An object that a quarantined checkpoint reaches may be the
//! damaged one; it is referred to no more, even where a good checkpoint reaches it too, so that damage does not spread
//! to new checkpoints.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use crate::chain::Chain;
use crate::error::{Kind, StoreError};
use crate::history::Checkpoint;
use crate::layout;
use crate::load::open_checkpoint;
use crate::manifest::Manifest;

/// Manifests of which the cache holds what they reach: mostly the newest one answers.
const CACHED: usize = 4;

/// The objects of a manifest that another save has written.
pub fn references(manifest: &Manifest) -> impl Iterator<Item = &str> {
    let own = Some((manifest.step, manifest.generation));
    let paths = manifest.objects.iter().map(|object| object.path.as_str());
    paths.filter(move |path| layout::step_and_generation(path) != own)
}

/// The references of a manifest that are not among the kept objects: condemned, or never heard of.
pub fn condemned_references<'a>(manifest: &'a Manifest, kept: &BTreeSet<String>) -> Vec<&'a str> {
    references(manifest).filter(|path| !kept.contains(*path)).collect()
}

/// What the newest checkpoints of a job reach, remembered between commits.
#[derive(Debug, Default)]
pub struct Reached(VecDeque<(String, Arc<BTreeSet<String>>)>);

impl Reached {
    /// Remembers a checkpoint by its manifest's file name.
    pub fn remember(&mut self, name: &str, manifest: &Manifest) {
        let paths = manifest.objects.iter().map(|object| object.path.clone()).collect();
        self.keep(name, Arc::new(paths));
    }

    fn keep(&mut self, name: &str, paths: Arc<BTreeSet<String>>) {
        self.0.retain(|(known, _)| known != name);
        self.0.push_front((name.to_owned(), paths));
        self.0.truncate(CACHED);
    }

    async fn of(&mut self, chain: &Chain, checkpoint: &Checkpoint) -> Result<Arc<BTreeSet<String>>, StoreError> {
        let name = &checkpoint.checkpoint.manifest;
        if let Some((_, paths)) = self.0.iter().find(|(known, _)| known == name) {
            return Ok(Arc::clone(paths));
        }
        let manifest = open_checkpoint(chain.store(), chain.job(), &checkpoint.checkpoint).await?;
        let paths: Arc<BTreeSet<String>> = Arc::new(manifest.objects.into_iter().map(|object| object.path).collect());
        self.keep(name, Arc::clone(&paths));
        Ok(paths)
    }

    /// The references of a manifest that may not be made. Reads older manifests, newest first, only as far as it must.
    pub async fn condemned(&mut self, chain: &Chain, manifest: &Manifest) -> Result<Vec<String>, StoreError> {
        let mut open: BTreeSet<&str> = references(manifest).collect();
        let mut kept = BTreeSet::new();
        if open.is_empty() {
            return Ok(vec![]);
        }
        let checkpoints = &chain.history().checkpoints;
        for checkpoint in checkpoints.iter().rev().filter(|c| c.quarantined.is_none()) {
            if open.is_empty() {
                break;
            }
            match self.of(chain, checkpoint).await {
                Ok(paths) => open.retain(|path| !(paths.contains(*path) && kept.insert((*path).to_owned()))),
                // Damage nobody has met yet: what it reached cannot be relied on.
                Err(error) if error.kind() == Kind::Corrupt => {}
                Err(error) => return Err(error),
            }
        }
        for checkpoint in checkpoints.iter().filter(|c| c.quarantined.is_some()) {
            match self.of(chain, checkpoint).await {
                Ok(paths) => kept.retain(|path| !paths.contains(path)),
                // The manifest itself was the damage.
                Err(error) if error.kind() == Kind::Corrupt => {}
                Err(error) => return Err(error),
            }
        }
        Ok(condemned_references(manifest, &kept).into_iter().map(str::to_owned).collect())
    }
}
