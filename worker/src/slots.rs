//! Slots: the files in the agent's memory folder that a worker's optimizer state lives in (§8).
//!
//! A slot holds the rank's shard of every state, `[param | exp_avg | exp_avg_sq]`. At any time one slot is live, the
//! newest complete snapshot lies in another, and a third takes the snapshot in progress; the roles rotate, so a capture
//! copies nothing. Slot files are allocated when a generation is joined: lack of room is an error then, never a fault
//! later. The agent maps them too, and what it holds outlives the worker.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::FallocateFlags;

use crate::machine::kept::Steps;

/// Slots of one generation: live, newest complete, in progress.
pub const SLOTS: usize = 3;
/// An empty shard still has a file that can be mapped.
const SMALLEST: u64 = 4096;

/// Why slots could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
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
    /// The node's budget does not allow for it.
    #[error(
        "{SLOTS} slots of {bytes} bytes for this worker's shard are more than its part of the node's memory budget, \
         {budget} bytes; raise the agent's --memory-budget, or run on more nodes"
    )]
    Budget {
        /// Bytes of one slot.
        bytes: u64,
        /// What the agent allows this worker.
        budget: u64,
    },
}

/// The shared mapping of a slot.
#[derive(Debug)]
pub struct SlotMap {
    map: MmapRaw,
    /// Removed when nobody uses the slot any more; none for memory of this process alone.
    path: Option<PathBuf>,
}

impl SlotMap {
    /// Memory of this process alone, for runs without an agent.
    pub fn anonymous(bytes: usize) -> std::io::Result<Self> {
        let map = MmapOptions::new().len(bytes.max(SMALLEST as usize)).populate().map_anon()?;
        Ok(Self { map: map.into(), path: None })
    }

    fn file(path: PathBuf, bytes: u64) -> std::io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        let map = MmapOptions::new().populate().map_raw(&file)?;
        Ok(Self { map, path: Some(path) })
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Never: an empty shard has a page all the same.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// The first `bytes` bytes of a snapshot.
    ///
    /// # Safety
    ///
    /// The slot is frozen: nobody writes to it while the slice lives.
    pub(crate) unsafe fn frozen(&self, bytes: usize) -> &[u8] {
        assert!(bytes <= self.len(), "the snapshot lies within its slot");
        // SAFETY: the bounds were checked, and the caller promised that nobody writes.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), bytes) }
    }
}

/// A slot in the worker's hands.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its number; the file is `slot-<index>`.
    pub index: u32,
    /// Its memory.
    pub map: Arc<SlotMap>,
}

#[derive(Debug)]
struct Place {
    map: Arc<SlotMap>,
    /// In the hands of the training thread.
    mine: bool,
    /// In the hands of the hashing thread or the agent.
    theirs: bool,
}

impl Place {
    fn is_busy(&self) -> bool {
        self.mine || self.theirs
    }
}

/// What became of snapshots in the parity group, as the agent says.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Kept {
    /// Of this generation.
    pub generation: u64,
    /// Their steps.
    pub steps: Steps,
    /// Processor seconds that the newest parity took on this node, for each of its workers.
    pub seconds: f64,
}

#[derive(Debug, Default)]
struct Inner {
    folder: Option<PathBuf>,
    budget: u64,
    bytes: u64,
    next: u32,
    places: BTreeMap<u32, Place>,
    kept: Kept,
    hash_seconds: f64,
}

/// The worker's slots: taken by the training thread, freed by the session when the agent is done with one.
#[derive(Debug, Default)]
pub struct Slots {
    inner: Mutex<Inner>,
}

impl Slots {
    /// Sets the folder the slot files lie in, and how many bytes they may have in all (0: no limit).
    pub fn place_in(&self, folder: PathBuf, budget: u64) {
        let mut inner = self.lock();
        inner.folder = Some(folder);
        inner.budget = budget;
    }

    /// Makes room for the snapshots of a generation: [`SLOTS`] free slots of `elements` elements of three states.
    /// Free slots of another size go; what the agent still holds of an earlier generation stays until it is freed.
    pub fn reserve(&self, elements: usize) -> Result<(), SlotError> {
        let mut inner = self.lock();
        let bytes = (elements as u64 * 3 * size_of::<f32>() as u64).max(SMALLEST);
        inner.bytes = bytes;
        if inner.budget > 0 && bytes * SLOTS as u64 > inner.budget {
            return Err(SlotError::Budget { bytes, budget: inner.budget });
        }
        inner.trim(usize::MAX);
        while inner.free().count() < SLOTS {
            inner.add()?;
        }
        Ok(())
    }

    /// A free slot of the present size, if there is one.
    pub(crate) fn take(&self) -> Option<Slot> {
        let mut inner = self.lock();
        let index = inner.free().next()?;
        let place = inner.places.get_mut(&index)?;
        place.mine = true;
        Some(Slot { index, map: place.map.clone() })
    }

    /// A slot the training thread has taken is a snapshot now: the agent's too, until it frees it.
    pub(crate) fn hand_over(&self, index: u32) {
        if let Some(place) = self.lock().places.get_mut(&index) {
            place.theirs = true;
        }
    }

    /// The training thread is done with a slot.
    pub(crate) fn give_back(&self, index: u32) {
        let mut inner = self.lock();
        if let Some(place) = inner.places.get_mut(&index) {
            place.mine = false;
        }
        inner.trim(SLOTS);
    }

    /// The agent is done with a slot.
    pub fn free(&self, index: u32) {
        let mut inner = self.lock();
        if let Some(place) = inner.places.get_mut(&index) {
            place.theirs = false;
        }
        inner.trim(SLOTS);
    }

    /// A snapshot was hashed, and threads were busy with it for so long in all.
    pub(crate) fn hashed(&self, seconds: f64) {
        self.lock().hash_seconds = seconds;
    }

    /// How long threads were busy with hashing the last snapshot.
    pub(crate) fn hash_seconds(&self) -> f64 {
        self.lock().hash_seconds
    }

    /// The agent says which snapshots are complete, and which never will be.
    pub fn keeps(&self, kept: Kept) {
        self.lock().kept = kept;
    }

    /// What the agent said last of snapshots.
    pub(crate) fn kept(&self) -> Kept {
        self.lock().kept
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change leaves the state whole, so a panic elsewhere does not spoil it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn free(&self) -> impl Iterator<Item = u32> {
        let right = |place: &Place| !place.is_busy() && place.map.len() as u64 == self.bytes;
        self.places.iter().filter(move |(_, place)| right(place)).map(|(index, _)| *index)
    }

    /// Gives free slots of another size back, and those beyond `most` of the right one.
    fn trim(&mut self, most: usize) {
        let bytes = self.bytes;
        let in_use = self.places.values().filter(|place| place.is_busy() && place.map.len() as u64 == bytes).count();
        let mut spare = most.saturating_sub(in_use);
        self.places.retain(|_, place| {
            if place.is_busy() {
                return true;
            }
            let keep = place.map.len() as u64 == bytes && spare > 0;
            if keep {
                spare -= 1;
            } else if let Some(path) = &place.map.path {
                // The folder goes with the worker; what cannot be removed now is removed then.
                let _ = std::fs::remove_file(path);
            }
            keep
        });
    }

    fn add(&mut self) -> Result<(), SlotError> {
        let (index, bytes) = (self.next, self.bytes);
        self.next += 1;
        let path = self.folder.as_ref().map(|folder| folder.join(format!("slot-{index}")));
        let made = match &path {
            Some(path) => SlotMap::file(path.clone(), bytes),
            None => SlotMap::anonymous(bytes as usize),
        };
        let map = made.map_err(|source| SlotError::Room { path: path.unwrap_or_default(), bytes, source })?;
        self.places.insert(index, Place { map: Arc::new(map), mine: false, theirs: false });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &std::path::Path) -> usize {
        std::fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn three_slots_are_ready_and_what_is_held_stays() {
        let folder = tempfile::tempdir().unwrap();
        let slots = Slots::default();
        slots.place_in(folder.path().into(), 0);
        slots.reserve(5000).unwrap();
        assert_eq!(files(folder.path()), 3);
        let held = slots.take().unwrap();
        let live = slots.take().unwrap();
        slots.hand_over(held.index);
        slots.give_back(held.index);
        slots.give_back(live.index);
        // A new generation of another size: the free ones go, the held one stays.
        slots.reserve(9000).unwrap();
        assert_eq!(files(folder.path()), 4);
        let taken = slots.take().unwrap();
        assert_eq!(taken.map.len(), 9000 * 12);
        slots.free(held.index);
        assert_eq!(files(folder.path()), 3);
        // Back at the old size, three are made anew, and one of the other size is in use.
        slots.reserve(5000).unwrap();
        assert_eq!(files(folder.path()), 4);
    }

    #[test]
    fn room_and_budget_are_checked_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let slots = Slots::default();
        slots.place_in(folder.path().into(), 100_000);
        assert!(matches!(slots.reserve(5000), Err(SlotError::Budget { bytes: 60_000, budget: 100_000 })));
        slots.place_in(folder.path().join("none"), 0);
        assert!(matches!(slots.reserve(10), Err(SlotError::Room { .. })));
        slots.place_in(folder.path().into(), 0);
        slots.reserve(10).unwrap();
        assert_eq!(slots.take().unwrap().map.len(), SMALLEST as usize);
    }
}
