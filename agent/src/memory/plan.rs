//! Where the bytes of a shard lie among the shards of another generation. Pure.
//!
//! A slot holds `[param | exp_avg | exp_avg_sq]` of its rank's shard; a node's payload is its ranks' slots end to end.
//! Shards are runs of whole blocks whatever the world size, so every piece is whole blocks and can be verified by
//! itself.

use std::ops::Range;

use checkpoint_store::parity::Layout;
use checkpoint_store::{Dtype, Space};
use proto::ids::{Rank, WorldSize};

/// States of a slot.
pub(crate) const STATES: u64 = 3;

/// A run of one state's elements that lies together in the old shard and in the new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The rank whose shard it was.
    pub(crate) rank: u32,
    /// Which state: 0 to 2.
    pub(crate) state: u64,
    /// Which blocks of the space.
    pub(crate) blocks: Range<u64>,
    /// Where it lies in the old rank's slot, in bytes.
    pub(crate) from: Range<u64>,
    /// Where it goes in the new slot, in bytes.
    pub(crate) to: Range<u64>,
}

/// Bytes of a rank's slot.
pub(crate) fn slot_bytes(space: &Space, rank: u32, world: WorldSize) -> u64 {
    let shard = space.shard(Rank::new(rank), world);
    (shard.end - shard.start) * Dtype::F32.size() * STATES
}

/// Bytes of a node's payload.
pub(crate) fn payload_bytes(space: &Space, ranks: &[u32], world: WorldSize) -> u64 {
    ranks.iter().map(|rank| slot_bytes(space, *rank, world)).sum()
}

/// The layout of a parity group with these ranks on its nodes.
pub(crate) fn layout(space: &Space, members: &[Vec<u32>], world: WorldSize, parities: usize) -> Option<Layout> {
    let longest = members.iter().map(|ranks| payload_bytes(space, ranks, world)).max().unwrap_or(0);
    Layout::new(members.len(), parities, longest)
}

/// The pieces that make up the shard of `rank` of `world`, from the shards of a generation of `before` ranks.
pub(crate) fn pieces(space: &Space, before: WorldSize, rank: u32, world: WorldSize) -> Vec<Piece> {
    let size = Dtype::F32.size();
    let block = space.block_elements();
    let mine = space.shard(Rank::new(rank), world);
    let length = mine.end - mine.start;
    let mut out = vec![];
    for old in before.ranks() {
        let theirs = space.shard(old, before);
        let common = mine.start.max(theirs.start)..mine.end.min(theirs.end);
        if common.start >= common.end {
            continue;
        }
        for state in 0..STATES {
            let place = |first: u64, elements: u64, at: u64| (state * elements + at - first) * size;
            let from = |at| place(theirs.start, theirs.end - theirs.start, at);
            let to = |at| place(mine.start, length, at);
            out.push(Piece {
                rank: old.get(),
                state,
                blocks: common.start / block..common.end.div_ceil(block),
                from: from(common.start)..from(common.end),
                to: to(common.start)..to(common.end),
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use checkpoint_store::TensorDecl;
    use proptest::prelude::*;

    use super::*;

    fn space(elements: u64) -> Space {
        Space::new(vec![TensorDecl { name: "w".into(), shape: vec![elements], dtype: Dtype::F32 }]).unwrap()
    }

    proptest! {
        /// Copying all pieces from the old slots gives the new slot, every byte once.
        #[test]
        fn pieces_make_up_the_shard(blocks in 1u64..20, tail in 1u64..65536, before in 1u32..6, world in 1u32..6) {
            let space = space((blocks - 1) * 65536 + tail);
            let (before, world) = (WorldSize::new(before).unwrap(), WorldSize::new(world).unwrap());
            for rank in world.ranks() {
                let mut covered = vec![];
                for piece in pieces(&space, before, rank.get(), world) {
                    prop_assert_eq!(piece.from.end - piece.from.start, piece.to.end - piece.to.start);
                    prop_assert!(piece.from.end <= slot_bytes(&space, piece.rank, before));
                    // The same element of the same state on both sides.
                    let theirs = space.shard(Rank::new(piece.rank), before);
                    let mine = space.shard(rank, world);
                    let element = |at: u64, shard: Range<u64>| {
                        let length = shard.end - shard.start;
                        (at / 4 / length, shard.start + at / 4 % length)
                    };
                    prop_assert_eq!(element(piece.from.start, theirs), element(piece.to.start, mine.clone()));
                    prop_assert_eq!(element(piece.to.start, mine).1, piece.blocks.start * space.block_elements());
                    covered.push(piece.to);
                }
                covered.sort_by_key(|range| range.start);
                let mut end = 0;
                for range in covered {
                    prop_assert_eq!(range.start, end);
                    end = range.end;
                }
                prop_assert_eq!(end, slot_bytes(&space, rank.get(), world));
            }
        }
    }
}
