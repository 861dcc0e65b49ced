//! A receipt: what a rank tells the coordinator when its part of a checkpoint is stored.
//!
//! It names the object that was written and, where blocks had not changed, the older objects that hold them already. It
//! comes over the wire, so reading one bounds every length; whether a set of receipts makes a checkpoint is judged when
//! the manifest is assembled. Format 2 is binary (`codec`); format 1, JSON, is still read.

use std::io::{Read, Write};

use proto::ids::{Generation, JobName, Rank, Step, WorldSize};
use serde::Deserialize;

use crate::codec::{self, HEAD, Reader, Writer, Wrong};
use crate::digest::{HashList, StateDecl};
use crate::error::{StoreError, parse_json};
use crate::fields;
use crate::manifest::MAX_STATES;
use crate::object::ObjectEntry;
use crate::scalar::ScalarState;
use crate::space::MAX_BLOCKS;
use crate::timeline::{MAX_STAGES, Stage, check_stages, read_stage, write_stage};

/// The version of receipts this build writes, and the newest it reads.
pub const RECEIPT_FORMAT: u32 = 2;
/// A receipt larger than this is refused.
pub const MAX_RECEIPT: usize = 64 << 20;
/// Most older objects of one receipt.
pub(crate) const MAX_REFERENCES: usize = 1 << 16;
/// Most extents of one receipt.
const MAX_EXTENTS: usize = 1 << 19;

const MARK: [u8; 8] = *b"cairn/r\n";

/// What one rank has stored of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
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
    /// What was stored; `None` for a rank that owns no blocks, or none that changed.
    pub object: Option<ObjectEntry>,
    /// The older objects that hold unchanged blocks, each with the extents that are used.
    pub references: Vec<ObjectEntry>,
    /// Where the time of the save went.
    pub stages: Vec<Stage>,
}

impl Receipt {
    /// The step of the state.
    pub fn step(&self) -> Step {
        self.scalar.step
    }

    /// All objects that hold the shard: the new one, then the older ones.
    pub fn objects(&self) -> impl Iterator<Item = &ObjectEntry> {
        self.object.iter().chain(&self.references)
    }

    /// The receipt as it is sent.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StoreError> {
        let hashes: usize = self.hashes.iter().map(|list| list.0.len() * 32).sum();
        let mut out = Vec::with_capacity(HEAD + 512 + hashes);
        out.extend_from_slice(&codec::head(MARK, RECEIPT_FORMAT));
        let written = self.write(&mut Writer(&mut out));
        written.map_err(|e| StoreError::Bug(format!("receipt of rank {}: {e}", self.rank)))?;
        if out.len() > MAX_RECEIPT {
            return Err(StoreError::Bug(format!("the receipt of rank {} would have {} bytes", self.rank, out.len())));
        }
        Ok(out)
    }

    /// Reads a receipt from the wire.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StoreError> {
        if bytes.len() > MAX_RECEIPT {
            return Err(StoreError::Input(format!("a receipt of {} bytes is too large", bytes.len())));
        }
        if bytes.first() == Some(&b'{') {
            return first::parse(bytes);
        }
        let body = codec::body("receipt", bytes, MARK, 2, RECEIPT_FORMAT)?;
        let mut from = Reader::new(body, MAX_RECEIPT as u64);
        let receipt = Self::read(&mut from).and_then(|receipt| from.end().map(|()| receipt));
        receipt.map_err(|why| StoreError::Corrupt(format!("receipt is not valid: {why}")))
    }

    fn write<W: Write>(&self, out: &mut Writer<W>) -> std::io::Result<()> {
        out.text(self.job.as_str())?;
        out.number(self.generation.get())?;
        out.number(u64::from(self.rank.get()))?;
        out.number(u64::from(self.world_size.get()))?;
        out.number(self.shard.0)?;
        out.number(self.shard.1)?;
        fields::write_scalar(out, &self.scalar)?;
        fields::write_states(out, &self.states)?;
        out.length(self.stages.len())?;
        self.stages.iter().try_for_each(|stage| write_stage(out, stage))?;
        out.length(usize::from(self.object.is_some()))?;
        out.length(self.references.len())?;
        self.objects().try_for_each(|object| fields::write_object(out, &self.job, &self.states, object))?;
        out.length(self.hashes.len())?;
        for list in &self.hashes {
            out.length(list.0.len())?;
            out.hashes(&list.0)?;
        }
        Ok(())
    }

    fn read<R: Read>(from: &mut Reader<R>) -> Result<Self, Wrong> {
        let job = fields::read_job(from)?;
        let generation = Generation::new(from.number()?);
        let rank = Rank::new(from.up_to("as its rank", u64::from(u32::MAX))? as u32);
        let world_size = fields::read_world_size(from)?;
        let shard = (from.number()?, from.number()?);
        let scalar = fields::read_scalar(from)?;
        let states = fields::read_states(from)?;
        let mut stages = vec![];
        for _ in 0..from.length("stages", MAX_STAGES)? {
            stages.push(read_stage(from)?);
        }
        let (new, old) = (from.length("new objects", 1)?, from.length("references", MAX_REFERENCES)?);
        let (mut references, mut extents) = (vec![], MAX_EXTENTS);
        for _ in 0..new + old {
            references.push(fields::read_object(from, &job, &states, &mut extents)?);
        }
        let object = (new == 1).then(|| references.remove(0));
        let mut hashes = vec![];
        for _ in 0..from.length("lists of hashes", MAX_STATES)? {
            let count = from.length("hashes of a state", MAX_BLOCKS as usize)?;
            hashes.push(HashList(from.hashes(count)?));
        }
        let receipt =
            Self { job, generation, rank, world_size, shard, scalar, states, hashes, object, references, stages };
        check_stages(&receipt.stages).map(|()| receipt)
    }
}

/// Receipts of format 1: JSON, one object a rank, no times.
mod first {
    use super::{Deserialize, Generation, HashList, JobName, ObjectEntry, Rank, Receipt, ScalarState, StateDecl};
    use super::{RECEIPT_FORMAT, StoreError, WorldSize, parse_json};

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct First {
        format: u32,
        job: JobName,
        generation: Generation,
        rank: Rank,
        world_size: WorldSize,
        shard: (u64, u64),
        scalar: ScalarState,
        states: Vec<StateDecl>,
        hashes: Vec<HashList>,
        object: Option<ObjectEntry>,
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Receipt, StoreError> {
        let first: First = parse_json("receipt", bytes, RECEIPT_FORMAT)?;
        if first.format != 1 {
            return Err(StoreError::Corrupt(format!("receipt is not valid: format {} is not JSON", first.format)));
        }
        let First { format: _, job, generation, rank, world_size, shard, scalar, states, hashes, object } = first;
        let (references, stages) = (vec![], vec![]);
        Ok(Receipt { job, generation, rank, world_size, shard, scalar, states, hashes, object, references, stages })
    }
}
