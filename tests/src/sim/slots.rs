//! A simulated worker's slots: real files in the agent's folder, which the agent maps, restores into and frees.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use worker::machine::kept::Steps;

/// Slots of a generation: live, newest complete, in progress.
const SLOTS: usize = 3;

#[derive(Debug, Default)]
struct Inner {
    folder: PathBuf,
    next: u32,
    free: BTreeSet<u32>,
    /// Held by the agent.
    theirs: BTreeSet<u32>,
    /// What became of the snapshots of a generation in the group.
    kept: (u64, Steps),
}

/// Shared by the session and the trainer.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<Inner>);

impl Slots {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn place_in(&self, folder: &str) {
        self.lock().folder = folder.into();
    }

    /// Makes room for a generation; what the agent holds of an earlier one stays until it is freed.
    pub(crate) fn reserve(&self) {
        let mut inner = self.lock();
        inner.free.clear();
        for _ in 0..SLOTS {
            let slot = inner.next;
            inner.next += 1;
            inner.free.insert(slot);
        }
    }

    /// Takes a free slot.
    pub(crate) fn take(&self) -> Option<u32> {
        self.lock().free.pop_first()
    }

    /// Whether another slot is free.
    pub(crate) fn ready(&self) -> bool {
        !self.lock().free.is_empty()
    }

    /// A slot's file. Written anew each time, so that what was mapped of it before keeps its bytes.
    pub(crate) fn path(&self, slot: u32) -> PathBuf {
        self.lock().folder.join(format!("slot-{slot}"))
    }

    /// Writes a slot.
    pub(crate) fn write(&self, slot: u32, bytes: &[u8]) -> std::io::Result<()> {
        let path = self.path(slot);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::write(path, bytes)
    }

    /// The agent has it now.
    pub(crate) fn hand_over(&self, slot: u32) {
        self.lock().theirs.insert(slot);
    }

    /// The agent is done with it.
    pub(crate) fn free(&self, slot: u32) {
        let mut inner = self.lock();
        if inner.theirs.remove(&slot) && inner.free.len() < SLOTS - 1 {
            inner.free.insert(slot);
        }
    }

    pub(crate) fn keeps(&self, generation: u64, steps: Steps) {
        self.lock().kept = (generation, steps);
    }

    /// What became of the snapshots of a generation.
    pub(crate) fn kept(&self, generation: u64) -> Steps {
        let (of, steps) = self.lock().kept;
        if of == generation { steps } else { Steps::default() }
    }
}
