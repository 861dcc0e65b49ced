//! Deduplication: what older objects of a job hold already, and what a new one therefore need not.
//!
//! A block whose hash has not changed lies in an object of an earlier checkpoint; a new checkpoint refers to it there.
//! Two rules keep loads and storage from paying for it later:
//!
//! * **A reference is worth a read.** A run of unchanged blocks shorter than [`MIN_RUN`] is written again, unless it
//!   is the whole shard of a state. A range request costs about as much as a few megabytes, and a load reads 8 MiB at
//!   once: so no load needs more than a small multiple of the requests it needs without deduplication.
//! * **An object is worth its space.** An object of which this shard would use less than a quarter is given up: its
//!   blocks are written again, and retention can remove it. So a checkpoint keeps at most four times its size alive.
//!
//! What is known comes from receipts that were committed. It may be out of date: the committer refuses a checkpoint
//! that refers to an object which is on its way out ([`crate::references`]); after a refusal nothing is known any more.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use proto::ids::{Generation, Step};

use crate::digest::{BlockHash, HashList, StateDecl};
use crate::object::{Extent, ObjectEntry, Run};
use crate::receipt::{MAX_REFERENCES, Receipt};
use crate::space::Space;

/// The shortest run of unchanged blocks that is referred to, in bytes.
pub const MIN_RUN: u64 = 4 << 20;
/// The smallest part of an object that must be in use, as its divisor.
const MIN_USE: u64 = 4;
/// Blocks remembered unless told otherwise: 16 MiB of memory, and a quarter of a terabyte of state at large blocks.
pub const MOST_BLOCKS: usize = 1 << 17;

/// An object that holds blocks.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    path: String,
    bytes: u64,
}

/// Where one block lies.
#[derive(Debug, Clone)]
struct Known {
    hash: BlockHash,
    source: Arc<Source>,
    offset: u64,
    /// The save it is known from.
    from: (Generation, Step),
}

/// What committed checkpoints of one job hold, by state and block.
#[derive(Debug, Clone)]
pub struct KnownBlocks {
    most: usize,
    min_run: u64,
    states: Vec<(StateDecl, BTreeMap<u64, Known>)>,
}

impl Default for KnownBlocks {
    fn default() -> Self {
        Self::new(MOST_BLOCKS)
    }
}

impl KnownBlocks {
    /// Knows nothing yet, and never more than `most` blocks.
    pub fn new(most: usize) -> Self {
        Self { most, min_run: MIN_RUN, states: vec![] }
    }

    /// Refers to runs of at least this many bytes, instead of [`MIN_RUN`].
    #[must_use]
    pub fn with_min_run(self, bytes: u64) -> Self {
        Self { min_run: bytes, ..self }
    }

    /// How many blocks are known.
    pub fn len(&self) -> usize {
        self.states.iter().map(|(_, blocks)| blocks.len()).sum()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets everything: after a refusal, and when the job starts anew.
    pub fn forget(&mut self) {
        self.states.clear();
    }

    /// Learns from the receipt of a rank whose checkpoint was committed. What a later save has told stays. With no room
    /// left, blocks known from other saves go first.
    pub fn learn(&mut self, space: &Space, receipt: &Receipt) {
        let (block, from) = (space.block_elements(), (receipt.generation, receipt.step()));
        let own = receipt.hashes.iter().map(|list| list.0.len()).sum::<usize>();
        if self.len().saturating_add(own) > self.most {
            for (_, blocks) in &mut self.states {
                blocks.retain(|_, known| known.from >= from);
            }
        }
        let mut room = self.most.saturating_sub(self.len());
        for object in receipt.objects() {
            let source = Arc::new(Source { path: object.path.clone(), bytes: object.bytes });
            for extent in &object.extents {
                let Some(index) = receipt.states.iter().position(|s| s.name == extent.state) else { continue };
                let (decl, first) = (&receipt.states[index], extent.first / block);
                let blocks = self.blocks_of(decl);
                let count = extent.elements.min(space.elements()).div_ceil(block);
                for number in first..first.saturating_add(count) {
                    let in_shard = number.checked_sub(receipt.shard.0 / block);
                    let hashes = receipt.hashes.get(index).map_or(&[][..], |list| &list.0);
                    let Some(hash) = in_shard.and_then(|at| hashes.get(at as usize)) else { continue };
                    let old = blocks.get(&number);
                    if old.is_some_and(|old| old.from > from) || (old.is_none() && room == 0) {
                        continue;
                    }
                    room -= usize::from(old.is_none());
                    let offset = extent.offset.saturating_add((number - first) * block * decl.dtype.size());
                    blocks.insert(number, Known { hash: *hash, source: Arc::clone(&source), offset, from });
                }
            }
        }
    }

    fn blocks_of(&mut self, decl: &StateDecl) -> &mut BTreeMap<u64, Known> {
        let index = self.states.iter().position(|(known, _)| known == decl).unwrap_or_else(|| {
            self.states.push((decl.clone(), BTreeMap::new()));
            self.states.len() - 1
        });
        &mut self.states[index].1
    }

    fn find(&self, decl: &StateDecl, block: u64, hash: BlockHash) -> Option<&Known> {
        let (_, blocks) = self.states.iter().find(|(known, _)| known == decl)?;
        blocks.get(&block).filter(|known| known.hash == hash)
    }
}

/// A shard in two parts: what must be written, and what lies somewhere already.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Split {
    /// State by state, in canonical order.
    pub(crate) fresh: Vec<Run>,
    /// By path; extents by state and place.
    pub(crate) references: Vec<ObjectEntry>,
}

/// A run of blocks of one state, and where it lies if it is known.
#[derive(Debug, Clone)]
struct Part {
    state: usize,
    blocks: Range<u64>,
    bytes: u64,
    lies: Option<(Arc<Source>, u64)>,
}

/// Splits the shard of these blocks. `states` has, for each state, its hashes of the shard.
pub(crate) fn split(known: &KnownBlocks, space: &Space, shard: Range<u64>, states: &[(StateDecl, &HashList)]) -> Split {
    let mut parts: Vec<Part> = vec![];
    for (index, (decl, hashes)) in states.iter().enumerate() {
        parts.extend(parts_of(known, space, shard.clone(), index, decl, hashes));
    }
    let short = |part: &Part| part.bytes < known.min_run && part.blocks != shard;
    for part in parts.iter_mut().filter(|part| short(part)) {
        part.lies = None;
    }
    let mut used: HashMap<String, u64> = HashMap::new();
    for part in &parts {
        if let Some((source, _)) = &part.lies {
            *used.entry(source.path.clone()).or_default() += part.bytes;
        }
    }
    let many = used.len() > MAX_REFERENCES;
    for part in &mut parts {
        let worth = |(source, _): &(Arc<Source>, u64)| {
            used.get(&source.path).is_some_and(|used| used.saturating_mul(MIN_USE) >= source.bytes)
        };
        part.lies = part.lies.take().filter(|lies| !many && worth(lies));
    }
    gather(space, states, parts)
}

/// One state's shard, cut where what is known of it changes.
fn parts_of(
    known: &KnownBlocks,
    space: &Space,
    shard: Range<u64>,
    state: usize,
    decl: &StateDecl,
    hashes: &HashList,
) -> Vec<Part> {
    let mut parts: Vec<Part> = vec![];
    for (block, hash) in shard.zip(&hashes.0) {
        let elements = space.blocks_to_elements(block..block + 1);
        let bytes = (elements.end - elements.start) * decl.dtype.size();
        let lies = known.find(decl, block, *hash).map(|known| (Arc::clone(&known.source), known.offset));
        if let Some(last) = parts.last_mut() {
            let follows = match (&last.lies, &lies) {
                (None, None) => true,
                (Some((a, from)), Some((b, offset))) => {
                    a.path == b.path && from.checked_add(last.bytes) == Some(*offset)
                }
                _ => false,
            };
            if follows {
                last.blocks.end = block + 1;
                last.bytes += bytes;
                continue;
            }
        }
        parts.push(Part { state, blocks: block..block + 1, bytes, lies });
    }
    parts
}

fn gather(space: &Space, states: &[(StateDecl, &HashList)], parts: Vec<Part>) -> Split {
    let mut split = Split::default();
    let mut old: BTreeMap<String, ObjectEntry> = BTreeMap::new();
    for part in parts {
        let elements = space.blocks_to_elements(part.blocks);
        if let Some((source, offset)) = part.lies {
            let new = || ObjectEntry { path: source.path.clone(), bytes: source.bytes, extents: vec![] };
            let object = old.entry(source.path.clone()).or_insert_with(new);
            let (state, count) = (states[part.state].0.name.clone(), elements.end - elements.start);
            object.extents.push(Extent { state, first: elements.start, elements: count, offset });
            continue;
        }
        match split.fresh.last_mut() {
            Some(run) if run.state == part.state && run.elements.end == elements.start => {
                run.elements.end = elements.end;
            }
            _ => split.fresh.push(Run { state: part.state, elements }),
        }
    }
    split.references = old.into_values().collect();
    split
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::ids::{JobName, Rank, WorldSize};

    use super::*;
    use crate::scalar::ScalarState;
    use crate::space::{Dtype, TensorDecl};

    const BLOCK: u64 = 1 << 18;

    fn space(blocks: u64) -> Space {
        let shape = vec![blocks << 16];
        Space::new(vec![TensorDecl { name: "w".into(), shape, dtype: Dtype::F32 }]).unwrap()
    }

    fn hashes(blocks: &[u64]) -> HashList {
        HashList(blocks.iter().map(|value| BlockHash::of(&value.to_le_bytes())).collect())
    }

    /// A receipt of a world of one whose whole shard lies in one object, named by `step`.
    fn receipt(step: u64, values: &[u64]) -> Receipt {
        let elements = (values.len() as u64) << 16;
        let extent = Extent { state: "param".into(), first: 0, elements, offset: 256 };
        let path = format!("jobs/tiny/objects/00/{step}.safetensors");
        Receipt {
            job: JobName::new("tiny").unwrap(),
            generation: Generation::new(1),
            rank: Rank::ZERO,
            world_size: WorldSize::ONE,
            shard: (0, elements),
            scalar: ScalarState { step: Step::new(step), ..ScalarState::start(1, 10) },
            states: vec![StateDecl::f32("param")],
            hashes: vec![hashes(values)],
            object: Some(ObjectEntry { path, bytes: 256 + elements * 4, extents: vec![extent] }),
            references: vec![],
            stages: vec![],
        }
    }

    fn split_of(known: &KnownBlocks, values: &[u64]) -> Split {
        let space = space(values.len() as u64);
        split(known, &space, 0..space.blocks(), &[(StateDecl::f32("param"), &hashes(values))])
    }

    fn runs(split: &Split) -> Vec<(u64, u64)> {
        split.fresh.iter().map(|run| (run.elements.start >> 16, run.elements.end >> 16)).collect()
    }

    #[test]
    fn only_runs_worth_a_read_are_referred_to() {
        let old: Vec<u64> = (0..64).collect();
        let mut known = KnownBlocks::default();
        known.learn(&space(64), &receipt(10, &old));
        assert_eq!(known.len(), 64);
        let whole = split_of(&known, &old);
        assert!(whole.fresh.is_empty() && whole.references[0].extents.len() == 1);
        // Blocks 20 and 30 change: the nine between are fewer than the sixteen of four megabytes.
        let mut new = old.clone();
        (new[20], new[30]) = (1000, 1001);
        let split = split_of(&known, &new);
        assert_eq!(runs(&split), [(20, 31)]);
        let places: Vec<_> = split.references[0].extents.iter().map(|e| (e.first >> 16, e.offset)).collect();
        assert_eq!(places, [(0, 256), (31, 256 + 31 * BLOCK)]);
        // A small shard is one read however small it is.
        let mut known = KnownBlocks::default();
        known.learn(&space(2), &receipt(10, &[1, 2]));
        assert!(split_of(&known, &[1, 2]).fresh.is_empty());
        assert_eq!(runs(&split_of(&known, &[1, 3])), [(0, 2)]);
    }

    #[test]
    fn an_object_used_too_little_is_given_up() {
        let old: Vec<u64> = (0..100).collect();
        let mut known = KnownBlocks::default();
        known.learn(&space(100), &receipt(10, &old));
        let keep = |n: usize| -> Vec<u64> { (0..100).map(|i| if i < n as u64 { i } else { 500 + i }).collect() };
        assert_eq!(runs(&split_of(&known, &keep(26))), [(26, 100)]);
        assert_eq!(runs(&split_of(&known, &keep(24))), [(0, 100)]);
    }

    #[test]
    fn later_saves_are_believed_and_memory_is_bounded() {
        let mut known = KnownBlocks::new(40).with_min_run(BLOCK);
        known.learn(&space(32), &receipt(20, &[7; 32]));
        known.learn(&space(32), &receipt(10, &[6; 32]));
        assert!(split_of(&known, &[7; 32]).fresh.is_empty(), "an older receipt changes nothing");
        let more = Receipt { generation: Generation::new(2), ..receipt(5, &(0..64).collect::<Vec<_>>()) };
        known.learn(&space(64), &more);
        assert_eq!(known.len(), 40, "the older save went, and no more than 40 blocks came");
        known.forget();
        assert!(known.is_empty());
    }

    proptest! {
        /// Fresh runs and references together are the shard, exactly; and each rule holds.
        #[test]
        fn a_split_is_the_shard(saves in proptest::collection::vec(proptest::collection::vec(0u64..3, 40), 1..5)) {
            let mut known = KnownBlocks::default().with_min_run(3 * BLOCK);
            let (last, before) = saves.split_last().unwrap();
            for (step, values) in before.iter().enumerate() {
                known.learn(&space(40), &receipt(step as u64, values));
            }
            let split = split_of(&known, last);
            let mut covered = vec![0; 40];
            for (first, end) in runs(&split) {
                for block in first..end {
                    covered[block as usize] += 1;
                }
            }
            for object in &split.references {
                let used: u64 = object.extents.iter().map(|e| e.elements * 4).sum();
                prop_assert!(used * 4 >= object.bytes);
                let step: usize = object.path.split(['/', '.']).nth_back(1).unwrap().parse().unwrap();
                for e in &object.extents {
                    prop_assert!(e.elements * 4 >= 3 * BLOCK);
                    for block in e.first >> 16..(e.first + e.elements) >> 16 {
                        covered[block as usize] += 1;
                        prop_assert_eq!(before[step][block as usize], last[block as usize]);
                    }
                }
            }
            prop_assert!(covered.iter().all(|n| *n == 1), "{:?}", covered);
        }
    }
}
