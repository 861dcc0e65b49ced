//! The decisions of the coordinator, pure and synchronous.
//!
//! [`Cluster::handle`] turns (now, event) into actions. There is no clock here, no randomness, no I/O, no logging and
//! no hash order, so a run is a function of its events, and tests drive years of failures in milliseconds. `now` is the
//! time since the coordinator started. Facts come in as events; after each one every job looks at all it knows and says
//! what comes next (level-triggered), so the order of events and lost messages do not matter.

mod action;
pub mod admission;
mod budget;
mod changes;
mod commit;
mod context;
mod desired;
mod forming;
mod incident;
mod job;
mod keeping;
mod ledger;
mod links;
mod live;
mod loading;
mod members;
pub mod memory;
mod muster;
mod nodes;
mod operate;
mod placing;
mod ranks;
mod schedule;
mod slow;
mod stored;
#[cfg(test)]
mod tests;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{Epoch, JobName, NodeName};
use proto::spec::detect::MISSED_HEARTBEATS;
use proto::wire::coordinator_message::Body;
use proto::wire::{JobStatus, Welcome};

pub use action::{Action, Answer, Ask, Changed, Event, Operation, Outcome, Refusal, RequestId};
use admission::Admission;
use changes::{Look, NOBODY};
pub use commit::{ReceiptEntry, ReceiptName};
use context::Context;
use desired::Book;
use job::Job;
pub use ledger::{Checkpoint, End, Entry, Ledger, Member, Membership};
use members::Members;
pub use members::{Connection, Failure, Home, NodeState, Worker};
use nodes::Drains;
use placing::Placed;

/// What the machine is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This leadership.
    pub epoch: Epoch,
    /// Where this coordinator is reached, for messages.
    pub leader: String,
    /// The store's URL as agents are to use it.
    pub store: String,
    /// Time between two reports of an agent.
    pub heartbeat: Duration,
    /// Silence after which an agent is lost.
    pub suspicion: Duration,
    /// Where agents find the nonce in the store.
    pub nonce_path: String,
    /// The nonce.
    pub nonce: String,
    /// What the keys of generations are derived from.
    pub secret: [u8; 32],
    /// Whether nodes show that they can exchange data before they get work.
    pub admission: bool,
}

/// A gap between two events, which come at least every 100 ms, that only a pause of this process explains.
const PAUSED: Duration = Duration::from_secs(2);

/// All agents and all jobs.
#[derive(Debug)]
pub struct Cluster {
    settings: Settings,
    members: Members,
    admission: Admission,
    drains: Drains,
    jobs: BTreeMap<JobName, Job>,
    /// The jobs in order of submission (those found in the store: of their names).
    order: Vec<JobName>,
    /// Jobs whose history is damaged, and how.
    unreadable: BTreeMap<JobName, String>,
    /// When the last event was handled; they come at least every tick.
    handled: Duration,
    /// What the jobs were last placed by.
    placed: Placed,
    /// Nodes that the jobs are to look at again.
    touched: BTreeSet<NodeName>,
    out: Vec<Action>,
}

impl Cluster {
    /// A cluster without agents and jobs.
    pub fn new(settings: Settings) -> Self {
        Self {
            admission: Admission::new(settings.admission),
            settings,
            members: Members::default(),
            drains: Drains::default(),
            jobs: BTreeMap::new(),
            order: Vec::new(),
            unreadable: BTreeMap::new(),
            handled: Duration::ZERO,
            placed: Placed::default(),
            touched: BTreeSet::new(),
            out: Vec::new(),
        }
    }

    /// Takes in an event and says what is to be done. `now` must not go back.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        // After a pause of this process the agents' reports are still waiting to be read: their silence was ours.
        let gap = now.saturating_sub(self.handled);
        if gap > PAUSED {
            self.members.forgive(gap);
        }
        self.handled = now;
        self.take_in(now, event);
        for (node, reason) in self.members.bury(now, self.suspicion()) {
            self.admission.leave(&node);
            self.out.push(Action::Log { job: None, text: format!("lost: {reason}") });
        }
        self.admission.advance(now, &self.members, &mut self.out);
        self.notice();
        self.place(now);
        let mut touched = self.advance(now);
        // What has just ended or failed has given slots back or wants other ones.
        self.place(now);
        touched.extend(self.touched.iter().cloned());
        self.tell(&touched);
        std::mem::take(&mut self.out)
    }

    /// Lets every job look at what has changed for it and say what comes next. Returns the nodes they looked at.
    fn advance(&mut self, now: Duration) -> BTreeSet<NodeName> {
        let touched = std::mem::take(&mut self.touched);
        for name in &self.order {
            let Some(job) = self.jobs.get_mut(name) else { continue };
            let look = Look { all: std::mem::take(&mut job.stale.look), touched: &touched };
            let (settings, members, out) = (&self.settings, &self.members, &mut self.out);
            job.advance(&mut Context { now, settings, members, look, out });
        }
        touched
    }

    fn tell(&mut self, touched: &BTreeSet<NodeName>) {
        let book =
            Book { jobs: &self.jobs, order: &self.order, unreadable: &self.unreadable, settings: &self.settings };
        desired::tell(&mut self.members, &book, touched, &mut self.out);
        self.jobs.values_mut().for_each(|job| job.stale.tell = false);
    }

    /// The shortest suspicion any job at work asks for, but never so short that one late heartbeat of an agent that has
    /// no job yet is a loss.
    fn suspicion(&self) -> Duration {
        let asked = self.jobs.values().filter(|job| job.active()).map(|job| job.ledger.spec.fault.suspicion);
        let shortest = asked.min_by(f64::total_cmp).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        shortest.unwrap_or(self.settings.suspicion).max(self.settings.heartbeat.mul_f64(MISSED_HEARTBEATS))
    }

    /// Lets a job act with its surroundings in view.
    fn with<R>(
        &mut self,
        now: Duration,
        name: &JobName,
        act: impl FnOnce(&mut Job, &mut Context<'_>) -> R,
    ) -> Option<R> {
        let job = self.jobs.get_mut(name)?;
        let look = Look { all: false, touched: &NOBODY };
        let (settings, members, out) = (&self.settings, &self.members, &mut self.out);
        Some(act(job, &mut Context { now, settings, members, look, out }))
    }

    fn take_in(&mut self, now: Duration, event: Event) {
        match event {
            Event::Loaded { job, ledger } => {
                let loaded = Job::new(job.clone(), *ledger, &self.settings.store);
                self.jobs.insert(job.clone(), loaded);
                self.order.push(job.clone());
                self.with(now, &job, Job::adopt);
            }
            Event::Unreadable { job, reason } => {
                self.out
                    .push(Action::Log { job: Some(job.clone()), text: format!("its history is damaged: {reason}") });
                self.unreadable.insert(job, reason);
            }
            Event::NodesLoaded { drained } => self.nodes_loaded(drained),
            Event::NodesRecorded { outcome } => self.nodes_recorded(outcome),
            Event::Attached { node, incarnation, connection, slots, home, state } => {
                if self.obeys_another(&node, state.epoch) {
                    return;
                }
                self.displace(now, &node, &incarnation, &home, &state);
                self.members.attach(now, &node, incarnation, connection, slots, home);
                self.members.report(now, &node, connection, state);
                self.welcome(node, connection);
            }
            Event::Report { node, connection, state } => {
                if !self.obeys_another(&node, state.epoch) && !self.members.report(now, &node, connection, state) {
                    // Of an agent that was taken for lost: it is to attach anew.
                    self.out.push(Action::Close { connection });
                }
            }
            Event::Detached { node, connection } => self.members.detach(now, &node, connection),
            Event::Probed { node, round, finding } => self.admission.probed(&node, round, finding),
            Event::Stepped { job, report } => {
                self.with(now, &job, |job, cx| job.stepped(cx, &report));
            }
            Event::Receipt { job, name, entry } => self.receipt(now, &job, name, entry),
            Event::Skipped { job, name, reason } => {
                self.with(now, &job, |job, cx| job.skipped(cx, name, &reason));
            }
            Event::SaveFailed { job, text } => {
                self.with(now, &job, |job, cx| job.save_failed(cx, text));
            }
            Event::Stored { job, outcome } => {
                if self.with(now, &job, |job, cx| job.stored(cx, outcome)) == Some(false) {
                    self.jobs.remove(&job);
                    self.order.retain(|name| *name != job);
                    // Agents that say they know it are to forget it.
                    self.touched.extend(self.members.iter().map(|(node, _)| node.clone()));
                }
            }
            Event::Asked { request, ask } => self.asked(request, ask),
            Event::Tick => {}
        }
    }

    /// An agent that has obeyed a higher epoch proves that another coordinator leads.
    fn obeys_another(&mut self, node: &NodeName, epoch: u64) -> bool {
        let mine = self.settings.epoch.get();
        if epoch > mine {
            let reason = format!("the agent on {node} obeys epoch {epoch}, this coordinator leads in epoch {mine}");
            self.out.push(Action::StepDown { reason });
        }
        epoch > mine
    }

    /// Another life of a node's agent begins: the earlier one, should it still be there, is told to go.
    fn displace(&mut self, now: Duration, node: &NodeName, incarnation: &str, home: &Home, state: &NodeState) {
        let before = self.members.get(node);
        if before.is_some_and(|agent| agent.incarnation == incarnation) {
            return;
        }
        if let Some(connection) = before.and_then(|agent| agent.connection) {
            let text = format!("another agent took the place of node {node}: give each agent a --node name of its own");
            self.out.push(Action::Send { node: node.clone(), connection, body: Body::Refused(text) });
        }
        self.jobs.values_mut().for_each(|job| job.pardon(node));
        let at_work = state.workers.iter().any(|worker| worker.place.is_some());
        self.admission.arrive(now, node, at_work, home.skew_ms);
    }

    fn welcome(&mut self, node: NodeName, connection: Connection) {
        let body = Body::Welcome(Welcome {
            store: self.settings.store.clone(),
            heartbeat_seconds: self.settings.heartbeat.as_secs_f64(),
            suspicion_seconds: self.settings.suspicion.as_secs_f64(),
            nonce_path: self.settings.nonce_path.clone(),
            nonce: self.settings.nonce.clone(),
        });
        self.out.push(Action::Send { node, connection, body });
    }

    fn receipt(&mut self, now: Duration, job: &JobName, name: ReceiptName, entry: ReceiptEntry) {
        let node = entry.node.clone();
        if self.with(now, job, |job, cx| job.received(cx, name, entry)).is_none() {
            // A job this store does not hold: the agent may forget it.
            let look = Look { all: false, touched: &NOBODY };
            let (settings, members, out) = (&self.settings, &self.members, &mut self.out);
            let mut cx = Context { now, settings, members, look, out };
            cx.settle(job, vec![(node, name, false)]);
        }
    }

    /// A job as people see it.
    fn view(&self, name: &JobName) -> Option<JobStatus> {
        self.jobs.get(name).map(|job| job.status(&self.members, &self.settings))
    }
}
