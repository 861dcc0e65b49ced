//! The nodes as operators see them, and what operators ask of one: to be emptied, and to be used again.
//!
//! A drained node takes no new work. The scheduler no longer sees it, so jobs on it stop after a checkpoint and form
//! their next generation elsewhere, or wait. It stays drained until it is undrained, also when its agent is restarted;
//! no chain holds it, so a new coordinator does not know of it. Undraining also lets a node back that was set aside, by
//! its admission or by jobs.

use std::collections::BTreeSet;

use proto::ids::NodeName;
use proto::wire::{NodeStatus, SetAside};

use super::Cluster;
use super::action::{Answer, Refusal};
use super::admission::Standing;
use super::live::Live;
use super::members::Agent;

impl Cluster {
    /// All nodes, those that are gone too.
    pub(super) fn nodes(&self) -> Answer {
        Answer::Nodes(self.members.known().into_iter().map(|(node, agent)| self.node_status(node, agent)).collect())
    }

    /// A node is to be emptied, or used again.
    pub(super) fn drain(&mut self, node: &NodeName, empty: bool) -> Result<Option<Answer>, Refusal> {
        let known = self.members.known();
        let Some(agent) = known.get(node) else {
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
        self.members.drain(node.clone(), empty);
        if !empty {
            self.admission.admit(node);
            self.jobs.values_mut().for_each(|job| job.pardon(node));
        }
        Ok(self.members.known().get(node).map(|agent| Answer::Node(Box::new(self.node_status(node, *agent)))))
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
