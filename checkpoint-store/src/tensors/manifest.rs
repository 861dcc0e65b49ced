//! The manifest of a checkpoint of boxes: which tensors, where their boxes lie, and the chunks' hashes.
//!
//! It is made from a complete set of receipts of one plan, and read back with every claim checked: boxes inside their
//! tensors and covering them exactly once, byte ranges inside their objects and disjoint, as many hashes as chunks, no
//! path outside the job. Nothing is allocated by a number that the manifest only states. The hashes serve integrity;
//! they say nothing about identity, since they depend on how the tensors were cut ([`super::canonicalize`] gives a
//! digest).

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use proto::ids::{Generation, JobName, Step, WorldSize};
use serde::{Deserialize, Serialize};

use super::catalog::Catalog;
use super::object::{MAX_CHUNK, TENSORS_FORMAT, TensorObject, TensorReceipt};
use super::plan::{MAX_PIECES, SavePlan, check_coverage};
use crate::error::{StoreError, parse_json};
use crate::layout;
use crate::manifest::{MAX_MANIFEST, MAX_OBJECTS};

/// Most bytes of one object: beyond what any store takes.
const MAX_OBJECT: u64 = 1 << 50;
/// Most bytes of the framework's own metadata.
const MAX_METADATA: usize = 1 << 20;

/// Tells this manifest from the canonical one, which lies in the same folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ManifestKind {
    /// Boxes of tensors.
    Tensors,
}

/// One checkpoint of boxes, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorManifest {
    /// [`TENSORS_FORMAT`].
    pub format: u32,
    /// Always `tensors`.
    pub kind: ManifestKind,
    /// The job.
    pub job: JobName,
    /// The step whose state this is.
    pub step: Step,
    /// The generation that saved it.
    pub generation: Generation,
    /// How many ranks saved it; of no consequence for loading.
    pub world_size: WorldSize,
    /// The framework's own words: counters, configuration.
    pub metadata: BTreeMap<String, String>,
    /// The tensors.
    pub tensors: Catalog,
    /// Where their boxes lie.
    pub objects: Vec<TensorObject>,
    /// For each tensor, its pieces as (object, piece); built by the check.
    #[serde(skip)]
    index: Vec<Vec<(u32, u32)>>,
}

impl TensorManifest {
    /// Makes the manifest of a complete set of receipts. A receipt that was sent twice counts once.
    pub fn assemble(
        plan: &SavePlan,
        mut receipts: Vec<TensorReceipt>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Self, StoreError> {
        receipts.sort_by_key(|r| r.rank);
        receipts.dedup();
        let wrong = |why: String| Err(StoreError::Input(why));
        let count = u32::try_from(plan.world_size()).ok().and_then(WorldSize::new);
        let (Some(first), Some(world_size)) = (receipts.first(), count) else {
            return wrong("a checkpoint needs at least one receipt".into());
        };
        let (job, step, generation) = (first.job.clone(), first.step, first.generation);
        let mut objects = vec![];
        for rank in world_size.ranks() {
            let receipt = receipts.get(rank.index()).filter(|r| r.rank == rank);
            let Some(receipt) = receipt else {
                return wrong(format!("{} receipts of {world_size} ranks; rank {rank}'s is missing", receipts.len()));
            };
            if (&receipt.job, receipt.step, receipt.generation) != (&job, step, generation) {
                return wrong(format!("rank {rank}: its receipt is of another job, step or generation than rank 0's"));
            }
            wrote_its_share(plan, receipt)?;
            objects.extend(receipt.object.clone());
        }
        if receipts.len() > world_size.count() {
            return wrong(format!("{} receipts of {world_size} ranks", receipts.len()));
        }
        let (format, kind, tensors) = (TENSORS_FORMAT, ManifestKind::Tensors, plan.catalog().clone());
        let index = vec![];
        let mut manifest = Self { format, kind, job, step, generation, world_size, metadata, tensors, objects, index };
        manifest.check().map_err(StoreError::Input)?;
        Ok(manifest)
    }

    /// Reads and checks a manifest; `path` is for messages.
    pub fn parse(path: &str, bytes: &[u8]) -> Result<Self, StoreError> {
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(StoreError::Corrupt(format!("{path} has {} bytes, more than {MAX_MANIFEST}", bytes.len())));
        }
        let mut manifest: Self = parse_json(path, bytes, TENSORS_FORMAT)?;
        manifest.check().map_err(|why| StoreError::Corrupt(format!("{path}: {why}")))?;
        Ok(manifest)
    }

    /// The manifest as it is stored.
    pub fn to_json(&self) -> Result<Bytes, StoreError> {
        let bytes = serde_json::to_vec(self).map_err(|e| StoreError::Bug(format!("manifest: {e}")))?;
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(StoreError::Input(format!("the manifest would have {} bytes: use fewer boxes", bytes.len())));
        }
        Ok(bytes.into())
    }

    /// Bytes of all objects.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().fold(0, |sum, o| sum.saturating_add(o.bytes))
    }

    /// Where the pieces of a tensor lie: (object, piece).
    pub(super) fn pieces_of(&self, tensor: usize) -> &[(u32, u32)] {
        self.index.get(tensor).map_or(&[], Vec::as_slice)
    }

    fn check(&mut self) -> Result<(), String> {
        let metadata: usize = self.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
        if metadata > MAX_METADATA {
            return Err(format!("{metadata} bytes of metadata are more than {MAX_METADATA}"));
        }
        let pieces = self.objects.iter().fold(0usize, |sum, o| sum.saturating_add(o.pieces.len()));
        if self.objects.len() > MAX_OBJECTS || pieces > MAX_PIECES {
            return Err(format!("{} objects with {pieces} pieces are too many", self.objects.len()));
        }
        let mut paths = HashSet::with_capacity(self.objects.len());
        let mut index = vec![vec![]; self.tensors.tensors().len()];
        for (number, object) in self.objects.iter().enumerate() {
            let shown: String = object.path.chars().take(120).collect();
            if !layout::is_object_of(&self.job, &object.path) {
                return Err(format!("{shown:?} is not a path of an object of job {}", self.job));
            }
            if !paths.insert(object.path.as_str()) {
                return Err(format!("{shown} is listed twice"));
            }
            check_object(&self.tensors, object)?;
            for (at, piece) in object.pieces.iter().enumerate() {
                index[piece.tensor as usize].push((number as u32, at as u32));
            }
        }
        let regions = self.objects.iter().flat_map(|o| &o.pieces).map(|p| (p.tensor as usize, &p.region));
        check_coverage(&self.tensors, regions).map_err(|e| e.to_string())?;
        self.index = index;
        Ok(())
    }
}

/// Checks an object's pieces against its size and against the tensors.
fn check_object(tensors: &Catalog, object: &TensorObject) -> Result<(), String> {
    let path = &object.path;
    if object.bytes > MAX_OBJECT || object.pieces.is_empty() {
        return Err(format!("{path} would have {} bytes and {} pieces", object.bytes, object.pieces.len()));
    }
    let mut free = 8;
    for piece in &object.pieces {
        let tensor = tensors.tensors().get(piece.tensor as usize);
        let tensor = tensor.ok_or_else(|| format!("{path} holds a tensor that is not listed"))?;
        let (name, size, region) = (&tensor.name, tensor.dtype.size(), &piece.region);
        if !region.is_within(&tensor.shape) {
            return Err(format!("{path}: {region} lies outside tensor {name:?} of shape {:?}", tensor.shape));
        }
        let elements = region.elements();
        if piece.chunk == 0 || piece.chunk > (MAX_CHUNK / size).max(1) {
            return Err(format!("{path}: {region} of {name:?} has chunks of {} elements", piece.chunk));
        }
        let (chunks, have) = (elements.div_ceil(piece.chunk), piece.hashes.0.len());
        if chunks != have as u64 {
            return Err(format!("{path}: {region} of {name:?} has {have} hashes for {chunks} chunks"));
        }
        // Cannot overflow: at most 2^48 elements of at most 8 bytes.
        let end = piece.at.checked_add(elements * size).filter(|&end| end <= object.bytes && piece.at >= free);
        free = end.ok_or_else(|| {
            format!("{path}: the bytes of {region} of {name:?} overlap others or lie outside the object")
        })?;
    }
    Ok(())
}

/// A receipt must be of this plan and hold exactly the rank's share of it.
fn wrote_its_share(plan: &SavePlan, receipt: &TensorReceipt) -> Result<(), StoreError> {
    let wanted = plan.shares(receipt.rank).iter().map(|s| (s.tensor, &s.region));
    let pieces = receipt.object.as_ref().map_or(&[][..], |o| &o.pieces);
    let found = pieces.iter().map(|p| (p.tensor as usize, &p.region));
    if receipt.plan == plan.key() && wanted.eq(found) {
        return Ok(());
    }
    Err(StoreError::Input(format!("rank {}: its receipt is not of what this plan gives it to write", receipt.rank)))
}
