//! Geometry against an oracle that looks at one element at a time.

use proptest::prelude::*;

use super::region::{Region, copy_region, flat_regions};

/// A shape of at most 240 elements.
fn shape() -> impl Strategy<Value = Vec<u64>> {
    proptest::collection::vec(1u64..7, 0..5).prop_filter("small", |s| s.iter().product::<u64>() <= 240)
}

fn inside(shape: &[u64]) -> impl Strategy<Value = Region> + use<> {
    let dims: Vec<_> = shape.iter().map(|&n| (0..n).prop_flat_map(move |o| (Just(o), 1..=n - o))).collect();
    dims.prop_map(|dims| {
        let (offsets, lengths) = dims.into_iter().unzip();
        Region::new(offsets, lengths).unwrap()
    })
}

fn shape_and_boxes() -> impl Strategy<Value = (Vec<u64>, Region, Region, Region)> {
    shape().prop_flat_map(|s| (Just(s.clone()), inside(&s), inside(&s), inside(&s)))
}

/// Every index of a box, row by row.
fn indices(region: &Region) -> Vec<Vec<u64>> {
    let mut all = vec![vec![]];
    for d in 0..region.dimensions() {
        all = all.iter().flat_map(|i| region.along(d).map(move |at| [&i[..], &[at]].concat())).collect();
    }
    all
}

fn flat(shape: &[u64], index: &[u64]) -> u64 {
    index.iter().zip(shape).fold(0, |at, (i, n)| at * n + i)
}

/// Whether a flat range is one box: its elements are as many as those of the smallest box around them.
fn is_box(shape: &[u64], range: std::ops::Range<u64>) -> bool {
    let all = indices(&Region::whole(shape));
    let run = &all[range.start as usize..range.end as usize];
    let extent = |d: usize| run.iter().map(|i| i[d]).max().unwrap() - run.iter().map(|i| i[d]).min().unwrap() + 1;
    (0..shape.len()).map(extent).product::<u64>() == run.len() as u64
}

proptest! {
    #[test]
    fn a_range_becomes_the_fewest_boxes((shape, cuts) in shape().prop_flat_map(|s| {
        let n = s.iter().product::<u64>();
        (Just(s), (0..=n, 0..=n))
    })) {
        let range = cuts.0.min(cuts.1)..cuts.0.max(cuts.1);
        let boxes = flat_regions(&shape, range.clone());
        let found: Vec<u64> = boxes.iter().flat_map(indices).map(|i| flat(&shape, &i)).collect();
        prop_assert!(found.iter().copied().eq(range.clone()), "{boxes:?}");
        // The fewest runs that are boxes, by dynamic programming over all ways to cut.
        let n = (range.end - range.start) as usize;
        let mut fewest = vec![0usize; n + 1];
        for end in 1..=n {
            let ways = (0..end).filter(|&from| is_box(&shape, range.start + from as u64..range.start + end as u64));
            fewest[end] = ways.map(|from| fewest[from] + 1).min().unwrap();
        }
        prop_assert_eq!(boxes.len(), fewest[n]);
    }

    #[test]
    fn boxes_meet_where_their_elements_do((_, a, b, _) in shape_and_boxes()) {
        let common: Vec<_> = indices(&a).into_iter().filter(|i| indices(&b).contains(i)).collect();
        prop_assert_eq!(a.intersect(&b).map_or(vec![], |c| indices(&c)), common.clone());
        prop_assert_eq!(a.contains(&b), common.len() as u64 == b.elements());
    }

    #[test]
    fn runs_are_the_memory_of_a_box((_, a, b, _) in shape_and_boxes()) {
        let Some(part) = a.intersect(&b) else { return Ok(()) };
        let runs: Vec<_> = a.runs(&part).unwrap().collect();
        let place = |i: &Vec<u64>| indices(&a).iter().position(|j| j == i).unwrap() as u64;
        let wanted: Vec<u64> = indices(&part).iter().map(place).collect();
        prop_assert!(runs.iter().cloned().flatten().eq(wanted));
        // None could be joined with the next.
        prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start));
    }

    #[test]
    fn a_copy_moves_what_is_common_and_nothing_else(
        (shape, from, to, part) in shape_and_boxes(), size in 1u64..9,
    ) {
        let Some(part) = from.intersect(&to).and_then(|c| c.intersect(&part)) else { return Ok(()) };
        let value = |i: &[u64]| (0..size).map(|byte| (flat(&shape, i) * size + byte + 1) as u8).collect::<Vec<_>>();
        let src: Vec<u8> = indices(&from).iter().flat_map(|i| value(i)).collect();
        let mut dst = vec![0; (to.elements() * size) as usize];
        copy_region((&src, &from), (&mut dst, &to), &part, size).unwrap();
        for (i, found) in indices(&to).iter().zip(dst.chunks(size as usize)) {
            let wanted = if indices(&part).contains(i) { value(i) } else { vec![0; size as usize] };
            prop_assert_eq!(found, &wanted[..]);
        }
    }

    #[test]
    fn a_cut_is_the_same_memory((_, a, _, _) in shape_and_boxes(), parts in 0u64..9) {
        let cut = a.cut(parts);
        let runs: Vec<_> = cut.iter().flat_map(|c| a.runs(c).unwrap()).collect();
        prop_assert_eq!(runs.len(), cut.len());
        prop_assert!(runs.into_iter().flatten().eq(0..a.elements()));
    }
}

#[test]
fn no_box_is_empty_deep_or_overflows() {
    let wrong: [(&[u64], &[u64]); 6] = [
        (&[0], &[0]),
        (&[0], &[]),
        (&[u64::MAX], &[1]),
        (&[0; 17], &[1; 17]),
        (&[0, 0], &[1 << 40, 1 << 40]),
        (&[1], &[u64::MAX]),
    ];
    for (offsets, lengths) in wrong {
        assert!(Region::new(offsets.to_vec(), lengths.to_vec()).is_err(), "{offsets:?} {lengths:?}");
        let json = serde_json::to_string(&(offsets, lengths)).unwrap();
        assert!(serde_json::from_str::<Region>(&json).is_err(), "{json}");
    }
    let (a, b) = (Region::new(vec![0], vec![2]).unwrap(), Region::new(vec![1], vec![2]).unwrap());
    let mut dst = [0; 2];
    assert!(copy_region((&[0; 2], &a), (&mut dst, &b), &a, 1).is_err(), "a part outside its target");
    assert!(copy_region((&[0; 3], &a), (&mut dst, &a), &a, 1).is_err(), "a buffer of another size");
}
