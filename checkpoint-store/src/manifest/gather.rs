//! From receipts to a manifest: the check that a set of shards is complete and of one state.

use proto::ids::{JobName, Rank, WorldSize};

use super::{MANIFEST_FORMAT, Manifest};
use crate::digest::{HashList, state_digest};
use crate::object::Receipt;
use crate::scalar::ScalarState;
use crate::space::Space;

/// Why receipts do not make a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// Not every rank is there exactly once.
    #[error("job {job}: receipts of {have} ranks, the generation has {world_size}; the first one missing is {missing}")]
    Incomplete {
        /// The job.
        job: JobName,
        /// Distinct receipts.
        have: usize,
        /// What there should be.
        world_size: WorldSize,
        /// The lowest rank without a receipt.
        missing: Rank,
    },
    /// A receipt is not of the same state as the first.
    #[error("rank {rank}: its receipt disagrees with rank {other}'s in {what}")]
    Disagree {
        /// Whose.
        rank: Rank,
        /// With whose.
        other: Rank,
        /// In what.
        what: &'static str,
    },
    /// A receipt contradicts the model or itself.
    #[error("rank {rank}: {why}")]
    Wrong {
        /// Whose.
        rank: Rank,
        /// What is wrong.
        why: String,
    },
    /// No receipts at all.
    #[error("a checkpoint needs at least one receipt")]
    Empty,
}

impl Manifest {
    /// Makes the manifest of a complete set of receipts of one generation and step. A receipt that was sent twice
    /// counts once; two different ones of a rank do not.
    pub fn assemble(space: &Space, scalar: ScalarState, mut receipts: Vec<Receipt>) -> Result<Self, AssembleError> {
        receipts.sort_by_key(|r| r.rank);
        receipts.dedup();
        let first = receipts.first().ok_or(AssembleError::Empty)?.clone();
        let world_size = first.world_size;
        let mut hashes = vec![HashList::default(); first.states.len()];
        let mut objects = Vec::with_capacity(receipts.len());
        for (rank, receipt) in (0u32..).map(Rank::new).zip(&receipts) {
            if receipt.rank != rank {
                return Err(incomplete(&first, receipts.len(), rank));
            }
            agree(&first, &scalar, receipt)?;
            fits(space, receipt)?;
            for (all, own) in hashes.iter_mut().zip(&receipt.hashes) {
                all.0.extend_from_slice(&own.0);
            }
            objects.extend(receipt.object.clone());
        }
        if receipts.len() != world_size.count() {
            return Err(incomplete(&first, receipts.len(), Rank::new(receipts.len() as u32)));
        }
        let digest = state_digest(&scalar, space, &first.states, &hashes);
        let mut manifest = Self {
            format: MANIFEST_FORMAT,
            job: first.job,
            step: scalar.step,
            generation: first.generation,
            world_size,
            scalar,
            space: space.clone(),
            block_elements: space.block_elements(),
            states: first.states,
            objects,
            hashes,
            digest,
            index: vec![],
        };
        manifest.check().map_err(|why| AssembleError::Wrong { rank: Rank::ZERO, why })?;
        Ok(manifest)
    }
}

fn incomplete(first: &Receipt, have: usize, missing: Rank) -> AssembleError {
    AssembleError::Incomplete { job: first.job.clone(), have, world_size: first.world_size, missing }
}

fn agree(first: &Receipt, scalar: &ScalarState, receipt: &Receipt) -> Result<(), AssembleError> {
    let what = match () {
        () if receipt.job != first.job => "the job",
        () if receipt.generation != first.generation => "the generation",
        () if receipt.world_size != first.world_size => "the world size",
        () if receipt.step() != scalar.step => "the step",
        () if receipt.scalar != *scalar => "the scalar state",
        () if receipt.states != first.states => "the states",
        () => return Ok(()),
    };
    Err(AssembleError::Disagree { rank: receipt.rank, other: first.rank, what })
}

/// A receipt must be of the rank's shard, hold a hash of each block, and an object with every state of the shard.
fn fits(space: &Space, receipt: &Receipt) -> Result<(), AssembleError> {
    let wrong = |why: String| Err(AssembleError::Wrong { rank: receipt.rank, why });
    let shard = space.shard(receipt.rank, receipt.world_size);
    if receipt.shard != (shard.start, shard.end) {
        let (first, end) = receipt.shard;
        return wrong(format!("its shard is {first}..{end}; of this model and world it is {shard:?}"));
    }
    let blocks = space.shard_blocks(receipt.rank, receipt.world_size).count();
    if receipt.hashes.len() != receipt.states.len() || receipt.hashes.iter().any(|h| h.0.len() != blocks) {
        return wrong(format!("its receipt does not have {blocks} hashes for each state"));
    }
    let whole = |e: &crate::object::Extent| e.first == shard.start && e.elements == shard.end - shard.start;
    match &receipt.object {
        None if blocks == 0 => Ok(()),
        None => wrong("its shard is not empty, but it stored no object".into()),
        Some(_) if blocks == 0 => wrong("its shard is empty, but it stored an object".into()),
        Some(object) => {
            let names = object.extents.iter().map(|e| &e.state).eq(receipt.states.iter().map(|s| &s.name));
            if names && object.extents.iter().all(whole) {
                return Ok(());
            }
            wrong(format!("{} does not hold its shard of every state", object.path))
        }
    }
}
