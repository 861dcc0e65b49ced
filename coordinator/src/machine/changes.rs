//! What has changed: so that a heartbeat with nothing new costs what its node's workers cost, not the cluster's.
//!
//! Decisions are level-triggered: they look at all that is known. Most events change nothing but one node, and what was
//! decided about the others still holds. So two things are noted. An event *touches* nodes: their reports, streams,
//! wanted workers or addresses are other than before, and every job looks at these nodes again. A job is *stale* when
//! something changed that may concern any node (its generation, its records, whom it refuses): then all nodes are
//! looked at. Noting too much costs time; noting too little would be a defect, and the tests drive beside every machine
//! a second one that looks at everything after every event.

use std::collections::BTreeSet;

use proto::ids::NodeName;

use super::Cluster;
use super::context::Context;
use super::job::Job;
use super::members::Agent;

/// Nobody.
pub(super) static NOBODY: BTreeSet<NodeName> = BTreeSet::new();

/// Which nodes a job is to look at again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look<'a> {
    /// All of them.
    pub(super) all: bool,
    /// At least these.
    pub(super) touched: &'a BTreeSet<NodeName>,
}

/// What of a job must be worked out anew from all nodes. Each flag is cleared by whoever has done so.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stale {
    /// What it makes of the nodes.
    pub(super) look: bool,
    /// What it asks of the scheduler.
    pub(super) ask: bool,
    /// What its agents are told.
    pub(super) tell: bool,
}

impl Stale {
    /// Nothing is known yet.
    pub(super) const ALL: Self = Self { look: true, ask: true, tell: true };
}

impl<'a> Context<'a> {
    /// The agents to look at again, in the order of their names.
    pub(super) fn seen(&self) -> Vec<(&'a NodeName, &'a Agent)> {
        let (members, touched) = (self.members, self.look.touched);
        if self.look.all {
            return members.iter().collect();
        }
        touched.iter().filter_map(|node| Some((node, members.get(node)?))).collect()
    }
}

impl Job {
    /// Something that may concern any node has changed.
    pub(super) fn unsettle(&mut self) {
        self.stale = Stale::ALL;
    }
}

impl Cluster {
    /// Notes the nodes an event has touched, and those who are told the address of one that has another now.
    pub(super) fn notice(&mut self) {
        self.touched.append(&mut self.members.take_touched());
        for node in self.members.take_moved() {
            for job in self.jobs.values_mut() {
                let Some(live) = &job.live else { continue };
                self.touched.extend(live.group_of(&node).into_iter().flat_map(|group| group.nodes().cloned()));
                if live.restorable.as_ref().is_some_and(|from| from.holds(&node)) {
                    job.unsettle();
                }
            }
        }
    }
}
