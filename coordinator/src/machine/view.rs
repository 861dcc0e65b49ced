//! A job as people see it.

use std::collections::BTreeMap;

use proto::ids::{NodeName, Step};
use proto::wire::{Failure, JobStatus, Room, WorkerState};

use super::Settings;
use super::job::Job;
use super::ledger::End;
use super::members::{Agent, Members, Worker};
use super::memory::{self, Inventory};

impl Job {
    fn state(&self) -> &'static str {
        match &self.ledger.end {
            _ if !self.born => "submitted",
            Some(End::Paused { .. }) => "paused",
            Some(End::Finished { .. }) => "finished",
            Some(End::Failed { .. }) => "failed",
            Some(End::Cancelled) => "cancelled",
            None if self.pausing => "stopping",
            None => match &self.live {
                Some(live) if live.stop => "stopping",
                Some(live) if live.joined() => "running",
                None if self.want.is_empty() => "queued",
                _ => "forming",
            },
        }
    }

    fn why(&self) -> String {
        let refusals = self.refused.values().cloned();
        let mut parts: Vec<String> = Some(self.reason.clone()).filter(|text| !text.is_empty()).into_iter().collect();
        if self.state() == "queued" {
            let min = self.ledger.spec.resources.workers.min;
            parts.push(format!("waiting for {min} free slots (start agents, or end other jobs)"));
            if self.overdue {
                parts.push("overdue: no job behind it goes first any more".into());
            }
        }
        parts.extend(refusals);
        parts.join("; ")
    }

    /// The job's status.
    pub(super) fn status(&self, members: &Members, settings: &Settings) -> JobStatus {
        let workers: Vec<_> = members
            .iter()
            .flat_map(|(node, agent)| agent.of(&self.name).map(|worker| (worker_state(worker), node.to_string())))
            .collect();
        let (workers, nodes) = workers.into_iter().unzip();
        let newest = self.ledger.newest();
        let at_rest = match &self.ledger.end {
            Some(End::Paused { step, loss, .. } | End::Finished { step, loss, .. }) => Some((*step, *loss)),
            _ => None,
        };
        let (step, loss) = at_rest.unwrap_or(self.newest);
        JobStatus {
            job: self.name.to_string(),
            state: self.state().into(),
            reason: self.why(),
            generation: self.ledger.generation.get(),
            world_size: self.live.as_ref().map_or(0, |live| live.membership.members.len() as u32),
            step: step.get(),
            steps: self.ledger.spec.training.steps,
            loss,
            checkpoint_step: newest.map(|newest| newest.step.get()),
            digest: newest.map(|newest| newest.digest.clone()).unwrap_or_default(),
            restarts_without_progress: self.budget.restarts(),
            min_workers: self.ledger.spec.resources.workers.min,
            max_workers: self.ledger.spec.resources.workers.max,
            workers,
            nodes,
            exit_code: match &self.ledger.end {
                Some(End::Failed { code, .. }) => Some(u32::from(*code)),
                _ => None,
            },
            epoch: settings.epoch.get(),
            tokens_per_step: self.ledger.spec.training.tokens_per_step(),
            memory_step: self.memory_step(members),
            memory: self.memory_words(),
            rooms: self.rooms(members),
            stragglers: self.slow_ranks(None),
            memory_skipped: members
                .iter()
                .filter_map(|(_, agent)| agent.memory.get(&self.name))
                .map(|m| m.skipped)
                .sum(),
        }
    }

    fn rooms(&self, members: &Members) -> Vec<Room> {
        let here = members.iter().filter(|(_, agent)| agent.of(&self.name).next().is_some());
        let room = |(node, agent): (&NodeName, &Agent)| Room {
            node: node.to_string(),
            budget: agent.room.budget,
            used: agent.room.used,
        };
        here.map(room).collect()
    }

    /// The newest step that could be restored from memory now.
    fn memory_step(&self, members: &Members) -> Option<u64> {
        let generation = self.live.as_ref()?.generation();
        let held: BTreeMap<&NodeName, &Inventory> =
            members.iter().filter_map(|(node, agent)| Some((node, agent.memory.get(&self.name)?))).collect();
        memory::newest(&held, |point| point.generation == generation).map(|newest| newest.point.step.get())
    }

    /// What may be lost without losing more than the steps since the last snapshot.
    fn memory_words(&self) -> String {
        let Some(live) = &self.live else { return String::new() };
        match live.groups() {
            [] => "off: checkpoint.memory = false".into(),
            [one] if one.members.len() == 1 => {
                "a worker may be lost; one node alone has no parity, so not the node".into()
            }
            [one] if one.parities == 0 => "a worker may be lost; checkpoint.parity = 0, so no node".into(),
            [one] => format!("{} of {} nodes may be lost at once", one.parities, one.members.len()),
            groups => {
                let parities = groups.iter().map(|group| group.parities).min().unwrap_or(0);
                format!("{parities} of the nodes of each of {} parity groups may be lost at once", groups.len())
            }
        }
    }
}

/// A worker in the wire's terms.
fn worker_state(worker: &Worker) -> WorkerState {
    let failure = worker.failure.as_ref();
    WorkerState {
        job: worker.job.to_string(),
        worker: worker.id.to_string(),
        phase: worker.phase.into(),
        generation: worker.place.map(|(generation, _)| generation.get()),
        rank: worker.place.map(|(_, rank)| rank.get()),
        step: worker.step.map(Step::get),
        loss: worker.loss,
        ring_address: worker.ring_address.clone(),
        numeric_identity: worker.identity.clone(),
        data_fingerprint: worker.fingerprint.clone(),
        failure: failure.map(|failure| Failure {
            kind: failure.kind.into(),
            reason: failure.reason.clone(),
            exit_code: failure.exit.0,
            signal: failure.exit.1,
            ring_sent: failure.moved.map(|(sent, _)| sent),
            ring_received: failure.moved.map(|(_, received)| received),
        }),
        source: worker.source.clone(),
        process: worker.process,
        load: worker.load.clone(),
    }
}
