//! Placement: which node runs how many workers of which job.
//!
//! A pure function of the nodes' slots, the jobs' wishes and what they hold now. A job starts as a gang (at least `min`
//! workers or none), earlier submitted jobs first; what it holds is never taken away for another job; what nobody
//! waits for lets running jobs grow up to `max`. Workers spread over the nodes with the most free slots, so that losing
//! one node costs as few of them as possible.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::{JobName, NodeName};

/// Workers per node of one job; nodes without workers are left out.
pub(super) type Placement = BTreeMap<NodeName, u32>;

/// What one job asks for. The order of a slice of these is the order of submission.
#[derive(Debug, Clone)]
pub(super) struct Request {
    /// The job.
    pub job: JobName,
    /// Fewer workers than this and it waits.
    pub min: u32,
    /// More than this it never uses.
    pub max: u32,
    /// Nodes that turned out not to fit the job.
    pub refused: BTreeSet<NodeName>,
    /// What it holds now; empty while it is queued.
    pub holds: Placement,
}

/// How many workers a placement has.
pub(super) fn total(placement: &Placement) -> u32 {
    placement.values().sum()
}

/// Places jobs on nodes (`slots` by node). A job that must wait has an empty placement.
pub(super) fn schedule(slots: &BTreeMap<NodeName, u32>, requests: &[Request]) -> BTreeMap<JobName, Placement> {
    let mut free = slots.clone();
    let mut placements: BTreeMap<JobName, Placement> = BTreeMap::new();
    for request in requests {
        placements.insert(request.job.clone(), keep(&mut free, request));
    }
    // Those that hold less than their minimum come first: waiting jobs, and jobs that lost a node.
    for waiting in [true, false] {
        for request in requests {
            let Some(placement) = placements.get_mut(&request.job) else { continue };
            if waiting == (total(placement) < request.min) {
                spread(&mut free, placement, request);
            }
        }
    }
    for request in requests {
        let Some(placement) = placements.get_mut(&request.job) else { continue };
        if total(placement) < request.min {
            placement.clear();
        }
    }
    placements
}

/// What a job may keep of what it holds: on nodes that still exist and fit, and no more than its maximum.
fn keep(free: &mut BTreeMap<NodeName, u32>, request: &Request) -> Placement {
    let mut kept = Placement::new();
    let mut left = request.max;
    for (node, &held) in &request.holds {
        let Some(slots) = free.get_mut(node).filter(|_| !request.refused.contains(node)) else { continue };
        let workers = held.min(*slots).min(left);
        if workers > 0 {
            *slots -= workers;
            left -= workers;
            kept.insert(node.clone(), workers);
        }
    }
    kept
}

/// Adds workers one by one where most slots are free, up to the maximum; a gang that cannot be met takes nothing.
fn spread(free: &mut BTreeMap<NodeName, u32>, placement: &mut Placement, request: &Request) {
    let fitting = |free: &BTreeMap<NodeName, u32>| -> u32 {
        free.iter().filter(|(node, _)| !request.refused.contains(node)).map(|(_, slots)| slots).sum()
    };
    if total(placement).saturating_add(fitting(free)) < request.min {
        // What it still held goes back: half a gang would only keep slots from others.
        for (node, workers) in std::mem::take(placement) {
            *free.entry(node).or_default() += workers;
        }
        return;
    }
    while total(placement) < request.max {
        let roomiest = free
            .iter_mut()
            .filter(|(node, slots)| **slots > 0 && !request.refused.contains(node))
            // `max_by_key` takes the last of equals; comparing names in reverse makes that the first by name.
            .max_by_key(|(node, slots)| (**slots, std::cmp::Reverse((*node).clone())));
        let Some((node, slots)) = roomiest else { break };
        *slots -= 1;
        *placement.entry(node.clone()).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeName {
        NodeName::new(name).unwrap()
    }

    fn request(job: &str, min: u32, max: u32, holds: &[(&str, u32)]) -> Request {
        let holds = holds.iter().map(|(name, workers)| (node(name), *workers)).collect();
        Request { job: JobName::new(job).unwrap(), min, max, refused: BTreeSet::new(), holds }
    }

    fn sizes(slots: &[(&str, u32)], requests: &[Request]) -> Vec<Vec<u32>> {
        let slots = slots.iter().map(|(name, slots)| (node(name), *slots)).collect();
        let placements = schedule(&slots, requests);
        requests.iter().map(|request| placements[&request.job].values().copied().collect()).collect()
    }

    #[test]
    fn workers_spread_over_nodes() {
        assert_eq!(sizes(&[("a", 4), ("b", 4)], &[request("x", 1, 5, &[])]), [vec![3, 2]]);
        assert_eq!(sizes(&[("a", 1), ("b", 4)], &[request("x", 1, 3, &[])]), [vec![3]]);
    }

    #[test]
    fn a_gang_is_all_or_nothing_and_later_jobs_use_the_rest() {
        let requests = [request("x", 4, 8, &[]), request("y", 1, 2, &[])];
        assert_eq!(sizes(&[("a", 3)], &requests), [vec![], vec![2]]);
    }

    #[test]
    fn holders_keep_their_slots_and_grow_only_after_waiting_jobs() {
        let requests = [request("x", 2, 2, &[]), request("y", 1, 4, &[("a", 2)])];
        assert_eq!(sizes(&[("a", 4)], &requests), [vec![2], vec![2]]);
        assert_eq!(sizes(&[("a", 3)], &requests), [vec![], vec![3]]);
    }

    #[test]
    fn a_lost_node_shrinks_the_job_and_a_refused_one_is_not_used() {
        assert_eq!(sizes(&[("b", 2)], &[request("x", 1, 4, &[("a", 2), ("b", 2)])]), [vec![2]]);
        let mut picky = request("x", 1, 4, &[("a", 2)]);
        picky.refused.insert(node("a"));
        assert_eq!(sizes(&[("a", 4), ("b", 1)], &[picky]), [vec![1]]);
    }
}
