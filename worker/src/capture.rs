//! What becomes of a frozen slot: hashed in the background, then told to the agent (P3).
//!
//! The training thread only hands the slot over. A thread of its own hashes the snapshot block by block and announces
//! it; from then on the agent holds it, uploads it if it is to be stored, and frees it when nobody needs it any more.

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use checkpoint_store::{Capture, Dtype, HashList, Stage, hash_blocks};
use proto::wire;
use tokio::sync::mpsc;

use crate::device::Arrival;
use crate::session::News;
use crate::slots::{Slot, Slots};

/// Why a snapshot was not announced.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Hashing did not keep up.
    #[error("the last snapshot was not hashed within {} s", .0.as_secs())]
    Late(Duration),
    /// The hashing thread is gone, which is a defect.
    #[error("the thread that hashes snapshots has ended")]
    Ended,
}

/// A frozen slot, not hashed yet.
pub struct Snapshot {
    /// Where it lies.
    pub slot: Slot,
    /// Waited for before it is read, if the device is still copying it there.
    pub arrival: Option<Arrival>,
    /// Elements of each of its three states.
    pub elements: usize,
    /// Threads to hash it with.
    pub threads: usize,
    /// Job, generation, step, rank, world size and tier, for the agent.
    pub message: wire::Captured,
    /// Everything about it but the hashes.
    pub capture: Capture,
    /// When it was frozen, and how long that held the training thread.
    pub frozen: (Instant, Duration),
}

enum Task {
    Hash(Box<Snapshot>),
    Flush(std::sync::mpsc::Sender<()>),
}

/// Lets snapshots be hashed in the background.
pub struct Capturer {
    slots: Arc<Slots>,
    tasks: std::sync::mpsc::Sender<Task>,
}

impl Capturer {
    /// Starts the hashing thread; it ends with the capturer.
    pub fn start(slots: Arc<Slots>, news: mpsc::Sender<News>) -> std::io::Result<Self> {
        let (tasks, queue) = std::sync::mpsc::channel();
        let mut pool = pool(1).map_err(std::io::Error::other)?;
        let shared = slots.clone();
        std::thread::Builder::new().name("cairn-capture".into()).spawn(move || {
            while let Ok(task) = queue.recv() {
                match task {
                    Task::Hash(snapshot) => {
                        let index = snapshot.slot.index;
                        if snapshot.threads != pool.current_num_threads()
                            && let Ok(other) = self::pool(snapshot.threads)
                        {
                            pool = other;
                        }
                        let Some(message) = announce(*snapshot, &shared, &pool) else {
                            shared.free(index);
                            continue;
                        };
                        if news.blocking_send(News::Captured(message)).is_err() {
                            return;
                        }
                    }
                    // The receiver may have given up waiting.
                    Task::Flush(done) => drop(done.send(())),
                }
            }
        })?;
        Ok(Self { slots, tasks })
    }

    /// The slots of this worker.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Has a snapshot hashed and announced.
    pub fn announce(&self, snapshot: Snapshot) -> Result<(), CaptureError> {
        self.tasks.send(Task::Hash(Box::new(snapshot))).map_err(|_| CaptureError::Ended)
    }

    /// Returns when every snapshot before this call has been announced.
    pub fn flush(&self, deadline: Duration) -> Result<(), CaptureError> {
        let (done, announced) = std::sync::mpsc::channel();
        self.tasks.send(Task::Flush(done)).map_err(|_| CaptureError::Ended)?;
        announced.recv_timeout(deadline).map_err(|error| match error {
            RecvTimeoutError::Timeout => CaptureError::Late(deadline),
            RecvTimeoutError::Disconnected => CaptureError::Ended,
        })
    }
}

/// Threads that hash.
fn pool(threads: usize) -> Result<rayon::ThreadPool, rayon::ThreadPoolBuildError> {
    rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).thread_name(|_| "cairn-hash".into()).build()
}

/// Hashes a snapshot; the message that tells the agent of it.
fn announce(snapshot: Snapshot, slots: &Slots, pool: &rayon::ThreadPool) -> Option<wire::Captured> {
    let Snapshot { slot, arrival, elements, mut message, mut capture, frozen, .. } = snapshot;
    if let Some(arrive) = arrival
        && let Err(error) = arrive()
    {
        // The training thread meets the same error at its next update.
        tracing::error!(%error, "a snapshot did not arrive in its slot");
        return None;
    }
    let began = Instant::now();
    let bytes = elements * size_of::<f32>();
    let block = capture.space.block_elements();
    // SAFETY: the slot is frozen until the agent frees it, which it does after it has heard of it.
    let states = unsafe { slot.map.frozen(3 * bytes) };
    // One state after the other lies in the slot, each hashed from its own start.
    capture.hashes = pool.install(|| {
        let state = |n: usize| &states[n * bytes..(n + 1) * bytes];
        (0..3).map(|n| HashList(hash_blocks(state(n), block, Dtype::F32))).collect()
    });
    message.slot = slot.index;
    let seconds = began.elapsed().as_secs_f64();
    let bytes = 3 * bytes as u64;
    let waited = began.duration_since(frozen.0).as_secs_f64();
    capture.stages =
        vec![Stage::new("capture", 0.0, frozen.1.as_secs_f64(), bytes), Stage::new("hash", waited, seconds, bytes)];
    slots.hashed(seconds * pool.current_num_threads() as f64);
    match capture.to_json() {
        Ok(json) => message.capture = json,
        Err(error) => {
            tracing::error!(%error, "a snapshot was not announced");
            return None;
        }
    }
    Some(message)
}

const _: () = assert!(cfg!(target_endian = "little"), "slots and objects are little-endian copies of memory");
