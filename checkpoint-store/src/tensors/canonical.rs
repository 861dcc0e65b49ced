//! From boxes to the digest: streams tensors through canonical blocks.
//!
//! Hashes of boxes depend on how the tensors were cut, so a checkpoint of boxes has no identity of its own. Read as
//! canonical states (which tensors of it are the model's parameters, which their moments) it has one: the digest that a
//! canonical save of the same numbers has.

use super::catalog::{Catalog, TensorInfo};
use super::source::{Reader, element_type};
use crate::digest::{Digest, HashList, StateDecl, hash_blocks, state_digest};
use crate::error::StoreError;
use crate::scalar::ScalarState;
use crate::space::Space;

/// Bytes that are read at once: whole blocks.
const WINDOW: u64 = 32 << 20;

/// Where a canonical state is found among the tensors of another framework.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CanonicalState {
    /// The state's name and type.
    pub decl: StateDecl,
    /// What stands before each parameter's name in the names of this state's tensors; often nothing for `param`.
    pub prefix: String,
}

/// Reads every tensor of the states through canonical blocks and returns the digest of the whole state. The tensors
/// must have the types of the states: nothing is converted. Memory: one window of 32 MiB and the hashes.
pub async fn canonicalize(
    reader: &Reader,
    space: &Space,
    scalar: &ScalarState,
    states: &[CanonicalState],
) -> Result<Digest, StoreError> {
    let mut hashes = vec![];
    for state in states {
        let (dtype, block) = (state.decl.dtype, space.block_elements());
        let of_boxes = element_type(dtype.name())?;
        let named =
            |t: &crate::TensorDecl| TensorInfo::new(format!("{}{}", state.prefix, t.name), of_boxes, t.shape.clone());
        let order = Catalog::new(space.tensors().iter().map(named).collect())?;
        let blocks = (WINDOW / (block * dtype.size())).max(1);
        let mut list = vec![];
        let mut at = 0;
        while at < space.blocks() {
            let range = space.blocks_to_elements(at..(at + blocks).min(space.blocks()));
            let mut bytes = vec![0; ((range.end - range.start) * dtype.size()) as usize];
            reader.read_flat(&order, range, &mut bytes).await?;
            let hashed = tokio::task::spawn_blocking(move || hash_blocks(&bytes, block, dtype)).await;
            list.extend(hashed.map_err(|e| StoreError::unavailable("hashing canonical blocks", e))?);
            at += blocks;
        }
        hashes.push(HashList(list));
    }
    let decls: Vec<_> = states.iter().map(|s| s.decl.clone()).collect();
    Ok(state_digest(scalar, space, &decls, &hashes))
}
