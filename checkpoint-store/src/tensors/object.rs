//! A rank's object of boxes: a plain safetensors file, and the receipt for it.
//!
//! The entries are named `<tensor>#<offset>,<offset>,…` and have the lengths as their shape, so any safetensors reader
//! opens the file and knows where each box belongs. `__metadata__` has the tensors' full shapes, each entry's offsets,
//! and the format version. A box is hashed in chunks: runs of its elements of at most 8 MiB, whole rows where rows are
//! short enough, and at most a 64th of the box where that is not tiny. A reader must read whole chunks to prove them,
//! so small chunks are what keeps it from reading much more than it needs.

use std::collections::BTreeMap;

use bytes::Bytes;
use proto::ids::{Generation, JobName, Rank, Step};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::catalog::Catalog;
use super::plan::{PlanKey, SavePlan, Share};
use super::region::{Region, copy_region};
use crate::backend::Store;
use crate::digest::{BlockHash, HashList};
use crate::error::{StoreError, parse_json};
use crate::layout;
use crate::object::MAX_HEADER;
use crate::receipt::MAX_RECEIPT;

/// The version of objects, receipts and manifests of boxes.
pub const TENSORS_FORMAT: u32 = 1;
/// The most bytes of a chunk.
pub(super) const MAX_CHUNK: u64 = 8 << 20;
/// Chunks are not made smaller than this.
const MIN_CHUNK: u64 = 16 << 10;
/// Chunks of a box, where they are neither too large nor too small.
const CHUNKS: u64 = 64;

/// A box as it lies in an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredPiece {
    /// The tensor, by its place in the manifest's list.
    pub tensor: u32,
    /// Where the box lies in the tensor.
    pub region: Region,
    /// Where its bytes begin in the object.
    pub at: u64,
    /// Elements of a chunk; the last one may be short.
    pub chunk: u64,
    /// The chunks' hashes, in order.
    pub hashes: HashList,
}

/// An object and the boxes in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorObject {
    /// Its path in the store.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// What it holds, in the order of its bytes.
    pub pieces: Vec<StoredPiece>,
}

/// One rank's part of a save.
#[derive(Debug, Clone)]
pub struct TensorSource {
    /// The job.
    pub job: JobName,
    /// The step whose state it is.
    pub step: Step,
    /// The generation that saves.
    pub generation: Generation,
    /// The rank.
    pub rank: Rank,
    /// The bytes of each piece of the rank's description, in its order: row by row, little-endian.
    pub data: Vec<Bytes>,
}

/// What a rank tells whoever commits, when its part is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorReceipt {
    /// [`TENSORS_FORMAT`].
    pub format: u32,
    /// The job.
    pub job: JobName,
    /// The step.
    pub step: Step,
    /// The generation that saves.
    pub generation: Generation,
    /// Whose part it is.
    pub rank: Rank,
    /// The plan by which it was written.
    pub plan: PlanKey,
    /// What was stored; `None` for a rank that had nothing to write.
    pub object: Option<TensorObject>,
}

impl TensorReceipt {
    /// Writes the receipt as JSON.
    pub fn to_json(&self) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(self).map_err(|e| StoreError::Bug(format!("receipt of rank {}: {e}", self.rank)))
    }

    /// Reads a receipt from the wire.
    pub fn from_json(bytes: &[u8]) -> Result<Self, StoreError> {
        if bytes.len() > MAX_RECEIPT {
            return Err(StoreError::Input(format!("a receipt of {} bytes is too large", bytes.len())));
        }
        parse_json("receipt", bytes, TENSORS_FORMAT)
    }
}

/// Stores what the plan gives a rank to write, as an object named by `id`, a fresh UUID. The bytes are hashed off the
/// async threads and uploaded without a copy.
pub async fn upload_boxes(
    store: &Store,
    plan: &SavePlan,
    source: &TensorSource,
    id: Uuid,
) -> Result<TensorReceipt, StoreError> {
    let rank = source.rank;
    if rank.index() >= plan.world_size() {
        return Err(StoreError::Bug(format!("rank {rank} is not in a plan for {} ranks", plan.world_size())));
    }
    let shares = plan.shares(rank);
    let mut object = None;
    if !shares.is_empty() {
        let catalog = plan.catalog();
        let header = header(catalog, shares)?;
        let bodies = bodies(plan, source)?;
        let mut at = header.len() as u64;
        let mut pieces = vec![];
        for (share, body) in shares.iter().zip(&bodies) {
            let size = catalog.tensors()[share.tensor].dtype.size();
            let chunk = chunk_elements(&share.region, size);
            let (bytes, length) = (body.clone(), (chunk * size) as usize);
            let hashes = tokio::task::spawn_blocking(move || bytes.par_chunks(length).map(BlockHash::of).collect());
            let hashes =
                hashes.await.map_err(|e| StoreError::unavailable(format!("hashing boxes of rank {rank}"), e))?;
            let (tensor, region) = (share.tensor as u32, share.region.clone());
            pieces.push(StoredPiece { tensor, region, at, chunk, hashes: HashList(hashes) });
            at += body.len() as u64;
        }
        let path = layout::object(&source.job, source.step, source.generation, rank, id);
        store.upload(&path, [vec![Bytes::from(header)], bodies].concat()).await?;
        object = Some(TensorObject { path, bytes: at, pieces });
    }
    let (job, step, generation) = (source.job.clone(), source.step, source.generation);
    Ok(TensorReceipt { format: TENSORS_FORMAT, job, step, generation, rank, plan: plan.key(), object })
}

/// The bytes of each share: a slice of its piece's, since shares are runs of rows.
fn bodies(plan: &SavePlan, source: &TensorSource) -> Result<Vec<Bytes>, StoreError> {
    let body = |share: &Share| {
        let held = source.data.get(share.piece)?;
        let tensor = &plan.catalog().tensors()[share.tensor];
        let whole = &share.held;
        let size = tensor.dtype.size();
        if whole.elements() * size != held.len() as u64 {
            return None;
        }
        let mut runs = whole.runs(&share.region)?;
        let (first, more) = (runs.next()?, runs.next());
        if more.is_none() {
            return Some(held.slice((first.start * size) as usize..(first.end * size) as usize));
        }
        let mut packed = vec![0; (share.region.elements() * size) as usize];
        copy_region((held, whole), (&mut packed, &share.region), &share.region, size).ok()?;
        Some(packed.into())
    };
    let bodies = plan.shares(source.rank).iter().map(|share| {
        body(share).ok_or_else(|| {
            let (name, have) = (&plan.catalog().tensors()[share.tensor].name, source.data.get(share.piece));
            StoreError::Bug(format!(
                "rank {}: piece {} of tensor {name:?} was described with another size than its data, {:?} bytes",
                source.rank,
                share.piece,
                have.map(Bytes::len)
            ))
        })
    });
    bodies.collect()
}

/// Elements of a chunk of a box: whole rows of some dimension, as many as stay under the bound.
fn chunk_elements(region: &Region, size: u64) -> u64 {
    let bound = (region.elements() * size / CHUNKS).clamp(MIN_CHUNK, MAX_CHUNK) / size;
    let mut row = 1;
    for &length in region.lengths().iter().rev() {
        if row * length > bound {
            return row * (bound / row);
        }
        row *= length;
    }
    row
}

/// The name of a box's entry.
pub(super) fn entry_name(tensor: &str, region: &Region) -> String {
    let offsets: Vec<_> = region.offsets().iter().map(u64::to_string).collect();
    format!("{tensor}#{}", offsets.join(","))
}

#[derive(Serialize)]
struct HeaderEntry<'a> {
    dtype: &'static str,
    shape: &'a [u64],
    data_offsets: [u64; 2],
}

/// The safetensors header, length and all, of an object with these boxes one after another.
fn header(catalog: &Catalog, shares: &[Share]) -> Result<Vec<u8>, StoreError> {
    let fail = |e: serde_json::Error| StoreError::Bug(format!("an object's header cannot be written: {e}"));
    let (mut shapes, mut offsets, mut entries, mut at) = (BTreeMap::new(), BTreeMap::new(), vec![], 0);
    for share in shares {
        let tensor = &catalog.tensors()[share.tensor];
        let name = entry_name(&tensor.name, &share.region);
        let end = at + share.region.elements() * tensor.dtype.size();
        let (dtype, shape) = (tensor.dtype.name(), share.region.lengths());
        entries.push((name.clone(), HeaderEntry { dtype, shape, data_offsets: [at, end] }));
        shapes.insert(tensor.name.as_str(), &tensor.shape);
        offsets.insert(name, share.region.offsets());
        at = end;
    }
    let metadata = BTreeMap::from([
        ("cairn.format", TENSORS_FORMAT.to_string()),
        ("cairn.kind", "tensors".to_owned()),
        ("cairn.shapes", serde_json::to_string(&shapes).map_err(fail)?),
        ("cairn.offsets", serde_json::to_string(&offsets).map_err(fail)?),
    ]);
    let mut text = format!("{{\"__metadata__\":{}", serde_json::to_string(&metadata).map_err(fail)?);
    for (name, entry) in &entries {
        let (name, entry) = (serde_json::to_string(name).map_err(fail)?, serde_json::to_string(entry).map_err(fail)?);
        text.extend([",", &name, ":", &entry]);
    }
    text.push('}');
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    if text.len() as u64 > MAX_HEADER {
        let why = format!("an object of {} boxes would have a header of {} bytes", entries.len(), text.len());
        return Err(StoreError::Input(format!("{why}, more than {MAX_HEADER}: use fewer boxes a rank")));
    }
    Ok([&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_whole_rows_of_a_bounded_size() {
        let chunk = |shape: &[u64], size| chunk_elements(&Region::whole(shape), size);
        assert_eq!(chunk(&[], 8), 1);
        assert_eq!(chunk(&[100], 4), 100);
        assert_eq!(chunk(&[1 << 20], 4), (1 << 20) / 64);
        assert_eq!(chunk(&[1000, 1000], 4), 15 * 1000);
        assert_eq!(chunk(&[1 << 20, 1 << 14], 2), MAX_CHUNK / 2);
        assert_eq!(chunk(&[2, 1 << 30], 4), MAX_CHUNK / 4);
        assert_eq!(chunk(&[100, 8, 100], 4), 5 * 800);
    }
}
