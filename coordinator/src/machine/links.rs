//! Where a broken exchange lost its bytes.
//!
//! In a ring whose data stop somewhere every rank soon waits for the one before, so all give up alike, and none knows
//! where the break is. But each has counted what it gave to the next rank and what it had from the one before. On a way
//! that works the two counts are the same in the end; on one that is broken more was given than arrived: everybody
//! stands still only because something is missing.

use std::collections::BTreeSet;

use proto::ids::NodeName;

/// Bytes given to the next rank, and had from the one before.
pub(super) type Moved = (u64, u64);

/// Where the bytes were lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Lost {
    /// On the way between two nodes, in the order of their names.
    Between(NodeName, NodeName),
    /// On the ways between a node and several others.
    Around(NodeName),
}

/// Where an exchange among these ranks, in their order, lost its bytes. `None`: they do not say, or it is several
/// places.
pub(super) fn broken(ranks: &[(&NodeName, Option<Moved>)]) -> Option<Lost> {
    let next = |at: usize| (at + 1) % ranks.len();
    let lossy = |at: usize| {
        let ((one, given), (other, had)) = (ranks[at], ranks[next(at)]);
        one != other && given.zip(had).is_some_and(|((sent, _), (_, received))| sent > received)
    };
    let all: Vec<usize> = (0..ranks.len()).filter(|at| lossy(*at)).collect();
    // Behind a break, whoever waits to send may have stopped to receive. Before it, all that came was passed on.
    let starved: Vec<usize> = all.iter().copied().filter(|at| !lossy(next(*at))).collect();
    let ways = if starved.is_empty() { all } else { starved };
    let pair = |at: usize| {
        let (one, other) = (ranks[at].0, ranks[next(at)].0);
        (one.min(other).clone(), one.max(other).clone())
    };
    let pairs: BTreeSet<(NodeName, NodeName)> = ways.into_iter().map(pair).collect();
    let mut rest = pairs.iter();
    let first = rest.next()?;
    if pairs.len() == 1 {
        return Some(Lost::Between(first.0.clone(), first.1.clone()));
    }
    let common = |node: &&NodeName| pairs.iter().all(|(one, other)| one == *node || other == *node);
    [&first.0, &first.1].into_iter().find(common).map(|node| Lost::Around(node.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(ranks: &[(&str, u64, u64)]) -> Option<Lost> {
        let nodes: Vec<NodeName> = ranks.iter().map(|(node, ..)| NodeName::new(*node).unwrap()).collect();
        let moved = ranks.iter().map(|(_, sent, received)| Some((*sent, *received)));
        broken(&nodes.iter().zip(moved).collect::<Vec<_>>())
    }

    fn between(one: &str, other: &str) -> Lost {
        Lost::Between(NodeName::new(one).unwrap(), NodeName::new(other).unwrap())
    }

    #[test]
    fn the_way_that_lost_something_is_named() {
        assert_eq!(lost(&[("a", 30, 20), ("b", 20, 20), ("c", 20, 20)]), Some(between("a", "b")));
        assert_eq!(lost(&[("b", 30, 30), ("a", 20, 30), ("c", 30, 20)]), None, "all arrived");
        // Behind the break the buffers are full.
        assert_eq!(lost(&[("a", 30, 20), ("b", 20, 20), ("c", 25, 20)]), Some(between("a", "b")));
        assert_eq!(lost(&[("a", 30, 20), ("b", 30, 20)]), Some(between("a", "b")), "both ways");
        assert_eq!(lost(&[("a", 30, 30), ("a", 30, 20), ("b", 30, 30)]), None, "not within a node");
    }

    #[test]
    fn a_node_that_reaches_nobody_is_named_and_two_breaks_are_nobodys() {
        let around = Some(Lost::Around(NodeName::new("b").unwrap()));
        assert_eq!(lost(&[("a", 30, 20), ("b", 30, 20), ("c", 30, 20)]), None, "everywhere");
        let apart = [("a", 30, 20), ("b", 20, 20), ("c", 30, 20), ("b", 20, 20), ("d", 20, 20)];
        assert_eq!(lost(&apart), around);
        assert_eq!(lost(&[("a", 30, 20), ("b", 20, 20), ("c", 30, 20), ("d", 20, 20)]), None);
        let (one, other) = (NodeName::new("a").unwrap(), NodeName::new("b").unwrap());
        assert_eq!(broken(&[(&one, None), (&other, Some((9, 0)))]), None, "one has not said");
        assert_eq!(broken(&[]), None);
    }
}
