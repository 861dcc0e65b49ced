//! A rank's object: a plain safetensors file of one-dimensional slices.
//!
//! The entries are named `<state>/<tensor>@<first element>`, in canonical order state by state, so any safetensors
//! reader can open an object and put tensors together from the names. `__metadata__` has the full shapes of its tensors
//! and the format version. The header is built from the shard's range alone and the body is the shard's memory as it
//! lies: the upload streams the one and then the other without a copy.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use proto::ids::{Generation, JobName, Rank, Step, WorldSize};
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::aligned::PAGE;
use crate::digest::{HashList, StateDecl};
use crate::error::{StoreError, check_format, parse_json};
use crate::layout;
use crate::scalar::ScalarState;
use crate::space::Space;

/// The version of objects and receipts.
pub const OBJECT_FORMAT: u32 = 1;
/// The largest header read, as in the safetensors format.
pub const MAX_HEADER: u64 = 100_000_000;
/// A receipt larger than this is refused.
pub const MAX_RECEIPT: usize = 64 << 20;

/// A run of one state's elements within an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// The state's name.
    pub state: String,
    /// First element in the canonical space; the start of a block.
    pub first: u64,
    /// Number of elements: whole blocks, but for the end of the space.
    pub elements: u64,
    /// Where its bytes begin in the object.
    pub offset: u64,
}

/// An object and what lies in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectEntry {
    /// Its path in the store.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// What it holds.
    pub extents: Vec<Extent>,
}

/// One state of a shard, as captured.
#[derive(Debug, Clone)]
pub struct ShardState {
    /// Name and type.
    pub decl: StateDecl,
    /// The shard's elements, little-endian. Mapped memory goes in by `Bytes::from_owner`.
    pub bytes: Bytes,
    /// The hashes of its blocks, in order.
    pub hashes: HashList,
}

/// All that is needed to store one rank's shard of one step.
#[derive(Debug, Clone)]
pub struct ShardSource {
    /// The job.
    pub job: JobName,
    /// Its canonical space.
    pub space: Space,
    /// The generation that computed it.
    pub generation: Generation,
    /// The rank that owns it.
    pub rank: Rank,
    /// Of how many.
    pub world_size: WorldSize,
    /// The scalar state, the same on every rank; its step is the checkpoint's.
    pub scalar: ScalarState,
    /// The states in declared order.
    pub states: Vec<ShardState>,
}

impl ShardSource {
    /// The elements this rank owns.
    pub fn shard(&self) -> Range<u64> {
        self.space.shard(self.rank, self.world_size)
    }

    /// Checks lengths, and lays the object out: its parts in order, and its entry. `None` for an empty shard.
    pub fn layout(&self, id: Uuid) -> Result<Option<(Vec<Bytes>, ObjectEntry)>, StoreError> {
        let shard = self.shard();
        let elements = shard.end - shard.start;
        let blocks = elements.div_ceil(self.space.block_elements());
        for state in &self.states {
            let (want, have) = (elements * state.decl.dtype.size(), state.bytes.len() as u64);
            if want != have || state.hashes.0.len() as u64 != blocks {
                return Err(StoreError::Bug(format!(
                    "rank {} of {}: state {} has {have} bytes and {} hashes; its shard needs {want} and {blocks}",
                    self.rank,
                    self.world_size,
                    state.decl.name,
                    state.hashes.0.len()
                )));
            }
        }
        if elements == 0 {
            return Ok(None);
        }
        let decls: Vec<_> = self.states.iter().map(|s| s.decl.clone()).collect();
        let (header, extents) = header(&self.space, &decls, shard)?;
        let path = layout::object(&self.job, self.scalar.step, self.generation, self.rank, id);
        let mut parts = vec![Bytes::from(header)];
        parts.extend(self.states.iter().map(|s| s.bytes.clone()));
        let bytes = parts.iter().map(|p| p.len() as u64).sum();
        Ok(Some((parts, ObjectEntry { path, bytes, extents })))
    }
}

/// What a rank tells the coordinator when its part of a checkpoint is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// [`OBJECT_FORMAT`].
    pub format: u32,
    /// The job.
    pub job: JobName,
    /// The generation that computed the state.
    pub generation: Generation,
    /// Whose shard it is.
    pub rank: Rank,
    /// Of how many.
    pub world_size: WorldSize,
    /// The elements of the shard, first and end.
    pub shard: (u64, u64),
    /// The scalar state with the step; all ranks must agree.
    pub scalar: ScalarState,
    /// The states in declared order.
    pub states: Vec<StateDecl>,
    /// Per state, the hashes of the shard's blocks.
    pub hashes: Vec<HashList>,
    /// What was stored; `None` for a rank that owns no blocks.
    pub object: Option<ObjectEntry>,
}

impl Receipt {
    /// The step of the state.
    pub fn step(&self) -> Step {
        self.scalar.step
    }

    /// Writes the receipt as JSON.
    pub fn to_json(&self) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(self).map_err(|e| StoreError::Bug(format!("receipt of rank {}: {e}", self.rank)))
    }

    /// Reads a receipt from the wire.
    pub fn from_json(bytes: &[u8]) -> Result<Self, StoreError> {
        if bytes.len() > MAX_RECEIPT {
            return Err(StoreError::Input(format!("a receipt of {} bytes is too large", bytes.len())));
        }
        parse_json("receipt", bytes, OBJECT_FORMAT)
    }
}

#[derive(Serialize)]
struct HeaderEntry {
    dtype: &'static str,
    shape: [u64; 1],
    data_offsets: [u64; 2],
}

/// Header entries in the order of the file: name, elements, first and last byte after the header.
fn entries(space: &Space, states: &[StateDecl], range: Range<u64>) -> Vec<(String, HeaderEntry)> {
    let (mut out, mut at) = (vec![], 0);
    for state in states {
        for piece in space.pieces(range.clone()) {
            let end = at + piece.elements * state.dtype.size();
            let name = format!("{}/{}@{}", state.name, piece.tensor.name, piece.first);
            let entry = HeaderEntry { dtype: state.dtype.name(), shape: [piece.elements], data_offsets: [at, end] };
            out.push((name, entry));
            at = end;
        }
    }
    out
}

/// The safetensors header of an object that holds `range` of every state, and the extents that follow it.
fn header(space: &Space, states: &[StateDecl], range: Range<u64>) -> Result<(Vec<u8>, Vec<Extent>), StoreError> {
    let json = |value: Result<String, serde_json::Error>| {
        value.map_err(|e| StoreError::Bug(format!("an object's header cannot be written: {e}")))
    };
    let shapes: BTreeMap<_, _> =
        space.pieces(range.clone()).map(|p| (p.tensor.name.as_str(), p.tensor.shape.as_slice())).collect();
    let metadata = BTreeMap::from([
        ("cairn.format", OBJECT_FORMAT.to_string()),
        ("cairn.shapes", json(serde_json::to_string(&shapes))?),
    ]);
    let mut text = format!("{{\"__metadata__\":{}", json(serde_json::to_string(&metadata))?);
    for (name, entry) in entries(space, states, range.clone()) {
        let (name, entry) = (json(serde_json::to_string(&name))?, json(serde_json::to_string(&entry))?);
        text += ",";
        text += &name;
        text += ":";
        text += &entry;
    }
    text.push('}');
    // The body begins on a page of the file, so that a local disk can take it straight from a mapped slot.
    while !(8 + text.len()).is_multiple_of(PAGE) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    if text.len() as u64 > MAX_HEADER {
        return Err(StoreError::Bug(format!("an object's header would have {} bytes", text.len())));
    }
    let mut offset = bytes.len() as u64;
    let elements = range.end - range.start;
    let extent = |state: &StateDecl| {
        let extent = Extent { state: state.name.clone(), first: range.start, elements, offset };
        offset += elements * state.dtype.size();
        extent
    };
    Ok((bytes, states.iter().map(extent).collect()))
}

/// Checks that the header of a stored object says the same as the manifest's entry for it.
pub(crate) fn check_header(
    space: &Space,
    states: &[StateDecl],
    object: &ObjectEntry,
    text: &[u8],
) -> Result<(), StoreError> {
    let path = &object.path;
    let corrupt = |why: String| StoreError::Corrupt(format!("{path}: {why}"));
    let metadata: Metadata =
        serde_json::from_slice(text).map_err(|e| corrupt(format!("its safetensors header is not valid: {e}")))?;
    let format = metadata.metadata().as_ref().and_then(|m| m.get("cairn.format")).and_then(|f| f.parse().ok());
    let format = format.ok_or_else(|| corrupt("its header names no format".into()))?;
    check_format(path, format, OBJECT_FORMAT)?;
    let mut expected = 0;
    for extent in &object.extents {
        let Some(state) = states.iter().find(|s| s.name == extent.state) else { continue };
        let mut at = extent.offset - 8 - text.len() as u64;
        let range = extent.first..extent.first + extent.elements;
        for (name, entry) in entries(space, std::slice::from_ref(state), range) {
            let length = entry.data_offsets[1] - entry.data_offsets[0];
            let found = metadata.info(&name).ok_or_else(|| corrupt(format!("its header lacks {name}")))?;
            let same = found.data_offsets == (at as usize, (at + length) as usize)
                && found.shape == [entry.shape[0] as usize]
                && format!("{:?}", found.dtype) == entry.dtype;
            if !same {
                return Err(corrupt(format!("its header places {name} elsewhere than the manifest does")));
            }
            at += length;
            expected += 1;
        }
    }
    let have = metadata.tensors().len();
    if have != expected {
        return Err(corrupt(format!("its header has {have} entries, the manifest {expected}")));
    }
    Ok(())
}
