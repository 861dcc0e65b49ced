//! Verification: what a checkpoint consists of is read again and proved, all of it or a sample.
//!
//! Unlike a load it does not stop at the first damage, and it also checks what no load reads: the objects' sizes and
//! their safetensors headers, which other tools rely on. A sample chooses blocks by a seed: the same seed chooses the
//! same blocks, another one others, so that repeated samples of a large store reach all of it in time. Sizes and
//! headers are always checked; the report says which share of the blocks was proved.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::stream::{self, StreamExt, TryStreamExt};
use proto::ids::JobName;

use crate::backend::Store;
use crate::error::{Kind, StoreError};
use crate::load::{READS_IN_FLIGHT, fetch, open_checkpoint};
use crate::manifest::Manifest;
use crate::object::{Extent, MAX_HEADER, ObjectEntry, check_header};
use crate::plan::plan;
use crate::record::CheckpointRef;

/// Which blocks to read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// The share of them, above 0; from 1 on all.
    pub share: f64,
    /// Chooses which.
    pub seed: u64,
}

impl Sample {
    /// Every block.
    pub const ALL: Self = Self { share: 1.0, seed: 0 };

    /// The number that decides whether a block is read: uniform over 64 bits, a function of seed and place.
    fn draw(&self, state: usize, block: u64) -> u64 {
        let mut hasher = blake3::Hasher::new_derive_key("cairn 2026 sample of a verification");
        for number in [self.seed, state as u64, block] {
            hasher.update(&number.to_le_bytes());
        }
        let mut number = [0; 8];
        hasher.finalize_xof().fill(&mut number);
        u64::from_le_bytes(number)
    }

    /// Whether a block is chosen. The block `always` of each state is, so that no sample is empty.
    fn takes(&self, state: usize, block: u64, always: u64) -> bool {
        self.share >= 1.0 || block == always || (self.draw(state, block) as f64) < self.share * 2f64.powi(64)
    }

    /// The one block of a state that is always read.
    fn always(&self, state: usize, blocks: u64) -> u64 {
        if blocks == 0 { 0 } else { self.draw(state, u64::MAX) % blocks }
    }
}

/// What was found of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectReport {
    /// Its path.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// What is wrong with it, if anything is.
    pub problem: Option<String>,
}

/// What was found of a checkpoint.
#[derive(Debug, Clone)]
pub struct VerifyReport {
    /// Its manifest, which was good.
    pub manifest: Manifest,
    /// One report an object, in the manifest's order.
    pub objects: Vec<ObjectReport>,
    /// Blocks that were read and had their hashes.
    pub proved: u64,
    /// Blocks the checkpoint has.
    pub blocks: u64,
}

impl VerifyReport {
    /// Whether nothing is wrong with what was read.
    pub fn is_good(&self) -> bool {
        self.objects.iter().all(|o| o.problem.is_none())
    }

    /// The first problem, for a quarantine's reason.
    pub fn first_problem(&self) -> Option<&str> {
        self.objects.iter().find_map(|o| o.problem.as_deref())
    }

    /// The share of the blocks that was proved, from 0 to 1.
    pub fn share(&self) -> f64 {
        if self.blocks == 0 { 0.0 } else { self.proved as f64 / self.blocks as f64 }
    }
}

/// Re-reads a whole checkpoint. A damaged or missing manifest is an error; damaged or missing objects are in the
/// report. A store that does not answer is an error too: it proves nothing.
pub async fn verify(store: &Store, job: &JobName, checkpoint: &CheckpointRef) -> Result<VerifyReport, StoreError> {
    verify_sample(store, job, checkpoint, Sample::ALL, &|_| {}).await
}

/// As [`verify`], of a sample. `progress` hears of the bytes of each read, as they are proved.
pub async fn verify_sample(
    store: &Store,
    job: &JobName,
    checkpoint: &CheckpointRef,
    sample: Sample,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<VerifyReport, StoreError> {
    if sample.share.is_nan() || sample.share <= 0.0 {
        return Err(StoreError::Input(format!("a sample of {} of the blocks proves nothing", sample.share)));
    }
    let manifest = open_checkpoint(store, job, checkpoint).await?;
    let work = Work { store, manifest: &manifest, sample, progress, proved: AtomicU64::new(0) };
    let mut objects = Vec::with_capacity(manifest.objects.len());
    for object in &manifest.objects {
        // An object may go while it is read.
        let checked = work.object(object).await.map_err(|e| e.missing_is_corrupt("the manifest"));
        let problem = match checked {
            Ok(()) => None,
            Err(e) if e.kind() == Kind::Corrupt => Some(e.to_string()),
            Err(e) => return Err(e),
        };
        objects.push(ObjectReport { path: object.path.clone(), bytes: object.bytes, problem });
    }
    let proved = work.proved.into_inner();
    let blocks = manifest.space.blocks() * manifest.states.len() as u64;
    Ok(VerifyReport { manifest, objects, proved, blocks })
}

/// One verification under way.
struct Work<'a> {
    store: &'a Store,
    manifest: &'a Manifest,
    sample: Sample,
    progress: &'a (dyn Fn(u64) + Sync),
    proved: AtomicU64,
}

impl Work<'_> {
    async fn object(&self, object: &ObjectEntry) -> Result<(), StoreError> {
        let (store, manifest, path) = (self.store, self.manifest, &object.path);
        let size = store.head(path).await?;
        if size != object.bytes {
            return Err(StoreError::Corrupt(format!("{path} has {size} bytes, the manifest says {}", object.bytes)));
        }
        let length = store.get_range(path, 0..8).await?;
        let length = length.as_ref().try_into().map_or(u64::MAX, u64::from_le_bytes);
        let first = object.extents.iter().map(|e| e.offset).min().unwrap_or(8);
        // The manifest may use only a later part of the object, so what it uses first need not follow the header.
        if length > MAX_HEADER || length > first - 8 {
            let most = first - 8;
            return Err(StoreError::Corrupt(format!(
                "{path}: its header says it has {length} bytes, it has at most {most}"
            )));
        }
        let header = store.get_range(path, 8..8 + length).await?;
        check_header(&manifest.space, &manifest.states, object, &header)?;
        for extent in &object.extents {
            let Some(state) = manifest.state_index(&extent.state) else { continue };
            for run in self.runs(state, extent) {
                self.blocks(state, run).await?;
            }
        }
        Ok(())
    }

    /// Reads and proves a run of blocks.
    async fn blocks(&self, state: usize, blocks: Range<u64>) -> Result<(), StoreError> {
        let reads = plan(self.manifest, state, self.manifest.space.blocks_to_elements(blocks));
        let checks = stream::iter(reads)
            .map(|read| async move {
                let bytes = fetch(self.store, self.manifest, state, &read).await?;
                self.proved.fetch_add(read.blocks.end - read.blocks.start, Ordering::Relaxed);
                (self.progress)(bytes.len() as u64);
                Ok::<(), StoreError>(())
            })
            .buffer_unordered(READS_IN_FLIGHT);
        checks.try_collect::<()>().await
    }

    /// The chosen blocks of an extent, as runs.
    fn runs(&self, state: usize, extent: &Extent) -> Vec<Range<u64>> {
        let block = self.manifest.block_elements;
        let all = extent.first / block..(extent.first + extent.elements).div_ceil(block);
        let always = self.sample.always(state, self.manifest.space.blocks());
        let mut runs: Vec<Range<u64>> = vec![];
        for chosen in all.filter(|&block| self.sample.takes(state, block, always)) {
            match runs.last_mut() {
                Some(run) if run.end == chosen => run.end += 1,
                _ => runs.push(chosen..chosen + 1),
            }
        }
        runs
    }
}
