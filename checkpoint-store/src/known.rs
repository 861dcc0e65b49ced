//! Deduplication: what older objects of a job hold already, and what a new one therefore need not.
//!
//! A block whose hash has not changed lies in an object of an earlier checkpoint; the new checkpoint refers to it there.
//! Two rules keep loads and storage from paying for it later:
//!
//! * **A reference is worth a read.** A run of unchanged blocks shorter than [`MIN_RUN`] is written again, unless it is
//!   the whole shard of a state. A range request costs about as much as a few megabytes, and a load reads 8 MiB at once:
//!   so no load needs more than a small multiple of the requests it needs without deduplication.
//! * **An object is worth its space.** An object of which this shard would use less than a quarter is given up: its
//!   blocks are written again, and retention can remove it. So a checkpoint keeps at most four times its size alive.
//!
//! What is known comes from receipts that were committed. It may be out of date: the committer refuses a checkpoint that
//! refers to an object which is on its way out ([`crate::references`]), and after a refusal nothing is known any more.

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
        Self { most, states: vec![] }
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
            self.states.iter_mut().for_each(|(_, blocks)| blocks.retain(|_, known| known.from >= from));
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
pub(crate) fn split(
    known: &KnownBlocks,
    space: &Space,
    shard: Range<u64>,
    states: &[(StateDecl, &HashList)],
) -> Split {
    let mut parts: Vec<Part> = vec![];
    for (index, (decl, hashes)) in states.iter().enumerate() {
        parts.extend(parts_of(known, space, shard.clone(), index, decl, hashes));
    }
    let short = |part: &Part| part.bytes < MIN_RUN && part.blocks != shard;
    parts.iter_mut().filter(|part| short(part)).for_each(|part| part.lies = None);
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
                (Some((a, from)), Some((b, offset))) => a.path == b.path && from.checked_add(last.bytes) == Some(*offset),
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
