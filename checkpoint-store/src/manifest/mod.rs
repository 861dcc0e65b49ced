//! The manifest: everything there is to know about one checkpoint.
//!
//! It holds the scalar state, the canonical space, where each state's elements lie, all block hashes and the digest. A
//! manifest in the store is not yet a checkpoint; a record of the chain that names it with its hash makes it one.
//! Manifests come from disk, so reading one checks everything it claims before anyone relies on it (`check`).

mod check;
mod gather;

use std::ops::Range;

use bytes::Bytes;
use proto::ids::{Generation, JobName, Step, WorldSize};
use serde::{Deserialize, Serialize};

pub use gather::AssembleError;

use crate::digest::{Digest, HashList, StateDecl};
use crate::error::{StoreError, parse_json};
use crate::object::ObjectEntry;
use crate::scalar::ScalarState;
use crate::space::Space;

/// The version of manifests.
pub const MANIFEST_FORMAT: u32 = 1;
/// A manifest larger than this is refused unread; 2^19 blocks of five states take 170 MB.
pub const MAX_MANIFEST: u64 = 256 << 20;
/// Most states of a checkpoint.
pub const MAX_STATES: usize = 16;
/// Most objects of a checkpoint.
pub const MAX_OBJECTS: usize = 1 << 20;

/// One checkpoint, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
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
    /// Per state, its extents in canonical order; built by the check.
    #[serde(skip)]
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
        let mut manifest: Self = parse_json(path, bytes, MANIFEST_FORMAT)?;
        manifest.check().map_err(|why| StoreError::Corrupt(format!("{path}: {why}")))?;
        Ok(manifest)
    }

    /// The manifest as it is stored.
    pub fn to_json(&self) -> Result<Bytes, StoreError> {
        let bytes = serde_json::to_vec(self).map_err(|e| StoreError::Bug(format!("manifest: {e}")))?;
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(StoreError::Bug(format!("the manifest would have {} bytes", bytes.len())));
        }
        Ok(bytes.into())
    }

    /// Bytes of all objects.
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
