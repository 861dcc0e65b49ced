//! What each agent should be told, whole.
//!
//! For every job and node there is one desired state, computed from scratch whenever it may have changed (`changes`),
//! and sent when it differs from what the agent was last told. So a lost message, a restarted agent and a new
//! coordinator all need nothing special. The key of a generation's data plane is derived, not drawn: a new leader with
//! the same secret announces the same generation in the same words.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::{Generation, JobName, NodeName, Rank, Step, WorldSize};
use proto::wire::coordinator_message::Body;
use proto::wire::{Announcement, Desired, GroupMember, MemoryStart, ParityGroup, Placement, WorkerPhase};

use super::Settings;
use super::action::Action;
use super::job::Job;
use super::ledger::Member;
use super::live::Live;
use super::members::Members;
use super::memory::Group;
use super::ranks::Sources;

impl Job {
    /// What the agent of a node should do for this job; `None`: nothing to say.
    fn desired(&self, node: &NodeName, members: &Members, settings: &Settings) -> Option<Desired> {
        let agent = members.get(node)?;
        let told = agent.told.get(&self.name);
        let knows = told.is_some_and(|told| told.workers > 0)
            || agent.of(&self.name).next().is_some()
            || agent.memory.contains_key(&self.name);
        let mut desired = Desired {
            job: self.name.to_string(),
            spec: Vec::new(),
            workers: 0,
            fenced: self.ledger.generation.get(),
            run: None,
            keep: false,
        };
        if self.ledger.end.is_some() {
            return knows.then_some(desired);
        }
        // Nothing is decided about a job that is not led, or whose workers may be alive but are not all heard of.
        if !self.led || !self.born || self.live.as_ref().is_some_and(Live::adopting) {
            return None;
        }
        let here = self.live.as_ref().map_or(0, |live| live.members_on(node));
        let wanted = if self.refused.contains_key(node) { 0 } else { self.wanted_on(node) };
        desired.workers = wanted.max(here);
        if desired.workers == 0 && !knows {
            return None;
        }
        desired.keep = desired.workers == 0 && self.needs_memory();
        if desired.workers > 0 {
            desired.spec.clone_from(&self.spec_json);
        }
        if let Some(live) = self.live.as_ref().filter(|_| here > 0) {
            desired.run = Some(self.announcement(live, node, members, settings)?);
        }
        Some(desired)
    }

    /// Whether a next generation may have to start from what earlier ones left in memory: until the live one has stored
    /// a checkpoint. Nodes without workers keep what they hold until then.
    fn needs_memory(&self) -> bool {
        let stored = self.ledger.newest().map(|newest| newest.generation);
        self.live.as_ref().is_none_or(|live| stored.is_none_or(|stored| stored < live.generation()))
    }

    /// `None` while a member's address is not known, which only a new coordinator can meet.
    fn announcement(
        &self,
        live: &Live,
        node: &NodeName,
        agents: &Members,
        settings: &Settings,
    ) -> Option<Announcement> {
        let agent = agents.get(node)?;
        let address = |node: &NodeName| agents.get(node).map(|agent| agent.home.snapshots.clone()).unwrap_or_default();
        let members = &live.membership.members;
        let here = live.ranks_on(node);
        let stop_at = self.ledger.stop_at.map_or(self.ledger.spec.training.steps, Step::get);
        // A worker that is past joining needs no addresses any more.
        let waits = |phase| matches!(phase, WorkerPhase::Ready | WorkerPhase::Starting);
        let joining = agent.of(&self.name).any(|worker| live.has(worker.id) && waits(worker.phase));
        if !live.addressed() && joining {
            return None;
        }
        if live.membership.memory.is_some() && live.restorable.is_none() && joining {
            return None;
        }
        Some(Announcement {
            generation: live.generation().get(),
            world_size: members.len() as u32,
            placements: here.iter().map(|rank| placement(*rank, members)).collect(),
            key: key(settings, &self.name, live.generation()).to_vec(),
            start: live.membership.start.as_ref().map(|start| start.reference.clone()).unwrap_or_default(),
            stop_at,
            stop: live.stop,
            group: live.group_of(node).map(|group| told(group, address)),
            groups: live.groups().len() as u32,
            memory: live.restorable.as_ref().map(|from| memory_start(from, here, members.len(), address)),
        })
    }
}

/// A rank's place in the ring.
fn placement(rank: Rank, members: &[Member]) -> Placement {
    Placement {
        worker: members[rank.index()].worker.to_string(),
        rank: rank.get(),
        next: members[(rank.index() + 1) % members.len()].address.clone(),
    }
}

/// A group in the wire's terms.
fn told(group: &Group, address: impl Fn(&NodeName) -> String) -> ParityGroup {
    let member = |(node, ranks): &(NodeName, Vec<Rank>)| GroupMember {
        node: node.to_string(),
        snapshots: address(node),
        ranks: ranks.iter().map(|rank| rank.get()).collect(),
    };
    ParityGroup { members: group.members.iter().map(member).collect(), parities: group.parities as u32 }
}

/// A step in memory in the wire's terms, as far as `ranks` need it; the nodes that lost it have no address.
fn memory_start(
    sources: &Sources,
    ranks: &[Rank],
    world: usize,
    address: impl Fn(&NodeName) -> String + Copy,
) -> MemoryStart {
    let from = sources.from();
    let present = |node: &NodeName| if from.holds(node) { address(node) } else { String::new() };
    let needed = sources.needed(ranks, WorldSize::new(world as u32));
    MemoryStart {
        generation: from.point.generation.get(),
        step: from.point.step.get(),
        world_size: from.world.get(),
        groups: needed.into_iter().map(|group| told(group, present)).collect(),
    }
}

/// 32 bytes that only holders of the cluster's secret know, different for every generation of every job and store.
fn key(settings: &Settings, job: &JobName, generation: Generation) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(&settings.secret);
    for part in [settings.store.as_bytes(), job.as_str().as_bytes(), &generation.get().to_le_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

/// All jobs, for who tells agents about them.
pub(super) struct Book<'a> {
    pub(super) jobs: &'a BTreeMap<JobName, Job>,
    pub(super) order: &'a [JobName],
    pub(super) unreadable: &'a BTreeMap<JobName, String>,
    pub(super) settings: &'a Settings,
}

impl Book<'_> {
    fn in_order(&self) -> impl Iterator<Item = &Job> {
        self.order.iter().filter_map(|name| self.jobs.get(name))
    }
}

/// Tells the agents what has changed for them: the touched ones about all jobs, the others about stale jobs.
pub(super) fn tell(members: &mut Members, book: &Book<'_>, touched: &BTreeSet<NodeName>, out: &mut Vec<Action>) {
    let stale: Vec<&Job> = book.in_order().filter(|job| job.stale.tell).collect();
    if stale.is_empty() {
        for node in touched {
            tell_node(members, book, node, None, out);
        }
        return;
    }
    let nodes: Vec<NodeName> = members.iter().map(|(node, _)| node.clone()).collect();
    for node in nodes {
        let only = (!touched.contains(&node)).then_some(stale.as_slice());
        tell_node(members, book, &node, only, out);
    }
}

/// Tells one agent what has changed for it, as far as `only` these jobs go.
fn tell_node(members: &mut Members, book: &Book<'_>, node: &NodeName, only: Option<&[&Job]>, out: &mut Vec<Action>) {
    let Some(agent) = members.get(node) else { return };
    let Some(connection) = agent.connection else { return };
    let word = |job: &Job| Some((job.name.clone(), job.desired(node, members, book.settings)?));
    let mut news: Vec<(JobName, Desired)> = match only {
        Some(jobs) => jobs.iter().filter_map(|job| word(job)).collect(),
        None => book.in_order().filter_map(word).collect(),
    };
    let reported = agent.workers.iter().map(|worker| &worker.job).chain(agent.memory.keys());
    for seen in reported.filter(|_| only.is_none()) {
        // What cannot be read now is left alone: it may be read again.
        let known = book.unreadable.contains_key(seen)
            || book.jobs.contains_key(seen)
            || news.iter().any(|(job, _)| job == seen);
        if !known {
            // Whatever generation the agent has seen of a job this store does not hold, it is over.
            let gone = Desired { job: seen.to_string(), fenced: u64::MAX, ..Desired::default() };
            news.push((seen.clone(), gone));
        }
    }
    let Some(agent) = members.get_mut(node) else { return };
    // Who gives slots up is told before who gets them.
    let before = |job: &JobName| agent.told.get(job).map_or(0, |told| told.workers);
    news.sort_by_key(|(job, desired)| desired.workers > before(job));
    for (job, desired) in news {
        if agent.told.get(&job) != Some(&desired) {
            agent.told.insert(job, desired.clone());
            out.push(Action::Send { node: node.clone(), connection, body: Body::Desired(desired) });
        }
    }
}
