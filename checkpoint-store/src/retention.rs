//! Retention: which checkpoints may go, and how they go without a clock.
//!
//! A checkpoint is condemned once `keep_last` good ones are newer than it; the newest good one never is. The `deleted`
//! record comes first, then the bytes: a crash in between leaves files that no record names, and the sweep finds those
//! by listing. The sweep deletes what no kept manifest reaches, unless a save that is still open may be about to name
//! it: one of the present generation, at a step the caller lists. Only the leader collects, in the same queue in which
//! it commits, so no commit can come in between.

use std::collections::{BTreeSet, HashSet};

use proto::ids::{Epoch, Step};

use crate::backend::Store;
use crate::chain::{Chain, ChainError};
use crate::error::StoreError;
use crate::history::{Checkpoint, History};
use crate::layout;
use crate::load::open_checkpoint;
use crate::record::{CheckpointRef, Event, Record};
use crate::tensors::reached_by_tensors;

/// Objects of one page of a listing.
const PAGE: usize = 1_000;

/// The checkpoints that `keep_last` lets go, oldest first. `keep_last` of 0 keeps one: the newest good one is what a
/// resume needs.
pub fn condemned(history: &History, keep_last: usize) -> Vec<CheckpointRef> {
    let newer = |c: &Checkpoint, than: &Checkpoint| {
        // A good checkpoint's line goes on, so steps order it; an abandoned one has only its place in the chain.
        if than.is_good() { c.checkpoint.step > than.checkpoint.step } else { c.record > than.record }
    };
    let is_condemned = |c: &&Checkpoint| {
        let later = history.checkpoints.iter().filter(|other| other.is_good() && newer(other, c)).count();
        later >= keep_last.max(1)
    };
    history.checkpoints.iter().filter(is_condemned).map(|c| c.checkpoint.clone()).collect()
}

/// Applies retention: records what goes, then sweeps. Returns the deleted checkpoints and the number of files removed.
/// `open` lists the steps of the present generation whose saves are not committed yet.
pub async fn collect(
    chain: &mut Chain,
    epoch: Epoch,
    keep_last: usize,
    open: &BTreeSet<Step>,
) -> Result<(Vec<CheckpointRef>, usize), ChainError> {
    let condemned = condemned(chain.history(), keep_last);
    delete(chain, epoch, &condemned).await?;
    let removed = sweep(chain, open).await?;
    Ok((condemned, removed))
}

/// Appends a `deleted` record for each checkpoint; their bytes go with the next [`sweep`].
pub async fn delete(chain: &mut Chain, epoch: Epoch, checkpoints: &[CheckpointRef]) -> Result<(), ChainError> {
    for checkpoint in checkpoints {
        let generation = chain.history().generation;
        let event = Event::Deleted { manifest: checkpoint.manifest.clone() };
        chain.append(Record::new(epoch, generation, event)).await?;
    }
    Ok(())
}

/// Deletes the manifests and objects of the job that no checkpoint of its chain reaches and no open save may name; also
/// what crashed writers left half-written. A kept manifest that cannot be read stops the sweep: what it reaches is
/// unknown.
pub async fn sweep(chain: &Chain, open: &BTreeSet<Step>) -> Result<usize, StoreError> {
    let (store, job, history) = (chain.store(), chain.job(), chain.history());
    let mut kept = HashSet::new();
    for checkpoint in &history.checkpoints {
        match open_checkpoint(store, job, &checkpoint.checkpoint).await {
            Ok(manifest) => kept.extend(manifest.objects.into_iter().map(|o| o.path)),
            // Already known to be damaged: its objects are of no use without it.
            Err(_) if checkpoint.quarantined.is_some() => {}
            Err(e) => return Err(e),
        }
        kept.insert(layout::manifest(job, &checkpoint.checkpoint.manifest));
    }
    kept.extend(reached_by_tensors(chain).await?);
    let may_be_named = |path: &str| match layout::step_and_generation(path) {
        Some((step, generation)) => {
            generation > history.generation || (generation == history.generation && open.contains(&step))
        }
        // Not a name this library makes: not ours to delete.
        None => true,
    };
    let mut removed = 0;
    for folder in [layout::checkpoints(job), layout::objects(job)] {
        for path in list_all(store, &folder).await? {
            if !kept.contains(&path) && !may_be_named(&path) {
                store.delete(&path).await?;
                removed += 1;
            }
        }
        removed += store.clear_leftovers(&folder).await?;
    }
    Ok(removed)
}

async fn list_all(store: &Store, folder: &str) -> Result<Vec<String>, StoreError> {
    let mut paths: Vec<String> = vec![];
    loop {
        let page = store.list(folder, paths.last().map(String::as_str), PAGE).await?;
        let last = page.len() < PAGE;
        paths.extend(page.into_iter().map(|l| l.path));
        if last {
            return Ok(paths);
        }
    }
}
