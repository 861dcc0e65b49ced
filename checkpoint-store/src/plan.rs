//! The plan of a load: which bytes of which objects give a range of a state.
//!
//! A reader asks for elements; hashes are of blocks. So each read covers whole blocks, blocks that follow one another
//! in an object are read together up to a bound, and no block is read twice.

use std::ops::Range;

use crate::manifest::Manifest;

/// The most bytes of one read. With the reads in flight it bounds the memory of a load.
pub const MAX_READ: u64 = 8 << 20;

/// One range read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// The object, as an index into the manifest's.
    pub object: usize,
    /// The bytes of the object.
    pub bytes: Range<u64>,
    /// The blocks they are, of the canonical space.
    pub blocks: Range<u64>,
    /// The elements they are.
    pub elements: Range<u64>,
}

/// The reads that together cover `range` of the state with this index, in canonical order.
pub fn plan(manifest: &Manifest, state: usize, range: Range<u64>) -> Vec<Read> {
    let space = &manifest.space;
    let range = range.start..range.end.min(space.elements());
    let Some(decl) = manifest.states.get(state) else { return vec![] };
    if range.is_empty() {
        return vec![];
    }
    let (size, block) = (decl.dtype.size(), space.block_elements());
    let most = (MAX_READ / (block * size)).max(1);
    let wanted = range.start / block..range.end.div_ceil(block);
    let mut reads = vec![];
    for extent in manifest.extents(state, range) {
        let end = (extent.first + extent.elements).div_ceil(block).min(wanted.end);
        let mut next = (extent.first / block).max(wanted.start);
        while next < end {
            let blocks = next..end.min(next + most);
            let elements = space.blocks_to_elements(blocks.clone());
            let at = extent.offset + (elements.start - extent.first) * size;
            let bytes = at..at + (elements.end - elements.start) * size;
            next = blocks.end;
            reads.push(Read { object: extent.object, bytes, blocks, elements });
        }
    }
    reads
}
