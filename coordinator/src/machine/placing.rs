//! From the scheduler's decision to what each job should have.
//!
//! The scheduler is asked anew after every event, but only when something it looks at has changed: most events are
//! heartbeats. A job whose generation is to give slots up is not cut short here; it stops with a checkpoint by itself,
//! and what it frees is given on when it has.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use proto::ids::{JobName, NodeName};

use super::Cluster;
use super::job::Job;
use super::live::Live;
use super::schedule::{OVERDUE, Placement, Request, Share, Site, schedule};

/// The question the scheduler has answered last.
#[derive(Debug, Default)]
pub(super) struct Placed {
    sites: BTreeMap<NodeName, Site>,
    requests: Vec<Request>,
}

impl Cluster {
    /// Schedules: gives every job its wanted workers.
    pub(super) fn place(&mut self, now: Duration) {
        for job in self.jobs.values_mut() {
            let waits = job.active() && job.led && job.live.is_none() && job.want.is_empty();
            job.queued = waits.then_some(job.queued.unwrap_or(now));
            job.overdue = job.queued.is_some_and(|since| now.saturating_sub(since) >= OVERDUE);
        }
        let active = self.order.iter().filter_map(|name| self.jobs.get(name)).filter(|job| job.active() && job.led);
        let requests: Vec<Request> = active.map(Job::request).collect();
        let sites = self.members.sites();
        if (&self.placed.sites, &self.placed.requests) != (&sites, &requests) {
            let mut shares = schedule(&sites, &requests);
            for (name, job) in &mut self.jobs {
                job.receive(shares.remove(name).unwrap_or_default());
            }
            self.placed = Placed { sites, requests };
        }
    }
}

impl Job {
    /// What it asks of the scheduler.
    fn request(&self) -> Request {
        let resources = &self.ledger.spec.resources;
        let mut bound = Placement::new();
        for member in self.live.iter().flat_map(|live| &live.membership.members) {
            *bound.entry(member.node.clone()).or_default() += 1;
        }
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

    fn receive(&mut self, share: Share) {
        (self.want, self.spares, self.yields_to) = (share.workers, share.spares, share.yields_to);
    }

    /// Workers it should have on a node, spares included.
    pub(super) fn wanted_on(&self, node: &NodeName) -> u32 {
        let on = |placement: &Placement| placement.get(node).copied().unwrap_or(0);
        on(&self.want).saturating_add(on(&self.spares))
    }

    /// Why its generation should give slots up, if it should.
    pub(super) fn must_yield(&self, live: &Live) -> Option<Yield> {
        let most = self.ledger.spec.resources.workers.max;
        let world = live.membership.members.len() as u32;
        let kept = |node: &NodeName| self.want.get(node).copied().unwrap_or(0);
        let lost =
            live.membership.members.iter().map(|member| &member.node).find(|node| kept(node) < live.members_on(node));
        let node = lost?;
        Some(if world > most {
            Yield::Shrink { from: world, to: most }
        } else if let Some(job) = &self.yields_to {
            Yield::Preempted(job.clone())
        } else {
            Yield::Leave(node.clone())
        })
    }
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
