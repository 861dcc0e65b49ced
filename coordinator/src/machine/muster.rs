//! The muster: on which nodes somebody is still missing, kept up to date node by node.
//!
//! While a generation forms, ten thousand agents report one after another, and after each report the job asks whether
//! all are there. Going through all nodes each time would make forming quadratic, so the nodes that are not done are
//! kept in sets, and a node is judged again only when it was touched.

use std::collections::BTreeSet;

use proto::ids::{Generation, NodeName};
use proto::wire::WorkerPhase;

use super::context::Context;
use super::job::Job;
use super::live::Live;
use super::members::{Agent, Members, Worker};

/// See the module header.
#[derive(Debug)]
pub(super) struct Muster {
    /// The live generation it was called beside; none: one is being formed.
    beside: Option<Generation>,
    /// Nodes that do not have the ready workers wanted of them.
    pub(super) lacking: BTreeSet<NodeName>,
    /// Nodes that held a part of the job and have not said for good what they hold now.
    pub(super) owing: BTreeSet<NodeName>,
    /// The nodes of the generation before.
    before: BTreeSet<NodeName>,
}

impl Job {
    /// Who is missing now.
    pub(super) fn muster(&mut self, cx: &Context<'_>) -> &Muster {
        let beside = self.live.as_ref().map(Live::generation);
        match self.muster.take().filter(|muster| muster.beside == beside) {
            Some(known) => self.muster.insert(known),
            None => {
                let called = self.call(cx.members, beside);
                self.muster.insert(called)
            }
        }
    }

    /// Judges the touched nodes again.
    pub(super) fn muster_again(&mut self, cx: &Context<'_>) {
        let beside = self.live.as_ref().map(Live::generation);
        let Some(mut muster) = self.muster.take().filter(|muster| muster.beside == beside) else { return };
        for node in cx.look.touched {
            note(&mut muster.lacking, node, self.lacks(cx.members, node));
            note(&mut muster.owing, node, self.owes(cx.members, node, &muster.before));
        }
        self.muster = Some(muster);
    }

    fn call(&self, members: &Members, beside: Option<Generation>) -> Muster {
        let last = self.ledger.membership.as_ref().filter(|_| beside.is_none());
        let before = last.iter().flat_map(|last| &last.members).map(|member| member.node.clone()).collect();
        let lacking = self.want.keys().filter(|node| self.lacks(members, node)).cloned().collect();
        let nodes = members.iter().map(|(node, _)| node);
        let owing = nodes.filter(|node| self.owes(members, node, &before)).cloned().collect();
        Muster { beside, lacking, owing, before }
    }

    /// Whether a node does not have the ready workers wanted of it.
    fn lacks(&self, members: &Members, node: &NodeName) -> bool {
        let Some(wanted) = self.want.get(node).map(|wanted| *wanted as usize) else { return false };
        let count = |agent: &Agent, is: &dyn Fn(&Worker) -> bool| agent.of(&self.name).filter(|w| is(w)).count();
        if let Some(live) = &self.live {
            let is_spare = |worker: &Worker| worker.phase == WorkerPhase::Ready && !live.has(worker.id);
            let spares = members.get(node).map_or(0, |agent| count(agent, &is_spare));
            return spares + (live.members_on(node) as usize) < wanted;
        }
        let Some(agent) = members.get(node).filter(|agent| agent.connection.is_some()) else { return true };
        let alive = count(agent, &|worker| worker.phase != WorkerPhase::Exited);
        let ready = count(agent, &|worker| worker.phase == WorkerPhase::Ready);
        // A spare that is ready stands in for a worker that is not.
        let spare = self.spares.contains_key(node) && ready >= wanted;
        !(spare || alive == wanted && ready == alive)
    }

    /// Whether a node that held a part of the job has not yet said what it holds for good.
    fn owes(&self, members: &Members, node: &NodeName, before: &BTreeSet<NodeName>) -> bool {
        let asked = |agent: &&Agent| agent.connection.is_some() && self.remembers(node);
        let Some(agent) = members.get(node).filter(asked) else { return false };
        let held = agent.memory.get(&self.name);
        held.map_or(before.contains(node), |held| held.fenced < self.ledger.generation)
    }

    /// Whether a node keeps what it holds of the job: where no worker is wanted any more, it is told to forget it.
    pub(super) fn remembers(&self, node: &NodeName) -> bool {
        self.wanted_on(node) > 0 && !self.refused.contains_key(node)
    }
}

fn note(set: &mut BTreeSet<NodeName>, node: &NodeName, belongs: bool) {
    if belongs {
        set.insert(node.clone());
    } else {
        set.remove(node);
    }
}
