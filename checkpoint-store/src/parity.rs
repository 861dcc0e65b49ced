//! Reed–Solomon parity of the snapshots of a group of nodes: who holds what, and the sums.
//!
//! A node's *payload* is its ranks' slots end to end. Over a group of `n` nodes with `m` parities, payloads are taken
//! as padded with zeros to a common length and cut into `n − m` *parts*. There are `n` *stripes*: stripe `s` has its
//! parity on nodes `s … s+m−1` (mod n) and one part of each other node. So every node holds `m` parity shards of a
//! part's length, `m/(n−m)` of a snapshot, and any `m` nodes may be lost: each stripe keeps `n − m` of its `n` shards.
//! (The rotation is that of RAID 5; the code is that of the `reed-solomon-simd` crate, over GF(2^16).)
//!
//! The code works on columns of 64 bytes, so any range of such columns can be encoded or restored by itself, and memory
//! is bounded by the range, not by the payload.

use reed_solomon_simd::{ReedSolomonDecoder, ReedSolomonEncoder};

use crate::error::StoreError;

/// Ranges of a stripe begin and end at multiples of this, in bytes.
pub const COLUMN: u64 = 64;
/// Most nodes of a group.
pub const MAX_GROUP: usize = 8;

/// Who holds what in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    nodes: usize,
    parities: usize,
    part: u64,
}

/// A shard of a stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Shard {
    /// The part with this number, of the node that has its part of that number in this stripe.
    Data(usize),
    /// The parity shard of this row.
    Parity(usize),
}

impl Layout {
    /// The layout of a group of `nodes` nodes, the longest of whose payloads has `longest` bytes, with as many parities
    /// as asked for and possible. `None`: a node alone, or no parity is asked for.
    pub fn new(nodes: usize, parities: usize, longest: u64) -> Option<Self> {
        let parities = parities.min(nodes.saturating_sub(1));
        if parities == 0 || nodes > MAX_GROUP {
            return None;
        }
        let part = longest.div_ceil((nodes - parities) as u64).div_ceil(COLUMN).max(1).checked_mul(COLUMN)?;
        Some(Self { nodes, parities, part })
    }

    /// Bytes of a part, and of a parity shard: a multiple of [`COLUMN`].
    pub fn part(&self) -> u64 {
        self.part
    }

    /// Parts of a payload.
    pub fn parts(&self) -> usize {
        self.nodes - self.parities
    }

    /// Nodes that may be lost.
    pub fn parities(&self) -> usize {
        self.parities
    }

    /// Nodes, and so stripes.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// Bytes of parity that each node holds.
    pub fn parity_bytes(&self) -> u64 {
        self.part * self.parities as u64
    }

    /// The stripe that a node's part belongs to.
    pub fn stripe_of(&self, node: usize, part: usize) -> usize {
        (node + 2 * self.nodes - part - self.parities) % self.nodes
    }

    /// What a node holds of a stripe.
    pub fn shard_on(&self, node: usize, stripe: usize) -> Shard {
        let distance = (node + self.nodes - stripe) % self.nodes;
        match distance.checked_sub(self.parities) {
            Some(part) => Shard::Data(part),
            None => Shard::Parity(distance),
        }
    }

    /// The node that holds a shard of a stripe.
    pub fn holder(&self, stripe: usize, shard: Shard) -> usize {
        let distance = match shard {
            Shard::Data(part) => part + self.parities,
            Shard::Parity(row) => row,
        };
        (stripe + distance) % self.nodes
    }

    /// The stripes whose parity a node holds, in the order of their rows.
    pub fn parity_stripes(&self, node: usize) -> impl Iterator<Item = usize> {
        let nodes = self.nodes;
        (0..self.parities).map(move |row| (node + nodes - row) % nodes)
    }

    /// Whether every byte of every payload can be had, if `has` says which nodes hold their payload and which their
    /// parity.
    pub fn recoverable(&self, has: &[(bool, bool)]) -> bool {
        let lost = |node: usize| !has.get(node).is_some_and(|has| has.0);
        let have = |stripe: usize| {
            let on = |node: usize| match (self.shard_on(node, stripe), has.get(node)) {
                (Shard::Data(_), Some((payload, _))) => *payload,
                (Shard::Parity(_), Some((_, parity))) => *parity,
                (_, None) => false,
            };
            (0..self.nodes).filter(|node| on(*node)).count()
        };
        let needed = |stripe: usize| {
            (0..self.nodes).any(|node| lost(node) && matches!(self.shard_on(node, stripe), Shard::Data(_)))
        };
        (0..self.nodes).all(|stripe| !needed(stripe) || have(stripe) >= self.parts())
    }

    /// Writes the parity of `row` for a range of a stripe's columns. `parts` holds that range of every data shard, in
    /// order; all have the length of `out`, a multiple of [`COLUMN`].
    pub fn encode(&self, row: usize, parts: &[&[u8]], out: &mut [u8]) -> Result<(), StoreError> {
        self.check_columns(out.len())?;
        let bug = |error: reed_solomon_simd::Error| StoreError::Bug(format!("parity: {error}"));
        if parts.len() != self.parts() || row >= self.parities {
            let why = format!("parity row {row} of {} parts, in a layout of {self:?}", parts.len());
            return Err(StoreError::Bug(why));
        }
        let mut encoder = ReedSolomonEncoder::new(self.parts(), self.parities, out.len()).map_err(bug)?;
        for part in parts {
            encoder.add_original_shard(part).map_err(bug)?;
        }
        let result = encoder.encode().map_err(bug)?;
        let parity = result.recovery(row).ok_or_else(|| StoreError::Bug("the parity row is missing".into()))?;
        out.copy_from_slice(parity);
        Ok(())
    }

    /// Restores a data shard for a range of a stripe's columns from any [`Layout::parts`] other shards of that range.
    pub fn restore(&self, part: usize, have: &[(Shard, &[u8])], out: &mut [u8]) -> Result<(), StoreError> {
        self.check_columns(out.len())?;
        let bug = |error: reed_solomon_simd::Error| StoreError::Bug(format!("parity: {error}"));
        let mut decoder = ReedSolomonDecoder::new(self.parts(), self.parities, out.len()).map_err(bug)?;
        for (shard, bytes) in have {
            match shard {
                Shard::Data(index) => decoder.add_original_shard(*index, bytes).map_err(bug)?,
                Shard::Parity(row) => decoder.add_recovery_shard(*row, bytes).map_err(bug)?,
            }
        }
        let result = decoder.decode().map_err(bug)?;
        let restored = result.restored_original(part);
        let restored = restored.ok_or_else(|| StoreError::Bug(format!("part {part} was not lost")))?;
        out.copy_from_slice(restored);
        Ok(())
    }

    fn check_columns(&self, bytes: usize) -> Result<(), StoreError> {
        let bytes = bytes as u64;
        if bytes > 0 && bytes.is_multiple_of(COLUMN) && bytes <= self.part {
            return Ok(());
        }
        Err(StoreError::Bug(format!("{bytes} bytes are no columns of a part of {} bytes", self.part)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn payloads(n: usize, longest: usize) -> Vec<Vec<u8>> {
        let byte = |node: usize, i: usize| (i as u8).wrapping_mul(31).wrapping_add(node as u8 * 7) ^ (i >> 8) as u8;
        (0..n).map(|node| (0..longest.saturating_sub(node * 5)).map(|i| byte(node, i)).collect()).collect()
    }

    /// A range of a node's part, padded.
    fn slice(layout: &Layout, payload: &[u8], part: usize, range: std::ops::Range<u64>) -> Vec<u8> {
        let start = part as u64 * layout.part();
        (start + range.start..start + range.end).map(|i| payload.get(i as usize).copied().unwrap_or(0)).collect()
    }

    fn parity(
        layout: &Layout,
        payloads: &[Vec<u8>],
        stripe: usize,
        row: usize,
        range: std::ops::Range<u64>,
    ) -> Vec<u8> {
        let parts: Vec<_> = (0..layout.parts())
            .map(|part| slice(layout, &payloads[layout.holder(stripe, Shard::Data(part))], part, range.clone()))
            .collect();
        let mut out = vec![0; (range.end - range.start) as usize];
        layout.encode(row, &parts.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut out).unwrap();
        out
    }

    #[test]
    fn the_layout_is_a_rotation_in_which_every_node_has_its_share() {
        for n in 2..=MAX_GROUP {
            for m in 1..n {
                let layout = Layout::new(n, m, 1_000_000).unwrap();
                assert!(layout.part() * layout.parts() as u64 >= 1_000_000);
                for node in 0..n {
                    assert_eq!(layout.parity_stripes(node).count(), m);
                    for (row, stripe) in layout.parity_stripes(node).enumerate() {
                        assert_eq!(layout.shard_on(node, stripe), Shard::Parity(row));
                        assert_eq!(layout.holder(stripe, Shard::Parity(row)), node);
                    }
                    for part in 0..layout.parts() {
                        let stripe = layout.stripe_of(node, part);
                        assert_eq!(layout.shard_on(node, stripe), Shard::Data(part));
                        assert_eq!(layout.holder(stripe, Shard::Data(part)), node);
                    }
                }
            }
        }
        assert_eq!(Layout::new(1, 1, 10), None);
        assert_eq!(Layout::new(3, 0, 10), None);
        assert_eq!(Layout::new(3, 9, 10).unwrap().parities(), 2);
        assert_eq!(Layout::new(3, 1, u64::MAX).map(|layout| layout.parts()), Some(2));
    }

    #[test]
    fn columns_can_be_worked_on_apart() {
        let layout = Layout::new(4, 2, 1000).unwrap();
        let payloads = payloads(4, 1000);
        for stripe in 0..4 {
            let whole = parity(&layout, &payloads, stripe, 1, 0..layout.part());
            for at in (0..layout.part()).step_by(COLUMN as usize) {
                let part = parity(&layout, &payloads, stripe, 1, at..at + COLUMN);
                assert_eq!(part, whole[at as usize..(at + COLUMN) as usize]);
            }
        }
        let mut out = [0; 63];
        assert!(layout.encode(0, &[&[0; 63], &[0; 63]], &mut out).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

        /// Whichever nodes are lost, as many as there are parities: every part of theirs comes back.
        #[test]
        fn any_m_nodes_may_be_lost(n in 2usize..=8, m in 1usize..4, longest in 1usize..3000, mask in any::<u8>()) {
            let layout = Layout::new(n, m, longest as u64).unwrap();
            let lost: Vec<usize> = (0..n).filter(|node| mask & (1 << node) != 0).take(layout.parities()).collect();
            let payloads = payloads(n, longest);
            let has: Vec<_> = (0..n).map(|node| (!lost.contains(&node), !lost.contains(&node))).collect();
            prop_assert!(layout.recoverable(&has));
            for node in &lost {
                for part in 0..layout.parts() {
                    let stripe = layout.stripe_of(*node, part);
                    let range = 0..layout.part();
                    let mut have: Vec<(Shard, Vec<u8>)> = vec![];
                    for other in (0..n).filter(|other| !lost.contains(other)) {
                        let shard = layout.shard_on(other, stripe);
                        have.push((shard, match shard {
                            Shard::Data(part) => slice(&layout, &payloads[other], part, range.clone()),
                            Shard::Parity(row) => parity(&layout, &payloads, stripe, row, range.clone()),
                        }));
                    }
                    have.truncate(layout.parts());
                    let have: Vec<_> = have.iter().map(|(shard, bytes)| (*shard, bytes.as_slice())).collect();
                    let mut out = vec![0; layout.part() as usize];
                    layout.restore(part, &have, &mut out).unwrap();
                    prop_assert_eq!(out, slice(&layout, &payloads[*node], part, range));
                }
            }
        }

        /// `recoverable` says exactly that each needed stripe has enough shards.
        #[test]
        fn recoverable_is_what_can_be_restored(n in 2usize..=6, m in 1usize..3, bits in any::<u16>()) {
            let layout = Layout::new(n, m, 1000).unwrap();
            let has: Vec<_> = (0..n).map(|node| (bits & (1 << node) != 0, bits & (1 << (8 + node)) != 0)).collect();
            let mut can = true;
            for node in (0..n).filter(|node| !has[*node].0) {
                for part in 0..layout.parts() {
                    let stripe = layout.stripe_of(node, part);
                    let shards = (0..n).filter(|other| match layout.shard_on(*other, stripe) {
                        Shard::Data(_) => has[*other].0,
                        Shard::Parity(_) => has[*other].1,
                    });
                    can &= shards.count() >= layout.parts();
                }
            }
            prop_assert_eq!(layout.recoverable(&has), can);
        }
    }
}
