//! The jobs' part of the store, as the machine's operations need it.
//!
//! The machine says which record comes next; this file turns it into a record of the job's chain and reports what came
//! of it. After an append without a clear answer the chain is read again before anything else is written, so a record
//! is neither lost nor doubled. An append lost to another author means that another coordinator leads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use checkpoint_store::error::{Kind, StoreError};
use checkpoint_store::{
    Chain, ChainError, Change, CheckpointRef, Digest, Encoded, Event, History, Keeper, Manifest,
    Member as StoredMember, MemoryPoint as StoredPoint, NodeBook, Open, Policy, Reached, Receipt, Record, Space,
    Status, Store, aside, commit_encoded, list_jobs, note, read_spec, write_spec,
};
use proto::ids::{Epoch, Generation, JobName, NodeName, Rank, Step, WorldSize};
use proto::invariant::same_content;
use proto::spec::{JobSpec, Reduction, SPEC_FORMAT, VALIDATION_LOSS};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::machine::memory::MemoryPoint;
use crate::machine::{Changed, Checkpoint, End, Entry, Ledger, Member, Membership, Operation, Outcome};
use crate::metrics::Metrics;

/// All chains this leader writes.
#[derive(Clone)]
pub(crate) struct Journal {
    store: Store,
    epoch: Epoch,
    /// Who leads, for the records.
    leader: String,
    /// All the store's jobs are this leader's, those too that it finds only when it would make them.
    all: bool,
    metrics: Metrics,
    /// The start of the monotonic time by which leases are counted.
    began: Instant,
    pages: Arc<std::sync::Mutex<BTreeMap<JobName, Arc<Mutex<Page>>>>>,
    /// What is recorded of nodes; `None` until it was read.
    nodes: Arc<Mutex<Option<NodeBook>>>,
}

/// One job's chain.
#[derive(Default)]
struct Page {
    /// `None` until the job's first record.
    chain: Option<Chain>,
    spec: Option<JobSpec>,
    /// An append whose fate is unknown.
    unclear: Option<Event>,
    /// What is remembered of leases and of what kept checkpoints reach.
    keeper: Keeper,
    /// What its newest checkpoints reach, for those that refer to older objects.
    reached: Reached,
}

/// A job found in the store: its ledger, or why it cannot be read.
pub(crate) type Found = (JobName, Result<Ledger, String>);

impl Journal {
    pub(crate) fn new(store: Store, epoch: Epoch, (leader, all): (String, bool), metrics: Metrics) -> Self {
        let (pages, nodes) = (Arc::default(), Arc::default());
        Self { store, epoch, leader, all, metrics, began: Instant::now(), pages, nodes }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn page(&self, job: &JobName) -> Arc<Mutex<Page>> {
        // Nothing panics while it holds the lock.
        let mut pages = self.pages.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Arc::clone(pages.entry(job.clone()).or_default())
    }

    /// Takes over what is recorded of nodes: those that are to be empty.
    pub(crate) async fn load_nodes(&self) -> Result<BTreeSet<NodeName>, StoreError> {
        let book = NodeBook::take_over(&self.store, self.epoch).await?;
        Ok(self.nodes.lock().await.insert(book).drained().clone())
    }

    /// Records which nodes are to be empty.
    pub(crate) async fn record_nodes(self, drained: BTreeSet<NodeName>) -> Outcome {
        match self.nodes.lock().await.as_mut() {
            Some(book) => {
                book.record(drained).await.map_or_else(|error| sorted(error.kind(), &error), |()| Outcome::Done)
            }
            None => Outcome::Failed("the record of nodes has not been read yet".into()),
        }
    }

    /// Reads all jobs of the store, or only one. Damage to one job is told with it; a store out of reach is an error.
    pub(crate) async fn load(&self, only: Option<&JobName>) -> Result<Vec<Found>, StoreError> {
        let mut found = Vec::new();
        let jobs = match only {
            Some(job) => vec![job.clone()],
            None => list_jobs(&self.store).await?,
        };
        for job in jobs {
            match self.load_job(&job).await {
                Ok(Some(ledger)) => found.push((job, Ok(ledger))),
                Ok(None) => {}
                Err(error) if error.kind() == Kind::Retry => return Err(error),
                Err(error) => found.push((job, Err(error.to_string()))),
            }
        }
        Ok(found)
    }

    async fn load_job(&self, job: &JobName) -> Result<Option<Ledger>, StoreError> {
        let Some(chain) = Chain::load(&self.store, job).await? else { return Ok(None) };
        let history = chain.history();
        let Some(hash) = history.spec_hash else {
            return Err(StoreError::Corrupt(format!("job {job}: its chain names no specification")));
        };
        let bytes = read_spec(&self.store, job, hash).await?;
        let spec: JobSpec = serde_json::from_slice(&bytes)
            .map_err(|error| StoreError::Corrupt(format!("job {job}: its specification cannot be read: {error}")))?;
        if spec.format > SPEC_FORMAT {
            let path = format!("job {job}: its specification");
            return Err(StoreError::NewerFormat { path, found: spec.format, known: SPEC_FORMAT });
        }
        spec.validate(&format!("job {job}: its specification"))
            .map_err(|error| StoreError::Corrupt(error.to_string()))?;
        if spec.name != *job {
            let name = &spec.name;
            return Err(StoreError::Corrupt(format!("job {job}: its specification is of a job named {name}")));
        }
        let ledger = ledger(spec.clone(), history)?;
        let page = self.page(job);
        let mut keeper = Keeper::default();
        keeper.observe(self.now(), &chain);
        *page.lock().await = Page { chain: Some(chain), spec: Some(spec), keeper, ..Page::default() };
        Ok(Some(ledger))
    }

    /// Performs one operation; at most one of a job at a time.
    pub(crate) async fn perform(self, job: JobName, operation: Operation) -> Outcome {
        let page = self.page(&job);
        let mut page = page.lock().await;
        let creates = matches!(operation, Operation::Append(Entry::Submitted { .. }));
        let done = match operation {
            Operation::Append(entry) => self.append(&mut page, &job, entry).await,
            Operation::Commit { receipts, validation_loss, .. } => {
                self.commit(&mut page, receipts, validation_loss).await
            }
            Operation::Retain => self.retain(&mut page).await,
            Operation::Change(change) => match self.change(&mut page, &change).await {
                Err(error) if error.kind() == Kind::Input => Ok(Outcome::Refused(error.to_string())),
                done => done,
            },
        };
        drop(page);
        match done {
            Ok(outcome) => outcome,
            // Nothing else leads here, so it was there all along: a leader before this one had asked for it, and the
            // record landed when this one had read the store.
            Err(error) if error.kind() == Kind::Fenced && creates && self.all => match self.load_job(&job).await {
                Ok(Some(ledger)) => Outcome::Found(Box::new(ledger)),
                Ok(None) => Outcome::Lost(error.to_string()),
                Err(error) => sorted(error.kind(), &error),
            },
            Err(error) => sorted(error.kind(), &error),
        }
    }

    async fn append(&self, page: &mut Page, job: &JobName, entry: Entry) -> Result<Outcome, ChainError> {
        let resolved = page.resolve(self.epoch).await?;
        let spec = match &entry {
            Entry::Submitted { spec, .. } | Entry::Resumed { spec, .. } | Entry::Restarted { spec, .. } => Some(spec),
            _ => None,
        };
        let event = self.event(job, &entry).await?;
        if resolved.as_ref() != Some(&event) {
            let history = page.chain.as_ref().map(Chain::history);
            let generation = match &event {
                Event::Generation { generation, .. } => *generation,
                _ => history.map(|history| history.generation).unwrap_or_default(),
            };
            let record = Record::new(self.epoch, generation, event.clone());
            if let Some(chain) = page.chain.as_mut() {
                page.unclear = Some(event);
                chain.append(record).await?;
                page.unclear = None;
            } else {
                page.chain = Some(Chain::create(&self.store, job, record).await?);
            }
        }
        if let Some(spec) = spec {
            page.spec = Some((**spec).clone());
        }
        Ok(Outcome::Done)
    }

    /// The chain's words for a decision.
    async fn event(&self, job: &JobName, entry: &Entry) -> Result<Event, StoreError> {
        let write = async |spec: &JobSpec| {
            let bytes = serde_json::to_vec(spec).map_err(|error| StoreError::Bug(format!("job {job}: {error}")))?;
            write_spec(&self.store, job, bytes.into()).await
        };
        Ok(match entry {
            Entry::Submitted { spec, stop_at } => Event::Submitted { spec_hash: write(spec).await?, stop_at: *stop_at },
            Entry::Resumed { spec, stop_at } => Event::Resumed { spec_hash: write(spec).await?, stop_at: *stop_at },
            Entry::Restarted { spec, stop_at } => Event::Restarted { spec_hash: write(spec).await?, stop_at: *stop_at },
            Entry::Led => Event::Led { epoch: self.epoch, leader: self.leader.clone() },
            Entry::Scaled { workers } => Event::Scaled { workers: *workers },
            Entry::Generation(membership) => formed(membership)?,
            Entry::Incident(incident) => Event::Incident(incident.clone()),
            Entry::Yielded { step, reason } => Event::Yielded { step: *step, reason: note(reason) },
            Entry::Quarantined { checkpoint, reason } => {
                Event::Quarantined { manifest: reference(checkpoint)?.manifest, reason: reason.clone() }
            }
            Entry::Ended(End::Paused { step, .. }) => Event::Paused { step: *step },
            Entry::Ended(End::Finished { step, loss, digest }) => {
                let loss = loss.filter(|loss| loss.is_finite());
                Event::Finished { step: *step, digest: parse_digest(digest)?, loss }
            }
            Entry::Ended(End::Failed { reason, code }) => Event::Failed { reason: reason.clone(), code: *code },
            Entry::Ended(End::Cancelled) => Event::Cancelled,
        })
    }

    async fn commit(
        &self,
        page: &mut Page,
        receipts: Vec<Arc<[u8]>>,
        validation_loss: Option<f64>,
    ) -> Result<Outcome, ChainError> {
        page.resolve(self.epoch).await?;
        let (Some(chain), Some(spec)) = (page.chain.as_mut(), page.spec.clone()) else {
            return Err(StoreError::Bug("a commit to a job without a chain".into()).into());
        };
        // Hashing the block hashes of a large model takes a while.
        let assembled = aside({
            let spec = spec.clone();
            move || assemble(&spec, &receipts)
        })
        .await;
        let (manifest, encoded) = match assembled {
            Ok(Ok(assembled)) => assembled,
            Ok(Err(reason)) => return Ok(Outcome::Impossible(reason)),
            Err(error) => return Ok(Outcome::Impossible(format!("assembling the manifest broke off: {error}"))),
        };
        if let Some(reason) = late(chain.history(), manifest.step, manifest.generation) {
            return Ok(Outcome::Impossible(reason));
        }
        // One that is committed already, by any generation, has the same content: weights are a function of the job.
        let stands = chain.history().checkpoints.iter().filter(|saved| saved.is_good()).map(|saved| &saved.checkpoint);
        let stands = stands.map(|saved| (saved.step, saved.digest));
        if spec.training.reduction == Reduction::Exact
            && let Err(violation) = same_content(stands, manifest.step, &manifest.digest)
        {
            tracing::error!(job = %chain.job(), %violation, "a defect: an invariant would be broken");
            return Ok(Outcome::Impossible(violation.to_string()));
        }
        let id = proto::chance::uuid();
        let checkpoint = commit_encoded(chain, &manifest, encoded, self.epoch, id, &mut page.reached).await?;
        self.metrics.saved(chain.job(), &manifest.timeline);
        if let Some(loss) = validation_loss.filter(|loss| loss.is_finite()) {
            measured(chain, self.epoch, &checkpoint, loss).await?;
        }
        Ok(Outcome::Committed(Box::new(known(&checkpoint)?)))
    }

    async fn retain(&self, page: &mut Page) -> Result<Outcome, ChainError> {
        page.resolve(self.epoch).await?;
        let (Some(chain), Some(spec)) = (page.chain.as_mut(), page.spec.as_ref()) else { return Ok(Outcome::Done) };
        let before = chain.history().clone();
        let policy = Policy::from(&spec.checkpoint);
        let done = page.keeper.collect(chain, self.epoch, self.now(), &policy).await?;
        if !done.deleted.is_empty() {
            tracing::info!(job = %chain.job(), checkpoints = done.deleted.len(), files = done.files, "retention");
        }
        if let Some(why) = done.unfinished {
            tracing::warn!(job = %chain.job(), "retention did not finish: {why}; the next one will");
        }
        Ok(Outcome::Collected(gone(&before, chain.history())))
    }

    async fn change(&self, page: &mut Page, change: &[u8]) -> Result<Outcome, ChainError> {
        page.resolve(self.epoch).await?;
        let change = Change::from_json(change)?;
        let (Some(chain), Some(spec)) = (page.chain.as_mut(), page.spec.as_ref()) else {
            return Err(StoreError::Bug("a change of a job without a chain".into()).into());
        };
        let before = chain.history().clone();
        let policy = Policy::from(&spec.checkpoint);
        let report = page.keeper.perform(chain, self.epoch, self.now(), &policy, &change).await?;
        if report.records > 0 {
            tracing::info!(job = %chain.job(), ?change, records = report.records, "the checkpoints were changed");
        }
        let quarantined = report.quarantined.as_ref().map(|(checkpoint, why)| (checkpoint.step, why.clone()));
        let json = serde_json::to_vec(&report).map_err(|error| StoreError::Bug(format!("a report: {error}")))?;
        Ok(Outcome::Changed(Changed { report: json, gone: gone(&before, chain.history()), quarantined }))
    }
}

/// What a failed operation means to the machine.
fn sorted(kind: Kind, error: &impl std::fmt::Display) -> Outcome {
    match kind {
        Kind::Fenced => Outcome::Lost(error.to_string()),
        Kind::Retry | Kind::Input => Outcome::Failed(error.to_string()),
        Kind::Corrupt | Kind::Bug => Outcome::Impossible(error.to_string()),
    }
}

/// The good checkpoints of one history that another lacks.
fn gone(before: &History, after: &History) -> Vec<(Step, Generation)> {
    let still = |manifest: &str| after.find(manifest).is_some_and(checkpoint_store::Checkpoint::is_good);
    let lost = before.checkpoints.iter().filter(|c| c.is_good() && !still(&c.checkpoint.manifest));
    lost.map(|c| (c.checkpoint.step, c.checkpoint.generation)).collect()
}

/// Why a step can no longer be committed: its files were fair game for a collection once a newer one was.
fn late(history: &History, step: Step, generation: Generation) -> Option<String> {
    let committed = history.checkpoints.iter().map(|c| &c.checkpoint);
    let known = committed.into_iter().any(|c| (c.step, c.generation) == (step, generation));
    let open = known || generation != history.generation || Open::of(history).holds(step);
    (!open).then(|| format!("generation {generation} has committed a newer step than {step}"))
}

/// Records the loss of a checkpoint, once.
async fn measured(chain: &mut Chain, epoch: Epoch, of: &CheckpointRef, loss: f64) -> Result<(), ChainError> {
    let known = chain.history().find(&of.manifest).and_then(|c| c.metrics.get(VALIDATION_LOSS));
    if known == Some(&loss) {
        return Ok(());
    }
    let metrics = BTreeMap::from([(VALIDATION_LOSS.to_string(), loss)]);
    let event = Event::Measured { manifest: of.manifest.clone(), metrics };
    chain.append(Record::new(epoch, chain.history().generation, event)).await.map(drop)
}

impl Page {
    /// Reads again what an append without a clear answer has done. `Some`: it took effect, and which it was.
    async fn resolve(&mut self, epoch: Epoch) -> Result<Option<Event>, ChainError> {
        let Some(chain) = self.chain.as_mut() else { return Ok(None) };
        let found = chain.refresh().await?;
        let history = chain.history();
        if history.epoch > epoch {
            let why = format!("the chain of job {} is led in epoch {}", chain.job(), history.epoch);
            return Err(StoreError::Fenced(why).into());
        }
        if found.added > 0 && history.epoch < epoch {
            // The leader before was not at its end: what the machine knows of the job is from before these records.
            let why = format!("the chain of job {} has grown since it was read; it must be read again", chain.job());
            return Err(StoreError::Fenced(why).into());
        }
        let unclear = self.unclear.take();
        if unclear.is_some() && found.added > 0 && !found.landed {
            // An append that was given up has landed late, in the place of the one whose fate is asked for.
            let why = format!("the chain of job {} holds a record that was given up: reading it anew", chain.job());
            return Err(StoreError::Fenced(why).into());
        }
        Ok(unclear.filter(|_| found.landed))
    }
}

/// The manifest of a complete set of receipts, also as it is stored; or why they make none.
fn assemble(spec: &JobSpec, receipts: &[Arc<[u8]>]) -> Result<(Manifest, Encoded), String> {
    let began = Instant::now();
    let bytes = receipts.iter().map(|receipt| receipt.len() as u64).sum();
    let read = |receipt: &Arc<[u8]>| Receipt::from_bytes(receipt).map_err(|error| error.to_string());
    let receipts: Vec<Receipt> = receipts.iter().map(read).collect::<Result<_, _>>()?;
    let scalar = receipts.first().map(|first| first.scalar.clone()).ok_or("no receipts")?;
    let space = Space::of_model(&spec.model).map_err(|error| error.to_string())?;
    let mut manifest = Manifest::assemble(&space, scalar, receipts).map_err(|error| error.to_string())?;
    manifest.timeline.set_commit(began.elapsed().as_secs_f64(), bytes);
    let encoded = manifest.encode().map_err(|error| error.to_string())?;
    Ok((manifest, encoded))
}

fn formed(membership: &Membership) -> Result<Event, StoreError> {
    let count = membership.members.len() as u32;
    let world_size = WorldSize::new(count).ok_or_else(|| StoreError::Bug("a generation without members".into()))?;
    let members = membership.members.iter().zip(0..);
    Ok(Event::Generation {
        generation: membership.generation,
        world_size,
        members: members
            .map(|(member, rank)| StoredMember {
                node: member.node.clone(),
                worker: member.worker,
                rank: Rank::new(rank),
            })
            .collect(),
        start: membership.start.as_ref().map(reference).transpose()?,
        memory: membership.memory.map(|point| StoredPoint { generation: point.generation, step: point.step }),
        identity: membership.identity.clone(),
        fingerprint: membership.fingerprint.clone(),
    })
}

fn reference(checkpoint: &Checkpoint) -> Result<CheckpointRef, StoreError> {
    let parsed = serde_json::from_slice(&checkpoint.reference);
    parsed.map_err(|error| StoreError::Bug(format!("the reference of step {}: {error}", checkpoint.step)))
}

fn parse_digest(hex: &str) -> Result<Digest, StoreError> {
    hex.parse().map_err(|error| StoreError::Bug(format!("digest {hex:?}: {error}")))
}

/// A stored checkpoint in the machine's terms.
fn known(checkpoint: &CheckpointRef) -> Result<Checkpoint, StoreError> {
    let reference = serde_json::to_vec(checkpoint)
        .map_err(|error| StoreError::Bug(format!("the reference of {}: {error}", checkpoint.manifest)))?;
    Ok(Checkpoint {
        step: checkpoint.step,
        generation: checkpoint.generation,
        digest: checkpoint.digest.to_string(),
        bytes: checkpoint.bytes,
        reference,
    })
}

/// The fold of a chain in the machine's terms.
fn ledger(spec: JobSpec, history: &History) -> Result<Ledger, StoreError> {
    let mut ledger = Ledger::new(spec, history.stop_at);
    if let Some(workers) = history.scaled {
        ledger.scale(workers);
    }
    ledger.generation = history.generation;
    ledger.identity.clone_from(&history.identity);
    ledger.fingerprint.clone_from(&history.fingerprint);
    // The first generation since the last progress was no restart.
    ledger.restarts = history.generations_without_progress.saturating_sub(1);
    for saved in history.checkpoints.iter().filter(|saved| saved.is_good()) {
        ledger.commit(known(&saved.checkpoint)?);
    }
    ledger.had_checkpoint = history.checkpoints.iter().any(|saved| !saved.abandoned);
    ledger.incidents.clone_from(&history.incidents);
    let newest = ledger.newest().cloned();
    ledger.end = match history.status.clone() {
        Status::Submitted | Status::Running => None,
        Status::Paused { step } => {
            let digest = newest.filter(|newest| newest.step == step).map(|newest| newest.digest);
            Some(End::Paused { step, loss: None, digest })
        }
        Status::Finished { step, digest, loss } => Some(End::Finished { step, loss, digest: digest.to_string() }),
        Status::Failed { reason, code } => Some(End::Failed { reason, code }),
        Status::Cancelled => Some(End::Cancelled),
    };
    if history.status == Status::Running {
        let mut members = history.members.clone();
        members.sort_by_key(|member| member.rank);
        let member = |member: StoredMember| Member { node: member.node, worker: member.worker, address: String::new() };
        ledger.membership = Some(Membership {
            generation: history.generation,
            members: members.into_iter().map(member).collect(),
            start: history.start.as_ref().map(known).transpose()?,
            memory: history.memory.map(|point| MemoryPoint { generation: point.generation, step: point.step }),
            identity: history.identity.clone().unwrap_or_default(),
            fingerprint: history.fingerprint.clone().unwrap_or_default(),
        });
    }
    Ok(ledger)
}

#[cfg(test)]
mod tests {
    use checkpoint_store::BlockHash;
    use proto::ids::Generation;

    use super::*;

    #[tokio::test]
    async fn a_job_that_has_grown_since_it_was_read_is_not_led_from_that_reading() {
        let (store, job) = (Store::memory(), JobName::new("tiny").unwrap());
        let record = |epoch, event| Record::new(Epoch::new(epoch), Generation::ZERO, event);
        let submitted = Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
        let mut old = Chain::create(&store, &job, record(1, submitted)).await.unwrap();
        let mut page = Page { chain: Some(old.clone()), ..Page::default() };
        assert_eq!(page.resolve(Epoch::new(2)).await.unwrap(), None);
        // The leader before was only asleep.
        old.append(record(1, Event::Scaled { workers: 2 })).await.unwrap();
        let error = page.resolve(Epoch::new(2)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Fenced, "{error}");
        // Read again, the job can be led, and then the former leader is the one that is fenced.
        let mut page = Page { chain: Chain::load(&store, &job).await.unwrap(), ..Page::default() };
        page.resolve(Epoch::new(2)).await.unwrap();
        let led = Event::Led { epoch: Epoch::new(2), leader: "two".into() };
        page.chain.as_mut().unwrap().append(record(2, led)).await.unwrap();
        let mut former = Page { chain: Some(old), ..Page::default() };
        assert_eq!(former.resolve(Epoch::new(1)).await.unwrap_err().kind(), Kind::Fenced);
    }
}
