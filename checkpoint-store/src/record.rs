//! The records of a job's chain: what can happen to a job, one kind each.
//!
//! A record is immutable JSON. It carries the epoch and generation of its author, so that a reader can see who was
//! entitled to write it, and a token, so that the author can tell its own record after an unclear answer. Every 256th
//! record also holds the history folded from all before it.

use std::collections::BTreeMap;

use proto::ids::{Epoch, Generation, NodeName, Rank, Step, WorkerId, WorldSize};
use proto::incident::Incident;
use serde::{Deserialize, Serialize};

use crate::digest::{BlockHash, Digest};
use crate::error::{StoreError, parse_json};
use crate::history::History;

/// The version of records this build writes, and the newest it reads. Format 2 added pins, proofs, leases and metrics:
/// a build that does not know them would delete what they keep, so it must refuse the chain. Format 3 added jobs that
/// give their slots up, which a build that does not know them would take for running, and incidents.
pub const RECORD_FORMAT: u32 = 3;
/// A record larger than this is refused unread.
pub const MAX_RECORD: u64 = 8 << 20;
/// Every record whose number is a multiple of this holds the folded history.
pub const FOLD_EVERY: u64 = 256;

/// A checkpoint as the chain names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRef {
    /// The step whose state it holds.
    pub step: Step,
    /// The generation that saved it.
    pub generation: Generation,
    /// The manifest's file name under the job's `checkpoints/`.
    pub manifest: String,
    /// The BLAKE3 hash of the manifest's bytes.
    pub hash: BlockHash,
    /// The digest of the state.
    pub digest: Digest,
    /// Bytes of all its objects.
    pub bytes: u64,
}

/// One worker of a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The node it runs on.
    pub node: NodeName,
    /// The process.
    pub worker: WorkerId,
    /// Its place.
    pub rank: Rank,
}

/// A step that the nodes of a generation hold in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPoint {
    /// The generation that captured it.
    pub generation: Generation,
    /// The step.
    pub step: Step,
}

/// What happened to a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// The job was submitted; always the first record.
    Submitted {
        /// The hash of the specification's bytes.
        spec_hash: BlockHash,
        /// Stop, paused, after this step.
        stop_at: Option<Step>,
    },
    /// A coordinator took the job over.
    Led {
        /// Its epoch.
        epoch: Epoch,
        /// Who it is, for people: address and host.
        leader: String,
    },
    /// A membership was formed, and its start decided.
    Generation {
        /// Its number, higher than any before.
        generation: Generation,
        /// The number of workers.
        world_size: WorldSize,
        /// All of them.
        members: Vec<Member>,
        /// The newest checkpoint, which it starts from unless `memory` is given; `None` for the initial state.
        start: Option<CheckpointRef>,
        /// The step in the nodes' memory it starts from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory: Option<MemoryPoint>,
        /// The numeric identity its workers share.
        identity: String,
        /// The fingerprint of the data.
        fingerprint: String,
    },
    /// A checkpoint exists from here on.
    Committed(CheckpointRef),
    /// A checkpoint of another framework's boxes exists from here on.
    CommittedTensors(crate::tensors::TensorRef),
    /// A checkpoint failed verification and is never resumed from.
    Quarantined {
        /// Its manifest's file name.
        manifest: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A checkpoint is gone; its bytes may be deleted from here on.
    Deleted {
        /// Its manifest's file name.
        manifest: String,
    },
    /// A checkpoint stays until it is unpinned.
    Pinned {
        /// Its manifest's file name.
        manifest: String,
        /// Why, for people; may be empty.
        reason: String,
    },
    /// A checkpoint is again under the rules of retention.
    Unpinned {
        /// Its manifest's file name.
        manifest: String,
    },
    /// A checkpoint was read again and nothing was wrong with what was read.
    Verified {
        /// Its manifest's file name.
        manifest: String,
        /// How many of its blocks were read and had their hashes.
        blocks: u64,
        /// How many it has.
        of: u64,
        /// Who read them, for people.
        by: String,
    },
    /// A reader needs a checkpoint: it is not deleted before the lease is released.
    Leased {
        /// Its manifest's file name.
        manifest: String,
        /// The lease's name, drawn by the reader.
        lease: String,
        /// Who reads, for people.
        holder: String,
        /// A leader that hears no renewal for this long, by its own monotonic clock, releases the lease.
        seconds: u32,
    },
    /// A lease is over.
    Released {
        /// The lease's name.
        lease: String,
        /// Why, for people.
        reason: String,
    },
    /// What was measured of a checkpoint's state, such as `validation_loss`.
    Measured {
        /// Its manifest's file name.
        manifest: String,
        /// Finite numbers by name; a later one replaces an earlier one of its name.
        metrics: BTreeMap<String, f64>,
    },
    /// The job stopped, to be resumed.
    Paused {
        /// At this step.
        step: Step,
    },
    /// The job is to go on from its newest good checkpoint.
    Resumed {
        /// The specification it goes on with.
        spec_hash: BlockHash,
        /// Stop, paused, after this step.
        stop_at: Option<Step>,
    },
    /// The job stopped after a checkpoint and gave its slots up; it goes on by itself when there is room.
    Yielded {
        /// After this step.
        step: Step,
        /// For what.
        reason: String,
    },
    /// Something that broke a generation off is over, and what it cost.
    Incident(Box<Incident>),
    /// The number of workers was changed by hand.
    Scaled {
        /// The new number.
        workers: u32,
    },
    /// Training reached its last step.
    Finished {
        /// That step.
        step: Step,
        /// The digest of the final state.
        digest: Digest,
        /// The last training loss, if it is finite.
        loss: Option<f64>,
    },
    /// The job was given up.
    Failed {
        /// Why.
        reason: String,
        /// The exit code that says so.
        code: u8,
    },
    /// The job was cancelled by hand.
    Cancelled,
    /// The job starts anew; no older checkpoint is resumed from.
    Restarted {
        /// The specification it starts with.
        spec_hash: BlockHash,
        /// Stop, paused, after this step.
        stop_at: Option<Step>,
    },
}

/// One link of a chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_FORMAT`].
    pub format: u32,
    /// Its place in the chain, from 0; set by the chain.
    pub number: u64,
    /// The author's leader epoch.
    pub epoch: Epoch,
    /// The job's generation.
    pub generation: Generation,
    /// A token of the author's; set by the chain.
    pub author: String,
    /// What happened.
    pub event: Event,
    /// The history before this record, in every [`FOLD_EVERY`]th; set by the chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folded: Option<Box<History>>,
}

impl Record {
    /// A record to append: by whom, and what.
    pub fn new(epoch: Epoch, generation: Generation, event: Event) -> Self {
        Self { format: RECORD_FORMAT, number: 0, epoch, generation, author: String::new(), event, folded: None }
    }

    /// Reads a record; `path` is for messages, and `number` what its name says.
    pub fn parse(path: &str, number: u64, bytes: &[u8]) -> Result<Self, StoreError> {
        let record: Self = parse_json(path, bytes, RECORD_FORMAT)?;
        if record.number != number {
            let found = record.number;
            return Err(StoreError::Corrupt(format!("{path} says it is record {found}, its name says {number}")));
        }
        let folded = record.folded.as_ref().map(|h| h.records);
        if folded.is_some_and(|n| n != number) {
            return Err(StoreError::Corrupt(format!("{path} holds a folded history of another length")));
        }
        Ok(record)
    }
}
