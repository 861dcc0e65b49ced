//! Who writes what: replicas once, by the least-loaded holder, and the same plan on every rank.
//!
//! Each rank describes the boxes it holds. The same box in several descriptions is one replica set; it is written once.
//! Large sets are first cut into runs of rows, so that not even one huge replicated tensor weighs on one rank. Then
//! sets are given out, those with the fewest holders first (they have the least choice), among them the largest first,
//! each to the holder with the fewest bytes so far. It is a pure function of the descriptions: every rank that knows
//! them all computes the same plan, and nobody has to send it.
//!
//! The boxes must cover every tensor exactly once; holes and overlaps are refused by name and place.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use proto::ids::Rank;
use serde::{Deserialize, Serialize};

use super::catalog::{BoxPiece, Catalog};
use super::coverage::coverage;
use super::region::Region;
use crate::digest::BlockHash;
use crate::error::StoreError;
use crate::scalar::Encoder;

/// Most pieces of one checkpoint, over all ranks.
pub const MAX_PIECES: usize = 1 << 22;
/// A replicated box larger than the mean load divided by this is cut.
const CUTS_PER_MEAN: u64 = 16;
/// But not into pieces smaller than this.
const MIN_CUT: u64 = 256 << 10;
/// Separates these hashes from every other use of BLAKE3.
const DOMAIN: &str = "cairn tensor save plan 1";

/// What one rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Whose it is.
    pub rank: Rank,
    /// The boxes, in the rank's own order.
    pub pieces: Vec<BoxPiece>,
}

impl Description {
    /// A hash over the catalog (names, types, shapes) and this rank's boxes.
    pub fn hash(&self, catalog: &Catalog) -> BlockHash {
        let mut out = Encoder::default();
        out.text(DOMAIN).len(catalog.tensors().len());
        for tensor in catalog.tensors() {
            out.text(&tensor.name).text(tensor.dtype.name()).u64s(&tensor.shape);
        }
        out.u32(self.rank.get()).len(self.pieces.len());
        for piece in &self.pieces {
            out.text(&piece.tensor).u64s(piece.offsets()).u64s(piece.lengths());
        }
        BlockHash::of(&out.take())
    }
}

/// The identity of a plan: the hash over all ranks' [`Description::hash`]es.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PlanKey(BlockHash);

impl PlanKey {
    /// The key of the plan for these descriptions, given by their hashes in the order of the ranks.
    pub fn of(descriptions: &[BlockHash]) -> Self {
        let mut out = Encoder::default();
        out.text(DOMAIN).len(descriptions.len());
        for hash in descriptions {
            out.raw(hash.as_bytes());
        }
        Self(BlockHash::of(&out.take()))
    }
}

/// One box that a rank is to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Which of the rank's described pieces it is part of.
    pub piece: usize,
    /// That piece's box.
    pub held: Region,
    /// The tensor, by its place in the catalog.
    pub tensor: usize,
    /// The box to write: all of the piece, or a run of its rows.
    pub region: Region,
}

/// Who writes what in a save.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavePlan {
    key: PlanKey,
    catalog: Catalog,
    shares: Vec<Vec<Share>>,
    loads: Vec<u64>,
}

/// A box and who has it: rank and place in its description.
struct Replicas<'a> {
    tensor: usize,
    held: &'a Region,
    region: Region,
    bytes: u64,
    holders: &'a [(usize, usize)],
}

impl SavePlan {
    /// Plans a save of all tensors of the catalog from what each rank holds, rank 0 first.
    pub fn new(catalog: &Catalog, descriptions: &[Description]) -> Result<Self, StoreError> {
        let holders = holders(catalog, descriptions)?;
        check_coverage(catalog, holders.keys().map(|&(tensor, region)| (tensor, region)))?;
        let ranks = descriptions.len();
        let limit = (catalog.bytes() / ranks as u64 / CUTS_PER_MEAN).max(MIN_CUT);
        let mut sets = vec![];
        for (&(tensor, held), holders) in &holders {
            let size = catalog.tensors()[tensor].dtype.size();
            let parts = if holders.len() > 1 { (held.elements() * size).div_ceil(limit) } else { 1 };
            sets.extend(held.cut(parts).into_iter().map(|region| {
                let bytes = region.elements() * size;
                Replicas { tensor, held, region, bytes, holders }
            }));
        }
        sets.sort_by_key(|set| (set.holders.len(), Reverse(set.bytes)));
        let (mut shares, mut loads) = (vec![vec![]; ranks], vec![0; ranks]);
        for Replicas { tensor, held, region, bytes, holders } in sets {
            let lightest = holders.iter().min_by_key(|(rank, _)| (loads[*rank], *rank));
            let &(rank, piece) = lightest.ok_or_else(|| StoreError::Bug("a box without a holder".into()))?;
            loads[rank] += bytes;
            shares[rank].push(Share { piece, held: held.clone(), tensor, region });
        }
        for own in &mut shares {
            // Wide elements first, so that each entry of the object is aligned to its elements.
            own.sort_by(|a: &Share, b| {
                let key = |s: &Share| (Reverse(catalog.tensors()[s.tensor].dtype.size()), s.tensor);
                (key(a), &a.region).cmp(&(key(b), &b.region))
            });
        }
        let hashes: Vec<_> = descriptions.iter().map(|d| d.hash(catalog)).collect();
        Ok(Self { key: PlanKey::of(&hashes), catalog: catalog.clone(), shares, loads })
    }

    /// Its identity.
    pub fn key(&self) -> PlanKey {
        self.key
    }

    /// The tensors.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.shares.len()
    }

    /// What a rank writes, in the order of its object.
    pub fn shares(&self, rank: Rank) -> &[Share] {
        self.shares.get(rank.index()).map_or(&[], Vec::as_slice)
    }

    /// Bytes that each rank writes.
    pub fn bytes(&self) -> &[u64] {
        &self.loads
    }

    /// The most bytes of a rank over the mean: 1 is perfect balance.
    pub fn max_over_mean(&self) -> f64 {
        max_over_mean(&self.loads)
    }
}

pub(super) fn max_over_mean(loads: &[u64]) -> f64 {
    let (most, sum) = (loads.iter().copied().max().unwrap_or(0), loads.iter().sum::<u64>());
    if sum == 0 { 1.0 } else { most as f64 * loads.len() as f64 / sum as f64 }
}

/// Every distinct box, as tensor and region, with its holders, as rank and place in its description.
type Holders<'a> = BTreeMap<(usize, &'a Region), Vec<(usize, usize)>>;

/// Every distinct box with its holders, in order.
fn holders<'a>(catalog: &Catalog, descriptions: &'a [Description]) -> Result<Holders<'a>, StoreError> {
    let wrong = |why: String| Err(StoreError::Input(why));
    if descriptions.is_empty() {
        return wrong("a save needs the description of at least one rank".into());
    }
    let mut all = Holders::new();
    let mut pieces = 0usize;
    for (rank, description) in descriptions.iter().enumerate() {
        if description.rank.index() != rank {
            return wrong(format!("the description of rank {} stands where rank {rank}'s belongs", description.rank));
        }
        pieces = pieces.saturating_add(description.pieces.len());
        if pieces > MAX_PIECES {
            return wrong(format!("the ranks describe more than {MAX_PIECES} boxes"));
        }
        for (index, piece) in description.pieces.iter().enumerate() {
            let found = catalog.locate(piece).map_err(|e| StoreError::Input(format!("rank {rank}: {e}")))?;
            let holders = all.entry(found).or_default();
            if holders.last().is_some_and(|&(last, _)| last == rank) {
                return wrong(format!("rank {rank} lists {} of tensor {:?} twice", piece.region, piece.tensor));
            }
            holders.push((rank, index));
        }
    }
    Ok(all)
}

/// Checks that boxes, which lie inside their tensors, hold every element of every tensor exactly once.
pub(super) fn check_coverage<'a>(
    catalog: &Catalog,
    boxes: impl Iterator<Item = (usize, &'a Region)>,
) -> Result<(), StoreError> {
    let mut by_tensor = vec![vec![]; catalog.tensors().len()];
    for (tensor, region) in boxes {
        by_tensor[tensor].push(region.clone());
    }
    for (tensor, boxes) in catalog.tensors().iter().zip(by_tensor) {
        let (name, count) = (&tensor.name, boxes.len());
        let found = coverage(&Region::whole(&tensor.shape), boxes).ok_or_else(|| {
            StoreError::Input(format!("tensor {name:?}: its {count} boxes are too entangled to be checked"))
        })?;
        if let Some(hole) = found.holes.first() {
            return Err(StoreError::Input(format!("tensor {name:?}: nobody holds {hole}")));
        }
        if let Some(overlap) = found.overlaps.first() {
            return Err(StoreError::Input(format!("tensor {name:?}: different boxes overlap in {overlap}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::{ElementType, TensorInfo};

    fn catalog(shapes: &[&[u64]]) -> Catalog {
        let tensor = |(i, s): (usize, &&[u64])| TensorInfo::new(format!("t{i}"), ElementType::Bf16, *s);
        Catalog::new(shapes.iter().enumerate().map(tensor).collect()).unwrap()
    }

    type Held<'a> = (&'a str, [u64; 2], [u64; 2]);

    fn described(held: &[Vec<Held<'_>>]) -> Vec<Description> {
        let rank = |(rank, boxes): (usize, &Vec<Held<'_>>)| Description {
            rank: Rank::new(rank as u32),
            pieces: boxes.iter().map(|(name, o, n)| BoxPiece::new(*name, o, n).unwrap()).collect(),
        };
        held.iter().enumerate().map(rank).collect()
    }

    #[test]
    fn replicas_are_written_once_and_evenly() {
        // A large tensor on all eight ranks, and one that only two ranks hold.
        let catalog = catalog(&[&[4096, 1024], &[1024, 1024]]);
        let whole = ("t0", [0, 0], [4096, 1024]);
        let mut held = vec![vec![whole]; 8];
        held[2].push(("t1", [0, 0], [1024, 1024]));
        held[5].push(("t1", [0, 0], [1024, 1024]));
        let plan = SavePlan::new(&catalog, &described(&held)).unwrap();
        assert_eq!(plan.bytes().iter().sum::<u64>(), catalog.bytes());
        assert!(plan.max_over_mean() < 1.1, "{:?}", plan.bytes());
        let all: Vec<_> = (0..8).flat_map(|r| plan.shares(Rank::new(r))).map(|s| (s.tensor, &s.region)).collect();
        check_coverage(&catalog, all.iter().copied()).unwrap();
        // The same on every rank, and another for other descriptions.
        assert_eq!(SavePlan::new(&catalog, &described(&held)).unwrap(), plan);
        held[3].clear();
        assert_ne!(SavePlan::new(&catalog, &described(&held)).unwrap().key(), plan.key());
    }

    #[test]
    fn holes_and_overlaps_are_named() {
        let catalog = catalog(&[&[4, 4]]);
        let cases = [
            (vec![vec![("t0", [0, 0], [2, 4])], vec![("t0", [3, 0], [1, 4])]], "nobody holds box [2, 0]+[1, 4]"),
            (vec![vec![("t0", [0, 0], [4, 4])], vec![("t0", [1, 1], [2, 2])]], "overlap in box [1, 1]+[2, 2]"),
            (vec![vec![("t0", [0, 0], [4, 4]); 2]], "rank 0 lists box [0, 0]+[4, 4] of tensor \"t0\" twice"),
            (vec![vec![("t0", [0, 0], [4, 5])]], "outside tensor \"t0\""),
            (vec![vec![("x", [0, 0], [4, 4])]], "no tensor \"x\""),
            (vec![vec![]], "nobody holds"),
            (vec![], "at least one rank"),
        ];
        for (held, wanted) in cases {
            let error = SavePlan::new(&catalog, &described(&held)).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
