//! The driver's part that holds state: snapshots taken in, uploads ended, slots given back.

use proto::ids::{Epoch, JobName, WorkerId};
use proto::spec::JobSpec;
use proto::wire::{self, agent_command, agent_message};

use super::Driver;
use crate::machine::keeper::Shortage;
use crate::memory::{self, Effect};
use crate::receipts::SaveKey;
use crate::uploads::{Finished, Outcome};

impl Driver {
    /// A capture found no slot. What holds one in vain gives it up: a snapshot that cannot become complete, an upload
    /// that gets nowhere.
    pub(super) fn short(&mut self, job: &JobName, skipped: wire::SaveSkipped) {
        let shortage = if skipped.memory { Shortage::Memory } else { Shortage::Store };
        self.memory.skipped(job, shortage);
        if shortage == Shortage::Store {
            self.skipped(wire::SaveSkipped { job: job.to_string(), ..skipped });
        }
        let memory = &self.memory;
        let given_up = self.uploads.give_up(job, |key| !memory.keeps(job, (key.generation, key.step), key.rank));
        for key in given_up {
            let reason = "it could not be stored in time, and newer snapshots need its memory";
            tracing::warn!(%job, step = key.step, rank = key.rank, "an upload is given up: {reason}");
            self.lost(&key, true, reason.into());
        }
        self.keep(Some(job.clone()));
    }

    fn skipped(&mut self, skipped: wire::SaveSkipped) {
        self.waiting.push(agent_message::Body::Skipped(skipped));
        self.flush();
    }

    /// Holds a snapshot, and begins its upload if it is to be stored.
    pub(super) fn captured(&mut self, job: &JobName, worker: WorkerId, captured: &wire::Captured) {
        let key =
            SaveKey { job: job.clone(), generation: captured.generation, step: captured.step, rank: captured.rank };
        let (source, stages) = match self.memory.captured(job, worker, &self.folder.slots(worker), captured) {
            Ok(held) => held,
            Err(error) => {
                tracing::error!(%job, step = key.step, rank = key.rank, %error, "a snapshot is unusable");
                self.tell(worker, agent_command::Body::SlotFree(captured.slot));
                return self.lost(&key, captured.store, format!("the snapshot is unusable: {error}"));
            }
        };
        if captured.store
            && let Err(reason) = self.uploads.start(&key, source, stages, captured)
        {
            tracing::warn!(%job, step = key.step, rank = key.rank, reason, "a snapshot is not uploaded");
            self.lost(&key, true, reason);
        }
        if !captured.store || !self.uploads.is_running(&key) {
            let effects = self.memory.uploaded(job, (key.generation, key.step), key.rank);
            self.follow(effects);
        }
        self.keep(Some(job.clone()));
    }

    /// A stored checkpoint that cannot be: the coordinator need not wait for it.
    fn lost(&mut self, key: &SaveKey, stored: bool, reason: String) {
        if stored {
            let SaveKey { job, generation, step, rank } = key;
            let (job, generation, step, rank) = (job.to_string(), *generation, *step, *rank);
            self.skipped(wire::SaveSkipped { job, generation, step, rank, reason, memory: false });
        }
    }

    /// Carries out what the memory tier wants of a job.
    pub(super) fn keep(&mut self, job: Option<JobName>) {
        if let Some(job) = job {
            let effects = self.memory.advance(&job, self.began.elapsed());
            self.follow(effects);
        }
    }

    pub(super) fn follow(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Free(worker, slot) => {
                    memory::adopt::unnote(&self.folder.slots(worker), slot);
                    self.tell(worker, agent_command::Body::SlotFree(slot));
                    if !self.present.contains_key(&worker) {
                        self.clear(worker);
                    }
                }
                Effect::Kept(job, kept) => {
                    let of_job = |worker: &WorkerId| self.machine.job_of(*worker) == Some(&job);
                    let workers: Vec<WorkerId> = self.present.keys().copied().filter(of_job).collect();
                    for worker in workers {
                        self.tell(worker, agent_command::Body::Kept(kept.clone()));
                    }
                }
            }
        }
    }

    /// Removes the slots of a worker that is gone, unless some are held.
    pub(super) fn clear(&mut self, worker: WorkerId) {
        if !self.memory.vault.holds_of(worker)
            && let Err(error) = self.folder.remove_slots(worker)
        {
            tracing::warn!(%worker, %error, "cannot remove the slots of a worker");
        }
    }

    pub(super) fn uploaded(&mut self, finished: Finished) {
        let Finished { key, outcome } = finished;
        self.uploads.ended(&key, matches!(outcome, Outcome::Stored(_)));
        let effects = self.memory.uploaded(&key.job, (key.generation, key.step), key.rank);
        self.follow(effects);
        match outcome {
            Outcome::Stored(receipt) => {
                self.send(agent_message::Body::Receipt(receipt.clone()));
                self.waiting.receipt(key, receipt);
            }
            Outcome::Hopeless(reason) => self.lost(&key, true, reason),
            Outcome::BrokenOff => {}
        }
    }

    /// A job's shards go to the store its spec names, which is the coordinator's; its memory follows its generation.
    pub(super) fn learn(&mut self, epoch: Epoch, desired: &wire::Desired) {
        let spec: Result<JobSpec, _> = serde_json::from_slice(&desired.spec);
        if let Ok(spec) = spec
            && spec.name.as_str() == desired.job
            && epoch >= self.machine.epoch()
        {
            self.uploads.store(spec.name.clone(), spec.checkpoint.store.clone());
            let effects = self.memory.desired(&spec.name, desired, &spec);
            self.follow(effects);
        }
    }

    pub(super) fn full_report(&self) -> wire::NodeReport {
        wire::NodeReport {
            memory: self.memory.inventory(),
            memory_budget: self.memory.budget(),
            memory_used: self.memory.vault.bytes(),
            ..self.machine.report()
        }
    }
}
