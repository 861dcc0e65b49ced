//! Who watches: everything that lands in the bucket is seen here at once, and held against what must always be true.
//!
//! The oracle folds the chain for itself and knows which objects the visible checkpoints reach, so each invariant is
//! checked at the very operation that could break it:
//!
//! * *whole*: a checkpoint that becomes visible verifies, byte for byte, and is the state that was trained;
//! * *immutable*: no object is overwritten by other bytes;
//! * *reachable*: nothing that a visible checkpoint needs is deleted, and no record;
//! * *once*: for a step and generation at most one manifest is ever committed;
//! * *fenced*: a record lands only in its place, by an author who has not been superseded;
//! * *newest*: the newest good checkpoint is never given up, and after each death it loads and is right;
//! * *acknowledged*: what a committer was told is committed, is;
//! * *collected*: when all is quiet, a collection leaves what is reachable and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use checkpoint_store::record::MAX_RECORD;
use checkpoint_store::{Chain, CheckpointRef, Event, History, Record, Store, layout, open_checkpoint, verify};
use proto::ids::Epoch;

use super::disk::Effect;
use super::product::{job, loads_truly, truth};

/// What the watcher knows.
pub(crate) struct Oracle {
    /// A way to the bucket on which nothing goes wrong.
    store: Store,
    history: History,
    /// The paths each visible checkpoint needs.
    reach: BTreeMap<String, BTreeSet<String>>,
    /// The manifest ever committed for a step and generation.
    committed: BTreeMap<(u64, u64), String>,
    /// The epoch a process has taken.
    epochs: BTreeMap<u32, Epoch>,
    /// How often each invariant was checked.
    pub(crate) checks: BTreeMap<&'static str, u64>,
}

impl Oracle {
    pub(crate) fn new(store: Store) -> Self {
        let (history, reach, committed) = (History::default(), BTreeMap::new(), BTreeMap::new());
        Self { store, history, reach, committed, epochs: BTreeMap::new(), checks: BTreeMap::new() }
    }

    pub(crate) fn history(&self) -> &History {
        &self.history
    }

    /// A process leads, or will, in this epoch.
    pub(crate) fn leads(&mut self, process: u32, epoch: Epoch) {
        self.epochs.insert(process, epoch);
    }

    /// Whether a checkpoint is committed and not deleted, in truth.
    pub(crate) fn is_visible(&self, manifest: &str) -> bool {
        self.reach.contains_key(manifest)
    }

    /// Checkpoints ever committed.
    pub(crate) fn commits(&self) -> u64 {
        self.committed.len() as u64
    }

    /// Leaders that were ever elected.
    pub(crate) fn leaders(&self) -> u64 {
        self.epochs.len() as u64
    }

    fn check(&mut self, what: &'static str) {
        *self.checks.entry(what).or_default() += 1;
    }

    /// Something has landed.
    pub(crate) async fn saw(&mut self, process: u32, effect: &Effect) -> Result<(), String> {
        match effect {
            Effect::Put { path, replaced } => {
                self.check("immutable");
                if *replaced {
                    return Err(format!("{path} was overwritten by other bytes"));
                }
                match layout::record_number(&job(), path) {
                    Some(number) => self.record(process, path, number).await,
                    None => Ok(()),
                }
            }
            Effect::Deleted { path } => {
                self.check("reachable");
                if layout::record_number(&job(), path).is_some() {
                    return Err(format!("the record {path} was deleted"));
                }
                match self.reach.iter().find(|(_, paths)| paths.contains(path)) {
                    Some((manifest, _)) => Err(format!("{path} is reachable, but was deleted: {manifest} names it")),
                    None => Ok(()),
                }
            }
        }
    }

    async fn record(&mut self, process: u32, path: &str, number: u64) -> Result<(), String> {
        // A put of the same bytes again changes nothing.
        if number < self.history.records {
            return Ok(());
        }
        let bytes = self.store.get(path, MAX_RECORD).await.map_err(|e| e.to_string())?;
        let record = Record::parse(path, number, &bytes).map_err(|e| e.to_string())?;
        self.check("fenced");
        if number != self.history.records {
            return Err(format!("{path} landed where record {} belongs", self.history.records));
        }
        if self.epochs.get(&process).is_some_and(|epoch| *epoch < self.history.epoch) {
            let at = self.history.epoch;
            return Err(format!("{path} was written by a superseded leader, though the chain is at epoch {at}"));
        }
        if let Event::Deleted { manifest } = &record.event {
            self.check("newest");
            if self.history.newest_good().is_some_and(|newest| newest.manifest == *manifest) {
                return Err(format!("the newest good checkpoint was deleted: {manifest}"));
            }
            self.reach.remove(manifest);
        }
        self.history.apply(&record).map_err(|e| format!("{path}: {e}"))?;
        match &record.event {
            Event::Committed(checkpoint) => self.committed(checkpoint).await,
            _ => Ok(()),
        }
    }

    async fn committed(&mut self, checkpoint: &CheckpointRef) -> Result<(), String> {
        self.check("once");
        let (step, generation) = (checkpoint.step.get(), checkpoint.generation.get());
        let name = &checkpoint.manifest;
        if let Some(before) = self.committed.insert((step, generation), name.clone()) {
            return Err(format!("step {step} of generation {generation} was committed twice: {before} and {name}"));
        }
        self.whole(checkpoint).await?;
        let manifest = open_checkpoint(&self.store, &job(), checkpoint).await.map_err(|e| e.to_string())?;
        let mut paths: BTreeSet<String> = manifest.objects.into_iter().map(|object| object.path).collect();
        paths.insert(layout::manifest(&job(), name));
        self.reach.insert(name.clone(), paths);
        Ok(())
    }

    /// A visible checkpoint verifies and is the state that was trained.
    async fn whole(&mut self, checkpoint: &CheckpointRef) -> Result<(), String> {
        self.check("whole");
        let name = &checkpoint.manifest;
        let torn = |why: String| format!("{name} was committed but does not verify: {why}");
        let report = verify(&self.store, &job(), checkpoint).await.map_err(|e| torn(e.to_string()))?;
        if let Some(problem) = report.first_problem() {
            return Err(torn(problem.to_owned()));
        }
        if checkpoint.digest != truth(checkpoint.step.get()).digest {
            return Err(torn("it is not the state that was saved".into()));
        }
        Ok(())
    }

    /// A committer was told so.
    pub(crate) fn acknowledged(&mut self, checkpoint: &CheckpointRef) -> Result<(), String> {
        self.check("acknowledged");
        let key = (checkpoint.step.get(), checkpoint.generation.get());
        if self.committed.get(&key) == Some(&checkpoint.manifest) {
            return Ok(());
        }
        Err(format!("{} was acknowledged, but no record of the chain names it", checkpoint.manifest))
    }

    /// A new process reads what the dead one has left: the newest good checkpoint loads, and is right.
    pub(crate) async fn recovers(&mut self) -> Result<(), String> {
        self.check("newest");
        let chain = Chain::load(&self.store, &job()).await.map_err(|e| format!("the chain does not load: {e}"))?;
        let history = chain.as_ref().map(Chain::history);
        if history.is_some_and(|found| *found != self.history) {
            return Err("the chain, read anew, is not what was written".into());
        }
        let Some(newest) = self.history.newest_good().cloned() else { return Ok(()) };
        let wrong = |why: String| format!("the newest good checkpoint {} does not load: {why}", newest.manifest);
        let manifest = open_checkpoint(&self.store, &job(), &newest).await.map_err(|e| wrong(e.to_string()))?;
        match loads_truly(&self.store, &manifest, 0..manifest.space.elements()).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(wrong("it is not the state that was saved".into())),
            Err(e) => Err(wrong(e.to_string())),
        }
    }

    /// All is quiet and collection has run: what is reachable is there and verifies, and nothing else is there.
    pub(crate) async fn quiet(&mut self) -> Result<(), String> {
        self.recovers().await?;
        for checkpoint in self.history.checkpoints.clone() {
            self.whole(&checkpoint.checkpoint).await?;
        }
        self.check("collected");
        let mut needed: BTreeSet<String> = self.reach.values().flatten().cloned().collect();
        for folder in [layout::checkpoints(&job()), layout::objects(&job())] {
            let there = self.store.list(&folder, None, 100_000).await.map_err(|e| e.to_string())?;
            for found in there {
                if !needed.remove(&found.path) {
                    return Err(format!("{} is an orphan that was never collected", found.path));
                }
            }
        }
        match needed.first() {
            Some(path) => Err(format!("{path} is reachable, but is not there")),
            None => Ok(()),
        }
    }
}
