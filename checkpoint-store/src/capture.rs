//! A capture: what a worker tells its agent about a snapshot in a slot, so that the agent can upload it.
//!
//! A slot holds the rank's shard of every state, one state after the other in declared order, little-endian, with no
//! padding; it may be longer. The capture says what lies there and what each block's hash is. Worker and agent are two
//! processes: the agent checks the capture against the slot before it trusts either.

use bytes::Bytes;
use proto::ids::{Generation, JobName, Rank, WorldSize};
use serde::{Deserialize, Serialize};

use crate::digest::{HashList, StateDecl};
use crate::error::{StoreError, parse_json};
use crate::manifest::MAX_STATES;
use crate::object::{ShardSource, ShardState};
use crate::scalar::ScalarState;
use crate::space::Space;
use crate::timeline::Stage;

/// The version of a capture's JSON form.
pub const CAPTURE_FORMAT: u32 = 1;

/// A rank's snapshot in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capture {
    /// Version of this form; [`CAPTURE_FORMAT`].
    pub format: u32,
    /// The job.
    pub job: JobName,
    /// The generation it was captured in.
    pub generation: Generation,
    /// Whose shard it is.
    pub rank: Rank,
    /// Of how many.
    pub world_size: WorldSize,
    /// The space the shard is a part of.
    pub space: Space,
    /// The state outside the tensors.
    pub scalar: ScalarState,
    /// The states, in the order in which they lie in the slot.
    pub states: Vec<StateDecl>,
    /// For each state, the hashes of the shard's blocks in order.
    pub hashes: Vec<HashList>,
    /// Where the time went so far: `capture`, `hash`, and what else came before the upload.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
}

impl Capture {
    /// As JSON.
    pub fn to_json(&self) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(self).map_err(|e| StoreError::Bug(format!("a capture cannot be written as JSON: {e}")))
    }

    /// Reads a capture from JSON.
    pub fn from_json(bytes: &[u8]) -> Result<Self, StoreError> {
        parse_json("a capture", bytes, CAPTURE_FORMAT)
    }

    /// The shard in a slot, ready for [`crate::upload_shard`]. Keeps `slot` alive, without copying it, for as long as
    /// the source lives. Refuses a slot that is too short and hashes that are not one for each block.
    pub fn source(self, slot: impl AsRef<[u8]> + Send + 'static) -> Result<ShardSource, StoreError> {
        let blocks = self.space.shard_blocks(self.rank, self.world_size);
        let shard = self.space.shard(self.rank, self.world_size);
        let (elements, blocks) = (shard.end - shard.start, (blocks.end - blocks.start) as usize);
        let (states, lists) = (self.states.len(), self.hashes.len());
        if states > MAX_STATES || states != lists || self.hashes.iter().any(|list| list.0.len() != blocks) {
            let why = format!("a capture of {states} states of {blocks} blocks does not have that many hashes");
            return Err(StoreError::Corrupt(why));
        }
        let slot = Bytes::from_owner(slot);
        let (mut at, mut shards) = (0u64, Vec::with_capacity(states));
        for (decl, hashes) in self.states.into_iter().zip(self.hashes) {
            let end = at + elements * decl.dtype.size();
            if end > slot.len() as u64 {
                return Err(StoreError::Corrupt(format!(
                    "a slot of {} bytes is too short for its capture",
                    slot.len()
                )));
            }
            shards.push(ShardState { decl, bytes: slot.slice(at as usize..end as usize), hashes });
            at = end;
        }
        Ok(ShardSource {
            job: self.job,
            space: self.space,
            generation: self.generation,
            rank: self.rank,
            world_size: self.world_size,
            scalar: self.scalar,
            states: shards,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::hash_blocks;
    use crate::space::{Dtype, TensorDecl};

    #[test]
    fn a_capture_reads_back_and_checks_its_slot() {
        let decl = TensorDecl { name: "w".into(), shape: vec![100_000], dtype: Dtype::F32 };
        let space = Space::new(vec![decl]).expect("one tensor is a space");
        let slot = vec![1u8; 100_000 * 4 * 3];
        let hashes = HashList(hash_blocks(&slot[..400_000], space.block_elements(), Dtype::F32));
        let capture = Capture {
            format: CAPTURE_FORMAT,
            job: JobName::new("tiny").unwrap(),
            generation: Generation::new(1),
            rank: Rank::ZERO,
            world_size: WorldSize::ONE,
            space,
            scalar: ScalarState::start(1, 10),
            states: StateDecl::adamw(),
            hashes: vec![hashes; 3],
            stages: vec![],
        };
        let timed = Capture { stages: vec![Stage::new("hash", 0.1, 0.2, 1_200_000)], ..capture.clone() };
        assert_eq!(Capture::from_json(&timed.to_json().unwrap()).unwrap(), timed);
        assert_eq!(Capture::from_json(&capture.to_json().unwrap()).unwrap(), capture);
        assert!(capture.clone().source(slot[1..].to_vec()).is_err());
        assert_eq!(capture.clone().source(slot.clone()).unwrap().states.len(), 3);
        let fewer = Capture { hashes: vec![HashList(vec![]); 3], ..capture };
        assert!(fewer.source(slot).is_err());
    }
}
