//! From receipts to a complete set: when a step of a generation can become a checkpoint.
//!
//! Each rank's agent sends a receipt once the rank's shard is durable, and repeats it until it is settled. A step is
//! complete when every rank of the generation has sent one. Steps are committed in order; a step that can never be
//! complete (a rank skipped it, a newer one is committed, the generation is over) is settled as not committed, so that
//! agents forget it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proto::ids::{Generation, NodeName, Rank, Step, WorldSize};

/// A rank's word that its shard of a step is durable. What the store needs of it is opaque here.
#[derive(Debug, Clone, PartialEq)]
pub struct ReceiptEntry {
    /// The node to answer.
    pub node: NodeName,
    /// JSON of the store's receipt.
    pub receipt: Arc<[u8]>,
    /// How long the capture held the training thread.
    pub stall: f64,
    /// Seconds from capture to durable upload.
    pub seconds: f64,
    /// When it first arrived.
    pub arrived: Duration,
}

/// Names one receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReceiptName {
    /// The generation.
    pub generation: Generation,
    /// The step.
    pub step: Step,
    /// The rank.
    pub rank: Rank,
}

/// An answer owed to an agent: (node, which receipt, whether its checkpoint is committed).
pub(super) type Settlement = (NodeName, ReceiptName, bool);

/// The receipts of one generation.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    generation: Generation,
    world: Option<WorldSize>,
    sets: BTreeMap<Step, BTreeMap<Rank, ReceiptEntry>>,
    skipped: BTreeSet<Step>,
    committed: BTreeSet<Step>,
}

impl Gathering {
    /// Starts over for a new generation; returns the answers owed for what is dropped.
    pub(super) fn begin(&mut self, generation: Generation, world: WorldSize) -> Vec<Settlement> {
        let owed = self.drop_through(Step::new(u64::MAX));
        *self = Self { generation, world: Some(world), ..Self::default() };
        owed
    }

    /// Stops gathering; returns the answers owed.
    pub(super) fn end(&mut self) -> Vec<Settlement> {
        let owed = self.drop_through(Step::new(u64::MAX));
        *self = Self { generation: self.generation, ..Self::default() };
        owed
    }

    /// The steps this generation has committed, as read from the history.
    pub(super) fn already(&mut self, step: Step) {
        self.committed.insert(step);
    }

    /// Takes a receipt. `Some`: it is settled at once.
    pub(super) fn receive(&mut self, name: ReceiptName, entry: ReceiptEntry) -> Option<Settlement> {
        let settle = |committed| Some((entry.node.clone(), name, committed));
        let in_world = self.world.is_some_and(|world| name.rank.get() < world.get());
        if name.generation != self.generation || !in_world {
            // A later generation cannot be: announcements follow their record. Both are nobody's checkpoint.
            return settle(false);
        }
        if self.committed.contains(&name.step) {
            return settle(true);
        }
        if self.skipped.contains(&name.step) || self.committed.last().is_some_and(|last| *last > name.step) {
            return settle(false);
        }
        self.sets.entry(name.step).or_default().entry(name.rank).or_insert(entry);
        None
    }

    /// A rank did not capture this step. `Some`: first heard of it, with the answers owed to the other ranks.
    pub(super) fn skip(&mut self, generation: Generation, step: Step) -> Option<Vec<Settlement>> {
        if generation != self.generation || self.committed.contains(&step) || !self.skipped.insert(step) {
            return None;
        }
        Some(self.drop_step(step))
    }

    /// The oldest complete step, with its receipts in rank order.
    pub(super) fn complete(&self) -> Option<(Generation, Step, Vec<ReceiptEntry>)> {
        let world = self.world?;
        let (step, set) = self.sets.iter().find(|(_, set)| set.len() == world.count())?;
        Some((self.generation, *step, set.values().cloned().collect()))
    }

    /// The receipts of a step so far, in rank order.
    pub(super) fn receipts(&self, step: Step) -> Vec<ReceiptEntry> {
        self.sets.get(&step).map(|set| set.values().cloned().collect()).unwrap_or_default()
    }

    /// A step is committed: answers owed for it and for older, incomplete ones.
    pub(super) fn committed(&mut self, step: Step) -> Vec<Settlement> {
        self.committed.insert(step);
        self.drop_through(step)
    }

    /// A complete set turned out not to make a checkpoint: answers owed.
    pub(super) fn impossible(&mut self, step: Step) -> Vec<Settlement> {
        self.skipped.insert(step);
        self.drop_step(step)
    }

    fn drop_through(&mut self, step: Step) -> Vec<Settlement> {
        let steps: Vec<_> = self.sets.range(..=step).map(|(step, _)| *step).collect();
        steps.into_iter().flat_map(|step| self.drop_step(step)).collect()
    }

    fn drop_step(&mut self, step: Step) -> Vec<Settlement> {
        let committed = self.committed.contains(&step);
        let set = self.sets.remove(&step).unwrap_or_default();
        let name = |rank| ReceiptName { generation: self.generation, step, rank };
        set.into_iter().map(|(rank, entry)| (entry.node, name(rank), committed)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(generation: u64, step: u64, rank: u32) -> ReceiptName {
        ReceiptName { generation: Generation::new(generation), step: Step::new(step), rank: Rank::new(rank) }
    }

    fn entry() -> ReceiptEntry {
        let node = NodeName::new("n").unwrap();
        ReceiptEntry { node, receipt: Arc::from(&b"{}"[..]), stall: 0.0, seconds: 0.0, arrived: Duration::ZERO }
    }

    fn gathering(world: u32) -> Gathering {
        let mut gathering = Gathering::default();
        assert!(gathering.begin(Generation::new(2), WorldSize::new(world).unwrap()).is_empty());
        gathering
    }

    #[test]
    fn a_step_is_complete_with_all_ranks_and_repeats_change_nothing() {
        let mut gathering = gathering(2);
        assert_eq!(gathering.receive(name(2, 10, 1), entry()), None);
        assert_eq!(gathering.receive(name(2, 10, 1), entry()), None);
        assert!(gathering.complete().is_none());
        assert_eq!(gathering.receive(name(2, 10, 0), entry()), None);
        assert_eq!(gathering.complete().unwrap().1, Step::new(10));
        let owed = gathering.committed(Step::new(10));
        assert_eq!(owed.len(), 2);
        assert!(owed.iter().all(|(_, _, committed)| *committed));
        assert!(gathering.receive(name(2, 10, 0), entry()).unwrap().2);
    }

    #[test]
    fn fenced_foreign_and_skipped_receipts_are_settled_as_lost() {
        let mut gathering = gathering(2);
        for bad in [name(1, 10, 0), name(3, 10, 0), name(2, 10, 2)] {
            assert!(!gathering.receive(bad, entry()).unwrap().2);
        }
        assert_eq!(gathering.receive(name(2, 20, 0), entry()), None);
        assert_eq!(gathering.skip(Generation::new(2), Step::new(20)).unwrap().len(), 1);
        assert!(gathering.skip(Generation::new(2), Step::new(20)).is_none());
        assert!(!gathering.receive(name(2, 20, 1), entry()).unwrap().2);
    }

    #[test]
    fn an_older_incomplete_step_is_given_up_when_a_newer_one_is_committed() {
        let mut gathering = gathering(2);
        gathering.receive(name(2, 10, 0), entry());
        gathering.receive(name(2, 20, 0), entry());
        gathering.receive(name(2, 20, 1), entry());
        assert_eq!(gathering.complete().unwrap().1, Step::new(20));
        let owed = gathering.committed(Step::new(20));
        assert_eq!(owed.iter().filter(|(_, _, committed)| *committed).count(), 2);
        assert_eq!(owed.len(), 3);
        assert!(!gathering.receive(name(2, 10, 1), entry()).unwrap().2);
    }
}
