//! Verification of boxes: every object is read again, its header and every chunk.
//!
//! Unlike a load it also checks what no load reads: the objects' sizes and safetensors headers, which other tools rely
//! on.

use proto::ids::JobName;
use safetensors::tensor::Metadata;

use super::catalog::BoxPiece;
use super::commit::{TensorRef, open_tensors};
use super::load::{LoadOptions, LoadPlan};
use super::manifest::TensorManifest;
use super::object::{TENSORS_FORMAT, TensorObject, entry_name};
use super::source::Reader;
use crate::backend::Store;
use crate::error::{Kind, StoreError, check_format};
use crate::object::MAX_HEADER;

/// Re-reads a checkpoint of boxes and says what is wrong with which objects; empty if all is good. A damaged or missing
/// manifest is an error, as is a store that does not answer: it proves nothing.
pub async fn verify_tensors(
    store: &Store,
    job: &JobName,
    checkpoint: &TensorRef,
) -> Result<Vec<(String, String)>, StoreError> {
    let manifest = open_tensors(store, job, checkpoint).await?;
    let reader = Reader::of_boxes(store, manifest.clone());
    let mut problems = vec![];
    for object in &manifest.objects {
        let checked = match check_header(store, &manifest, object).await {
            Ok(()) => check_chunks(&reader, &manifest, object).await,
            Err(e) => Err(e),
        };
        match checked {
            Ok(()) => {}
            Err(e) if e.kind() == Kind::Corrupt => problems.push((object.path.clone(), e.to_string())),
            Err(e) => return Err(e),
        }
    }
    Ok(problems)
}

/// Proves every chunk of an object, one piece at a time; nothing is kept.
async fn check_chunks(reader: &Reader, manifest: &TensorManifest, object: &TensorObject) -> Result<(), StoreError> {
    for piece in &object.pieces {
        let tensor = manifest.tensors.tensors()[piece.tensor as usize].name.clone();
        let whole = BoxPiece { tensor, region: piece.region.clone() };
        LoadPlan::new(reader, &[vec![whole]], LoadOptions::default())?.prove(reader).await?;
    }
    Ok(())
}

/// Checks that an object's size and safetensors header say the same as the manifest.
async fn check_header(store: &Store, manifest: &TensorManifest, object: &TensorObject) -> Result<(), StoreError> {
    let path = &object.path;
    let corrupt = |why: String| StoreError::Corrupt(format!("{path}: {why}"));
    let size = store.head(path).await.map_err(|e| e.missing_is_corrupt("the manifest"))?;
    if size != object.bytes {
        return Err(corrupt(format!("it has {size} bytes, the manifest says {}", object.bytes)));
    }
    let length = store.get_range(path, 0..8).await?;
    let length = length.as_ref().try_into().map_or(u64::MAX, u64::from_le_bytes);
    let body = object.pieces.first().map_or(8, |piece| piece.at);
    if length > MAX_HEADER || length != body - 8 {
        return Err(corrupt(format!("its header says it has {length} bytes, it has {}", body - 8)));
    }
    let text = store.get_range(path, 8..body).await?;
    let header: Metadata =
        serde_json::from_slice(&text).map_err(|e| corrupt(format!("its safetensors header is not valid: {e}")))?;
    let format = header.metadata().as_ref().and_then(|m| m.get("cairn.format")).and_then(|f| f.parse().ok());
    check_format(path, format.ok_or_else(|| corrupt("its header names no format".into()))?, TENSORS_FORMAT)?;
    for piece in &object.pieces {
        let tensor = &manifest.tensors.tensors()[piece.tensor as usize];
        let name = entry_name(&tensor.name, &piece.region);
        let start = piece.at - body;
        let end = start + piece.region.elements() * tensor.dtype.size();
        let same = header.info(&name).is_some_and(|entry| {
            entry.data_offsets == (start as usize, end as usize)
                && entry.shape.iter().map(|&n| n as u64).eq(piece.region.lengths().iter().copied())
                && serde_json::to_value(entry.dtype).ok() == serde_json::to_value(tensor.dtype).ok()
        });
        if !same {
            return Err(corrupt(format!("its header lacks {name} or places it elsewhere than the manifest does")));
        }
    }
    match header.tensors().len() {
        n if n == object.pieces.len() => Ok(()),
        n => Err(corrupt(format!("its header has {n} entries, the manifest {}", object.pieces.len()))),
    }
}
