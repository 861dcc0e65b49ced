//! A job as people see it.

use proto::ids::Step;
use proto::wire::{Failure, JobStatus, WorkerState};

use super::Settings;
use super::job::Job;
use super::ledger::End;
use super::members::{Members, Worker};

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
        failure: failure.map(|failure| Failure { kind: failure.kind.into(), reason: failure.reason.clone() }),
        source: worker.source.clone(),
        process: worker.process,
    }
}
