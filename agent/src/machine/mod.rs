//! What the node's workers should be doing, decided without doing anything.
//!
//! The coordinator sends the whole state it desires of a job on this node; workers report the whole state they are in.
//! [`Machine`] compares the two after every event and returns the [`Action`]s that close the gap: start a process, end
//! one, tell one its rank, tell one to break off. It is level-triggered, so a repeated or lost message changes nothing,
//! and it is pure: time comes in as an argument, new worker identities from the driver, and nothing here waits, logs or
//! touches a file. Fencing (P4, and §7 of the design) is enforced here for the node: a lower epoch, or a lower
//! generation of a job, is refused with the reason.

mod job;
pub mod keeper;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use proto::ids::{Epoch, JobName, WorkerId};
use proto::wire;

use job::Job;

/// Something happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A coordinator of this epoch took the node in.
    Welcomed(Epoch),
    /// The coordinator says what it wants of a job.
    Desired {
        /// The epoch of the coordinator that sent it.
        epoch: Epoch,
        /// What it wants.
        desired: wire::Desired,
    },
    /// A worker process opened its stream.
    Attached(WorkerId),
    /// A worker process reported.
    State {
        /// Which.
        worker: WorkerId,
        /// Its whole state.
        state: wire::WorkerState,
    },
    /// A worker process ended, or could not be started.
    Exited {
        /// Which.
        worker: WorkerId,
        /// How.
        failure: wire::Failure,
    },
    /// A process was started and has this process id.
    Started {
        /// Which.
        worker: WorkerId,
        /// Its process id.
        process: u32,
    },
    /// Time passed.
    Tick,
}

/// A command to a worker; the driver adds what only it knows (folders, addresses).
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Read the spec and the data, build the model, open the ring's port.
    Prepare {
        /// JSON of the job's spec.
        spec: Vec<u8>,
        /// CPU threads to use.
        threads: u32,
        /// Its place among this node's workers, from 0: which GPU it uses, where there are some.
        place: u32,
    },
    /// Act in a generation; repeated with `stop` set when it should end.
    Run(wire::WorkerRun),
    /// Break off this generation and any lower one.
    Hold(u64),
}

/// What the driver must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Start a worker process.
    Spawn {
        /// For this job.
        job: JobName,
        /// With this identity.
        worker: WorkerId,
    },
    /// End a worker process.
    Kill {
        /// Which.
        worker: WorkerId,
        /// Why, for the log.
        reason: &'static str,
    },
    /// Tell a worker.
    Send {
        /// Which.
        worker: WorkerId,
        /// What.
        command: Command,
    },
    /// Tell the coordinator at once: something other than a step count changed.
    Report,
    /// Uploads of generations up to `fenced`, except `live`, can no longer become checkpoints.
    Fence {
        /// Of this job.
        job: JobName,
        /// Up to and with this generation.
        fenced: u64,
        /// The generation that may still save.
        live: Option<u64>,
    },
    /// The job is gone from this node: drop its uploads and receipts.
    Forget(JobName),
    /// A message was refused; the reason, for the log.
    Refused(String),
}

/// Hands out identities for new worker processes; the driver draws them at random.
pub type Fresh<'a> = &'a mut dyn FnMut() -> WorkerId;

/// The node's desired and actual state.
#[derive(Debug)]
pub struct Machine {
    cores: usize,
    epoch: Epoch,
    /// The node is about to leave, and says so in every report.
    draining: bool,
    jobs: BTreeMap<JobName, Job>,
    /// The last report without its step counts, to notice changes worth telling at once.
    told: wire::NodeReport,
}

impl Machine {
    /// A node without jobs, whose workers share `cores` CPU cores.
    pub fn new(cores: usize) -> Self {
        Self {
            cores: cores.max(1),
            epoch: Epoch::ZERO,
            draining: false,
            jobs: BTreeMap::new(),
            told: wire::NodeReport::default(),
        }
    }

    /// Takes an event at `now` (time since any fixed moment) and returns what must be done, in order.
    pub fn handle(&mut self, now: Duration, event: Event, fresh: Fresh<'_>) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Welcomed(epoch) => self.epoch = self.epoch.max(epoch),
            Event::Desired { epoch, desired } => self.desire(epoch, desired, &mut actions),
            Event::Attached(worker) => self.with(worker, |job| job.attached(worker)),
            Event::State { worker, state } => self.with(worker, |job| job.reported(now, worker, state)),
            Event::Exited { worker, failure } => self.with(worker, |job| job.exited(now, worker, failure)),
            Event::Started { worker, process } => self.with(worker, |job| job.started(worker, process)),
            Event::Tick => {}
        }
        let mut places = self.jobs.values().flat_map(Job::places).collect();
        for job in self.jobs.values_mut() {
            job.reconcile(now, fresh, &mut places, &mut actions);
        }
        self.jobs.retain(|name, job| {
            let over = job.is_over();
            if over {
                actions.push(Action::Forget(name.clone()));
            }
            !over
        });
        let mut telling = self.report();
        for worker in &mut telling.workers {
            worker.step = None;
            worker.loss = None;
        }
        if telling != self.told {
            self.told = telling;
            actions.push(Action::Report);
        }
        actions
    }

    /// Everything the node's workers are doing.
    pub fn report(&self) -> wire::NodeReport {
        let workers = self.jobs.values().flat_map(Job::states).collect();
        wire::NodeReport { workers, epoch: self.epoch.get(), draining: self.draining, ..Default::default() }
    }

    /// The node is to leave: the coordinator moves its jobs away, each with a checkpoint. Returns the longest grace one
    /// of them asks for; `None` if there is none to wait for.
    pub fn drain(&mut self) -> Option<Duration> {
        self.draining = true;
        self.jobs.values().map(Job::grace).max()
    }

    /// The shortest heartbeat a job on this node asks for.
    pub fn heartbeat(&self) -> Option<Duration> {
        self.jobs.values().filter_map(Job::heartbeat).min()
    }

    /// No job has work on this node.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// The rank a worker has in the live generation of its job.
    pub fn rank_of(&self, worker: WorkerId) -> Option<u32> {
        self.jobs.values().find(|job| job.has(worker)).and_then(|job| job.rank_of(worker))
    }

    /// The highest epoch that was obeyed.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The job a live worker belongs to, and whether it is there at all.
    pub fn job_of(&self, worker: WorkerId) -> Option<&JobName> {
        self.jobs.iter().find(|(_, job)| job.has(worker)).map(|(name, _)| name)
    }

    fn with(&mut self, worker: WorkerId, act: impl FnOnce(&mut Job)) {
        if let Some(job) = self.jobs.values_mut().find(|job| job.has(worker)) {
            act(job);
        }
    }

    fn desire(&mut self, epoch: Epoch, desired: wire::Desired, actions: &mut Vec<Action>) {
        if epoch < self.epoch {
            let text = format!("orders of epoch {epoch} refused: epoch {} has been obeyed", self.epoch);
            return actions.push(Action::Refused(text));
        }
        let name = match JobName::new(desired.job.as_str()) {
            Ok(name) => name,
            Err(error) => return actions.push(Action::Refused(error.to_string())),
        };
        self.epoch = epoch;
        if desired.workers == 0 && !self.jobs.contains_key(&name) {
            // What an earlier life of this agent has left may still be needed.
            if !desired.keep {
                actions.push(Action::Forget(name));
            }
            return;
        }
        let live = desired.run.as_ref().map(|run| run.generation);
        let fenced = desired.fenced;
        let cores = self.cores;
        let job = self.jobs.entry(name.clone()).or_insert_with(|| Job::new(name.clone()));
        match job.desire(desired, cores) {
            Ok(()) => actions.push(Action::Fence { job: name, fenced, live }),
            Err(reason) => actions.push(Action::Refused(reason)),
        }
    }
}
