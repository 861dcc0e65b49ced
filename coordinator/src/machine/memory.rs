//! What a job could be restored from now: parity groups, inventories, and the newest step of which every block can be
//! had (§8, §9).
//!
//! Agents report what they hold, self-describing: each snapshot says its generation, step, rank and world size, each
//! parity the group it was made in. So nothing needs to be remembered here, and a new coordinator decides as the old
//! one would have.

use std::collections::{BTreeMap, BTreeSet};

use checkpoint_store::parity::{Layout, MAX_GROUP};
use proto::ids::{Generation, NodeName, Rank, Step, WorldSize};

/// Nodes that hold parity of one another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Each with its ranks, ascending; the order decides who holds what.
    pub members: Vec<(NodeName, Vec<Rank>)>,
    /// How many may be lost at once.
    pub parities: usize,
}

impl Group {
    /// Its nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.members.iter().map(|(node, _)| node)
    }
}

/// A step of a generation.
pub type Point = (Generation, Step);

/// What one node holds of a job, as its agent says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Of this and lower generations the list is final.
    pub fenced: Generation,
    /// Whole shards, and the size of the generation that captured them.
    pub snapshots: BTreeMap<Point, (WorldSize, BTreeSet<Rank>)>,
    /// Parity, and the group it was made in.
    pub parity: BTreeMap<Point, Group>,
    /// Snapshots that found no free slot.
    pub skipped: u64,
}

/// A node's memory, all jobs together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// Bytes that may be used.
    pub budget: u64,
    /// Bytes that are.
    pub used: u64,
}

/// A step in memory that a generation starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemoryPoint {
    /// The generation that captured it.
    pub generation: Generation,
    /// The step.
    pub step: Step,
}

/// A step of which every block can be had, and from whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restorable {
    /// Which step.
    pub point: MemoryPoint,
    /// The size of the generation that captured it.
    pub world: WorldSize,
    /// All its groups; members that lost their snapshots are not in `present`.
    pub groups: Vec<Group>,
    /// The nodes that hold the snapshots of all their ranks, or their group's parity.
    pub present: BTreeSet<NodeName>,
}

impl Restorable {
    /// Whether anything can be read from a node.
    pub fn holds(&self, node: &NodeName) -> bool {
        self.present.contains(node)
    }
}

/// Cuts the nodes of a generation into ⌈N/8⌉ groups whose sizes differ by at most one, the nodes of one failure domain
/// in different groups as far as that goes: losing a domain then costs each group as few members as possible.
pub fn groups(nodes: &BTreeMap<NodeName, (String, Vec<Rank>)>, parities: usize) -> Vec<Group> {
    let mut order: Vec<_> = nodes.iter().collect();
    // A node without a domain is one by itself; dealing is then in the order of names.
    order.sort_by(|(a, (domain_a, _)), (b, (domain_b, _))| (domain_a, a).cmp(&(domain_b, b)));
    let count = order.len().div_ceil(MAX_GROUP).max(1);
    let mut groups = vec![vec![]; count];
    for (at, (node, (_, ranks))) in order.into_iter().enumerate() {
        groups[at % count].push((node.clone(), ranks.clone()));
    }
    let group = |mut members: Vec<(NodeName, Vec<Rank>)>| {
        members.sort();
        let parities = parities.min(members.len().saturating_sub(1));
        Group { members, parities }
    };
    groups.into_iter().filter(|members| !members.is_empty()).map(group).collect()
}

/// The newest step that `allowed` lets through and of which every block can be had.
pub fn newest(
    inventories: &BTreeMap<&NodeName, &Inventory>,
    allowed: impl Fn(MemoryPoint) -> bool,
) -> Option<Restorable> {
    let mut points: Vec<Point> = inventories.values().flat_map(|held| held.snapshots.keys().copied()).collect();
    points.sort_unstable_by_key(|(generation, step)| (*step, *generation));
    points.dedup();
    let point = |(generation, step)| MemoryPoint { generation, step };
    points.into_iter().rev().map(point).filter(|point| allowed(*point)).find_map(|point| restorable(inventories, point))
}

/// Whether every block of a step can be had, and how.
fn restorable(inventories: &BTreeMap<&NodeName, &Inventory>, point: MemoryPoint) -> Option<Restorable> {
    let key = (point.generation, point.step);
    let held = |node: &NodeName| inventories.get(node).and_then(|held| held.snapshots.get(&key));
    let world = inventories.values().find_map(|inventory| inventory.snapshots.get(&key)).map(|(world, _)| *world)?;
    let mut groups: BTreeSet<Group> = inventories.values().filter_map(|held| held.parity.get(&key)).cloned().collect();
    let grouped: BTreeSet<NodeName> =
        groups.iter().flat_map(|group| group.members.iter().map(|(node, _)| node.clone())).collect();
    // Nodes of a group without parity, or alone, stand for themselves.
    for (node, inventory) in inventories {
        if let Some((_, ranks)) = inventory.snapshots.get(&key).filter(|_| !grouped.contains(*node)) {
            let members = vec![((*node).clone(), ranks.iter().copied().collect())];
            groups.insert(Group { members, parities: 0 });
        }
    }
    let whole = |(node, ranks): &(NodeName, Vec<Rank>)| {
        held(node).is_some_and(|(of, have)| *of == world && ranks.iter().all(|rank| have.contains(rank)))
    };
    let (mut covered, mut present) = (BTreeSet::new(), BTreeSet::new());
    for group in &groups {
        let has: Vec<(bool, bool)> = group
            .members
            .iter()
            .map(|member| {
                let parity = inventories.get(&member.0).is_some_and(|held| held.parity.get(&key) == Some(group));
                (whole(member), parity)
            })
            .collect();
        let recoverable =
            Layout::new(group.members.len(), group.parities, 1).is_some_and(|layout| layout.recoverable(&has));
        for (member, (payload, parity)) in group.members.iter().zip(&has) {
            if *payload || *parity {
                present.insert(member.0.clone());
            }
            if *payload || recoverable {
                covered.extend(member.1.iter().copied());
            }
        }
    }
    let all = world.ranks().all(|rank| covered.contains(&rank));
    all.then(|| Restorable { point, world, groups: groups.into_iter().collect(), present })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(at: usize) -> NodeName {
        NodeName::new(format!("n{at:02}")).unwrap()
    }

    fn nodes(count: usize, domains: usize) -> BTreeMap<NodeName, (String, Vec<Rank>)> {
        (0..count).map(|at| (node(at), (format!("d{}", at % domains), vec![Rank::new(at as u32)]))).collect()
    }

    /// What each node holds of steps up to `steps`, all complete.
    fn inventories(groups: &[Group], world: usize, steps: u64) -> BTreeMap<NodeName, Inventory> {
        let mut all = BTreeMap::new();
        for group in groups {
            for (node, ranks) in &group.members {
                let mut held = Inventory::default();
                for step in 1..=steps {
                    let key = (Generation::new(1), Step::new(step));
                    let world = WorldSize::new(world as u32).unwrap();
                    held.snapshots.insert(key, (world, ranks.iter().copied().collect()));
                    if group.parities > 0 {
                        held.parity.insert(key, group.clone());
                    }
                }
                all.insert(node.clone(), held);
            }
        }
        all
    }

    fn newest_of(all: &BTreeMap<NodeName, Inventory>) -> Option<Restorable> {
        newest(&all.iter().collect(), |_| true)
    }

    #[test]
    fn the_newest_step_that_all_can_make_is_chosen() {
        let groups = groups(&nodes(3, 3), 1);
        let mut all = inventories(&groups, 3, 7);
        // One node is a step behind with its parity: with all there that does not matter.
        let newest = (Generation::new(1), Step::new(7));
        all.get_mut(&node(1)).unwrap().parity.remove(&newest);
        assert_eq!(newest_of(&all).unwrap().point.step.get(), 7);
        // With a node lost it does.
        all.remove(&node(0));
        let chosen = newest_of(&all).unwrap();
        assert_eq!(chosen.point.step.get(), 6);
        assert_eq!(chosen.present, BTreeSet::from([node(1), node(2)]));
        all.remove(&node(2));
        assert_eq!(newest_of(&all), None, "two of a group are lost");
    }

    #[test]
    fn a_node_alone_has_what_it_holds_and_no_more() {
        let groups = groups(&nodes(1, 1), 1);
        assert_eq!(groups[0].parities, 0);
        let all = inventories(&groups, 1, 3);
        assert_eq!(newest_of(&all).unwrap().point.step.get(), 3);
        let two = inventories(&groups, 2, 3);
        assert_eq!(newest_of(&two), None, "rank 1 is nowhere");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn groups_are_even_and_spread_over_domains(count in 1usize..70, domains in 1usize..12) {
            let nodes = nodes(count, domains);
            let groups = groups(&nodes, 1);
            prop_assert_eq!(groups.len(), count.div_ceil(MAX_GROUP));
            let sizes: Vec<usize> = groups.iter().map(|group| group.members.len()).collect();
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
            prop_assert_eq!(sizes.iter().sum::<usize>(), count);
            // Of one domain no group has more than its even share, rounded up, and one for where the dealing begins.
            for domain in 0..domains {
                let of = |group: &Group| {
                    group.members.iter().filter(|(node, _)| nodes[node].0 == format!("d{domain}")).count()
                };
                let most = groups.iter().map(of).max().unwrap();
                let total: usize = groups.iter().map(of).sum();
                prop_assert!(most <= total.div_ceil(groups.len()));
            }
        }

        /// As many nodes of each group lost as it has parities: everything can still be had.
        #[test]
        fn as_many_may_be_lost_as_there_are_parities(count in 2usize..30, parities in 1usize..4, seed in any::<u64>()) {
            let groups = groups(&nodes(count, count), parities);
            let mut all = inventories(&groups, count, 2);
            for (at, group) in groups.iter().enumerate() {
                for lost in 0..group.parities {
                    let which = (seed as usize).wrapping_add(at * 7 + lost) % group.members.len();
                    all.remove(&group.members[which].0);
                }
            }
            let chosen = newest_of(&all);
            if all.is_empty() {
                prop_assert!(chosen.is_none());
            } else {
                prop_assert_eq!(chosen.map(|chosen| chosen.point.step.get()), Some(2));
            }
        }
    }
}
