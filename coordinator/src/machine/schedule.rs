//! Placement: which node runs how many workers of which job.
//!
//! A pure function of the nodes, the jobs' wishes and what they hold now. Its rules, in the order they count:
//!
//! - **Gang.** A job runs with at least `min` workers or with none.
//! - **Priority.** Jobs are served by priority, those of one priority by submission. A job's minimum may take from
//!   jobs of lower priority: first their spares, then what they have beyond their minimum, at last all of it, the
//!   lowest priority and of it the latest submission first, and only if that is enough. Spares and growth take no more
//!   than the first two. Between jobs of one priority nothing is taken.
//! - **Nobody starves.** A job that waits lets others go first where it does not fit, but not for ever: once it is
//!   *overdue*, nothing it could use goes to a job behind it, and jobs of its own priority give back what they have
//!   beyond their minimum. A job that all nodes together could not run holds nobody up.
//! - **Stable.** What a job holds it keeps where it is, whatever happens to other nodes and to jobs that are not above
//!   it.
//! - **Topology.** A job's workers go into as few racks (agents' `--domain`) as possible, so that the ring seldom
//!   crosses one, and there evenly over the nodes, so that each parity group has as many nodes as can be and a lost
//!   node costs few workers. So parity outlives nodes, not a whole rack: from that a job returns by the store.
//!   Nodes without a domain are one rack.
//! - **Spares.** Prepared workers that step in without a wait; on nodes where the job has none, as far as that goes.
//! - **What acts is not cut short.** A slot whose worker is in a generation is free only when that has stopped, with a
//!   checkpoint. Until then who is to have it waits; what it already holds it keeps.

mod board;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{JobName, NodeName};

use board::Board;

/// How long a job may wait before no other may overtake it any more.
pub(super) const OVERDUE: Duration = Duration::from_mins(5);

/// Workers per node of one job; nodes without workers are left out.
pub(super) type Placement = BTreeMap<NodeName, u32>;

/// A node that takes work.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Site {
    /// Workers it can run at once.
    pub slots: u32,
    /// Its rack; empty if it has not said.
    pub rack: String,
}

/// What one job asks for. The order of a slice of these is the order of submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// The job.
    pub job: JobName,
    /// Higher goes first.
    pub priority: i32,
    /// Fewer workers than this and it waits.
    pub min: u32,
    /// More than this it never uses.
    pub max: u32,
    /// Prepared workers it wants beyond those.
    pub spares: u32,
    /// Nodes that turned out not to fit the job.
    pub refused: BTreeSet<NodeName>,
    /// Its workers now: those that act, or those it was given to form a generation.
    pub holds: Placement,
    /// Its spares now.
    pub reserve: Placement,
    /// Its workers that act in a generation and must stop before their slots are free.
    pub bound: Placement,
    /// Not all its workers are heard of yet: nothing about it is decided.
    pub firm: bool,
    /// It has waited long enough.
    pub overdue: bool,
}

/// What one job gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Share {
    /// Its workers. Fewer than act on a node: that generation is to stop.
    pub workers: Placement,
    /// Its spares.
    pub spares: Placement,
    /// For which job it has to give something up.
    pub yields_to: Option<JobName>,
}

/// How many workers a placement has.
pub(super) fn total(placement: &Placement) -> u32 {
    placement.values().fold(0, |sum, workers| sum.saturating_add(*workers))
}

/// Places jobs on nodes. A job that must wait has no workers.
pub(super) fn schedule(sites: &BTreeMap<NodeName, Site>, requests: &[Request]) -> BTreeMap<JobName, Share> {
    let mut order: Vec<&Request> = requests.iter().collect();
    order.sort_by_key(|request| Reverse(request.priority));
    let mut board = Board::new(sites, &order);
    // What a gang that cannot be met gives back may be what one before it lacks.
    while board.gather_all() {}
    let mut start = 0;
    while let Some(first) = order.get(start) {
        let level = order[start..].iter().take_while(|request| request.priority == first.priority).count();
        (start..start + level).for_each(|at| board.reserve(at));
        (start..start + level).for_each(|at| board.grow(at));
        start += level;
    }
    board.grant()
}

impl Board<'_> {
    /// Serves all minimums in order. `true`: some job gave slots back, which others may want.
    fn gather_all(&mut self) -> bool {
        self.unbar();
        (0..self.plans.len()).fold(false, |released, at| self.gather(at) | released)
    }

    /// Brings a job to its minimum, taking from others what it may, or takes back what it has of it. `true`: it gave
    /// something back.
    fn gather(&mut self, at: usize) -> bool {
        let request = self.plans[at].request;
        if request.firm {
            return false;
        }
        self.promote(at, request.min);
        let need = request.min.saturating_sub(total(&self.plans[at].workers));
        if need == 0 {
            return false;
        }
        self.reclaim(at, need);
        if self.room(at) >= need {
            self.fill(at, request.min);
            return false;
        }
        // Half a gang would only keep slots from others.
        let released = self.release_all(at);
        if request.overdue && self.could_ever_fit(at) {
            self.bar(at);
        }
        released
    }

    fn is_placed(&self, at: usize) -> bool {
        let plan = &self.plans[at];
        !plan.request.firm && total(&plan.workers) >= plan.request.min
    }

    /// Gives a placed job its spares.
    fn reserve(&mut self, at: usize) {
        let request = self.plans[at].request;
        while self.is_placed(at) && total(&self.plans[at].spares) < request.spares {
            if !self.add_spare(at) && !self.take_one(at) {
                return;
            }
        }
    }

    /// Lets a placed job grow.
    fn grow(&mut self, at: usize) {
        let request = self.plans[at].request;
        while self.is_placed(at) && total(&self.plans[at].workers) < request.max {
            self.fill(at, request.max);
            if total(&self.plans[at].workers) < request.max && !self.take_one(at) {
                return;
            }
        }
    }
}
