//! What this node holds in memory: snapshots in slots, parity, and the captures that describe them.
//!
//! Slots are mapped the moment a capture is heard of, so their bytes stay whatever becomes of the worker. The driver
//! puts in and takes out; the service for peers and the tasks that encode and restore read. A reader gets slices that
//! keep the mapping alive, so nothing is copied and nothing vanishes under it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use checkpoint_store::{Capture, ShardSource};
use proto::ids::{JobName, WorkerId};

use crate::machine::keeper::StepKey;

/// One rank's snapshot.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    /// Whose slot it lies in.
    pub(crate) worker: WorkerId,
    /// The slot.
    pub(crate) slot: u32,
    /// The shard, its states being slices of the mapped slot.
    pub(crate) source: Arc<ShardSource>,
    /// The shard's bytes end to end.
    pub(crate) payload: Bytes,
    /// The memory tier keeps it.
    pub(crate) kept: bool,
    /// An upload reads it.
    pub(crate) uploading: bool,
}

/// A capture and its JSON, which peers get as it is.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    pub(crate) capture: Arc<Capture>,
    pub(crate) json: Bytes,
}

#[derive(Debug, Default)]
struct OfJob {
    snapshots: BTreeMap<StepKey, BTreeMap<u32, Held>>,
    /// Captures of this node's ranks and of the other members of its group.
    captures: BTreeMap<StepKey, BTreeMap<u32, Described>>,
    /// Finished parity shards by stripe.
    parity: BTreeMap<StepKey, BTreeMap<usize, Bytes>>,
}

/// Everything held, by job. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Vault(Arc<RwLock<BTreeMap<JobName, OfJob>>>);

impl Vault {
    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<JobName, OfJob>> {
        // Every change leaves the maps whole, so a panic elsewhere does not spoil them.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<JobName, OfJob>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a snapshot in.
    pub(crate) fn put(&self, job: &JobName, key: StepKey, rank: u32, held: Held) {
        self.write().entry(job.clone()).or_default().snapshots.entry(key).or_default().insert(rank, held);
    }

    /// Takes the description of a rank's snapshot in, this node's or a peer's.
    pub(crate) fn describe(&self, job: &JobName, key: StepKey, rank: u32, described: Described) {
        self.write().entry(job.clone()).or_default().captures.entry(key).or_default().insert(rank, described);
    }

    /// Takes a finished parity shard in.
    pub(crate) fn put_parity(&self, job: &JobName, key: StepKey, stripe: usize, bytes: Bytes) {
        self.write().entry(job.clone()).or_default().parity.entry(key).or_default().insert(stripe, bytes);
    }

    /// A snapshot is not kept by the memory tier, or not read by an upload, any more. Returns those that nobody needs
    /// now: their slots are free.
    pub(crate) fn let_go(&self, job: &JobName, key: StepKey, which: impl Fn(u32, &mut Held)) -> Vec<Held> {
        let mut all = self.write();
        let Some(of) = all.get_mut(job) else { return vec![] };
        let mut free = vec![];
        if let Some(ranks) = of.snapshots.get_mut(&key) {
            for (rank, held) in ranks.iter_mut() {
                which(*rank, held);
            }
            let gone: Vec<u32> =
                ranks.iter().filter(|(_, held)| !held.kept && !held.uploading).map(|(rank, _)| *rank).collect();
            free.extend(gone.into_iter().filter_map(|rank| ranks.remove(&rank)));
            if ranks.is_empty() {
                of.snapshots.remove(&key);
            }
        }
        free
    }

    /// Forgets what describes a step, and its parity.
    pub(crate) fn forget_step(&self, job: &JobName, key: StepKey) {
        if let Some(of) = self.write().get_mut(job) {
            of.captures.remove(&key);
            of.parity.remove(&key);
        }
    }

    /// Forgets a job. Returns the snapshots it had.
    pub(crate) fn forget(&self, job: &JobName) -> Vec<Held> {
        let of = self.write().remove(job).unwrap_or_default();
        of.snapshots.into_values().flat_map(BTreeMap::into_values).collect()
    }

    /// One rank's snapshot.
    pub(crate) fn snapshot(&self, job: &JobName, key: StepKey, rank: u32) -> Option<Held> {
        self.read().get(job)?.snapshots.get(&key)?.get(&rank).cloned()
    }

    /// The steps, ranks and world sizes held of a job, with a hash that tells their content.
    pub(crate) fn inventory(&self, job: &JobName) -> Vec<(StepKey, u32, Arc<ShardSource>)> {
        let all = self.read();
        let Some(of) = all.get(job) else { return vec![] };
        let kept = of.snapshots.iter().flat_map(|(key, ranks)| {
            ranks.iter().filter(|(_, held)| held.kept).map(|(rank, held)| (*key, *rank, held.source.clone()))
        });
        kept.collect()
    }

    /// The descriptions known of a step.
    pub(crate) fn captures(&self, job: &JobName, key: StepKey) -> BTreeMap<u32, Described> {
        let all = self.read();
        all.get(job).and_then(|of| of.captures.get(&key)).cloned().unwrap_or_default()
    }

    /// Whether a worker's slots hold anything.
    pub(crate) fn holds_of(&self, worker: WorkerId) -> bool {
        let all = self.read();
        all.values().any(|of| of.snapshots.values().any(|ranks| ranks.values().any(|held| held.worker == worker)))
    }

    /// Bytes that snapshots and parity take.
    pub(crate) fn bytes(&self) -> u64 {
        let all = self.read();
        let of = |of: &OfJob| {
            let snapshots = of.snapshots.values().flat_map(BTreeMap::values).map(|held| held.payload.len() as u64);
            let parity = of.parity.values().flat_map(BTreeMap::values).map(|bytes| bytes.len() as u64);
            snapshots.chain(parity).sum::<u64>()
        };
        all.values().map(of).sum()
    }

    /// A range of this node's payload of a step: its ranks' shards end to end, as if followed by zeros. `None` if it
    /// holds nothing of the step, or if more padding is asked for than any layout has.
    pub(crate) fn payload(&self, job: &JobName, key: StepKey, range: Range<u64>) -> Option<Vec<Bytes>> {
        let all = self.read();
        let ranks = all.get(job)?.snapshots.get(&key)?;
        let (mut at, mut out, mut missing) = (0u64, vec![], range.end.saturating_sub(range.start));
        for held in ranks.values() {
            let end = at + held.payload.len() as u64;
            let (from, to) = (range.start.max(at), range.end.min(end));
            if from < to {
                out.push(held.payload.slice((from - at) as usize..(to - at) as usize));
                missing -= to - from;
            }
            at = end;
        }
        if missing > MOST_PADDING {
            return None;
        }
        while missing > 0 {
            let zeros = missing.min(ZEROS.len() as u64);
            out.push(Bytes::from_static(&ZEROS[..zeros as usize]));
            missing -= zeros;
        }
        Some(out)
    }

    /// A range of a finished parity shard.
    pub(crate) fn parity(&self, job: &JobName, key: StepKey, stripe: usize, range: Range<u64>) -> Option<Bytes> {
        let all = self.read();
        let bytes = all.get(job)?.parity.get(&key)?.get(&stripe)?;
        let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
        (start <= end && end <= bytes.len()).then(|| bytes.slice(start..end))
    }

    /// The stripes whose parity is held of a step.
    pub(crate) fn stripes(&self, job: &JobName, key: StepKey) -> usize {
        self.read().get(job).and_then(|of| of.parity.get(&key)).map_or(0, BTreeMap::len)
    }
}

/// Most padding of one read: a peer must not make this node list zeros without end.
const MOST_PADDING: u64 = 16 << 30;

/// What padding is sent from.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

#[cfg(test)]
mod tests {
    use checkpoint_store::{CAPTURE_FORMAT, Dtype, HashList, ScalarState, Space, StateDecl, TensorDecl};
    use proto::ids::{Generation, Rank, WorldSize};

    use super::*;

    pub(crate) fn held(rank: u32, fill: u8) -> Held {
        let decl = TensorDecl { name: "w".into(), shape: vec![100], dtype: Dtype::F32 };
        let capture = Capture {
            format: CAPTURE_FORMAT,
            job: JobName::new("tiny").unwrap(),
            generation: Generation::new(1),
            rank: Rank::ZERO,
            world_size: WorldSize::ONE,
            space: Space::new(vec![decl]).unwrap(),
            scalar: ScalarState::start(1, 10),
            states: StateDecl::adamw(),
            hashes: vec![HashList(checkpoint_store::hash_blocks(&[fill; 400], 65536, Dtype::F32)); 3],
            stages: vec![],
        };
        let payload = Bytes::from(vec![fill; 1200]);
        let source = Arc::new(capture.source(payload.clone()).unwrap());
        let worker = WorkerId::from_uuid(uuid::Uuid::from_u128(u128::from(rank)));
        Held { worker, slot: 0, source, payload, kept: true, uploading: false }
    }

    #[test]
    fn payloads_are_read_across_ranks_and_padded() {
        let (vault, job) = (Vault::default(), JobName::new("tiny").unwrap());
        vault.put(&job, (1, 5), 0, held(0, 1));
        vault.put(&job, (1, 5), 3, held(3, 2));
        let read = |range| vault.payload(&job, (1, 5), range).unwrap().concat();
        assert_eq!(read(1199..1202), [1, 2, 2]);
        assert_eq!(read(2399..2402), [2, 0, 0]);
        assert_eq!(read(1 << 40..(1 << 40) + 70_000).len(), 70_000);
        assert!(vault.payload(&job, (1, 6), 0..1).is_none());
        assert!(vault.payload(&job, (1, 5), 0..1 << 40).is_none(), "zeros without end");
        assert_eq!(vault.bytes(), 2400);
    }

    #[test]
    fn a_slot_is_free_when_neither_memory_nor_upload_needs_it() {
        let (vault, job) = (Vault::default(), JobName::new("tiny").unwrap());
        vault.put(&job, (1, 5), 0, Held { uploading: true, ..held(0, 1) });
        assert!(vault.let_go(&job, (1, 5), |_, held| held.kept = false).is_empty());
        assert!(vault.holds_of(held(0, 1).worker));
        assert_eq!(vault.let_go(&job, (1, 5), |_, held| held.uploading = false).len(), 1);
        assert!(!vault.holds_of(held(0, 1).worker) && vault.snapshot(&job, (1, 5), 0).is_none());
    }
}
