//! From receipts to a manifest: the check that a set of shards is complete and of one state.

use std::collections::BTreeMap;

use proto::ids::{JobName, Rank, WorldSize};

use super::Manifest;
use crate::digest::{HashList, StateDecl, state_digest};
use crate::object::{Extent, ObjectEntry};
use crate::receipt::Receipt;
use crate::scalar::ScalarState;
use crate::space::Space;
use crate::timeline::{Timeline, check_stages};

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
        let blocks = space.blocks() as usize;
        for list in &mut hashes {
            list.0.reserve_exact(blocks);
        }
        let mut objects = Vec::with_capacity(receipts.len());
        let mut timeline = Timeline::default();
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
            timeline.add(rank, &receipt.stages);
        }
        let references = receipts.iter().map(|receipt| (receipt.rank, receipt.references.as_slice()));
        objects.extend(merge(&first.states, references)?);
        if receipts.len() != world_size.count() {
            return Err(incomplete(&first, receipts.len(), Rank::new(receipts.len() as u32)));
        }
        let digest = state_digest(&scalar, space, &first.states, &hashes);
        let mut manifest = Self {
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
            timeline,
            index: vec![],
        };
        manifest.check_structure().map_err(|why| AssembleError::Wrong { rank: Rank::ZERO, why })?;
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
    check_stages(&receipt.stages).map_err(|why| AssembleError::Wrong { rank: receipt.rank, why })?;
    if blocks == 0 {
        return match receipt.objects().next() {
            None => Ok(()),
            Some(_) => wrong("its shard is empty, but it stored an object".into()),
        };
    }
    if receipt.objects().next().is_none() {
        return wrong("its shard is not empty, but it stored no object".into());
    }
    for state in &receipt.states {
        let extents = receipt.objects().flat_map(|object| &object.extents).filter(|e| e.state == state.name);
        let mut extents: Vec<&Extent> = extents.collect();
        extents.sort_unstable_by_key(|e| e.first);
        let mut next = shard.start;
        let follow = |e: &&Extent| std::mem::replace(&mut next, e.first.saturating_add(e.elements)) == e.first;
        if !extents.iter().all(follow) || next != shard.end {
            let path = receipt.objects().next().map_or("", |object| &object.path);
            return wrong(format!("{path} does not hold its shard of every state, not even with older objects"));
        }
    }
    Ok(())
}

/// Puts the references of all ranks together: an older object that several ranks use is named once, and extents that
/// follow one another are one.
fn merge<'a>(
    states: &[StateDecl],
    references: impl Iterator<Item = (Rank, &'a [ObjectEntry])>,
) -> Result<Vec<ObjectEntry>, AssembleError> {
    let mut merged: BTreeMap<&str, ObjectEntry> = BTreeMap::new();
    for (rank, objects) in references {
        for object in objects {
            let new = || ObjectEntry { extents: vec![], ..object.clone() };
            let entry = merged.entry(object.path.as_str()).or_insert_with(new);
            if entry.bytes != object.bytes {
                let (path, bytes, other) = (&object.path, object.bytes, entry.bytes);
                let why = format!("it says {path} has {bytes} bytes; another rank says {other}");
                return Err(AssembleError::Wrong { rank, why });
            }
            entry.extents.extend(object.extents.iter().cloned());
        }
    }
    let size = |name: &str| states.iter().find(|s| s.name == name).map_or(0, |s| s.dtype.size());
    let mut merged: Vec<ObjectEntry> = merged.into_values().collect();
    for object in &mut merged {
        object.extents.sort_unstable_by_key(|e| e.offset);
        object.extents.dedup_by(|e, before| {
            let bytes = before.elements.saturating_mul(size(&before.state));
            let follows = before.state == e.state
                && before.first.checked_add(before.elements) == Some(e.first)
                && before.offset.checked_add(bytes) == Some(e.offset);
            if follows {
                before.elements = before.elements.saturating_add(e.elements);
            }
            follows
        });
    }
    Ok(merged)
}
