//! Snapshots on their way from the workers' slots to the store.
//!
//! The agent maps a slot the moment it hears of it, so the bytes stay even if the worker dies and its files are
//! removed. Each upload is a task that tries until it succeeds, a later generation is announced, or the coordinator has
//! settled the save otherwise. A failed try is logged and reported; it never ends the job (§7 of the design).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint_store::{Kind, ShardSource, Store, StoreError, upload_shard};
use proto::ids::JobName;
use proto::wire;
use tokio::sync::{mpsc, oneshot};

use crate::driver::Input;
use crate::receipts::SaveKey;

/// Between two tries: doubles from the first to the last.
const WAITS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

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
    /// Dropping a sender breaks its upload off.
    running: BTreeMap<SaveKey, oneshot::Sender<()>>,
    /// The newest generation named of a job: what an older one has captured can no longer become a checkpoint.
    newest: BTreeMap<JobName, u64>,
    stores: BTreeMap<JobName, String>,
}

impl Uploads {
    pub(crate) fn new(inputs: mpsc::Sender<Input>) -> Self {
        Self { inputs, running: BTreeMap::new(), newest: BTreeMap::new(), stores: BTreeMap::new() }
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
        self.running.insert(key.clone(), cancel);
        let (inputs, key, stall) = (self.inputs.clone(), key.clone(), captured.stall_seconds);
        tokio::spawn(async move {
            let began = Instant::now();
            let work = tokio::spawn(persist(url, source, key.clone(), inputs.clone()));
            let stop = work.abort_handle();
            let ended = tokio::select! {
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

    /// Breaks one upload off.
    pub(crate) fn cancel(&mut self, key: &SaveKey) {
        self.running.remove(key);
    }

    /// Whether an upload is under way.
    pub(crate) fn is_running(&self, key: &SaveKey) -> bool {
        self.running.contains_key(key)
    }

    /// An upload has ended.
    pub(crate) fn ended(&mut self, key: &SaveKey) {
        self.running.remove(key);
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
        self.stores.remove(job);
        self.running.retain(|key, _| key.job != *job);
    }
}

/// Tries until the shard is in the store; the receipt as JSON, or why no try can succeed.
async fn persist(
    url: String,
    source: Arc<ShardSource>,
    key: SaveKey,
    inputs: mpsc::Sender<Input>,
) -> Result<Vec<u8>, String> {
    let (mut wait, mut failures) = (WAITS.0, 0u32);
    loop {
        let error = match attempt(&url, &source).await {
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

async fn attempt(url: &str, source: &ShardSource) -> Result<Vec<u8>, StoreError> {
    // The store was proved to be the coordinator's when this agent was taken in; one that has vanished since is not made.
    let store = Store::open_existing(url)?;
    upload_shard(&store, source, uuid::Uuid::new_v4()).await?.to_json()
}
