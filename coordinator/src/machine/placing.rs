//! From the scheduler's decision to what each job should have.
//!
//! The scheduler is asked anew after every event, but only when something it looks at has changed: most events are
//! heartbeats, after which not even the question is put together. A job whose generation is to give slots up is not cut
//! short here; it stops with a checkpoint by itself, and what it frees is given on when it has.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use proto::ids::{JobName, NodeName};

use super::Cluster;
use super::job::Job;
use super::live::Live;
use super::schedule::{OVERDUE, Placement, Request, Share, Site, schedule, total};

/// The question the scheduler has answered last.
#[derive(Debug, Default)]
pub(super) struct Placed {
    sites: BTreeMap<NodeName, Site>,
    requests: Vec<Request>,
}

impl Cluster {
    /// Schedules: gives every job its wanted workers.
    pub(super) fn place(&mut self, now: Duration) {
        let mut anew = self.members.take_resited() | self.admission.take_changed();
        for job in self.jobs.values_mut() {
            let waits = job.active() && job.led && job.live.is_none() && job.want.is_empty();
            job.queued = waits.then_some(job.queued.unwrap_or(now));
            let overdue = job.queued.is_some_and(|since| now.saturating_sub(since) >= OVERDUE);
            anew |= std::mem::take(&mut job.stale.ask) || job.overdue != overdue;
            job.overdue = overdue;
        }
        if !anew {
            return;
        }
        let active = self.order.iter().filter_map(|name| self.jobs.get(name)).filter(|job| job.active() && job.led);
        let requests: Vec<Request> = active.map(Job::request).collect();
        if requests.is_empty() && self.placed.requests.is_empty() {
            // Nodes come and go while nobody wants them.
            return;
        }
        let mut sites = self.members.sites();
        sites.retain(|node, _| !self.admission.bars(node));
        if (&self.placed.sites, &self.placed.requests) != (&sites, &requests) {
            let mut shares = schedule(&sites, &requests);
            for (name, job) in &mut self.jobs {
                job.receive(shares.remove(name).unwrap_or_default(), &mut self.touched);
            }
            self.placed = Placed { sites, requests };
        }
    }
}

impl Job {
    /// What it asks of the scheduler.
    fn request(&self) -> Request {
        let resources = &self.ledger.spec.resources;
        let bound: Placement = self.live.iter().flat_map(Live::nodes).collect();
        // Where it trains, the node fits it, whatever a further worker there has said.
        let refused: BTreeSet<NodeName> =
            self.refused.keys().filter(|node| !bound.contains_key(*node)).cloned().collect();
        Request {
            job: self.name.clone(),
            priority: resources.priority,
            min: resources.workers.min,
            max: resources.workers.max,
            spares: resources.spares,
            refused,
            holds: if self.live.is_some() { bound.clone() } else { self.want.clone() },
            reserve: self.spares.clone(),
            bound,
            firm: self.live.as_ref().is_some_and(Live::adopting),
            overdue: self.overdue,
        }
    }

    fn receive(&mut self, share: Share, touched: &mut BTreeSet<NodeName>) {
        let same = self.want == share.workers && self.spares == share.spares && self.yields_to == share.yields_to;
        if same {
            return;
        }
        differing(&self.want, &share.workers, touched);
        differing(&self.spares, &share.spares, touched);
        (self.want, self.spares, self.yields_to) = (share.workers, share.spares, share.yields_to);
        // What it holds now is part of its next question.
        self.stale.ask = true;
        self.fit = None;
    }

    /// How well its generation fits what it is to have.
    pub(super) fn fit(&mut self) -> Option<&Fit> {
        let live = self.live.as_ref()?;
        if self.fit.is_none() {
            self.fit = Some(Fit { yields: self.must_yield(live), wanted: total(&self.want) });
        }
        self.fit.as_ref()
    }

    /// Workers it should have on a node, spares included.
    pub(super) fn wanted_on(&self, node: &NodeName) -> u32 {
        let on = |placement: &Placement| placement.get(node).copied().unwrap_or(0);
        on(&self.want).saturating_add(on(&self.spares))
    }

    /// Why its generation should give slots up, if it should.
    fn must_yield(&self, live: &Live) -> Option<Yield> {
        let most = self.ledger.spec.resources.workers.max;
        let world = live.membership.members.len() as u32;
        let kept = |node: &NodeName| self.want.get(node).copied().unwrap_or(0);
        // The node of the lowest rank that has to go.
        let lost = live.nodes().filter(|(node, members)| kept(node) < *members);
        let (node, _) = lost.min_by_key(|(node, _)| live.ranks_on(node).first().copied())?;
        Some(if world > most {
            Yield::Shrink { from: world, to: most }
        } else if let Some(job) = &self.yields_to {
            Yield::Preempted(job.clone())
        } else {
            Yield::Leave(node)
        })
    }
}

/// Notes the nodes that have another number of workers in one placement than in the other.
fn differing(before: &Placement, after: &Placement, touched: &mut BTreeSet<NodeName>) {
    let changed = |of: &Placement, other: &Placement| -> Vec<NodeName> {
        of.iter().filter(|(node, workers)| other.get(*node) != Some(workers)).map(|(node, _)| node.clone()).collect()
    };
    touched.extend(changed(before, after));
    touched.extend(changed(after, before));
}

/// A live generation beside what the scheduler has given its job since.
#[derive(Debug)]
pub(super) struct Fit {
    /// Why it should give slots up, if it should.
    pub(super) yields: Option<Yield>,
    /// Workers the job is to have.
    pub(super) wanted: u32,
}

/// Why a generation gives slots up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Yield {
    /// It is larger than it may be.
    Shrink {
        /// Its size.
        from: u32,
        /// The size it may have.
        to: u32,
    },
    /// Another job needs them.
    Preempted(JobName),
    /// A node takes no more work.
    Leave(NodeName),
}

impl fmt::Display for Yield {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shrink { from, to } => write!(f, "shrinking from {from} to {to} workers"),
            Self::Preempted(job) => write!(f, "giving slots up for job {job}"),
            Self::Leave(node) => write!(f, "node {node} takes no more work"),
        }
    }
}
