//! What is persisted about a job, in the machine's terms: the records it decides to write and their fold.
//!
//! The machine never sees the store. It says which [`Entry`] comes next, and only when the driver reports it stored
//! does it enter the [`Ledger`] and may anything follow from it. After a restart the driver hands over the ledger it
//! folded from the job's chain.

use proto::ids::{Generation, NodeName, Step, WorkerId};
use proto::incident::{Incident, Incidents};
use proto::spec::JobSpec;

use super::memory::MemoryPoint;

/// A committed checkpoint as the machine needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its step.
    pub step: Step,
    /// The generation that saved it.
    pub generation: Generation,
    /// Its digest, in hex.
    pub digest: String,
    /// Bytes written for it.
    pub bytes: u64,
    /// JSON of the store's reference to it, for the workers that load it.
    pub reference: Vec<u8>,
}

/// One rank of a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Where it runs.
    pub node: NodeName,
    /// The process.
    pub worker: WorkerId,
    /// Where its ring listens; empty if the history does not say.
    pub address: String,
}

/// A persisted membership; its rank order is the order of `members`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Its number.
    pub generation: Generation,
    /// All ranks.
    pub members: Vec<Member>,
    /// The newest checkpoint, which it starts from unless `memory` says otherwise; `None`: the seed.
    pub start: Option<Checkpoint>,
    /// The step in the nodes' memory it starts from.
    pub memory: Option<MemoryPoint>,
    /// The numeric identity the job's workers must have.
    pub identity: String,
    /// The data's fingerprint.
    pub fingerprint: String,
}

impl Membership {
    /// The step it starts from.
    pub fn start_step(&self) -> Step {
        let stored = self.start.as_ref().map_or(Step::ZERO, |start| start.step);
        self.memory.map_or(stored, |memory| memory.step)
    }
}

/// How a job came to rest.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// Stopped with a checkpoint, to be resumed.
    Paused {
        /// After this step.
        step: Step,
        /// The loss of that step.
        loss: Option<f64>,
        /// Digest of the state, if there is a checkpoint.
        digest: Option<String>,
    },
    /// All steps done and stored.
    Finished {
        /// The last step.
        step: Step,
        /// Its loss.
        loss: Option<f64>,
        /// Digest of the final state.
        digest: String,
    },
    /// Given up.
    Failed {
        /// Why, and what to do.
        reason: String,
        /// Exit code of a command that waits for the job.
        code: u8,
    },
    /// Ended by the operator.
    Cancelled,
}

/// A record the machine wants in a job's chain.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    /// The job exists.
    Submitted {
        /// What was asked.
        spec: Box<JobSpec>,
        /// Pause after this step.
        stop_at: Option<Step>,
    },
    /// This leader acts on the job from now on.
    Led,
    /// A paused or failed job goes on, perhaps with other resources.
    Resumed {
        /// What is asked now.
        spec: Box<JobSpec>,
        /// Pause after this step.
        stop_at: Option<Step>,
    },
    /// The job starts over; what was saved is never resumed from.
    Restarted {
        /// What is asked now.
        spec: Box<JobSpec>,
        /// Pause after this step.
        stop_at: Option<Step>,
    },
    /// The elastic range changed.
    Scaled {
        /// Most workers; no more than this are the fewest.
        workers: u32,
    },
    /// A membership; announced only after this is stored.
    Generation(Box<Membership>),
    /// The job has stopped with a checkpoint and given its slots up; it waits for others.
    Yielded {
        /// The step it stopped after.
        step: Step,
        /// For what.
        reason: String,
    },
    /// A checkpoint is not what it should be.
    Quarantined {
        /// Which.
        checkpoint: Checkpoint,
        /// What is wrong with it.
        reason: String,
    },
    /// What broke a generation off is over.
    Incident(Box<Incident>),
    /// The job came to rest.
    Ended(End),
}

/// The fold of a job's chain.
#[derive(Debug, Clone, PartialEq)]
pub struct Ledger {
    /// The specification in force.
    pub spec: JobSpec,
    /// Pause after this step.
    pub stop_at: Option<Step>,
    /// The newest generation number ever used; zero before the first.
    pub generation: Generation,
    /// The newest membership, if it may still be alive: nothing ended it.
    pub membership: Option<Membership>,
    /// Checkpoints a new generation may start from, oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// Whether the job (since it last started over) ever had a checkpoint.
    pub had_checkpoint: bool,
    /// The numeric identity, once recorded.
    pub identity: Option<String>,
    /// The data fingerprint, once recorded.
    pub fingerprint: Option<String>,
    /// Failures in a row without a new checkpoint, as far as the history tells.
    pub restarts: u32,
    /// What went wrong since the job was submitted or last started over.
    pub incidents: Incidents,
    /// Set while the job is at rest.
    pub end: Option<End>,
}

impl Ledger {
    /// The ledger of a job of which nothing is stored yet.
    pub fn new(spec: JobSpec, stop_at: Option<Step>) -> Self {
        Self {
            spec,
            stop_at,
            generation: Generation::ZERO,
            membership: None,
            checkpoints: Vec::new(),
            had_checkpoint: false,
            identity: None,
            fingerprint: None,
            restarts: 0,
            incidents: Incidents::default(),
            end: None,
        }
    }

    /// The newest checkpoint a generation may start from.
    pub fn newest(&self) -> Option<&Checkpoint> {
        self.checkpoints.last()
    }

    /// The number of workers was changed by hand.
    pub fn scale(&mut self, workers: u32) {
        let range = &mut self.spec.resources.workers;
        range.max = workers;
        range.min = range.min.min(workers);
    }

    /// Checkpoints were deleted or set aside.
    pub fn forget(&mut self, gone: &[(Step, Generation)]) {
        self.checkpoints.retain(|checkpoint| !gone.contains(&(checkpoint.step, checkpoint.generation)));
    }

    /// A checkpoint was committed.
    pub fn commit(&mut self, checkpoint: Checkpoint) {
        self.had_checkpoint = true;
        self.checkpoints.retain(|other| other.step < checkpoint.step);
        self.checkpoints.push(checkpoint);
    }

    /// Takes an unfinished job for one at rest: whoever ran it is gone, and it is to be submitted again.
    pub fn interrupt(&mut self) {
        if self.end.is_none() {
            let newest = self.newest();
            let step = newest.map_or(Step::ZERO, |checkpoint| checkpoint.step);
            let digest = newest.map(|checkpoint| checkpoint.digest.clone());
            self.end = Some(End::Paused { step, loss: None, digest });
            self.membership = None;
        }
    }

    /// Enters a stored record.
    pub fn apply(&mut self, entry: &Entry) {
        match entry {
            Entry::Led => {}
            Entry::Submitted { spec, stop_at } | Entry::Resumed { spec, stop_at } => {
                self.spec = (**spec).clone();
                self.stop_at = *stop_at;
                self.end = None;
                self.membership = None;
            }
            Entry::Restarted { spec, stop_at } => {
                let generation = self.generation;
                *self = Self { generation, ..Self::new((**spec).clone(), *stop_at) };
            }
            Entry::Scaled { workers } => self.scale(*workers),
            Entry::Generation(membership) => {
                self.generation = membership.generation;
                // Beyond the start lie only abandoned checkpoints.
                let start = membership.start_step();
                self.checkpoints.retain(|checkpoint| checkpoint.step <= start);
                self.identity.get_or_insert_with(|| membership.identity.clone());
                self.fingerprint.get_or_insert_with(|| membership.fingerprint.clone());
                self.membership = Some((**membership).clone());
            }
            Entry::Yielded { .. } => self.membership = None,
            Entry::Quarantined { checkpoint, .. } => {
                self.checkpoints.retain(|other| other.step != checkpoint.step);
            }
            Entry::Incident(incident) => self.incidents.add((**incident).clone()),
            Entry::Ended(end) => {
                self.end = Some(end.clone());
                self.membership = None;
            }
        }
    }
}
