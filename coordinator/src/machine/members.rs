//! The agents attached to the coordinator and what they last reported.
//!
//! A report is the whole truth about a node, so only the newest is kept. An agent is lost when it has been silent for
//! the suspicion time, or when its stream has been closed for a second and it has not come back; a short break of the
//! connection is no failure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{Generation, JobName, NodeName, Rank, Step, WorkerId};
use proto::spec::detect::REATTACH;
use proto::wire::{Desired, FailureKind, LoadStage, WorkerPhase};

use super::memory::{Inventory, Room};
use super::schedule::Site;

/// One stream of an agent, numbered by the driver; a later stream of the same node has another number.
pub type Connection = u64;

/// Why a worker is FAILED or EXITED.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What sort of trouble.
    pub kind: FailureKind,
    /// In words.
    pub reason: String,
    /// Exit code and signal of the process, if it ended.
    pub exit: (Option<i32>, Option<i32>),
    /// Of a broken exchange: bytes given to the next rank and had from the one before.
    pub moved: Option<(u64, u64)>,
}

/// One worker as its agent reports it, checked: from JOINING on it has a generation and a rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    /// The job it works for.
    pub job: JobName,
    /// One life of its process.
    pub id: WorkerId,
    /// Where it is in its life.
    pub phase: WorkerPhase,
    /// Its place in a generation.
    pub place: Option<(Generation, Rank)>,
    /// The newest finished step.
    pub step: Option<Step>,
    /// The loss of that step.
    pub loss: Option<f64>,
    /// Where its ring listens (`host:port`).
    pub ring_address: String,
    /// What its arithmetic depends on.
    pub identity: String,
    /// What its data is.
    pub fingerprint: String,
    /// Why it failed, if it did.
    pub failure: Option<Failure>,
    /// Where its state came from.
    pub source: String,
    /// What having its state cost.
    pub load: Vec<LoadStage>,
    /// Unix process id.
    pub process: u32,
}

/// Everything a node says of itself, whole.
#[derive(Debug, Clone, Default)]
pub struct NodeState {
    /// Its workers.
    pub workers: Vec<Worker>,
    /// The highest epoch it has obeyed.
    pub epoch: u64,
    /// Whether it is about to leave.
    pub draining: bool,
    /// What it holds in memory, by job.
    pub memory: BTreeMap<JobName, Inventory>,
    /// Its memory, all jobs together.
    pub room: Room,
}

/// Where and what a node is; the same for the whole life of its agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Home {
    /// Where other agents read its snapshots.
    pub snapshots: String,
    /// What it may fail together with; empty: only itself.
    pub domain: String,
    /// How far its clock is ahead of the coordinator's, in milliseconds.
    pub skew_ms: i64,
}

/// One attached agent.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    /// One life of its process.
    pub incarnation: String,
    /// Its current stream, if it is attached.
    pub connection: Option<Connection>,
    /// How many workers it can run.
    pub slots: u32,
    /// Whether the node is about to leave: nothing is placed on it any more.
    pub draining: bool,
    /// Where and what it is.
    pub home: Home,
    /// All its workers.
    pub workers: Vec<Worker>,
    /// What it holds in memory, by job.
    pub memory: BTreeMap<JobName, Inventory>,
    /// Its memory, all jobs together.
    pub room: Room,
    /// What it was last told, by job, so that nothing is said twice.
    pub told: BTreeMap<JobName, Desired>,
    /// When it was last heard.
    heard: Duration,
    /// When its stream closed.
    closed: Option<Duration>,
}

impl Agent {
    /// How long it has been silent.
    pub(super) fn silent_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.heard)
    }

    /// Its workers of one job.
    pub(super) fn of<'a>(&'a self, job: &'a JobName) -> impl Iterator<Item = &'a Worker> {
        self.workers.iter().filter(move |worker| worker.job == *job)
    }
}

/// All agents, by node.
#[derive(Debug, Default)]
pub(super) struct Members {
    agents: BTreeMap<NodeName, Agent>,
    /// Why the agents that are gone are gone.
    epitaphs: BTreeMap<NodeName, String>,
    /// When an agent last came or went.
    changed: Duration,
    /// Nodes an operator wants to be empty, whatever agent lives there.
    drained: BTreeSet<NodeName>,
    /// Nodes of which something is other than when this was last asked.
    touched: BTreeSet<NodeName>,
    /// Of those, the ones whose address may be another.
    moved: BTreeSet<NodeName>,
    /// Whether other nodes may take work than when this was last asked.
    resited: bool,
    /// No agent was last heard before this.
    oldest: Duration,
    /// No stream that is closed now was closed before this, if any is.
    closed: Option<Duration>,
}

impl Members {
    /// A stream opened. The same life of an agent keeps what it reported; another one starts empty.
    pub(super) fn attach(
        &mut self,
        now: Duration,
        node: &NodeName,
        incarnation: String,
        connection: Connection,
        slots: u32,
        home: Home,
    ) {
        let before = self.agents.remove(node);
        let same_life = before.as_ref().is_some_and(|agent| agent.incarnation == incarnation && agent.slots == slots);
        if !same_life {
            self.changed = now;
        }
        self.resited = true;
        self.touched.insert(node.clone());
        if before.as_ref().is_none_or(|agent| agent.home.snapshots != home.snapshots) {
            self.moved.insert(node.clone());
        }
        let before = before.filter(|_| same_life);
        let (workers, memory) = before.map(|agent| (agent.workers, agent.memory)).unwrap_or_default();
        let agent = Agent {
            incarnation,
            connection: Some(connection),
            slots,
            draining: false,
            home,
            workers,
            memory,
            room: Room::default(),
            told: BTreeMap::new(),
            heard: now,
            closed: None,
        };
        self.agents.insert(node.clone(), agent);
        self.epitaphs.remove(node);
    }

    /// A whole report arrived. `false`: from a stream that another has replaced.
    pub(super) fn report(&mut self, now: Duration, node: &NodeName, connection: Connection, state: NodeState) -> bool {
        let Some(agent) = self.agents.get_mut(node).filter(|agent| agent.connection == Some(connection)) else {
            return false;
        };
        agent.heard = now;
        let before = (&agent.workers, agent.draining, &agent.memory);
        if before != (&state.workers, state.draining, &state.memory) {
            self.resited |= agent.draining != state.draining;
            self.touched.insert(node.clone());
        }
        agent.workers = state.workers;
        agent.draining = state.draining;
        agent.memory = state.memory;
        agent.room = state.room;
        true
    }

    /// The stream closed.
    pub(super) fn detach(&mut self, now: Duration, node: &NodeName, connection: Connection) {
        if let Some(agent) = self.agents.get_mut(node).filter(|agent| agent.connection == Some(connection)) {
            agent.connection = None;
            agent.closed = Some(now);
            self.closed.get_or_insert(now);
            self.touched.insert(node.clone());
        }
    }

    /// Does not hold a silence of this length against anyone.
    pub(super) fn forgive(&mut self, gap: Duration) {
        self.oldest += gap;
        self.closed = self.closed.map(|closed| closed + gap);
        for agent in self.agents.values_mut() {
            agent.heard += gap;
            agent.closed = agent.closed.map(|closed| closed + gap);
        }
    }

    /// Forgets the agents that are lost by now and says why each is.
    pub(super) fn bury(&mut self, now: Duration, suspicion: Duration) -> Vec<(NodeName, String)> {
        let closed = self.closed.is_some_and(|closed| now.saturating_sub(closed) >= REATTACH);
        // Whoever is heard is heard later than all before: until the oldest word is too old, nobody's is.
        if !closed && now.saturating_sub(self.oldest) <= suspicion {
            return Vec::new();
        }
        let mut lost = Vec::new();
        for (node, agent) in &self.agents {
            if agent.closed.is_some_and(|closed| now.saturating_sub(closed) >= REATTACH) {
                lost.push((node.clone(), format!("the agent on {node} closed its connection and did not come back")));
            } else if now.saturating_sub(agent.heard) > suspicion {
                let seconds = suspicion.as_secs_f64();
                lost.push((node.clone(), format!("the agent on {node} was silent for more than {seconds} s")));
            }
        }
        for (node, reason) in &lost {
            self.agents.remove(node);
            self.epitaphs.insert(node.clone(), reason.clone());
            self.changed = now;
            self.resited = true;
            self.touched.insert(node.clone());
            self.moved.insert(node.clone());
        }
        self.oldest = self.agents.values().map(|agent| agent.heard).min().unwrap_or(now);
        self.closed = self.agents.values().filter_map(|agent| agent.closed).min();
        lost
    }

    /// The agent on a node.
    pub(super) fn get(&self, node: &NodeName) -> Option<&Agent> {
        self.agents.get(node)
    }

    /// Why there is no agent on a node.
    pub(super) fn epitaph(&self, node: &NodeName) -> String {
        self.epitaphs.get(node).cloned().unwrap_or_else(|| format!("no agent on {node}"))
    }

    /// The agent on a node, to note what it is told.
    pub(super) fn get_mut(&mut self, node: &NodeName) -> Option<&mut Agent> {
        self.agents.get_mut(node)
    }

    /// All agents in the order of their names.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&NodeName, &Agent)> {
        self.agents.iter()
    }

    /// Whether any agent is attached.
    pub(super) fn any(&self) -> bool {
        !self.agents.is_empty()
    }

    /// The nodes that take work: those that are about to leave are left out.
    pub(super) fn sites(&self) -> BTreeMap<NodeName, Site> {
        let site = |agent: &Agent| Site { slots: agent.slots, rack: agent.home.domain.clone() };
        let staying = self.agents.iter().filter(|(node, agent)| !agent.draining && !self.drained.contains(*node));
        staying.map(|(node, agent)| (node.clone(), site(agent))).collect()
    }

    /// Whether an operator wants a node to be empty.
    pub(super) fn is_drained(&self, node: &NodeName) -> bool {
        self.drained.contains(node)
    }

    /// The nodes that an operator wants to be empty.
    pub(super) fn drained(&self) -> &BTreeSet<NodeName> {
        &self.drained
    }

    /// An operator wants a node to be empty, or not any more.
    pub(super) fn drain(&mut self, node: NodeName, empty: bool) {
        self.resited = true;
        if empty {
            self.drained.insert(node);
        } else {
            self.drained.remove(&node);
        }
    }

    /// All nodes there are or were: why those that are gone are gone.
    pub(super) fn known(&self) -> BTreeMap<&NodeName, Result<&Agent, &str>> {
        let gone = self.epitaphs.iter().map(|(node, reason)| (node, Err(reason.as_str())));
        gone.chain(self.agents.iter().map(|(node, agent)| (node, Ok(agent)))).collect()
    }

    /// The nodes of which something has changed since this was last asked.
    pub(super) fn take_touched(&mut self) -> BTreeSet<NodeName> {
        std::mem::take(&mut self.touched)
    }

    /// The nodes whose address may have changed since this was last asked.
    pub(super) fn take_moved(&mut self) -> BTreeSet<NodeName> {
        std::mem::take(&mut self.moved)
    }

    /// Whether [`Self::sites`] may say something else than when this was last asked.
    pub(super) fn take_resited(&mut self) -> bool {
        std::mem::take(&mut self.resited)
    }

    /// Forgets what is known to be unchanged.
    #[cfg(test)]
    pub(super) fn doubt(&mut self) {
        self.touched = self.agents.keys().chain(self.epitaphs.keys()).cloned().collect();
        (self.resited, self.oldest, self.closed) = (true, Duration::ZERO, Some(Duration::ZERO));
    }

    /// How long no agent has come or gone.
    pub(super) fn stable_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.changed)
    }
}
