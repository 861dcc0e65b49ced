//! Boxes of N dimensions: where they meet, what runs of memory they are, and how a flat range becomes boxes.
//!
//! A flat range of a row-major tensor is a head in a partial row, a block of full rows, and a tail in a partial row;
//! head and tail are flat ranges of one dimension less. So a range of an N-dimensional tensor is at most 2N-1 boxes,
//! each of them one run of memory, and no other cut into such boxes has fewer. Nothing here asks anyone else: geometry
//! alone says where every element lies, whatever the parallelism that cut the tensor was called.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::catalog::elements;
use crate::error::StoreError;

/// A box: `lengths` elements from `offsets` on, in each dimension. Never empty, and its sums never overflow.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Raw", into = "Raw")]
pub struct Region {
    offsets: Vec<u64>,
    lengths: Vec<u64>,
}

#[derive(Serialize, Deserialize)]
struct Raw(Vec<u64>, Vec<u64>);

impl TryFrom<Raw> for Region {
    type Error = StoreError;
    fn try_from(raw: Raw) -> Result<Self, StoreError> {
        Self::new(raw.0, raw.1)
    }
}

impl From<Region> for Raw {
    fn from(region: Region) -> Self {
        Self(region.offsets, region.lengths)
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "box {:?}+{:?}", self.offsets, self.lengths)
    }
}

impl Region {
    /// A box, checked.
    pub fn new(offsets: Vec<u64>, lengths: Vec<u64>) -> Result<Self, StoreError> {
        let fits = offsets.len() == lengths.len() && elements(&lengths).is_some();
        if fits && offsets.iter().zip(&lengths).all(|(&o, &n)| o.checked_add(n).is_some()) {
            return Ok(Self { offsets, lengths });
        }
        let few = |all: &[u64]| all.iter().take(16).copied().collect::<Vec<_>>();
        Err(StoreError::Input(format!(
            "no box has offsets {:?} and lengths {:?}: as many of each, at most 16, no length zero, 2^48 elements",
            few(&offsets),
            few(&lengths)
        )))
    }

    /// All of a shape whose product is at least 1 and at most 2^48.
    pub(super) fn whole(shape: &[u64]) -> Self {
        Self { offsets: vec![0; shape.len()], lengths: shape.to_vec() }
    }

    /// First element in each dimension.
    pub fn offsets(&self) -> &[u64] {
        &self.offsets
    }

    /// Number of elements in each dimension.
    pub fn lengths(&self) -> &[u64] {
        &self.lengths
    }

    /// Number of dimensions.
    pub fn dimensions(&self) -> usize {
        self.lengths.len()
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.lengths.iter().product()
    }

    /// The box's elements along one dimension.
    pub(super) fn along(&self, dimension: usize) -> Range<u64> {
        self.offsets[dimension]..self.offsets[dimension] + self.lengths[dimension]
    }

    /// The part of the box that lies in `range` along one dimension; `range` must meet it.
    pub(super) fn narrowed(&self, dimension: usize, range: Range<u64>) -> Self {
        let own = self.along(dimension);
        let (start, end) = (own.start.max(range.start), own.end.min(range.end));
        let mut part = self.clone();
        (part.offsets[dimension], part.lengths[dimension]) = (start, end - start);
        part
    }

    /// Whether the box lies inside a tensor of this shape.
    pub fn is_within(&self, shape: &[u64]) -> bool {
        self.dimensions() == shape.len() && (0..shape.len()).all(|d| self.along(d).end <= shape[d])
    }

    /// What two boxes of one tensor have in common.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        if self.dimensions() != other.dimensions() {
            return None;
        }
        let mut common = self.clone();
        for d in 0..self.dimensions() {
            let (a, b) = (self.along(d), other.along(d));
            let (start, end) = (a.start.max(b.start), a.end.min(b.end));
            if start >= end {
                return None;
            }
            (common.offsets[d], common.lengths[d]) = (start, end - start);
        }
        Some(common)
    }

    /// Whether all of `other` lies in this box.
    pub fn contains(&self, other: &Self) -> bool {
        self.intersect(other).as_ref() == Some(other)
    }

    /// The boxes that a range of this box's own elements, counted row by row, is made of.
    pub(super) fn flat_parts(&self, range: Range<u64>) -> Vec<Self> {
        let mut parts = flat_regions(&self.lengths, range);
        for part in &mut parts {
            part.offsets.iter_mut().zip(&self.offsets).for_each(|(at, own)| *at += own);
        }
        parts
    }

    /// The runs of memory that `part`, a box inside this one, is made of, when this box lies row by row in a buffer:
    /// ranges of elements in order, as long as can be. `None` if the part is not inside.
    pub fn runs(&self, part: &Self) -> Option<Runs> {
        self.contains(part).then(|| Runs::new(&[self], part))
    }

    /// From the first element of `part`, a box inside this one, to the end of its last, counted row by row.
    pub(super) fn span(&self, part: &Self) -> Range<u64> {
        let (mut first, mut last) = (0, 0);
        for d in 0..self.dimensions() {
            let at = part.offsets[d] - self.offsets[d];
            first = first * self.lengths[d] + at;
            last = last * self.lengths[d] + at + part.lengths[d] - 1;
        }
        first..last + 1
    }

    /// Cuts the box into at most `parts` boxes of nearly equal size along its first dimension that is not 1 long: each
    /// is a run of the box's memory.
    pub(super) fn cut(&self, parts: u64) -> Vec<Self> {
        let Some(dimension) = self.lengths.iter().position(|&n| n > 1) else { return vec![self.clone()] };
        let (first, length) = (self.offsets[dimension], self.lengths[dimension]);
        let parts = parts.clamp(1, length);
        let at = |i: u64| first + (length as u128 * i as u128 / parts as u128) as u64;
        (0..parts).map(|i| self.narrowed(dimension, at(i)..at(i + 1))).collect()
    }
}

/// The boxes that a range of a row-major tensor's elements is made of, in order; a range past the end is cut off.
pub(super) fn flat_regions(shape: &[u64], range: Range<u64>) -> Vec<Region> {
    let mut out = vec![];
    let mut region = Region::whole(shape);
    let end = range.end.min(region.elements());
    if range.start < end {
        descend(shape, 0, range.start..end, &mut region, &mut out);
    }
    out
}

/// `range` counts elements of one row of dimension `d - 1`; `region` has the dimensions before `d` fixed.
fn descend(shape: &[u64], d: usize, range: Range<u64>, region: &mut Region, out: &mut Vec<Region>) {
    if d == shape.len() {
        out.push(region.clone());
        return;
    }
    let row: u64 = shape[d + 1..].iter().product();
    let (first, last) = (range.start / row, (range.end - 1) / row);
    let is_part = |at: u64| !at.is_multiple_of(row);
    let mut within = |rows: Range<u64>, part: Option<Range<u64>>| {
        (region.offsets[d], region.lengths[d]) = (rows.start, rows.end - rows.start);
        match part {
            Some(part) => descend(shape, d + 1, part, region, out),
            None => out.push(region.clone()),
        }
        // Whoever is called next finds the deeper dimensions whole again.
        (region.offsets[d], region.lengths[d]) = (0, shape[d]);
    };
    if first == last && (is_part(range.start) || is_part(range.end)) {
        within(first..first + 1, Some(range.start - first * row..range.end - first * row));
        return;
    }
    let full = range.start.div_ceil(row)..range.end / row;
    if is_part(range.start) {
        within(first..first + 1, Some(range.start - first * row..row));
    }
    if !full.is_empty() {
        within(full, None);
    }
    if is_part(range.end) {
        within(last..last + 1, Some(0..range.end - last * row));
    }
}

/// The longest common runs of a box within one or more boxes that hold it: starts in each holder, one length for all.
#[derive(Debug, Clone)]
pub struct Runs {
    /// Elements of each run.
    length: u64,
    /// Lengths of the dimensions that are stepped through, the outermost first.
    steps: Vec<u64>,
    /// Per holder, elements from one step to the next in each of those dimensions.
    strides: Vec<Vec<u64>>,
    /// Per holder, the first run's start.
    starts: Vec<u64>,
    /// Where the iteration is in each dimension.
    at: Vec<u64>,
    done: bool,
}

impl Runs {
    fn new(holders: &[&Region], part: &Region) -> Self {
        let n = part.dimensions();
        // Inner dimensions that are whole in every holder make one run with the dimension outside them.
        let whole = |d: usize| holders.iter().all(|h| h.lengths[d] == part.lengths[d]);
        let mut inner = n;
        while inner > 0 && whole(inner - 1) {
            inner -= 1;
        }
        let outer = inner.saturating_sub(1);
        let (mut strides, mut starts) = (vec![], vec![]);
        for holder in holders {
            let mut all = vec![1u64; n];
            for d in (0..n.saturating_sub(1)).rev() {
                all[d] = all[d + 1] * holder.lengths[d + 1];
            }
            starts.push((0..n).map(|d| (part.offsets[d] - holder.offsets[d]) * all[d]).sum());
            all.truncate(outer);
            strides.push(all);
        }
        let length = part.lengths[outer..].iter().product();
        Self { length, steps: part.lengths[..outer].to_vec(), strides, starts, at: vec![0; outer], done: false }
    }

    /// The starts of the next run, one a holder; its length is the same everywhere.
    fn advance(&mut self, starts: &mut [u64]) -> bool {
        if self.done {
            return false;
        }
        starts.copy_from_slice(&self.starts);
        for d in (0..self.steps.len()).rev() {
            self.at[d] += 1;
            if self.at[d] < self.steps[d] {
                self.starts.iter_mut().zip(&self.strides).for_each(|(start, strides)| *start += strides[d]);
                return true;
            }
            self.at[d] = 0;
            let back = self.steps[d] - 1;
            self.starts.iter_mut().zip(&self.strides).for_each(|(start, strides)| *start -= strides[d] * back);
        }
        self.done = true;
        true
    }
}

impl Iterator for Runs {
    type Item = Range<u64>;
    fn next(&mut self) -> Option<Range<u64>> {
        let mut start = [0];
        (self.starts.len() == 1 && self.advance(&mut start)).then(|| start[0]..start[0] + self.length)
    }
}

/// Copies `part` from a buffer that holds the box `from` to one that holds the box `to`, both row by row, in the
/// longest runs the two have in common. `size` is the bytes of an element.
pub fn copy_region(
    (src, from): (&[u8], &Region),
    (dst, to): (&mut [u8], &Region),
    part: &Region,
    size: u64,
) -> Result<(), StoreError> {
    let fits = |bytes: &[u8], region: &Region| {
        region.elements().checked_mul(size) == Some(bytes.len() as u64) && region.contains(part)
    };
    if !fits(src, from) || !fits(dst, to) {
        return Err(StoreError::Bug(format!(
            "{part} of {size}-byte elements cannot go from {} bytes of {from} to {} bytes of {to}",
            src.len(),
            dst.len()
        )));
    }
    let mut runs = Runs::new(&[from, to], part);
    let length = (runs.length * size) as usize;
    let mut starts = [0; 2];
    while runs.advance(&mut starts) {
        let [a, b] = starts.map(|start| (start * size) as usize);
        dst[b..b + length].copy_from_slice(&src[a..a + length]);
    }
    Ok(())
}
