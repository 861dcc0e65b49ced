//! Coverage: whether boxes hold every element of a tensor exactly once.
//!
//! The sweep works by divide and conquer. Boxes are sorted along a dimension; where no box crosses, the region falls
//! apart there, and each part is looked at for itself, along the next dimension. A part that no box covers is a hole; a
//! part that two boxes fill is an overlap. Rows, columns, grids, flat ranges and replicas fall apart in a few rounds,
//! so they take O(d · n log n). Boxes that lock into one another like bricks round a corner do not fall apart: there
//! the region is cut at the boundary that crosses the fewest of them, and the crossed ones count on both sides. In the
//! worst case, made on purpose, that is quadratic; a bound on the work refuses such a set instead of sweeping on.

use std::ops::Range;

use super::region::Region;

/// Most holes and most overlaps that are reported.
const MAX_REPORTED: usize = 8;
/// Boxes looked at, over all rounds, for each box there is: beyond it the set is refused.
const WORK_PER_BOX: usize = 64;
/// Small sets may be as tangled as they like.
const FREE_WORK: usize = 1 << 16;

/// What a set of boxes covers of a tensor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Elements that at least one box holds.
    pub covered: u64,
    /// The first regions that no box holds.
    pub holes: Vec<Region>,
    /// The first regions that two boxes or more hold.
    pub overlaps: Vec<Region>,
}

impl Coverage {
    /// Whether every element is held exactly once.
    pub fn is_exact(&self) -> bool {
        self.holes.is_empty() && self.overlaps.is_empty()
    }
}

/// A part of the tensor and the boxes that meet it, cut off at its borders.
type Part = (Region, Vec<Region>);

/// Sweeps boxes that lie inside `whole`. `None` if they are so tangled that the sweep would take too long.
pub fn coverage(whole: &Region, boxes: Vec<Region>) -> Option<Coverage> {
    let mut work = boxes.len().saturating_mul(WORK_PER_BOX).saturating_add(FREE_WORK);
    let mut found = Coverage::default();
    let mut stack: Vec<Part> = vec![(whole.clone(), boxes)];
    while let Some((region, boxes)) = stack.pop() {
        work = work.checked_sub(boxes.len() + 1)?;
        match &boxes[..] {
            [] => note(&mut found.holes, region),
            [only] if *only == region => found.covered += region.elements(),
            all if all.iter().all(|b| *b == region) => {
                found.covered += region.elements();
                note(&mut found.overlaps, region);
            }
            _ => {
                let parts = fall_apart(&region, &boxes).unwrap_or_else(|| cut(&region, &boxes));
                // The first part comes off the stack first: what is reported is in order.
                stack.extend(parts.into_iter().rev());
            }
        }
    }
    Some(found)
}

fn note(list: &mut Vec<Region>, region: Region) {
    if list.len() < MAX_REPORTED {
        list.push(region);
    }
}

/// Divides the region between boxes, along the first dimension in which that is possible. The parts fill the region.
fn fall_apart(region: &Region, boxes: &[Region]) -> Option<Vec<Part>> {
    (0..region.dimensions()).find_map(|d| {
        let mut order: Vec<usize> = (0..boxes.len()).collect();
        order.sort_unstable_by_key(|&i| (boxes[i].along(d).start, i));
        let own = region.along(d);
        let mut parts: Vec<(Range<u64>, Vec<Region>)> = vec![];
        let mut at = own.start;
        for i in order {
            let Range { start, end } = boxes[i].along(d);
            if start > at {
                parts.push((at..start, vec![]));
            }
            match parts.last_mut() {
                // It begins before the last part's boxes end: the two hang together.
                Some((range, members)) if start < range.end => {
                    range.end = range.end.max(end);
                    members.push(boxes[i].clone());
                }
                _ => parts.push((start..end, vec![boxes[i].clone()])),
            }
            at = at.max(end);
        }
        if at < own.end {
            parts.push((at..own.end, vec![]));
        }
        (parts.len() > 1).then(|| parts.into_iter().map(|(r, members)| (region.narrowed(d, r), members)).collect())
    })
}

/// Divides a region whose boxes hang together, at the boundary of a box that crosses the fewest others; among those at
/// the one nearest to the middle.
fn cut(region: &Region, boxes: &[Region]) -> Vec<Part> {
    let best = (0..region.dimensions()).filter_map(|d| best_cut(region, boxes, d)).min();
    // Not all boxes fill the region, so some box has a boundary inside it.
    let Some((_, _, d, at)) = best else { return vec![(region.clone(), vec![])] };
    let own = region.along(d);
    [own.start..at, at..own.end]
        .map(|side| {
            let meets = |b: &&Region| b.along(d).start < side.end && b.along(d).end > side.start;
            let members = boxes.iter().filter(meets).map(|b| b.narrowed(d, side.clone())).collect();
            (region.narrowed(d, side.clone()), members)
        })
        .into()
}

/// For one dimension: boxes crossed, distance from the middle of the order, the dimension, and where to cut.
fn best_cut(region: &Region, boxes: &[Region], d: usize) -> Option<(usize, usize, usize, u64)> {
    let own = region.along(d);
    let mut starts: Vec<u64> = boxes.iter().map(|b| b.along(d).start).collect();
    let mut ends: Vec<u64> = boxes.iter().map(|b| b.along(d).end).collect();
    starts.sort_unstable();
    ends.sort_unstable();
    let inside = starts.iter().chain(&ends).copied().filter(|&at| own.start < at && at < own.end);
    inside
        .map(|at| {
            let begun = starts.partition_point(|&s| s < at);
            let over = ends.partition_point(|&e| e <= at);
            (begun - over, begun.abs_diff(boxes.len() / 2), d, at)
        })
        .min()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(offsets: &[u64], lengths: &[u64]) -> Region {
        Region::new(offsets.to_vec(), lengths.to_vec()).unwrap()
    }

    /// How often each element is held, one at a time.
    fn counts(whole: &Region, boxes: &[Region]) -> Vec<usize> {
        let mut counts = vec![0; whole.elements() as usize];
        for b in boxes {
            whole.runs(b).unwrap().flatten().for_each(|i| counts[i as usize] += 1);
        }
        counts
    }

    fn check(whole: &Region, boxes: &[Region]) {
        let found = coverage(whole, boxes.to_vec()).unwrap();
        let counts = counts(whole, boxes);
        let at = |r: &Region| whole.runs(r).unwrap().flatten().map(|i| counts[i as usize]).collect::<Vec<_>>();
        assert_eq!(found.covered, counts.iter().filter(|&&c| c > 0).count() as u64);
        assert_eq!(found.holes.is_empty(), counts.iter().all(|&c| c > 0), "{boxes:?}");
        assert_eq!(found.overlaps.is_empty(), counts.iter().all(|&c| c < 2), "{boxes:?}");
        assert!(found.holes.iter().all(|r| at(r).iter().all(|&c| c == 0)));
        assert!(found.overlaps.iter().all(|r| at(r).iter().all(|&c| c > 1)));
    }

    /// Cuts a box at random places again and again: an exact cover of it.
    fn shatter(whole: &Region, cuts: &[(usize, u64, usize)]) -> Vec<Region> {
        let mut boxes = vec![whole.clone()];
        for &(which, at, d) in cuts {
            let b = boxes.swap_remove(which % boxes.len());
            let (d, own) = (d % b.dimensions(), b.along(d % b.dimensions()));
            let at = own.start + at % (own.end - own.start);
            let sides = [own.start..at, at..own.end];
            boxes.extend(sides.into_iter().filter(|s| !s.is_empty()).map(|s| b.narrowed(d, s)));
        }
        boxes
    }

    proptest! {
        #[test]
        fn sweep_and_counting_agree(
            boxes in proptest::collection::vec(((0u64..6, 1u64..6), (0u64..6, 1u64..6), (0u64..3, 1u64..3)), 0..12)
        ) {
            let clip = |(o, n): (u64, u64), max: u64| (o.min(max - 1), n.min(max - o.min(max - 1)));
            let boxes: Vec<_> = boxes.into_iter().map(|(a, b, c)| {
                let (a, b, c) = (clip(a, 6), clip(b, 6), clip(c, 3));
                region(&[a.0, b.0, c.0], &[a.1, b.1, c.1])
            }).collect();
            check(&region(&[0, 0, 0], &[6, 6, 3]), &boxes);
        }

        #[test]
        fn exact_covers_are_seen_and_so_is_what_spoils_them(
            cuts in proptest::collection::vec((any::<usize>(), any::<u64>(), any::<usize>()), 0..25),
            spoil in any::<usize>(),
        ) {
            let whole = region(&[0, 0, 0], &[8, 9, 5]);
            let mut boxes = shatter(&whole, &cuts);
            let found = coverage(&whole, boxes.clone()).unwrap();
            prop_assert!(found.is_exact() && found.covered == 360);
            let taken = boxes.swap_remove(spoil % boxes.len());
            check(&whole, &boxes);
            boxes.extend([taken.clone(), taken]);
            check(&whole, &boxes);
        }
    }

    #[test]
    fn bricks_round_a_corner_are_cut() {
        let whole = region(&[0, 0], &[3, 3]);
        let pinwheel = [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([2, 1], [1, 2]), ([1, 0], [2, 1]), ([1, 1], [1, 1])];
        let boxes: Vec<_> = pinwheel.iter().map(|(o, n)| region(o, n)).collect();
        assert!(fall_apart(&whole, &boxes).is_none());
        assert!(coverage(&whole, boxes.clone()).unwrap().is_exact());
        let found = coverage(&whole, boxes[..4].to_vec()).unwrap();
        assert_eq!((found.covered, found.holes), (8, vec![region(&[1, 1], &[1, 1])]));
    }

    #[test]
    fn usual_layouts_of_many_ranks_take_few_rounds_and_knots_are_refused() {
        let n = 20_000;
        let whole = region(&[0, 0], &[n, n]);
        let rows: Vec<_> = (0..n).map(|i| region(&[i, 0], &[1, n])).collect();
        let columns: Vec<_> = (0..n).map(|i| region(&[0, i], &[n, 1])).collect();
        let grid: Vec<_> = (0..n).map(|i| region(&[i / 200 * 200, i % 200 * 100], &[200, 100])).collect();
        for boxes in [rows.clone(), columns.clone(), grid] {
            assert!(coverage(&whole, boxes).unwrap().is_exact());
        }
        let ranges: Vec<_> = (0..n).flat_map(|i| whole.flat_parts(i * n + i..(i + 1) * n + i + 1)).collect();
        assert!(coverage(&whole, ranges).unwrap().is_exact());
        // All rows over all columns: every element twice, in n squared places.
        assert_eq!(coverage(&whole, [rows, columns].concat()), None);
    }
}
