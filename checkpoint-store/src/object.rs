//! A rank's object: a plain safetensors file of one-dimensional slices.
//!
//! The entries are named `<state>/<tensor>@<first element>`, in canonical order state by state, so any safetensors
//! reader can open an object and put tensors together from the names. `__metadata__` has the full shapes of its tensors
//! and the format version. The header is built from ranges alone and the body is the shard's memory as it lies: the
//! upload streams the one and then the other without a copy. An object holds the whole shard, or only the runs of
//! blocks that changed ([`crate::known`]).

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use bytes::Bytes;
use proto::ids::{Generation, JobName, Rank, WorldSize};
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::aligned::PAGE;
use crate::digest::{HashList, StateDecl};
use crate::error::{StoreError, check_format};
use crate::layout;
use crate::scalar::ScalarState;
use crate::space::{Piece, Space};

/// The version of objects.
pub const OBJECT_FORMAT: u32 = 1;
/// The largest header read, as in the safetensors format.
pub const MAX_HEADER: u64 = 100_000_000;

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

    /// Checks that every state has the bytes and hashes of its shard.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
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
        Ok(())
    }

    /// The states' declarations in order.
    pub fn decls(&self) -> Vec<StateDecl> {
        self.states.iter().map(|s| s.decl.clone()).collect()
    }

    /// Lays an object of the whole shard out: its parts in order, and its entry. `None` for an empty shard.
    pub fn layout(&self, id: Uuid) -> Result<Option<(Vec<Bytes>, ObjectEntry)>, StoreError> {
        let shard = self.shard();
        let whole = |state| Run { state, elements: shard.clone() };
        let runs: Vec<Run> = (0..self.states.len()).filter(|_| !shard.is_empty()).map(whole).collect();
        self.layout_of(id, &runs)
    }

    /// Lays an object of some runs of the shard out, which come state by state and in canonical order. `None` if there
    /// are none.
    pub(crate) fn layout_of(&self, id: Uuid, runs: &[Run]) -> Result<Option<(Vec<Bytes>, ObjectEntry)>, StoreError> {
        self.check()?;
        if runs.is_empty() {
            return Ok(None);
        }
        let (header, extents) = lay_out(&self.space, &self.decls(), runs)?;
        let path = layout::object(&self.job, self.scalar.step, self.generation, self.rank, id);
        let (shard, mut parts) = (self.shard(), vec![Bytes::from(header)]);
        for run in runs {
            let state = &self.states[run.state];
            let byte = |element: u64| ((element - shard.start) * state.decl.dtype.size()) as usize;
            parts.push(state.bytes.slice(byte(run.elements.start)..byte(run.elements.end)));
        }
        let bytes = parts.iter().map(|p| p.len() as u64).sum();
        Ok(Some((parts, ObjectEntry { path, bytes, extents })))
    }
}

/// A run of elements of one state, which an object holds in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The state, as an index into the declared ones.
    pub state: usize,
    /// The elements: whole blocks, but for the end of the space.
    pub elements: Range<u64>,
}

#[derive(Serialize)]
struct HeaderEntry {
    dtype: &'static str,
    shape: [u64; 1],
    data_offsets: [u64; 2],
}

/// The header entries of one run, from byte `at` of the body on.
fn entries(space: &Space, state: &StateDecl, range: Range<u64>, mut at: u64) -> Vec<(String, HeaderEntry)> {
    let entry = |piece: Piece<'_>| {
        let end = at + piece.elements * state.dtype.size();
        let name = format!("{}/{}@{}", state.name, piece.tensor.name, piece.first);
        let entry = HeaderEntry { dtype: state.dtype.name(), shape: [piece.elements], data_offsets: [at, end] };
        at = end;
        (name, entry)
    };
    space.pieces(range).map(entry).collect()
}

/// The safetensors header of an object that holds these runs one after the other, and the extents that follow it.
pub fn lay_out(space: &Space, states: &[StateDecl], runs: &[Run]) -> Result<(Vec<u8>, Vec<Extent>), StoreError> {
    let json = |value: Result<String, serde_json::Error>| {
        value.map_err(|e| StoreError::Bug(format!("an object's header cannot be written: {e}")))
    };
    let pieces = runs.iter().flat_map(|run| space.pieces(run.elements.clone()));
    let shapes: BTreeMap<_, _> = pieces.map(|p| (p.tensor.name.as_str(), p.tensor.shape.as_slice())).collect();
    let metadata = BTreeMap::from([
        ("cairn.format", OBJECT_FORMAT.to_string()),
        ("cairn.shapes", json(serde_json::to_string(&shapes))?),
    ]);
    let mut text = format!("{{\"__metadata__\":{}", json(serde_json::to_string(&metadata))?);
    let (mut at, mut extents) = (0, Vec::with_capacity(runs.len()));
    for run in runs {
        let state = states.get(run.state).ok_or_else(|| StoreError::Bug("a run of no declared state".into()))?;
        for (name, entry) in entries(space, state, run.elements.clone(), at) {
            let (name, entry) = (json(serde_json::to_string(&name))?, json(serde_json::to_string(&entry))?);
            text += ",";
            text += &name;
            text += ":";
            text += &entry;
        }
        let elements = run.elements.end - run.elements.start;
        extents.push(Extent { state: state.name.clone(), first: run.elements.start, elements, offset: at });
        at += elements * state.dtype.size();
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
    for extent in &mut extents {
        extent.offset += bytes.len() as u64;
    }
    Ok((bytes, extents))
}

/// One entry of a stored header, as a place in the canonical space.
struct Held {
    first: u64,
    elements: u64,
    /// Where its bytes begin after the header.
    at: u64,
}

/// Checks that the header of a stored object says the same as the manifest's entry for it. The manifest may use only
/// part of what the object holds; the rest of the object must be well-formed all the same.
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
    let body = 8 + text.len() as u64;
    let held = held(space, states, &metadata).map_err(corrupt)?;
    let end = metadata.tensors().values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
    if body.checked_add(end) != Some(object.bytes) {
        return Err(corrupt(format!("its header describes {end} bytes, of which the object has not as many")));
    }
    for extent in &object.extents {
        let Some(state) = states.iter().position(|s| s.name == extent.state) else { continue };
        let missing = |element| {
            corrupt(format!(
                "its header lacks element {element} of state {} (tensor {}), or places it elsewhere than the manifest",
                extent.state,
                space.tensor_at(element)
            ))
        };
        let size = states[state].dtype.size();
        let at = extent.offset.checked_sub(body).ok_or_else(|| missing(extent.first))?;
        let (mut next, stop) = (extent.first, extent.first + extent.elements);
        let start = held[state].partition_point(|h| h.first + h.elements <= next);
        for h in &held[state][start..] {
            if next >= stop || h.first > next || h.at + (next - h.first) * size != at + (next - extent.first) * size {
                break;
            }
            next = h.first + h.elements;
        }
        if next < stop {
            return Err(missing(next));
        }
    }
    Ok(())
}

/// The entries of a header per state, in canonical order. Every one must be a slice of a tensor of the space, in one
/// piece; states the manifest does not declare are passed over.
fn held(space: &Space, states: &[StateDecl], metadata: &Metadata) -> Result<Vec<Vec<Held>>, String> {
    let tensors: HashMap<&str, Range<u64>> = space.tensor_ranges().map(|(t, range)| (t.name.as_str(), range)).collect();
    let mut held: Vec<Vec<Held>> = states.iter().map(|_| vec![]).collect();
    for (name, info) in metadata.tensors() {
        let parts = name.split_once('/').and_then(|(state, rest)| Some((state, rest.rsplit_once('@')?)));
        let place = parts.and_then(|(state, (tensor, first))| {
            let (range, first) = (tensors.get(tensor)?, first.parse::<u64>().ok()?);
            let [elements] = info.shape.as_slice() else { return None };
            let inside = first.checked_add(*elements as u64).is_some_and(|end| end <= range.end - range.start);
            inside.then(|| (state, range.start + first, *elements as u64))
        });
        let Some((state, first, elements)) = place else {
            let shown: String = name.chars().take(80).collect();
            return Err(format!("its header holds {shown:?}, which is no slice of a tensor of this model"));
        };
        let Some(index) = states.iter().position(|s| s.name == state) else { continue };
        if format!("{:?}", info.dtype) != states[index].dtype.name() {
            return Err(format!("its header holds {name} as {:?}", info.dtype));
        }
        held[index].push(Held { first, elements, at: info.data_offsets.0 as u64 });
    }
    for entries in &mut held {
        entries.sort_unstable_by_key(|h| (h.first, h.elements));
    }
    Ok(held)
}
