//! Who is where in a generation: indices that are built once, because a membership never changes.
//!
//! With 80,000 ranks on 10,000 nodes no question about one node may walk through all ranks or all groups.

use std::collections::BTreeMap;

use checkpoint_store::shards_before;
use proto::ids::{NodeName, Rank, WorkerId, WorldSize};

use super::ledger::Membership;
use super::memory::{Group, Restorable};

/// The ranks of a membership by node and by worker, ascending.
#[derive(Debug, Default)]
pub(super) struct Ranks {
    by_node: BTreeMap<NodeName, Vec<Rank>>,
    by_worker: BTreeMap<WorkerId, Rank>,
}

impl Ranks {
    /// Of a membership.
    pub(super) fn new(membership: &Membership) -> Self {
        let mut ranks = Self::default();
        for (member, rank) in membership.members.iter().zip(0..) {
            ranks.by_node.entry(member.node.clone()).or_default().push(Rank::new(rank));
            ranks.by_worker.insert(member.worker, Rank::new(rank));
        }
        ranks
    }

    /// Those of a node.
    pub(super) fn on(&self, node: &NodeName) -> &[Rank] {
        self.by_node.get(node).map(Vec::as_slice).unwrap_or_default()
    }

    /// All, by node.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (&NodeName, &[Rank])> {
        self.by_node.iter().map(|(node, ranks)| (node, ranks.as_slice()))
    }

    /// Whether a worker has one.
    pub(super) fn has(&self, worker: WorkerId) -> bool {
        self.by_worker.contains_key(&worker)
    }
}

/// Which parity group each node is in.
#[derive(Debug, Default)]
pub(super) struct Groups {
    all: Vec<Group>,
    of: BTreeMap<NodeName, usize>,
}

impl Groups {
    /// Of these groups.
    pub(super) fn new(all: Vec<Group>) -> Self {
        let mut of = BTreeMap::new();
        for (at, group) in all.iter().enumerate() {
            for node in group.nodes() {
                of.entry(node.clone()).or_insert(at);
            }
        }
        Self { all, of }
    }

    /// All of them.
    pub(super) fn all(&self) -> &[Group] {
        &self.all
    }

    /// A node's.
    pub(super) fn of(&self, node: &NodeName) -> Option<&Group> {
        self.all.get(*self.of.get(node)?)
    }
}

/// A step in memory, and in which of its groups each rank of the generation that captured it is.
#[derive(Debug)]
pub(super) struct Sources {
    from: Restorable,
    groups_of: BTreeMap<Rank, Vec<usize>>,
}

impl Sources {
    /// Of a step that can be had.
    pub(super) fn new(from: Restorable) -> Self {
        let mut groups_of: BTreeMap<Rank, Vec<usize>> = BTreeMap::new();
        for (at, group) in from.groups.iter().enumerate() {
            for rank in group.members.iter().flat_map(|(_, ranks)| ranks) {
                groups_of.entry(*rank).or_default().push(at);
            }
        }
        Self { from, groups_of }
    }

    /// The step.
    pub(super) fn from(&self) -> &Restorable {
        &self.from
    }

    /// Whether anything can be read from a node.
    pub(super) fn holds(&self, node: &NodeName) -> bool {
        self.from.holds(node)
    }

    /// The groups that hold what these ranks of a generation of `world` begin with, in their order.
    pub(super) fn needed(&self, ranks: &[Rank], world: Option<WorldSize>) -> Vec<&Group> {
        let before = |rank: &Rank| world.map(|world| shards_before(*rank, world, self.from.world));
        let shards = ranks.iter().filter_map(before).flatten();
        let groups = shards.filter_map(|rank| self.groups_of.get(&Rank::new(rank)));
        let mut at: Vec<usize> = groups.flatten().copied().collect();
        at.sort_unstable();
        at.dedup();
        at.into_iter().filter_map(|at| self.from.groups.get(at)).collect()
    }
}
