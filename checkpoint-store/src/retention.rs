//! Retention: how checkpoints go, without a clock and without a race.
//!
//! Which ones go is [`Policy`]'s to say. The `deleted` record comes first, then the bytes: a crash in between leaves
//! files that no record names, and the sweep finds those by listing. The sweep deletes what no kept manifest reaches,
//! unless a save that is still open may be about to name it.
//!
//! # Why nothing that is needed can go
//!
//! * **A save.** Its files carry the present generation and a step that is not committed: such files are *open* and
//!   left alone ([`Open`]). A generation commits its steps in ascending order, so a step at or below its newest
//!   committed one is over.
//! * **A commit that reuses older objects.** The leader commits and collects in one queue and refuses a commit that
//!   names an object no kept checkpoint reaches. So whatever a later manifest reuses is reached by the history before
//!   it, and is in `kept` here.
//! * **A leader that was superseded and wakes in the middle of its sweep.** Its view is old, but the same argument
//!   holds for it: what its successor has committed since is either of a higher generation (left alone), or of the same
//!   generation beyond the newest step it knows (open), or reused from what it knows to be kept.
//! * **A manifest that a superseded leader wrote and could not commit.** Its record lost the append, so it never names
//!   anything; the file goes like any other once its step is over.
//! * **A reader.** It has a lease, which is a record: the fold refuses the `deleted` record of a leased or pinned
//!   checkpoint, so a collector that has not seen the lease loses the append.

use std::collections::{BTreeMap, BTreeSet};

use futures::stream::{self, StreamExt, TryStreamExt};
use proto::ids::{Epoch, Step};
use serde::{Deserialize, Serialize};

use crate::backend::Store;
use crate::chain::{Chain, ChainError};
use crate::error::{Kind, StoreError};
use crate::history::{Checkpoint, History};
use crate::layout;
use crate::load::open_checkpoint;
use crate::policy::Policy;
use crate::reach::Reach;
use crate::record::{CheckpointRef, Event, Record};
use crate::tensors::reached_by_tensors;

/// Objects of one page of a listing.
const PAGE: usize = 1_000;
/// Manifests or deletions in flight at once.
const IN_FLIGHT: usize = 8;

/// The steps of the present generation whose saves may not be committed yet: their files are not collected.
#[derive(Debug, Clone, Copy)]
pub enum Open<'a> {
    /// These.
    Steps(&'a BTreeSet<Step>),
    /// Every one after this.
    After(Step),
}

impl Open<'_> {
    /// What may be open, seen from the chain alone: everything beyond the newest step the generation has committed.
    pub fn of(history: &History) -> Self {
        let own = history.checkpoints.iter().map(|c| &c.checkpoint).filter(|c| c.generation == history.generation);
        match own.map(|c| c.step).max() {
            Some(newest) => Self::After(newest),
            None => Self::After(Step::ZERO),
        }
    }

    /// Whether a save of this step may still be open.
    pub fn holds(&self, step: Step) -> bool {
        match self {
            Self::Steps(steps) => steps.contains(&step),
            Self::After(newest) => step > *newest,
        }
    }
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// The checkpoints that went, in the order of their commits.
    pub deleted: Vec<CheckpointRef>,
    /// Files removed, leftovers of crashed writers included.
    pub files: usize,
    /// Why files that should go are still there; the next sweep finds them.
    pub unfinished: Option<String>,
}

/// What would come free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freed {
    /// Objects that only the condemned checkpoints reach.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Collects one job's checkpoints, remembering what it has read between one collection and the next.
#[derive(Debug, Default)]
pub struct Collector {
    reach: Reach,
}

impl Collector {
    /// Applies a policy: records what goes, then sweeps. Once something is recorded as deleted, a store that fails is
    /// no error any more: what is recorded has happened.
    pub async fn collect(
        &mut self,
        chain: &mut Chain,
        epoch: Epoch,
        policy: &Policy,
        open: Open<'_>,
    ) -> Result<Collected, ChainError> {
        let (before, mut deleted) = (chain.history().records, policy.condemned(chain.history()));
        let done = match delete(chain, epoch, &deleted).await {
            Ok(()) => self.sweep(chain, open).await.map_err(ChainError::from),
            Err(error) => Err(error),
        };
        match done {
            Ok(files) => Ok(Collected { deleted, files, unfinished: None }),
            Err(error) if error.kind() != Kind::Fenced && chain.history().records > before => {
                deleted.retain(|gone| chain.history().find(&gone.manifest).is_none());
                Ok(Collected { deleted, files: 0, unfinished: Some(error.to_string()) })
            }
            Err(error) => Err(error),
        }
    }

    /// Deletes the manifests and objects of the job that no checkpoint of its chain reaches and no open save may name;
    /// also what crashed writers left half-written. A kept manifest that cannot be read stops the sweep: what it
    /// reaches is unknown.
    pub async fn sweep(&mut self, chain: &Chain, open: Open<'_>) -> Result<usize, StoreError> {
        let (store, job, history) = (chain.store(), chain.job(), chain.history());
        let all: Vec<&Checkpoint> = history.checkpoints.iter().collect();
        let kept = self.reach.of(store, job, &all).await?;
        let tensors: BTreeSet<String> = reached_by_tensors(chain).await?.into_iter().collect();
        let may_be_named = |path: &str| match layout::step_and_generation(path) {
            Some((step, generation)) => {
                generation > history.generation || (generation == history.generation && open.holds(step))
            }
            // Not a name this library makes: not ours to delete.
            None => true,
        };
        let mut removed = 0;
        for folder in [layout::checkpoints(job), layout::objects(job)] {
            let paths = list_all(store, &folder).await?;
            let gone: Vec<String> =
                paths.into_iter().filter(|p| !kept.holds(p) && !tensors.contains(p) && !may_be_named(p)).collect();
            removed += gone.len();
            let deletions = stream::iter(gone).map(|path| async move { store.delete(&path).await });
            deletions.buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
            removed += store.clear_leftovers(&folder).await?;
        }
        Ok(removed)
    }

    /// What would come free if these checkpoints went: objects that others reach are not counted.
    pub async fn freed(&mut self, chain: &Chain, condemned: &[CheckpointRef]) -> Result<Freed, StoreError> {
        let (store, job, history) = (chain.store(), chain.job(), chain.history());
        let goes = |c: &&Checkpoint| condemned.iter().any(|gone| gone.manifest == c.checkpoint.manifest);
        let (gone, stay): (Vec<_>, Vec<_>) = history.checkpoints.iter().partition(goes);
        let kept = self.reach.of(store, job, &stay).await?;
        let mut objects = BTreeMap::new();
        let mut manifests = stream::iter(gone.into_iter().cloned())
            .map(|c| async move { (open_checkpoint(store, job, &c.checkpoint).await, c) })
            .buffer_unordered(IN_FLIGHT);
        while let Some((manifest, checkpoint)) = manifests.next().await {
            match manifest {
                Ok(manifest) => objects.extend(manifest.objects.into_iter().map(|o| (o.path, o.bytes))),
                // Its objects go all the same; how many they are is not known any more.
                Err(e) if checkpoint.quarantined.is_some() && e.kind() != Kind::Retry => {}
                Err(e) => return Err(e),
            }
        }
        objects.retain(|path, _| !kept.holds(path));
        let bytes = objects.values().fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
        Ok(Freed { objects: objects.len() as u64, bytes })
    }
}

/// The checkpoints that keeping only the last `keep_last` lets go. 0 keeps one: the newest good one is what a resume
/// needs.
pub fn condemned(history: &History, keep_last: usize) -> Vec<CheckpointRef> {
    Policy::last(keep_last).condemned(history)
}

/// One collection that keeps only the last `keep_last`. Returns the deleted checkpoints and the number of files
/// removed. `open` lists the steps of the present generation whose saves are not committed yet. Who collects again and
/// again keeps a [`Collector`].
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

/// One sweep; see [`Collector::sweep`].
pub async fn sweep(chain: &Chain, open: &BTreeSet<Step>) -> Result<usize, StoreError> {
    Collector::default().sweep(chain, Open::Steps(open)).await
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
