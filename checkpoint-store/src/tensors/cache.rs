//! Plans are kept: one vote of hashes tells whether the last one still holds.
//!
//! A plan depends on all ranks' descriptions, which rarely change between saves. So ranks do not send them again: each
//! sends a [`Ballot`] of 64 bytes by whatever collective it has, and [`vote`] says from all ballots whether everyone
//! has the plan for exactly these descriptions. It is a pure function: all ranks decide alike, and a rank that
//! restarted with an empty cache makes everyone plan anew.

use std::sync::Arc;

use super::catalog::Catalog;
use super::plan::{Description, PlanKey, SavePlan};
use crate::digest::BlockHash;

/// What a rank says before a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ballot {
    /// The hash of what it holds now.
    pub description: BlockHash,
    /// The plan it last used for such a description, if it still has it.
    pub plan: Option<PlanKey>,
}

/// What all ballots together say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vote {
    /// Everyone has this plan, and it is the right one.
    Go(PlanKey),
    /// The ranks must exchange descriptions and plan.
    Replan {
        /// Why, for people.
        reason: String,
    },
}

/// Counts the ballots of all ranks, rank 0's first.
pub fn vote(ballots: &[Ballot]) -> Vote {
    let hashes: Vec<_> = ballots.iter().map(|b| b.description).collect();
    let right = PlanKey::of(&hashes);
    let reason = match ballots.iter().enumerate().find(|(_, b)| b.plan != Some(right)) {
        Some((rank, Ballot { plan: None, .. })) => format!("rank {rank} has no plan for what it holds"),
        Some((rank, _)) => format!("rank {rank} last planned with ranks that held something else"),
        None if ballots.is_empty() => "nobody voted".into(),
        None => return Vote::Go(right),
    };
    Vote::Replan { reason }
}

/// The plans that were used last. One that is used moves to the front; the one unused for longest goes first.
#[derive(Debug, Clone)]
pub struct PlanCache {
    capacity: usize,
    /// The rank's own description and the plan; the last one is the newest.
    entries: Vec<(BlockHash, Arc<SavePlan>)>,
}

impl PlanCache {
    /// An empty cache for at least one plan.
    pub fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), entries: vec![] }
    }

    /// The ballot of a rank that holds this.
    pub fn ballot(&self, catalog: &Catalog, held: &Description) -> Ballot {
        let description = held.hash(catalog);
        let found = self.entries.iter().rev().find(|(own, _)| *own == description);
        Ballot { description, plan: found.map(|(_, plan)| plan.key()) }
    }

    /// The plan with this key.
    pub fn get(&mut self, key: PlanKey) -> Option<Arc<SavePlan>> {
        let at = self.entries.iter().position(|(_, plan)| plan.key() == key)?;
        let entry = self.entries.remove(at);
        let plan = entry.1.clone();
        self.entries.push(entry);
        Some(plan)
    }

    /// Keeps a plan under what this rank holds in it.
    pub fn insert(&mut self, catalog: &Catalog, held: &Description, plan: Arc<SavePlan>) {
        self.entries.retain(|(_, other)| other.key() != plan.key());
        if self.entries.len() == self.capacity {
            self.entries.remove(0);
        }
        self.entries.push((held.hash(catalog), plan));
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::Rank;

    use super::*;
    use crate::tensors::{BoxPiece, ElementType, TensorInfo};

    /// Two ranks that cut a tensor at a row.
    fn split(dtype: ElementType, rows: u64, at: u64) -> (Catalog, Vec<Description>) {
        let catalog = Catalog::new(vec![TensorInfo::new("w", dtype, [rows, 3])]).unwrap();
        let held = |rank, first, length| Description {
            rank: Rank::new(rank),
            pieces: vec![BoxPiece::new("w", &[first, 0], &[length, 3]).unwrap()],
        };
        (catalog, vec![held(0, 0, at), held(1, at, rows - at)])
    }

    #[test]
    fn names_types_shapes_and_boxes_all_count() {
        let mut caches = [PlanCache::new(4), PlanCache::new(4)];
        let ballots = |caches: &[PlanCache; 2], (catalog, held): &(Catalog, Vec<Description>)| {
            [0, 1].map(|r| caches[r].ballot(catalog, &held[r]))
        };
        let cases = [split(ElementType::F32, 8, 4), split(ElementType::Bf16, 8, 4), split(ElementType::F32, 8, 5)];
        for case in &cases {
            assert!(matches!(vote(&ballots(&caches, case)), Vote::Replan { .. }));
            let plan = Arc::new(SavePlan::new(&case.0, &case.1).unwrap());
            for (cache, held) in caches.iter_mut().zip(&case.1) {
                cache.insert(&case.0, held, plan.clone());
            }
            assert_eq!(vote(&ballots(&caches, case)), Vote::Go(plan.key()));
        }
        // A rank that restarted, a rank alone, and ranks in another order.
        let good = ballots(&caches, &cases[0]);
        assert!(matches!(vote(&good), Vote::Go(_)));
        caches[1] = PlanCache::new(4);
        assert!(matches!(vote(&ballots(&caches, &cases[0])), Vote::Replan { reason } if reason.contains("rank 1")));
        for other in [&good[..1], &[good[1], good[0]], &[]] {
            assert!(matches!(vote(other), Vote::Replan { .. }));
        }
    }

    #[test]
    fn the_plan_unused_for_longest_goes() {
        let cases: Vec<_> = (1..=3).map(|at| split(ElementType::U8, 4, at)).collect();
        let plans: Vec<_> = cases.iter().map(|(c, held)| Arc::new(SavePlan::new(c, held).unwrap())).collect();
        let mut cache = PlanCache::new(2);
        cache.insert(&cases[0].0, &cases[0].1[0], plans[0].clone());
        cache.insert(&cases[1].0, &cases[1].1[0], plans[1].clone());
        assert!(cache.get(plans[0].key()).is_some());
        cache.insert(&cases[2].0, &cases[2].1[0], plans[2].clone());
        let kept: Vec<_> = plans.iter().map(|plan| cache.get(plan.key()).is_some()).collect();
        assert_eq!(kept, [true, false, true]);
    }
}
