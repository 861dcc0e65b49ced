//! The manifest: everything there is to know about one checkpoint.
//!
//! It holds the scalar state, the canonical space, where each state's elements lie, all block hashes and the digest. A
//! manifest in the store is not yet a checkpoint; a record of the chain that names it with its hash makes it one.
//! Manifests come from disk, so reading one checks everything it claims before anyone relies on it (`check`). Format 2
//! (`second`) is what is written; format 1 (`first`) is still read.

mod check;
mod first;
mod gather;
mod second;

use std::ops::Range;

use proto::ids::{Generation, JobName, Step, WorldSize};

pub use gather::AssembleError;
pub use second::Encoded;

use crate::digest::{Digest, HashList, StateDecl};
use crate::error::StoreError;
use crate::object::ObjectEntry;
use crate::scalar::ScalarState;
use crate::space::Space;
use crate::timeline::Timeline;

/// The version of manifests this build writes, and the newest it reads.
pub const MANIFEST_FORMAT: u32 = 2;
/// A manifest larger than this is refused unread; 2^19 blocks of fifteen states take 252 MB.
pub const MAX_MANIFEST: u64 = 256 << 20;
/// Most states of a checkpoint.
pub const MAX_STATES: usize = 16;
/// Most objects of a checkpoint.
pub const MAX_OBJECTS: usize = 1 << 20;

/// Most extents of a checkpoint.
pub const MAX_EXTENTS: usize = 1 << 21;

/// One checkpoint, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The job.
    pub job: JobName,
    /// The step whose state this is.
    pub step: Step,
    /// The generation that saved it.
    pub generation: Generation,
    /// How many workers saved it; of no consequence for loading.
    pub world_size: WorldSize,
    /// The scalar state.
    pub scalar: ScalarState,
    /// The canonical space, as its tensors.
    pub space: Space,
    /// Elements of one block; a function of the space, written for other readers.
    pub block_elements: u64,
    /// The states in declared order.
    pub states: Vec<StateDecl>,
    /// Where their bytes lie.
    pub objects: Vec<ObjectEntry>,
    /// Per state, the hashes of all blocks.
    pub hashes: Vec<HashList>,
    /// The digest of all of it.
    pub digest: Digest,
    /// Where the time of the save went; no part of the digest.
    pub timeline: Timeline,
    /// Per state, its extents in canonical order; built by the check.
    index: Vec<Vec<Located>>,
}

/// An extent, from the reader's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) first: u64,
    pub(crate) elements: u64,
    pub(crate) object: usize,
    pub(crate) offset: u64,
}

impl Manifest {
    /// Reads and checks a manifest; `path` is for messages.
    pub fn parse(path: &str, bytes: &[u8]) -> Result<Self, StoreError> {
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(StoreError::Corrupt(format!("{path} has {} bytes, more than {MAX_MANIFEST}", bytes.len())));
        }
        let json = bytes.iter().find(|b| !b.is_ascii_whitespace()).is_some_and(|b| matches!(b, b'{' | b'['));
        let mut manifest = if json { first::parse(path, bytes)? } else { second::parse(path, bytes)? };
        manifest.check().map_err(|why| StoreError::Corrupt(format!("{path}: {why}")))?;
        Ok(manifest)
    }

    /// Bytes of all objects it needs, with the parts of older ones that it does not use.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().fold(0, |sum, o| sum.saturating_add(o.bytes))
    }

    /// Elements of one state, which for the parameters is the model's size.
    pub fn parameters(&self) -> u64 {
        self.space.elements()
    }

    /// The place of a state in `states` and `hashes`.
    pub fn state_index(&self, name: &str) -> Option<usize> {
        self.states.iter().position(|s| s.name == name)
    }

    /// The extents of a state that meet a range of elements, in order.
    pub(crate) fn extents(&self, state: usize, range: Range<u64>) -> impl Iterator<Item = &Located> {
        let all = self.index.get(state).map_or(&[][..], Vec::as_slice);
        let start = all.partition_point(|e| e.first + e.elements <= range.start);
        all[start..].iter().take_while(move |e| e.first < range.end)
    }
}
