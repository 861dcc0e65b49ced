//! The nodes as operators see them, and what operators ask of one: to be emptied, and to be used again.
//!
//! A drained node takes no new work. The scheduler no longer sees it, so jobs on it stop after a checkpoint and form
//! their next generation elsewhere, or wait. It stays drained until it is undrained, whatever becomes of its agent and
//! of coordinators: a request takes effect, and is answered, once the store has a record of it. Undraining also lets a
//! node back that was set aside, by its admission or by jobs.

use std::collections::{BTreeSet, VecDeque};

use proto::ids::NodeName;
use proto::wire::{NodeStatus, SetAside};

use super::Cluster;
use super::action::{Action, Answer, Outcome, Refusal, RequestId};
use super::admission::Standing;
use super::live::Live;
use super::members::Agent;

/// Why a node is not there that an earlier coordinator has recorded.
const NEVER_SEEN: &str = "no agent of it has attached since this coordinator leads";

/// A node is to be emptied, or used again.
#[derive(Debug)]
struct Wanted {
    request: RequestId,
    node: NodeName,
    empty: bool,
}

/// What operators want of nodes, on its way into the store: one record at a time.
#[derive(Debug, Default)]
pub(super) struct Drains {
    waiting: VecDeque<Wanted>,
    flight: Option<Wanted>,
}

impl Cluster {
    /// All nodes, those that are gone too.
    pub(super) fn nodes(&self) -> Answer {
        let mut all = self.members.known();
        for node in self.members.drained() {
            all.entry(node).or_insert(Err(NEVER_SEEN));
        }
        Answer::Nodes(all.into_iter().map(|(node, agent)| self.node_status(node, agent)).collect())
    }

    /// An earlier coordinator has recorded that these nodes are to be empty.
    pub(super) fn nodes_loaded(&mut self, drained: BTreeSet<NodeName>) {
        for node in drained {
            self.members.drain(node, true);
        }
    }

    /// A node is to be emptied, or used again.
    pub(super) fn drain(&mut self, request: RequestId, node: NodeName, empty: bool) -> Result<Option<Answer>, Refusal> {
        let known = self.members.known();
        let recorded = self.members.is_drained(&node).then_some(Err(NEVER_SEEN));
        let Some(agent) = known.get(&node).copied().or(recorded) else {
            let names: Vec<_> = known.keys().take(20).map(ToString::to_string).collect();
            let names = if names.is_empty() { "none".into() } else { names.join(", ") };
            let text = format!("no agent of a node {node} has attached (known are {names}); list them: cairn nodes");
            return Err(Refusal::NotFound(text));
        };
        if !empty && agent.is_ok_and(|agent| agent.draining) {
            return Err(Refusal::Precondition(format!(
                "the agent on node {node} was told to stop and leaves by itself; start it again instead"
            )));
        }
        self.drains.waiting.push_back(Wanted { request, node, empty });
        self.record_next();
        Ok(None)
    }

    fn record_next(&mut self) {
        if self.drains.flight.is_some() {
            return;
        }
        self.drains.flight = self.drains.waiting.pop_front();
        let Some(Wanted { node, empty, .. }) = &self.drains.flight else { return };
        let mut drained = self.members.drained().clone();
        if *empty {
            drained.insert(node.clone());
        } else {
            drained.remove(node);
        }
        self.out.push(Action::RecordNodes { drained });
    }

    /// The record of what is wanted of a node is stored, or is not.
    pub(super) fn nodes_recorded(&mut self, outcome: Outcome) {
        let Some(Wanted { request, node, empty }) = self.drains.flight.take() else { return };
        let answer = match outcome {
            Outcome::Done => Ok(self.drained(node, empty)),
            Outcome::Lost(reason) => {
                self.out.push(Action::StepDown { reason: reason.clone() });
                Err(Refusal::Unavailable(reason))
            }
            Outcome::Failed(why) | Outcome::Impossible(why) => Err(Refusal::Unavailable(format!(
                "what is wanted of node {node} may not be recorded, so nothing is done yet: {why}; ask again"
            ))),
            other => Err(Refusal::Unavailable(format!("an answer to something else: {other:?}"))),
        };
        self.out.push(Action::Reply { request, answer });
        self.record_next();
    }

    fn drained(&mut self, node: NodeName, empty: bool) -> Answer {
        self.members.drain(node.clone(), empty);
        if !empty {
            self.admission.admit(&node);
            self.jobs.values_mut().for_each(|job| job.pardon(&node));
        }
        let agent = self.members.known().get(&node).copied().unwrap_or(Err(NEVER_SEEN));
        Answer::Node(Box::new(self.node_status(&node, agent)))
    }

    fn node_status(&self, node: &NodeName, agent: Result<&Agent, &str>) -> NodeStatus {
        let (mut used, mut jobs) = (0u32, BTreeSet::new());
        for job in self.jobs.values() {
            let acts = job.live.as_ref().map_or(0, |live: &Live| live.members_on(node));
            // The scheduler has its say after this answer, so what it wanted of a drained node counts no more.
            let staying = if self.members.is_drained(node) { 0 } else { job.wanted_on(node) };
            let has = if agent.is_ok() { acts.max(staying) } else { 0 };
            used = used.saturating_add(has);
            jobs.extend((has > 0).then(|| job.name.to_string()));
        }
        let standing = self.admission.standing(node);
        let (why, rate) = match standing {
            Some(Standing::Aside(reason)) => (reason.as_str(), None),
            Some(Standing::Admitted(rate)) => ("", *rate),
            Some(Standing::New) | None => ("", None),
        };
        let drained = self.members.is_drained(node);
        let leaving = agent.is_ok_and(|agent| agent.draining);
        let state = match agent {
            Err(_) => "lost",
            Ok(agent) if agent.connection.is_none() => "detached",
            Ok(_) if matches!(standing, Some(Standing::Aside(_))) => "aside",
            Ok(_) if self.admission.bars(node) => "checking",
            Ok(_) if (drained || leaving) && used > 0 => "draining",
            Ok(_) if drained || leaving => "drained",
            Ok(_) => "ready",
        };
        let aside = self.jobs.values().filter(|job| job.active());
        let aside = aside.filter_map(|job| Some((job, job.refused.get(node)?)));
        NodeStatus {
            node: node.to_string(),
            state: state.into(),
            reason: agent.err().unwrap_or(why).into(),
            exchange_bytes_per_second: rate,
            slots: agent.map_or(0, |agent| agent.slots),
            used,
            domain: agent.map(|agent| agent.home.domain.clone()).unwrap_or_default(),
            drained_by_operator: drained,
            leaving,
            silent_ms: agent.ok().map(|agent| agent.silent_for(self.handled).as_millis() as u64),
            jobs: jobs.into_iter().collect(),
            set_aside: aside
                .map(|(job, reason)| SetAside { job: job.name.to_string(), reason: reason.clone() })
                .collect(),
            stragglers: self.jobs.values().flat_map(|job| job.slow_ranks(Some(node))).collect(),
        }
    }
}
