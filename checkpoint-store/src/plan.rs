//! The plan of a load: which bytes of which objects give a range of some states.
//!
//! A reader asks for elements; hashes are of blocks. So each read covers whole blocks, blocks that follow one another
//! in an object are read together up to a bound, and no block is read twice. Reads that lie close together in an object
//! are joined into one request; the bytes between them, which nobody asked for, stay under a share of those wanted.

use std::ops::Range;

use crate::manifest::Manifest;

/// The most bytes of one read. With the reads in flight it bounds the memory of a load.
pub const MAX_READ: u64 = 8 << 20;

/// Bytes read over bytes wanted, at most, by default.
pub const OVER_READ: f64 = 1.05;

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

/// The reads that together cover `range` of the state with this index, in canonical order, each of at most
/// [`MAX_READ`] bytes or one block.
pub fn plan(manifest: &Manifest, state: usize, range: Range<u64>) -> Vec<Read> {
    plan_within(MAX_READ, manifest, state, range)
}

/// As [`plan`], with another bound on the bytes of a read.
pub(crate) fn plan_within(most: u64, manifest: &Manifest, state: usize, range: Range<u64>) -> Vec<Read> {
    let space = &manifest.space;
    let range = range.start..range.end.min(space.elements());
    let Some(decl) = manifest.states.get(state) else { return vec![] };
    if range.is_empty() {
        return vec![];
    }
    let (size, block) = (decl.dtype.size(), space.block_elements());
    let most = (most / (block * size)).max(1);
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

/// One request: some reads of one object, in the order in which they lie there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The object, as an index into the manifest's.
    pub object: usize,
    /// The bytes to ask for; from the first read's start to the last one's end.
    pub bytes: Range<u64>,
    /// The reads, as indices into the list that was joined.
    pub reads: Vec<usize>,
}

/// Joins reads into requests of at most `most` bytes. Reads that touch are always joined; others while the bytes of all
/// gaps together, smallest first, stay within `over_read` times the bytes wanted.
pub fn join(reads: &[Read], over_read: f64, most: u64) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..reads.len()).collect();
    order.sort_by_key(|&i| (reads[i].object, reads[i].bytes.start));
    let wanted: u64 = reads.iter().map(|r| r.bytes.end - r.bytes.start).sum();
    let mut left = (wanted as f64 * (over_read - 1.0).max(0.0)) as u64;
    let gap = |pair: &[usize]| {
        let (a, b) = (&reads[pair[0]], &reads[pair[1]]);
        (a.object == b.object).then(|| b.bytes.start.checked_sub(a.bytes.end)).flatten()
    };
    let mut gaps: Vec<(u64, usize)> =
        order.windows(2).enumerate().filter_map(|(i, pair)| gap(pair).map(|gap| (gap, i + 1))).collect();
    gaps.sort_unstable();
    let mut joins = vec![false; reads.len()];
    for (gap, place) in gaps {
        // A gap as wide as a request is no saving, whatever the share allows.
        if gap > left || gap >= most {
            break;
        }
        left -= gap;
        joins[place] = true;
    }
    let mut batches: Vec<Batch> = vec![];
    for (place, &index) in order.iter().enumerate() {
        let read = &reads[index];
        match batches.last_mut().filter(|b| joins[place] && read.bytes.end - b.bytes.start <= most) {
            Some(batch) => {
                batch.bytes.end = read.bytes.end;
                batch.reads.push(index);
            }
            None => batches.push(Batch { object: read.object, bytes: read.bytes.clone(), reads: vec![index] }),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn requests_hold_each_read_once_within_their_bounds(
            pieces in proptest::collection::vec((0usize..3, 0u64..400_000, 1u64..3_000_000), 0..40),
            over_read in 1.0f64..1.5,
        ) {
            let mut ends = [0u64; 3];
            let reads: Vec<Read> = pieces.iter().map(|&(object, gap, length)| {
                let start = ends[object] + gap / 100_000 * gap;
                ends[object] = start + length;
                Read { object, bytes: start..start + length, blocks: 0..1, elements: 0..1 }
            }).collect();
            let batches = join(&reads, over_read, MAX_READ);
            let mut seen = vec![0; reads.len()];
            for batch in &batches {
                prop_assert!(batch.bytes.end - batch.bytes.start <= MAX_READ);
                let mut at = batch.bytes.start;
                for &index in &batch.reads {
                    seen[index] += 1;
                    let read = &reads[index];
                    prop_assert!(read.object == batch.object && read.bytes.start >= at);
                    at = read.bytes.end;
                }
                prop_assert_eq!(at, batch.bytes.end);
            }
            prop_assert!(seen.iter().all(|n| *n == 1));
            let bytes = |ranges: Vec<&Range<u64>>| ranges.into_iter().map(|r| r.end - r.start).sum::<u64>() as f64;
            let wanted = bytes(reads.iter().map(|r| &r.bytes).collect());
            prop_assert!(bytes(batches.iter().map(|b| &b.bytes).collect()) <= wanted * over_read);
        }
    }

    #[test]
    fn neighbours_are_one_request_and_strangers_are_not() {
        let read =
            |object, start: u64, length| Read { object, bytes: start..start + length, blocks: 0..1, elements: 0..1 };
        let reads = [read(0, 2_000, 1_000), read(0, 0, 1_000), read(0, 1_000, 1_000), read(1, 3_000, 1_000)];
        assert_eq!(
            join(&reads, 1.0, MAX_READ).iter().map(|b| b.reads.clone()).collect::<Vec<_>>(),
            [vec![1, 2, 0], vec![3]]
        );
        let far = [read(0, 0, 10_000), read(0, 10_500, 10_000), read(0, 90_000, 10_000)];
        assert_eq!(join(&far, 1.05, MAX_READ).len(), 2);
        assert_eq!(join(&far, 1.0, MAX_READ).len(), 3);
    }
}
