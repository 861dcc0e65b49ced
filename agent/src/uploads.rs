//! Snapshots on their way from the workers' slots to the store.
//!
//! The agent maps a slot the moment it hears of it, so the bytes stay even if the worker dies and its files are
//! removed. Each upload is a task that tries until it succeeds, a later generation is announced, or the coordinator has
//! settled the save otherwise. A failed try is logged and reported; it never ends the job (§7 of the design).
//!
//! An upload holds a slot, one of three. While a capture finds none it may be given up, and its checkpoint counts as
//! skipped: at once if a try has failed, else after a time that doubles with each upload that was given up for it, so
//! that a store that is slow, and not away, gets its checkpoint in the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use checkpoint_store::{
    Kind, KnownBlocks, Opener, Receipt, ShardSource, Space, Stage, StoreError, UploadOptions, upload_changed,
};
use proto::ids::JobName;
use proto::wire;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::driver::Input;
use crate::memory::ParityTimes;
use crate::receipts::SaveKey;

/// Between two tries: doubles from the first to the last.
const WAITS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// The time an upload has at the least while its slot is needed, and how many times that of the last one. Long: what is
/// given up is a checkpoint, and a large one takes its time.
const LEASH: Duration = Duration::from_mins(5);
const SLOWER: u32 = 3;

/// An upload is over, one way or the other; nothing reads its slot any more.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Which save.
    pub(crate) key: SaveKey,
    /// What came of it.
    pub(crate) outcome: Outcome,
}

/// How an upload ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The shard is durable.
    Stored(wire::ShardReceipt),
    /// Nobody wants it any more.
    BrokenOff,
    /// No try can succeed, and why.
    Hopeless(String),
}

/// The uploads in progress.
#[derive(Debug)]
pub(crate) struct Uploads {
    inputs: mpsc::Sender<Input>,
    running: BTreeMap<SaveKey, Running>,
    /// How long an upload of a job may take while its slot is needed, where that is not [`LEASH`].
    leashes: BTreeMap<JobName, Duration>,
    /// The newest generation named of a job: what an older one has captured can no longer become a checkpoint.
    newest: BTreeMap<JobName, u64>,
    stores: BTreeMap<JobName, String>,
    known: BTreeMap<JobName, Known>,
    opener: Opener,
    times: ParityTimes,
}

/// An upload in progress.
#[derive(Debug)]
struct Running {
    /// Dropping it breaks the upload off.
    _cancel: oneshot::Sender<()>,
    began: Instant,
    /// A try has failed.
    failed: bool,
}

/// What the committed checkpoints of a job hold, as far as this node stored them: unchanged blocks stay where they lie.
#[derive(Debug)]
struct Known {
    space: Space,
    blocks: Arc<KnownBlocks>,
}

impl Uploads {
    pub(crate) fn new(inputs: mpsc::Sender<Input>, opener: Opener, times: ParityTimes) -> Self {
        Self {
            inputs,
            running: BTreeMap::new(),
            leashes: BTreeMap::new(),
            newest: BTreeMap::new(),
            stores: BTreeMap::new(),
            known: BTreeMap::new(),
            opener,
            times,
        }
    }

    /// Where the shards of a job go.
    pub(crate) fn store(&mut self, job: JobName, url: String) {
        self.stores.insert(job, url);
    }

    /// Begins to upload a shard, or says why not. It ends with an [`Input::Uploaded`], whatever happens.
    pub(crate) fn start(
        &mut self,
        key: &SaveKey,
        source: Arc<ShardSource>,
        stages: Vec<Stage>,
        captured: &wire::Captured,
    ) -> Result<(), String> {
        if self.newest.get(&key.job).is_some_and(|newest| key.generation < *newest) {
            return Err("its generation is over".into());
        }
        if self.running.contains_key(key) {
            return Err("it is on its way already".into());
        }
        let url = self.stores.get(&key.job).cloned().ok_or("its job has no store here")?;
        let (cancel, cancelled) = oneshot::channel();
        let running = Running { _cancel: cancel, began: Instant::now(), failed: false };
        self.running.insert(key.clone(), running);
        let (inputs, key, stall) = (self.inputs.clone(), key.clone(), captured.stall_seconds);
        let (known, times) = (self.known_of(&key.job, &source.space), self.times.clone());
        let opener = self.opener.clone();
        tokio::spawn(async move {
            let began = Instant::now();
            let save = Save { opener, url, source, known, stages, times };
            let work = tokio::spawn(persist(save, key.clone(), inputs.clone()));
            let stop = work.abort_handle();
            let ended = tokio::select! {
                biased;
                ended = work => ended.unwrap_or_else(|error| Err(format!("a defect in uploading: {error}"))).map(Some),
                _ = cancelled => {
                    stop.abort();
                    Ok(None)
                }
            };
            let outcome = match ended {
                Ok(Some(receipt)) => Outcome::Stored(wire::ShardReceipt {
                    job: key.job.to_string(),
                    generation: key.generation,
                    step: key.step,
                    rank: key.rank,
                    receipt,
                    stall_seconds: stall,
                    seconds: began.elapsed().as_secs_f64(),
                }),
                Ok(None) => Outcome::BrokenOff,
                Err(reason) => Outcome::Hopeless(reason),
            };
            let _ = inputs.send(Input::Uploaded(Finished { key, outcome })).await;
        });
        Ok(())
    }

    /// What is known of a job; nothing, if its model is another than before.
    fn known_of(&mut self, job: &JobName, space: &Space) -> Arc<KnownBlocks> {
        if self.known.get(job).is_none_or(|known| known.space != *space) {
            self.known.insert(job.clone(), Known { space: space.clone(), blocks: Arc::default() });
        }
        self.known.get(job).map(|known| Arc::clone(&known.blocks)).unwrap_or_default()
    }

    /// A save is decided: its upload, if it still runs, is of no use. What became a checkpoint is learnt from. After a
    /// refusal, which may be for what the save referred to, nothing is known any more: the next shard is stored whole.
    pub(crate) fn settled(&mut self, key: &SaveKey, committed: bool, receipt: Option<wire::ShardReceipt>) {
        self.running.remove(key);
        let Some(known) = self.known.get_mut(&key.job) else { return };
        let receipt = receipt.and_then(|receipt| Receipt::from_bytes(&receipt.receipt).ok());
        match receipt.filter(|_| committed) {
            Some(receipt) => Arc::make_mut(&mut known.blocks).learn(&known.space, &receipt),
            None if committed => {}
            None => known.blocks = Arc::default(),
        }
    }

    /// Whether an upload is under way.
    pub(crate) fn is_running(&self, key: &SaveKey) -> bool {
        self.running.contains_key(key)
    }

    /// An upload has ended, well or not.
    pub(crate) fn ended(&mut self, key: &SaveKey, stored: bool) {
        let running = self.running.remove(key);
        if let Some(running) = running.filter(|_| stored) {
            self.leashes.insert(key.job.clone(), LEASH.max(running.began.elapsed() * SLOWER));
        }
    }

    /// A try to upload has failed.
    pub(crate) fn failed(&mut self, failed: &wire::SaveFailed) {
        let Ok(job) = JobName::new(failed.job.as_str()) else { return };
        let key = SaveKey { job, generation: failed.generation, step: failed.step, rank: failed.rank };
        if let Some(running) = self.running.get_mut(&key) {
            running.failed = true;
        }
    }

    /// A capture found no slot: gives up the oldest step's uploads that hold slots alone, if they get nowhere. Returns
    /// them; each still ends with an [`Input::Uploaded`].
    pub(crate) fn give_up(&mut self, job: &JobName, alone: impl Fn(&SaveKey) -> bool) -> Vec<SaveKey> {
        let leash = self.leashes.get(job).copied().unwrap_or(LEASH);
        let vain = |running: &Running| running.failed || running.began.elapsed() >= leash;
        let oldest = self.running.iter().find(|(key, running)| key.job == *job && vain(running) && alone(key));
        let Some((key, failed)) = oldest.map(|(key, running)| (key.clone(), running.failed)) else { return vec![] };
        if !failed {
            self.leashes.insert(job.clone(), leash.saturating_mul(2));
        }
        let of_step =
            |other: &SaveKey| other.job == *job && (other.generation, other.step) == (key.generation, key.step);
        self.running.extract_if(.., |other, _| of_step(other)).map(|(key, _)| key).collect()
    }

    /// Breaks off what can no longer become a checkpoint. A generation that has failed may still be committed by those
    /// of its uploads that are under way, until the next one is announced.
    pub(crate) fn fence(&mut self, job: &JobName, fenced: u64, live: Option<u64>) {
        let newest = fenced.max(live.unwrap_or(0));
        self.newest.insert(job.clone(), newest);
        self.running.retain(|key, _| key.job != *job || key.generation >= newest);
    }

    /// Breaks off everything of a job.
    pub(crate) fn forget(&mut self, job: &JobName) {
        self.newest.remove(job);
        self.leashes.remove(job);
        self.stores.remove(job);
        self.known.remove(job);
        self.running.retain(|key, _| key.job != *job);
    }
}

/// A shard to be stored.
struct Save {
    opener: Opener,
    url: String,
    source: Arc<ShardSource>,
    /// Blocks that are stored already.
    known: Arc<KnownBlocks>,
    /// Where the time has gone so far.
    stages: Vec<Stage>,
    times: ParityTimes,
}

/// Tries until the shard is in the store; the receipt as it is sent, or why no try can succeed.
async fn persist(save: Save, key: SaveKey, inputs: mpsc::Sender<Input>) -> Result<Vec<u8>, String> {
    let (mut wait, mut failures) = (WAITS.0, 0u32);
    loop {
        let error = match attempt(&save).await {
            Ok(receipt) => return Ok(receipt),
            Err(error) => error,
        };
        failures = failures.saturating_add(1);
        let hopeless = matches!(error.kind(), Kind::Bug | Kind::Fenced);
        tracing::warn!(
            job = %key.job, generation = key.generation, step = key.step, rank = key.rank, failures, %error, hopeless,
            "a shard was not stored"
        );
        if hopeless {
            return Err(error.to_string());
        }
        let failed = wire::SaveFailed {
            job: key.job.to_string(),
            generation: key.generation,
            step: key.step,
            rank: key.rank,
            failures,
            reason: error.to_string(),
        };
        // For people: dropped when the agent does not keep up.
        let _ = inputs.try_send(Input::SaveFailed(failed));
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(WAITS.1);
    }
}

async fn attempt(save: &Save) -> Result<Vec<u8>, StoreError> {
    // The store was proved to be the coordinator's when this agent was taken in; one that has vanished since is not
    // made.
    let store = save.opener.open_existing(&save.url)?;
    let options = UploadOptions { known: Some(&save.known), stages: &save.stages };
    let source = &save.source;
    let mut receipt = upload_changed(&store, source, proto::chance::uuid(), options).await?;
    let key = (source.generation.get(), source.scalar.step.get());
    receipt.stages.extend(save.times.of(&source.job, key));
    receipt.to_bytes()
}
