//! The capture: a copy of the rank's shard in memory that outlives the worker, made without waiting for storage (P3).
//!
//! At a checkpoint step the training thread copies `[param | exp_avg | exp_avg_sq]` of its shard into a slot, a mapped
//! file in the agent's folder, and goes on. A background thread hashes the copy and tells the agent, which uploads it
//! from there. There are two slots: one may be on its way to the store while the next is filled. With none free the
//! checkpoint is skipped and counted. Slot files are allocated when a generation is joined, so lack of room is an error
//! then, never a fault later.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use checkpoint_store::{Capture, Dtype, HashList, hash_blocks};
use memmap2::MmapMut;
use proto::wire;
use rustix::fs::FallocateFlags;
use tokio::sync::mpsc;

use crate::session::News;

/// Slots of one worker.
const SLOTS: usize = 2;
/// An empty shard still has a file that can be mapped.
const SMALLEST: u64 = 4096;
/// Between two looks at whether a wait for a slot was broken off.
const POLL: Duration = Duration::from_millis(50);

/// Why a snapshot could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A slot file could not be made.
    #[error("cannot set aside {bytes} bytes for a snapshot in {path}: {source}; give the agent a larger --memory")]
    Room {
        /// The slot file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Hashing did not keep up.
    #[error("the last snapshot was not hashed within {} s", .0.as_secs())]
    Late(Duration),
    /// The hashing thread is gone, which is a defect.
    #[error("the thread that hashes snapshots has ended")]
    Ended,
}

#[derive(Default)]
struct Place {
    /// Absent while a capture fills or hashes it, and before the first generation.
    map: Option<MmapMut>,
    busy: bool,
}

#[derive(Default)]
struct Inner {
    folder: PathBuf,
    bytes: u64,
    places: [Place; SLOTS],
}

/// The worker's slots: taken by the training thread, freed by the session when the agent is done with one.
#[derive(Default)]
pub struct Slots {
    inner: Mutex<Inner>,
    freed: Condvar,
}

/// A slot in the hands of a capture.
struct Slot {
    index: usize,
    map: MmapMut,
}

impl Slots {
    /// Sets the folder the slot files lie in.
    pub fn place_in(&self, folder: PathBuf) {
        self.lock().folder = folder;
    }

    /// Makes room for snapshots of `elements` elements of three states, in every slot that is not in use.
    pub fn reserve(&self, elements: usize) -> Result<(), CaptureError> {
        let mut inner = self.lock();
        inner.bytes = (elements as u64 * 3 * Dtype::F32.size()).max(SMALLEST);
        (0..SLOTS).filter(|index| !inner.places[*index].busy).collect::<Vec<_>>().into_iter().try_for_each(|index| {
            let map = inner.map(index)?;
            inner.places[index].map = Some(map);
            Ok(())
        })
    }

    /// The agent is done with a slot.
    pub fn free(&self, index: u32) {
        if let Some(place) = self.lock().places.get_mut(index as usize) {
            place.busy = false;
        }
        self.freed.notify_all();
    }

    /// A free slot; if there is none, waits for one until `deadline` or until `broken_off`.
    fn take(&self, deadline: Instant, broken_off: &dyn Fn() -> bool) -> Result<Option<Slot>, CaptureError> {
        let mut inner = self.lock();
        loop {
            if let Some(index) = inner.places.iter().position(|place| !place.busy) {
                let map = inner.map(index)?;
                inner.places[index].busy = true;
                return Ok(Some(Slot { index, map }));
            }
            if Instant::now() >= deadline || broken_off() {
                return Ok(None);
            }
            inner = self.freed.wait_timeout(inner, POLL).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Keeps the mapping for the next capture; the slot stays in use until it is freed.
    fn put_back(&self, slot: Slot) {
        self.lock().places[slot.index].map = Some(slot.map);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change leaves the state whole, so a panic elsewhere does not spoil it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The mapping of a free slot at the present size. Another size is another file: an upload that is being broken off
    /// may still read the old one.
    fn map(&mut self, index: usize) -> Result<MmapMut, CaptureError> {
        if let Some(map) = self.places[index].map.take().filter(|map| map.len() as u64 == self.bytes) {
            return Ok(map);
        }
        let (path, bytes) = (self.folder.join(format!("slot-{index}")), self.bytes);
        let make = || -> std::io::Result<MmapMut> {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
            // SAFETY: the file is this worker's own, in a folder of mode 0700. Nobody shortens it: it is only ever
            // removed, which leaves mappings valid; the agent maps it read-only, after it was filled.
            unsafe { MmapMut::map_mut(&file) }
        };
        make().map_err(|source| CaptureError::Room { path: path.clone(), bytes, source })
    }
}

/// What a snapshot is of.
pub struct Snapshot<'a> {
    /// Job, generation, step, rank and world size, for the agent.
    pub message: wire::Captured,
    /// Everything about it but the hashes.
    pub capture: Capture,
    /// The shard of each state, in declared order.
    pub states: [&'a [f32]; 3],
}

/// How to behave when no slot is free.
pub struct Patience<'a> {
    /// Wait for this long.
    pub wait: Duration,
    /// Stop waiting when this says so.
    pub broken_off: &'a dyn Fn() -> bool,
}

/// A slot that holds a snapshot, not hashed yet.
struct Filled {
    slot: Slot,
    message: wire::Captured,
    capture: Capture,
    elements: usize,
}

enum Task {
    Hash(Box<Filled>),
    Flush(std::sync::mpsc::Sender<()>),
}

/// Fills slots and lets them be hashed in the background.
pub struct Capturer {
    slots: Arc<Slots>,
    tasks: std::sync::mpsc::Sender<Task>,
}

impl Capturer {
    /// Starts the hashing thread; it ends with the capturer.
    pub fn start(slots: Arc<Slots>, news: mpsc::Sender<News>) -> std::io::Result<Self> {
        let (tasks, queue) = std::sync::mpsc::channel();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .thread_name(|_| "cairn-hash".into())
            .build()
            .map_err(std::io::Error::other)?;
        let shared = slots.clone();
        std::thread::Builder::new().name("cairn-capture".into()).spawn(move || {
            while let Ok(task) = queue.recv() {
                match task {
                    Task::Hash(filled) => {
                        let Filled { slot, mut message, mut capture, elements } = *filled;
                        let bytes = elements * 4;
                        let block = capture.space.block_elements();
                        // One state after the other lies in the slot, each hashed from its own start.
                        capture.hashes = pool.install(|| {
                            let state = |n: usize| &slot.map[n * bytes..(n + 1) * bytes];
                            (0..3).map(|n| HashList(hash_blocks(state(n), block, Dtype::F32))).collect()
                        });
                        message.slot = slot.index as u32;
                        shared.put_back(slot);
                        match capture.to_json() {
                            Ok(json) => message.capture = json,
                            Err(error) => {
                                tracing::error!(%error, "a snapshot was not announced");
                                shared.free(message.slot);
                                continue;
                            }
                        }
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

    /// The slots it fills.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Copies a snapshot into a free slot and has it hashed and announced. Returns how long the copy held the caller,
    /// or nothing if no slot was free.
    pub fn capture(&self, snapshot: Snapshot<'_>, patience: &Patience<'_>) -> Result<Option<Duration>, CaptureError> {
        let Some(mut slot) = self.slots.take(Instant::now() + patience.wait, patience.broken_off)? else {
            return Ok(None);
        };
        let began = Instant::now();
        let elements = snapshot.states[0].len();
        let mut rest = &mut slot.map[..];
        for state in snapshot.states {
            let (part, after) = rest.split_at_mut(state.len() * 4);
            // The slot's layout is little-endian, and so is every machine this builds for.
            part.copy_from_slice(bytemuck::cast_slice(state));
            rest = after;
        }
        let stall = began.elapsed();
        let mut message = snapshot.message;
        message.stall_seconds = stall.as_secs_f64();
        let task = Task::Hash(Box::new(Filled { slot, message, capture: snapshot.capture, elements }));
        self.tasks.send(task).map_err(|_| CaptureError::Ended)?;
        Ok(Some(stall))
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

const _: () = assert!(cfg!(target_endian = "little"), "slots and objects are little-endian copies of memory");
