//! Forming a generation: from wanted workers to a membership worth persisting.
//!
//! A generation forms when every wanted worker is ready. If some never come, it forms with those that did, as long as
//! they are enough. Workers whose arithmetic would give other bits are refused with the difference named, and other
//! data than the job began with ends it: both would break the promise that the weights are a function of spec and data.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{NodeName, WorkerId};
use proto::spec::Reduction;
use proto::wire::{FailureKind, WorkerPhase};

use super::context::Context;
use super::incident::Blame;
use super::job::{Job, Verdict};
use super::ledger::{Entry, Member, Membership};
use super::live::Cause;
use super::members::{Agent, Worker};
use super::memory::{self, Inventory, Restorable};
use super::placing::Fit;
use super::schedule::total;

/// How long the nodes must be unchanged before a running job is stopped to grow.
const STABLE: Duration = Duration::from_secs(3);
/// How long nodes that held a part of the job have to say what they hold.
const INVENTORY: Duration = Duration::from_secs(2);

impl Job {
    /// Judges workers that end before they are in a generation, and those that would not fit one.
    pub(super) fn inspect(&mut self, cx: &mut Context<'_>) {
        self.forget_excuses(cx);
        let seen = cx.seen();
        for (node, agent) in &seen {
            self.excuse_surplus(node, agent);
        }
        let name = self.name.clone();
        for (node, worker) in seen.iter().flat_map(|(node, agent)| agent.of(&name).map(move |worker| (node, worker))) {
            match worker.phase {
                WorkerPhase::Exited | WorkerPhase::Failed => self.mourn(cx, node, worker),
                WorkerPhase::Ready => self.compare(cx, node, worker),
                _ => {}
            }
        }
        if self.live.is_none()
            && !self.refused.is_empty()
            && cx.members.any()
            && cx.members.iter().all(|(node, _)| self.refused.contains_key(node))
        {
            let reasons: Vec<_> = self.refused.values().cloned().collect();
            self.verdict.get_or_insert(Verdict { reason: reasons.join("; "), code: 2 });
        }
    }

    /// Forgets the workers that are not reported any more.
    fn forget_excuses(&mut self, cx: &Context<'_>) {
        let job = &self.name;
        let keep = |node: &NodeName, ids: &mut BTreeSet<WorkerId>| {
            let reported = |id: &WorkerId| {
                let agent = cx.members.get(node);
                agent.is_some_and(|agent| agent.of(job).any(|worker| worker.id == *id))
            };
            ids.retain(reported);
            !ids.is_empty()
        };
        if cx.look.all {
            self.excused.retain(keep);
            return;
        }
        for node in cx.look.touched {
            if self.excused.get_mut(node).is_some_and(|ids| !keep(node, ids)) {
                self.excused.remove(node);
            }
        }
    }

    /// Where more workers live than are wanted, the agent ends some: their end is no failure.
    fn excuse_surplus(&mut self, node: &NodeName, agent: &Agent) {
        let wanted = self.wanted_on(node) as usize;
        let alive = || agent.of(&self.name).filter(|worker| worker.phase != WorkerPhase::Exited);
        if alive().count() > wanted {
            let ids: Vec<WorkerId> = alive().map(|worker| worker.id).collect();
            self.excused.entry(node.clone()).or_default().extend(ids);
        }
    }

    /// A worker ended or failed outside any live generation.
    fn mourn(&mut self, cx: &mut Context<'_>, node: &NodeName, worker: &Worker) {
        let of_live = self.live.as_ref().is_some_and(|live| live.has(worker.id));
        if of_live || !self.excused.entry(node.clone()).or_default().insert(worker.id) || worker.place.is_some() {
            return;
        }
        let failure = worker.failure.clone();
        let kind = failure.as_ref().map_or(FailureKind::Exit, |failure| failure.kind);
        let reason = failure.map_or_else(|| "a worker ended while it prepared".to_string(), |failure| failure.reason);
        let is_nodes = matches!(kind, FailureKind::Fatal | FailureKind::NonFinite | FailureKind::Input);
        if is_nodes && self.has_run() {
            // A node that cannot work must not end a job that has run on others.
            self.refuse(cx, node, format!("node {node}: {reason}"));
        } else if self.live.is_none() {
            let blame = Blame::failure(kind, node, worker.failure.as_ref());
            self.trouble(cx, Cause { rank: None, kind, reason, blame });
        }
    }

    fn refuse(&mut self, cx: &mut Context<'_>, node: &NodeName, reason: String) {
        let before = self.refused.insert(node.clone(), reason.clone());
        if before.as_ref() == Some(&reason) {
            return;
        }
        self.unsettle();
        if before.is_none() {
            cx.log(&self.name, format!("refused: {reason}"));
        }
    }

    /// Checks a ready worker's arithmetic and data against the job's.
    fn compare(&mut self, cx: &mut Context<'_>, node: &NodeName, worker: &Worker) {
        let exact = self.ledger.spec.training.reduction == Reduction::Exact;
        if let Some(wanted) = self.ledger.identity.as_ref().filter(|wanted| exact && **wanted != worker.identity) {
            let reason = format!(
                "node {node} computes with {:?}, but the job was begun with {wanted:?}, and exact mode needs the same",
                worker.identity
            );
            self.refuse(cx, node, reason);
        }
        if let Some(wanted) = self.ledger.fingerprint.as_ref().filter(|wanted| **wanted != worker.fingerprint) {
            let reason = format!(
                "the data on node {node} (fingerprint {}) are not what the job was begun with (fingerprint {wanted}): \
                 restore the data of data.train and data.validation, or start over with --fresh",
                worker.fingerprint
            );
            self.refuse(cx, node, reason);
        }
    }

    /// The membership to persist next, if the wanted workers are there (or have had their time).
    pub(super) fn form(&mut self, cx: &mut Context<'_>) -> Option<Entry> {
        if self.want.is_empty() {
            // Queued: the time to form begins with the first slots.
            self.since = cx.now;
            return None;
        }
        if self.ledger.had_checkpoint && self.ledger.newest().is_none() {
            let reason = "every checkpoint of the job is damaged and set aside; start over with --fresh".to_string();
            self.verdict = Some(Verdict { reason, code: 4 });
            return None;
        }
        let late = cx.now.saturating_sub(self.since).as_secs_f64() > self.ledger.spec.fault.restart;
        let complete = self.muster(cx).lacking.is_empty();
        if !complete && !late {
            return None;
        }
        let mut chosen: Vec<(NodeName, Worker)> = Vec::new();
        for (node, &wanted) in &self.want {
            let agent = cx.members.get(node).filter(|agent| agent.connection.is_some());
            let ready = agent.into_iter().flat_map(|agent| agent.of(&self.name));
            let ready = ready.filter(|worker| worker.phase == WorkerPhase::Ready).take(wanted as usize);
            chosen.extend(ready.map(|worker| (node.clone(), worker.clone())));
        }
        // Neighbours in the ring share a rack as far as that goes.
        let rack = |node: &NodeName| cx.members.get(node).map(|agent| agent.home.domain.clone());
        chosen.sort_by_cached_key(|(node, _)| rack(node));
        let enough = chosen.len() >= self.ledger.spec.resources.workers.min as usize;
        if !enough || chosen.is_empty() {
            self.since = cx.now;
            let limit = self.ledger.spec.fault.restart;
            let reason = format!("only {} of {} workers were ready within {limit} s", chosen.len(), total(&self.want));
            let blame = Blame::of(proto::incident::Cause::NoProgress);
            self.trouble(cx, Cause { rank: None, kind: FailureKind::Transient, reason, blame });
            return None;
        }
        if self.awaits_inventory(cx) {
            return None;
        }
        self.agree(cx, chosen)
    }

    /// Whether a node that held a part of the job has not yet said what it holds for good, and may still do so.
    fn awaits_inventory(&mut self, cx: &Context<'_>) -> bool {
        let in_time = cx.now.saturating_sub(self.since) < INVENTORY;
        self.ledger.spec.checkpoint.memory && in_time && !self.muster(cx).owing.is_empty()
    }

    /// The newest step in the nodes' memory to start from, if that is no older than the newest checkpoint.
    fn in_memory(&self, cx: &Context<'_>) -> Option<Restorable> {
        if !self.ledger.spec.checkpoint.memory {
            return None;
        }
        let stored = self.ledger.newest().map(|newest| newest.step);
        let started = self.ledger.membership.as_ref().and_then(|membership| membership.memory);
        let inventories: BTreeMap<&NodeName, &Inventory> =
            cx.inventories(&self.name).filter(|(node, _)| self.remembers(node)).collect();
        memory::newest(&inventories, |point| {
            let of_line = point.generation == self.ledger.generation || Some(point) == started;
            of_line && stored.is_none_or(|stored| point.step >= stored) && !self.distrusted(point)
        })
    }

    /// Makes a membership of ready workers, if they agree on arithmetic and data.
    fn agree(&mut self, cx: &mut Context<'_>, chosen: Vec<(NodeName, Worker)>) -> Option<Entry> {
        let (first_node, first) = chosen.first().cloned()?;
        let exact = self.ledger.spec.training.reduction == Reduction::Exact;
        for (node, worker) in &chosen {
            if worker.fingerprint != first.fingerprint {
                let reason = format!(
                    "the data on node {node} (fingerprint {}) differ from those on node {first_node} (fingerprint {}): \
                     give all nodes the same data.train and data.validation",
                    worker.fingerprint, first.fingerprint
                );
                self.verdict = Some(Verdict { reason, code: 2 });
                return None;
            }
            if exact && worker.identity != first.identity {
                let reason = format!(
                    "node {node} computes with {:?}, node {first_node} with {:?}, and exact mode needs the same",
                    worker.identity, first.identity
                );
                self.refuse(cx, node, reason);
                return None;
            }
        }
        let Some(generation) = self.ledger.generation.next() else {
            self.verdict = Some(Verdict { reason: "the generation numbers are used up".into(), code: 3 });
            return None;
        };
        let member =
            |(node, worker): (NodeName, Worker)| Member { node, worker: worker.id, address: worker.ring_address };
        let restorable = self.in_memory(cx);
        let memory = restorable.as_ref().map(|from| from.point);
        self.restorable = restorable;
        Some(Entry::Generation(Box::new(Membership {
            generation,
            memory,
            members: chosen.into_iter().map(member).collect(),
            start: self.ledger.newest().cloned(),
            identity: self.ledger.identity.clone().unwrap_or(first.identity),
            fingerprint: first.fingerprint,
        })))
    }

    /// Stops a running generation if the job should have another size and could have it at once.
    pub(super) fn reshape(&mut self, cx: &mut Context<'_>) {
        let Some(live) = self.live.as_ref().filter(|live| live.joined() && !live.stop && !live.adopting()) else {
            return;
        };
        let world = live.membership.members.len() as u32;
        let Some(Fit { yields, wanted }) = self.fit() else { return };
        let (yields, wanted) = (yields.clone(), *wanted);
        let may_grow = wanted > world && (self.asked_to_scale || cx.members.stable_for(cx.now) >= STABLE);
        let why = if let Some(why) = &yields {
            why.to_string()
        } else if may_grow && self.muster(cx).lacking.is_empty() {
            format!("growing from {world} to {wanted} workers")
        } else {
            return;
        };
        cx.log(&self.name, format!("{why}: stopping generation {} with a checkpoint", self.ledger.generation));
        self.open_planned(cx, yields.as_ref(), &why);
        if let Some(live) = self.live.as_mut() {
            live.stop = true;
        }
        self.unsettle();
    }

    /// Gives its place in the chain of running jobs up, if it has stopped and there is no room for it: a coordinator
    /// that comes after this one is not to look for its workers.
    pub(super) fn stand_back(&mut self, cx: &mut Context<'_>) -> Option<Entry> {
        if !self.halted || !self.want.is_empty() || self.ledger.membership.is_none() {
            return None;
        }
        let step = self.ledger.newest()?.step;
        let reason = match &self.yields_to {
            Some(job) => format!("its slots went to job {job}, which has a higher priority or has waited too long"),
            None => "the nodes it ran on take no more work".to_string(),
        };
        cx.log(&self.name, format!("queued after step {step}: {reason}"));
        Some(Entry::Yielded { step, reason })
    }

    /// Forgets that a node did not fit: another agent lives there now.
    pub(super) fn pardon(&mut self, node: &NodeName) {
        if self.refused.remove(node).is_some() {
            self.unsettle();
        }
    }

    /// The end of these workers needs no further mention.
    pub(super) fn excuse(&mut self, members: &[Member]) {
        for member in members {
            self.excused.entry(member.node.clone()).or_default().insert(member.worker);
        }
    }
}
