//! The loader: a range of several states at once, straight into the caller's memory, every block verified.
//!
//! ```text
//! plan     which blocks of which objects           → requests of 1 MiB from a disk, 8 MiB from a bucket, each with
//!                                                     its place in the memory
//! read     several requests in flight, each byte once
//! verify   the BLAKE3 of each block, on the thread that read it, while other threads read
//! place    a copy, where a request is not exactly a piece of the caller's memory, or not on pages
//! ```
//!
//! On a local disk (`local`) threads read into the caller's memory itself. From a bucket (`remote`) a request's bytes
//! arrive in a buffer of their own. Either way a load takes the caller's memory and at most [`BUFFER_LOCAL`] or
//! [`BUFFER_REMOTE`] beside it, however large the range.

mod local;
mod remote;

use std::ops::{AddAssign, Range};
use std::time::{Duration, Instant};

use proto::ids::JobName;
use serde::Serialize;

use crate::aligned::PAGE;
use crate::backend::Store;
use crate::backend::file::EDGES;
use crate::digest::BlockHash;
use crate::error::StoreError;
use crate::load::open_sized;
use crate::manifest::Manifest;
use crate::plan::{MAX_READ, OVER_READ, Read, join, plan_within};
use crate::record::CheckpointRef;

/// Threads that read and verify from a local disk.
const THREADS: usize = 4;
/// Most bytes of a request to a local disk. Small, so that no thread waits long for another at the end of a step, and
/// what was read is still near the processor when it is hashed; large enough for a disk's full rate.
const LOCAL_READ: u64 = 1 << 20;
/// Requests to a bucket in flight.
const REQUESTS: usize = 8;
/// Most memory of a load from a local disk beside the caller's: a request's buffer for each
/// thread, and one for the pages at its edges. A block larger than
/// 1 MiB counts in its place.
pub const BUFFER_LOCAL: u64 = THREADS as u64 * (LOCAL_READ + (EDGES + 4 * PAGE) as u64);
/// Most memory of a load from a bucket beside the caller's: each request's bytes, twice while its body is put together.
pub const BUFFER_REMOTE: u64 = 2 * REQUESTS as u64 * MAX_READ;

/// What one stage of a load cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Stage {
    /// Seconds, added up over threads and requests in flight, so they may exceed the load's.
    pub seconds: f64,
    /// Bytes that went through it.
    pub bytes: u64,
}

impl Stage {
    fn add(&mut self, took: Duration, bytes: u64) {
        self.seconds += took.as_secs_f64();
        self.bytes += bytes;
    }
}

impl AddAssign for Stage {
    fn add_assign(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.bytes += other.bytes;
    }
}

/// What a load did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct LoadReport {
    /// Finding and checking the manifest, if the loader opened it.
    pub list: Stage,
    /// Planning.
    pub plan: Stage,
    /// Reading from the store.
    pub read: Stage,
    /// Hashing.
    pub verify: Stage,
    /// Copying into place what was not read in place.
    pub place: Stage,
    /// Bytes the caller asked for.
    pub bytes_needed: u64,
    /// Bytes the store was asked for.
    pub bytes_read: u64,
    /// Requests.
    pub requests: u64,
    /// Seconds from beginning to end, without the listing.
    pub seconds: f64,
}

impl LoadReport {
    /// The stages by name, in the order in which a byte goes through them.
    pub fn stages(&self) -> [(&'static str, Stage); 5] {
        let Self { list, plan, read, verify, place, .. } = *self;
        [("list", list), ("plan", plan), ("read", read), ("verify", verify), ("place", place)]
    }

    /// Bytes read over bytes needed; 1 for a load of nothing.
    pub fn over_read(&self) -> f64 {
        if self.bytes_needed == 0 { 1.0 } else { self.bytes_read as f64 / self.bytes_needed as f64 }
    }

    fn add_work(&mut self, other: &Self) {
        self.read += other.read;
        self.verify += other.verify;
        self.place += other.place;
        self.bytes_read += other.bytes_read;
        self.requests += other.requests;
    }
}

/// Adds loads up; the listing counts once, and the seconds are those of the longest, since loads run side by side.
impl AddAssign for LoadReport {
    fn add_assign(&mut self, other: Self) {
        self.add_work(&other);
        self.plan += other.plan;
        self.bytes_needed += other.bytes_needed;
        self.seconds = self.seconds.max(other.seconds);
    }
}

/// Loads ranges of one checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Loader<'a> {
    store: &'a Store,
    manifest: &'a Manifest,
    list: Stage,
    over_read: f64,
}

/// Where a run of blocks goes.
struct Piece<'m> {
    state: usize,
    read: Read,
    /// Bytes of the run before the first that is wanted.
    skip: usize,
    /// The caller's memory for those that are wanted.
    to: &'m mut [u8],
}

/// One request and what comes of it.
struct Job<'m> {
    object: usize,
    bytes: Range<u64>,
    pieces: Vec<Piece<'m>>,
}

impl Job<'_> {
    /// Whether the bytes of the request are exactly a piece of the caller's memory.
    fn is_in_place(&self) -> bool {
        matches!(self.pieces.as_slice(), [only] if only.to.len() as u64 == self.length())
    }

    fn length(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }
}

/// Opens a committed checkpoint as [`crate::open_checkpoint`] does, and says what that cost, for [`Loader::listed`].
pub async fn open_timed(
    store: &Store,
    job: &JobName,
    checkpoint: &CheckpointRef,
) -> Result<(Manifest, Stage), StoreError> {
    let began = Instant::now();
    let (manifest, bytes) = open_sized(store, job, checkpoint).await?;
    Ok((manifest, Stage { seconds: began.elapsed().as_secs_f64(), bytes }))
}

impl<'a> Loader<'a> {
    /// A loader of an opened checkpoint.
    pub fn new(store: &'a Store, manifest: &'a Manifest) -> Self {
        Self { store, manifest, list: Stage::default(), over_read: OVER_READ }
    }

    /// Reports what opening the checkpoint cost along with each load.
    pub fn listed(self, list: Stage) -> Self {
        Self { list, ..self }
    }

    /// Bounds bytes read over bytes needed; 1.0 joins only requests that touch. Blocks at the edges of a range are
    /// always read whole, since they are what can be verified.
    pub fn over_read(self, over_read: f64) -> Self {
        Self { over_read, ..self }
    }

    /// Reads the elements `range` of each named state into its memory, which holds exactly their bytes. On an error the
    /// memory may be partly written. From a local disk the thread that polls this works itself, in steps of half a
    /// second between which the load can be dropped.
    pub async fn load(&self, range: Range<u64>, targets: &mut [(&str, &mut [u8])]) -> Result<LoadReport, StoreError> {
        let began = Instant::now();
        let mut report = LoadReport { list: self.list, ..LoadReport::default() };
        let jobs = self.plan(range, targets)?;
        report.bytes_needed = jobs.iter().flat_map(|j| &j.pieces).map(|p| p.to.len() as u64).sum();
        report.plan.add(began.elapsed(), report.bytes_needed);
        match self.store.local() {
            Some(disk) => local::load(self, disk, jobs, &mut report).await?,
            None => remote::load(self, jobs, &mut report).await?,
        }
        report.seconds = began.elapsed().as_secs_f64();
        Ok(report)
    }

    /// The requests of a load, in the order in which they lie in the objects.
    fn plan<'m>(&self, range: Range<u64>, targets: &'m mut [(&str, &mut [u8])]) -> Result<Vec<Job<'m>>, StoreError> {
        let most = if self.store.local().is_some() { LOCAL_READ } else { MAX_READ };
        let (mut reads, mut pieces) = (vec![], vec![]);
        for (name, memory) in targets {
            let state = self.state(name, &range, memory.len() as u64)?;
            let size = self.manifest.states[state].dtype.size();
            let mut rest = &mut **memory;
            for read in plan_within(most, self.manifest, state, range.clone()) {
                let first = read.elements.start.max(range.start);
                let end = read.elements.end.min(range.end);
                let skip = ((first - read.elements.start) * size) as usize;
                let (to, after) = rest.split_at_mut(((end - first) * size) as usize);
                rest = after;
                reads.push(read.clone());
                pieces.push(Some(Piece { state, read, skip, to }));
            }
        }
        let batches = join(&reads, self.over_read, most).into_iter();
        Ok(batches
            .map(|batch| {
                let pieces = batch.reads.iter().filter_map(|&read| pieces[read].take()).collect();
                Job { object: batch.object, bytes: batch.bytes, pieces }
            })
            .collect())
    }

    fn state(&self, name: &str, range: &Range<u64>, bytes: u64) -> Result<usize, StoreError> {
        let manifest = self.manifest;
        let state = manifest.state_index(name).ok_or_else(|| {
            let have: Vec<_> = manifest.states.iter().map(|s| s.name.as_str()).collect();
            StoreError::Input(format!("the checkpoint has no state {name:?}; it has {}", have.join(", ")))
        })?;
        let elements = range.end.saturating_sub(range.start);
        if range.end > manifest.space.elements() || elements * manifest.states[state].dtype.size() != bytes {
            let why = format!("elements {range:?} of state {name} do not fit {bytes} bytes or the model");
            return Err(StoreError::Bug(why));
        }
        Ok(state)
    }

    /// Checks the hashes of a run of whole blocks.
    fn verify(&self, state: usize, read: &Read, bytes: &[u8]) -> Result<(), StoreError> {
        verify_blocks(self.manifest, state, read, bytes)
    }
}

/// Checks the hashes of a run of whole blocks.
pub(crate) fn verify_blocks(manifest: &Manifest, state: usize, read: &Read, bytes: &[u8]) -> Result<(), StoreError> {
    let block_bytes = manifest.block_elements * manifest.states[state].dtype.size();
    let expected = &manifest.hashes[state].0[read.blocks.start as usize..read.blocks.end as usize];
    let blocks = bytes.chunks(block_bytes as usize).map(BlockHash::of);
    let Some(at) = blocks.zip(expected).position(|(found, right)| found != *right) else { return Ok(()) };
    let element = read.elements.start + at as u64 * manifest.block_elements;
    Err(StoreError::Corrupt(format!(
        "{} is damaged: the block at byte {} (state {}, from tensor {} on, element {element} of the model) \
         does not have its hash",
        manifest.objects[read.object].path,
        read.bytes.start + at as u64 * block_bytes,
        manifest.states[state].name,
        manifest.space.tensor_at(element),
    )))
}
