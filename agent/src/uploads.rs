//! Snapshots on their way from the workers' slots to the store.
//!
//! The agent maps a slot the moment it hears of it, so the bytes stay even if the worker dies and its files are
//! removed. Each upload is a task that tries until it succeeds, the generation is fenced, or the coordinator has
//! settled the save otherwise. A failed try is logged and counted; it never ends the job (§7 of the design).

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint_store::{
    Capture, Kind, KnownBlocks, Receipt, ShardSource, Space, Stage, Store, StoreError, UploadOptions, upload_changed,
};
use memmap2::Mmap;
use proto::ids::{JobName, WorkerId};
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
    /// Whose slot.
    pub(crate) worker: WorkerId,
    /// The slot.
    pub(crate) slot: u32,
    /// The receipt, unless it was broken off.
    pub(crate) receipt: Option<wire::ShardReceipt>,
}

/// What is fenced of a job: generations up to `fenced`, except `live`.
#[derive(Debug, Clone, Copy)]
struct Fence {
    fenced: u64,
    live: Option<u64>,
}

impl Fence {
    fn holds(self, generation: u64) -> bool {
        generation <= self.fenced && Some(generation) != self.live
    }
}

/// The uploads in progress.
#[derive(Debug)]
pub(crate) struct Uploads {
    inputs: mpsc::Sender<Input>,
    /// Dropping a sender breaks its upload off.
    running: BTreeMap<SaveKey, oneshot::Sender<()>>,
    fences: BTreeMap<JobName, Fence>,
    stores: BTreeMap<JobName, String>,
    known: BTreeMap<JobName, Known>,
}

/// What the committed checkpoints of a job hold, as far as this node stored them: unchanged blocks stay where they lie.
#[derive(Debug)]
struct Known {
    space: Space,
    blocks: Arc<KnownBlocks>,
}

impl Uploads {
    pub(crate) fn new(inputs: mpsc::Sender<Input>) -> Self {
        Self {
            inputs,
            running: BTreeMap::new(),
            fences: BTreeMap::new(),
            stores: BTreeMap::new(),
            known: BTreeMap::new(),
        }
    }

    /// Where the shards of a job go.
    pub(crate) fn store(&mut self, job: JobName, url: String) {
        self.stores.insert(job, url);
    }

    /// Begins to upload a slot; false if there is nothing to wait for: the slot is free again.
    pub(crate) fn start(&mut self, job: JobName, worker: WorkerId, slots: &Path, captured: wire::Captured) -> bool {
        let key = SaveKey { job, generation: captured.generation, step: captured.step, rank: captured.rank };
        if self.fences.get(&key.job).is_some_and(|fence| fence.holds(key.generation)) || self.running.contains_key(&key)
        {
            return false;
        }
        let Some(url) = self.stores.get(&key.job).cloned() else {
            tracing::error!(job = %key.job, "a snapshot of a job without a store was dropped");
            return false;
        };
        let (source, stages) = match open(slots, &captured, &key) {
            Ok(opened) => opened,
            Err(error) => {
                tracing::error!(job = %key.job, step = key.step, rank = key.rank, %error, "a snapshot is unusable");
                return false;
            }
        };
        let (cancel, cancelled) = oneshot::channel();
        self.running.insert(key.clone(), cancel);
        let inputs = self.inputs.clone();
        let known = self.known_of(&key.job, &source.space);
        tokio::spawn(async move {
            let (began, slot) = (Instant::now(), captured.slot);
            let options = UploadOptions { known: Some(&known), stages: &stages };
            let receipt = tokio::select! {
                receipt = persist(&url, &source, &key, options) => receipt,
                _ = cancelled => None,
            };
            drop(source);
            let receipt = receipt.map(|receipt| wire::ShardReceipt {
                job: key.job.to_string(),
                generation: key.generation,
                step: key.step,
                rank: key.rank,
                receipt,
                stall_seconds: captured.stall_seconds,
                seconds: began.elapsed().as_secs_f64(),
            });
            let _ = inputs.send(Input::Uploaded(Finished { key, worker, slot, receipt })).await;
        });
        true
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

    /// An upload has ended.
    pub(crate) fn ended(&mut self, key: &SaveKey) {
        self.running.remove(key);
    }

    /// Breaks off what can no longer become a checkpoint.
    pub(crate) fn fence(&mut self, job: &JobName, fenced: u64, live: Option<u64>) {
        let fence = Fence { fenced, live };
        self.fences.insert(job.clone(), fence);
        self.running.retain(|key, _| key.job != *job || !fence.holds(key.generation));
    }

    /// Breaks off everything of a job.
    pub(crate) fn forget(&mut self, job: &JobName) {
        self.fences.remove(job);
        self.stores.remove(job);
        self.known.remove(job);
        self.running.retain(|key, _| key.job != *job);
    }
}

/// Maps a slot and checks that it holds what the worker says.
fn open(slots: &Path, captured: &wire::Captured, key: &SaveKey) -> Result<(ShardSource, Vec<Stage>), StoreError> {
    let path = slots.join(format!("slot-{}", captured.slot));
    let unusable = |error: std::io::Error| StoreError::Input(format!("{}: {error}", path.display()));
    let file = File::open(&path).map_err(unusable)?;
    // SAFETY: the slot is in this agent's folder of mode 0700, is never shortened (a worker removes a file rather than
    // resizing it), and is not written again before this agent frees it.
    let map = unsafe { Mmap::map(&file) }.map_err(unusable)?;
    let mut capture = Capture::from_json(&captured.capture)?;
    let named = (capture.generation.get(), capture.scalar.step.get(), capture.rank.get());
    if capture.job != key.job || named != (key.generation, key.step, key.rank) {
        return Err(StoreError::Input(format!("{} is announced as another save than it is", path.display())));
    }
    let stages = std::mem::take(&mut capture.stages);
    Ok((capture.source(map)?, stages))
}

/// Tries until the shard is in the store; the receipt as it is sent. `None` if no try can succeed.
async fn persist(url: &str, source: &ShardSource, key: &SaveKey, options: UploadOptions<'_>) -> Option<Vec<u8>> {
    let mut wait = WAITS.0;
    for failures in 1.. {
        let error = match attempt(url, source, options).await {
            Ok(receipt) => return Some(receipt),
            Err(error) => error,
        };
        let hopeless = matches!(error.kind(), Kind::Bug | Kind::Fenced);
        tracing::warn!(
            job = %key.job, generation = key.generation, step = key.step, rank = key.rank, failures, %error, hopeless,
            "a shard was not stored"
        );
        if hopeless {
            return None;
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(WAITS.1);
    }
    None
}

async fn attempt(url: &str, source: &ShardSource, options: UploadOptions<'_>) -> Result<Vec<u8>, StoreError> {
    let store = Store::open(url)?;
    upload_changed(&store, source, uuid::Uuid::new_v4(), options).await?.to_bytes()
}
