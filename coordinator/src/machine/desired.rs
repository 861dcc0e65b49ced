//! What each agent should be told, whole.
//!
//! For every job and node there is one desired state, computed from scratch; it is sent when it differs from what the
//! agent was last told. So a lost message, a restarted agent and a new coordinator all need nothing special. The key of
//! a generation's data plane is derived, not drawn: a new leader with the same secret announces the same generation in
//! the same words.

use std::collections::{BTreeMap, BTreeSet};

use checkpoint_store::shards_before;
use proto::ids::{Generation, JobName, NodeName, Rank, Step, WorldSize};
use proto::wire::coordinator_message::Body;
use proto::wire::{Announcement, Desired, GroupMember, MemoryStart, ParityGroup, Placement, WorkerPhase};

use super::Settings;
use super::action::Action;
use super::job::Job;
use super::ledger::Member;
use super::live::Live;
use super::members::Members;
use super::memory::{Group, Restorable};

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
        if desired.workers > 0 {
            desired.spec.clone_from(&self.spec_json);
        }
        if let Some(live) = self.live.as_ref().filter(|_| here > 0) {
            desired.run = Some(self.announcement(live, node, members, settings)?);
        }
        Some(desired)
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
        let placements = members.iter().enumerate().filter(|(_, member)| member.node == *node);
        let stop_at = self.ledger.stop_at.map_or(self.ledger.spec.training.steps, Step::get);
        let known = members.iter().all(|member| !member.address.is_empty());
        // A worker that is past joining needs no addresses any more.
        let waits = |phase| matches!(phase, WorkerPhase::Ready | WorkerPhase::Starting);
        let joining = agent.of(&self.name).any(|worker| live.has(worker.id) && waits(worker.phase));
        if !known && joining {
            return None;
        }
        if live.membership.memory.is_some() && live.restorable.is_none() && joining {
            return None;
        }
        Some(Announcement {
            generation: live.generation().get(),
            world_size: members.len() as u32,
            placements: placements
                .map(|(rank, member)| Placement {
                    worker: member.worker.to_string(),
                    rank: rank as u32,
                    next: members[(rank + 1) % members.len()].address.clone(),
                })
                .collect(),
            key: key(settings, &self.name, live.generation()).to_vec(),
            start: live.membership.start.as_ref().map(|start| start.reference.clone()).unwrap_or_default(),
            stop_at,
            stop: live.stop,
            group: live.groups.iter().find(|group| has(group, node)).map(|group| told(group, address)),
            groups: live.groups.len() as u32,
            memory: live.restorable.as_ref().map(|from| memory_start(from, node, members, address)),
        })
    }
}

fn has(group: &Group, node: &NodeName) -> bool {
    group.members.iter().any(|(member, _)| member == node)
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

/// A step in memory in the wire's terms, as far as the ranks on `node` need it; those who lost it have no address.
fn memory_start(
    from: &Restorable,
    node: &NodeName,
    members: &[Member],
    address: impl Fn(&NodeName) -> String + Copy,
) -> MemoryStart {
    let mine = members.iter().zip(0..).filter(|(member, _)| member.node == *node).map(|(_, rank)| Rank::new(rank));
    let needs = |rank| WorldSize::new(members.len() as u32).map(|world| shards_before(rank, world, from.world));
    let needed: BTreeSet<u32> = mine.filter_map(needs).flatten().collect();
    let is_needed = |group: &&Group| group.members.iter().any(|(_, r)| r.iter().any(|r| needed.contains(&r.get())));
    let present = |node: &NodeName| if from.holds(node) { address(node) } else { String::new() };
    MemoryStart {
        generation: from.point.generation.get(),
        step: from.point.step.get(),
        world_size: from.world.get(),
        groups: from.groups.iter().filter(is_needed).map(|group| told(group, present)).collect(),
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

/// Tells every agent what has changed for it.
pub(super) fn tell<'a>(
    members: &mut Members,
    jobs: impl Iterator<Item = &'a Job> + Clone,
    unreadable: &BTreeMap<JobName, String>,
    settings: &Settings,
    out: &mut Vec<Action>,
) {
    let nodes: Vec<NodeName> = members.iter().map(|(node, _)| node.clone()).collect();
    for node in nodes {
        let Some(agent) = members.get(&node) else { continue };
        let Some(connection) = agent.connection else { continue };
        let mut news: Vec<(JobName, Desired)> = Vec::new();
        for job in jobs.clone() {
            let desired = job.desired(&node, members, settings);
            news.extend(desired.map(|desired| (job.name.clone(), desired)));
        }
        for seen in agent.workers.iter().map(|worker| &worker.job).chain(agent.memory.keys()) {
            // What cannot be read now is left alone: it may be read again.
            let known = unreadable.contains_key(seen)
                || jobs.clone().any(|job| job.name == *seen)
                || news.iter().any(|(job, _)| job == seen);
            if !known {
                // Whatever generation the agent has seen of a job this store does not hold, it is over.
                let gone = Desired { job: seen.to_string(), fenced: u64::MAX, ..Desired::default() };
                news.push((seen.clone(), gone));
            }
        }
        let Some(agent) = members.get_mut(&node) else { continue };
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
}
