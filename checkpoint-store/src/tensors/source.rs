//! A reader over one checkpoint, of boxes or canonical, as chunks that can be proved.
//!
//! Both kinds come down to the same thing: chunks with a hash, each a run of an address space (an object's bytes, or
//! the canonical space's), made of boxes of tensors. What differs is only where a chunk's boxes come from: the elements
//! of a piece in order, or the elements of a block of the canonical space.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use proto::ids::JobName;
use rayon::prelude::*;

use super::catalog::{BoxPiece, Catalog, ElementType, TensorInfo};
use super::commit::{TensorRef, open_tensors};
use super::load::{LoadOptions, LoadPlan};
use super::manifest::TensorManifest;
use super::object::StoredPiece;
use super::region::Region;
use crate::backend::Store;
use crate::digest::BlockHash;
use crate::error::StoreError;
use crate::load::read_range;
use crate::manifest::Manifest;

/// Reads any box of any tensor from a checkpoint. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Reader {
    store: Store,
    catalog: Catalog,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Boxes(Arc<TensorManifest>),
    /// One state of a canonical checkpoint.
    Canonical(Arc<Manifest>, String),
}

/// A chunk's place: object, piece of the object, chunk of the piece. In the order of these they lie in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ChunkId {
    pub(super) object: u32,
    piece: u32,
    index: u64,
}

/// A box within a chunk: tensor, box, first byte.
pub(super) type Part = (usize, Region, u64);

impl Reader {
    /// A reader of a checkpoint of boxes that the chain names.
    pub async fn open(store: &Store, job: &JobName, checkpoint: &TensorRef) -> Result<Self, StoreError> {
        Ok(Self::of_boxes(store, open_tensors(store, job, checkpoint).await?))
    }

    /// A reader of a checkpoint of boxes, by its manifest.
    pub fn of_boxes(store: &Store, manifest: TensorManifest) -> Self {
        let catalog = manifest.tensors.clone();
        Self { store: store.clone(), catalog, source: Source::Boxes(Arc::new(manifest)) }
    }

    /// A reader of one state of a canonical checkpoint: its tensors have the names that the model declares.
    pub fn of_canonical(store: &Store, manifest: Manifest, state: &str) -> Result<Self, StoreError> {
        let index = manifest.state_index(state);
        let index = index.ok_or_else(|| StoreError::Input(format!("the checkpoint has no state {state:?}")))?;
        let dtype = element_type(manifest.states[index].dtype.name())?;
        let info = |t: &crate::TensorDecl| TensorInfo::new(t.name.clone(), dtype, t.shape.clone());
        let catalog = Catalog::new(manifest.space.tensors().iter().map(info).collect())?;
        Ok(Self { store: store.clone(), catalog, source: Source::Canonical(Arc::new(manifest), state.to_owned()) })
    }

    /// The tensors that can be read.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Reads a box, row by row.
    pub async fn read_box(&self, piece: &BoxPiece) -> Result<Vec<u8>, StoreError> {
        let (tensor, region) = self.catalog.locate(piece)?;
        let length = (region.elements() * self.size(tensor)) as usize;
        let mut out = vec![];
        out.try_reserve_exact(length)
            .map_err(|e| StoreError::unavailable(format!("memory for {region} of {:?}", piece.tensor), e))?;
        out.resize(length, 0);
        self.read_box_into(piece, &mut out).await?;
        Ok(out)
    }

    /// Reads a box into a buffer of exactly its size. On an error the buffer may be partly written.
    pub async fn read_box_into(&self, piece: &BoxPiece, dst: &mut [u8]) -> Result<(), StoreError> {
        let plan = LoadPlan::new(self, &[vec![piece.clone()]], LoadOptions::default())?;
        plan.run_alone(self, &mut [dst]).await
    }

    /// Reads a range of elements of tensors laid end to end in the order of `order`, which may name any of this
    /// checkpoint's tensors, with their types and shapes. So a canonical shard loads from another framework's boxes.
    pub async fn read_flat(&self, order: &Catalog, range: Range<u64>, dst: &mut [u8]) -> Result<(), StoreError> {
        let (mut wanted, mut parts, mut rest) = (vec![], vec![], dst);
        for (tensor, region) in order.flat_pieces(range) {
            let tensor = &order.tensors()[tensor];
            let found = self.catalog.find(&tensor.name).map(|at| &self.catalog.tensors()[at]);
            if found != Some(tensor) {
                let have = found.map_or("lacks it".to_owned(), |t| format!("has {} {:?}", t.dtype.name(), t.shape));
                let (name, dtype, shape) = (&tensor.name, tensor.dtype.name(), &tensor.shape);
                return Err(StoreError::Input(format!(
                    "tensor {name:?} is wanted as {dtype} {shape:?}: the checkpoint {have}"
                )));
            }
            let length = (region.elements() * tensor.dtype.size()) as usize;
            let (part, after) = rest.split_at_mut_checked(length).ok_or_else(wrong_size)?;
            rest = after;
            parts.push(part);
            wanted.push(BoxPiece { tensor: tensor.name.clone(), region });
        }
        if !rest.is_empty() {
            return Err(wrong_size());
        }
        let plan = LoadPlan::new(self, &[wanted], LoadOptions::default())?;
        plan.run_alone(self, &mut parts).await
    }

    pub(super) fn size(&self, tensor: usize) -> u64 {
        self.catalog.tensors()[tensor].dtype.size()
    }

    /// The chunks that hold elements of a region, in order.
    pub(super) fn chunks(&self, tensor: usize, region: &Region) -> Vec<ChunkId> {
        let mut found = vec![];
        match &self.source {
            Source::Boxes(manifest) => {
                for &(object, piece) in manifest.pieces_of(tensor) {
                    let stored = &manifest.objects[object as usize].pieces[piece as usize];
                    let Some(common) = stored.region.intersect(region) else { continue };
                    let span = stored.region.span(&common);
                    let all = span.start / stored.chunk..span.end.div_ceil(stored.chunk);
                    let gapless = common.elements() == span.end - span.start;
                    let ids = all.map(|index| ChunkId { object, piece, index });
                    found.extend(ids.filter(|id| gapless || self.meets(*id, tensor, &common)));
                }
            }
            Source::Canonical(manifest, _) => {
                let span = Region::whole(&self.catalog.tensors()[tensor].shape).span(region);
                let (start, block) = (self.catalog.range(tensor).start, manifest.block_elements);
                let all = (start + span.start) / block..(start + span.end).div_ceil(block);
                let gapless = region.elements() == span.end - span.start;
                let ids = all.map(|index| ChunkId { object: 0, piece: 0, index });
                found.extend(ids.filter(|id| gapless || self.meets(*id, tensor, region)));
            }
        }
        found
    }

    fn meets(&self, id: ChunkId, tensor: usize, region: &Region) -> bool {
        self.parts(id).iter().any(|(t, part, _)| *t == tensor && part.intersect(region).is_some())
    }

    fn piece(manifest: &TensorManifest, id: ChunkId) -> &StoredPiece {
        &manifest.objects[id.object as usize].pieces[id.piece as usize]
    }

    /// The elements of a chunk: of its piece, or of the canonical space.
    fn elements(&self, id: ChunkId) -> Range<u64> {
        let (chunk, all) = match &self.source {
            Source::Boxes(manifest) => {
                let piece = Self::piece(manifest, id);
                (piece.chunk, piece.region.elements())
            }
            Source::Canonical(manifest, _) => (manifest.block_elements, self.catalog.elements()),
        };
        let first = id.index * chunk;
        first..(first + chunk).min(all)
    }

    /// The bytes of a chunk in its address space.
    pub(super) fn bytes(&self, id: ChunkId) -> Range<u64> {
        let elements = self.elements(id);
        let (at, size) = match &self.source {
            Source::Boxes(manifest) => {
                let piece = Self::piece(manifest, id);
                (piece.at, self.size(piece.tensor as usize))
            }
            Source::Canonical(..) => (0, self.size(0)),
        };
        at + elements.start * size..at + elements.end * size
    }

    /// The boxes that a chunk is made of, in the order of its bytes.
    pub(super) fn parts(&self, id: ChunkId) -> Vec<Part> {
        let elements = self.elements(id);
        let parts: Vec<(usize, Region)> = match &self.source {
            Source::Boxes(manifest) => {
                let piece = Self::piece(manifest, id);
                let tensor = piece.tensor as usize;
                piece.region.flat_parts(elements).into_iter().map(|region| (tensor, region)).collect()
            }
            Source::Canonical(..) => self.catalog.flat_pieces(elements),
        };
        let mut at = 0;
        let place = |(tensor, region): (usize, Region)| {
            let start = at;
            at += region.elements() * self.size(tensor);
            (tensor, region, start)
        };
        parts.into_iter().map(place).collect()
    }

    /// Reads a range of an address space and proves the chunks in it; what lies between them is read along.
    pub(super) async fn fetch(&self, object: u32, bytes: Range<u64>, chunks: &[ChunkId]) -> Result<Bytes, StoreError> {
        let manifest = match &self.source {
            Source::Boxes(manifest) => manifest,
            Source::Canonical(manifest, state) => {
                let size = self.size(0);
                let mut out = vec![0; (bytes.end - bytes.start) as usize];
                read_range(&self.store, manifest, state, bytes.start / size..bytes.end / size, &mut out).await?;
                return Ok(out.into());
            }
        };
        let path = &manifest.objects[object as usize].path;
        let read = self.store.get_range(path, bytes.clone()).await.map_err(|e| e.missing_is_corrupt("the manifest"))?;
        let expected = chunks.iter().map(|&id| {
            let range = self.bytes(id);
            let slice = read.slice((range.start - bytes.start) as usize..(range.end - bytes.start) as usize);
            (slice, Self::piece(manifest, id).hashes.0[id.index as usize])
        });
        let expected: Vec<_> = expected.collect();
        let wrong = tokio::task::spawn_blocking(move || {
            expected.par_iter().position_first(|(bytes, right)| BlockHash::of(bytes) != *right)
        });
        let wrong = wrong.await.map_err(|e| StoreError::unavailable(format!("verifying {path}"), e))?;
        let Some(&id) = wrong.and_then(|at| chunks.get(at)) else { return Ok(read) };
        let (piece, range) = (Self::piece(manifest, id), self.bytes(id));
        Err(StoreError::Corrupt(format!(
            "{path} is damaged: bytes {}..{} ({} of tensor {:?}) do not have their hash",
            range.start,
            range.end,
            piece.region,
            self.catalog.tensors()[piece.tensor as usize].name
        )))
    }
}

fn wrong_size() -> StoreError {
    StoreError::Bug("the buffer does not have the size of the range".into())
}

/// The type of a canonical state, by its name.
pub(super) fn element_type(name: &str) -> Result<ElementType, StoreError> {
    ElementType::from_name(name).ok_or_else(|| StoreError::Input(format!("no tensor can have the type {name}")))
}
