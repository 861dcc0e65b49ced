//! Manifests of format 1: JSON, with hashes in hexadecimal, and no times.
//!
//! Still read, as every released format is; and written for people and for tools that would rather have JSON than the
//! binary form.

use bytes::Bytes;
use proto::ids::{Generation, JobName, Step, WorldSize};
use serde::{Deserialize, Serialize};

use super::{MANIFEST_FORMAT, MAX_MANIFEST, Manifest};
use crate::digest::{Digest, HashList, StateDecl};
use crate::error::{StoreError, parse_json};
use crate::object::ObjectEntry;
use crate::scalar::ScalarState;
use crate::space::Space;
use crate::timeline::Timeline;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct First {
    format: u32,
    job: JobName,
    step: Step,
    generation: Generation,
    world_size: WorldSize,
    scalar: ScalarState,
    space: Space,
    block_elements: u64,
    states: Vec<StateDecl>,
    objects: Vec<ObjectEntry>,
    hashes: Vec<HashList>,
    digest: Digest,
}

/// The same, borrowed, so that writing copies nothing.
#[derive(Serialize)]
struct FirstRef<'a> {
    format: u32,
    job: &'a JobName,
    step: Step,
    generation: Generation,
    world_size: WorldSize,
    scalar: &'a ScalarState,
    space: &'a Space,
    block_elements: u64,
    states: &'a [StateDecl],
    objects: &'a [ObjectEntry],
    hashes: &'a [HashList],
    digest: Digest,
}

/// Reads JSON; the claims are not checked yet.
pub(super) fn parse(path: &str, bytes: &[u8]) -> Result<Manifest, StoreError> {
    let first: First = parse_json(path, bytes, MANIFEST_FORMAT)?;
    if first.format != 1 {
        return Err(StoreError::Corrupt(format!("{path} is not valid: format {} is not JSON", first.format)));
    }
    Ok(Manifest {
        job: first.job,
        step: first.step,
        generation: first.generation,
        world_size: first.world_size,
        scalar: first.scalar,
        space: first.space,
        block_elements: first.block_elements,
        states: first.states,
        objects: first.objects,
        hashes: first.hashes,
        digest: first.digest,
        timeline: Timeline::default(),
        index: vec![],
    })
}

impl Manifest {
    /// The manifest as JSON of format 1, without its times.
    pub fn to_json(&self) -> Result<Bytes, StoreError> {
        let first = FirstRef {
            format: 1,
            job: &self.job,
            step: self.step,
            generation: self.generation,
            world_size: self.world_size,
            scalar: &self.scalar,
            space: &self.space,
            block_elements: self.block_elements,
            states: &self.states,
            objects: &self.objects,
            hashes: &self.hashes,
            digest: self.digest,
        };
        let bytes = serde_json::to_vec(&first).map_err(|e| StoreError::Bug(format!("manifest: {e}")))?;
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(StoreError::Bug(format!("the manifest would have {} bytes", bytes.len())));
        }
        Ok(bytes.into())
    }
}
