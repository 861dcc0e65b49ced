//! A job's history: the pure fold of its records.
//!
//! Whoever reads the same records has the same history, so every decision about a job (what to resume from, what to
//! keep, who may write) is a function of the chain. The rules of fencing live here: a record with a lower epoch or
//! generation than one before it is refused, as is a commit by any generation but the present one. When a generation
//! starts from a step, checkpoints of earlier generations beyond it are *abandoned*: another future has begun, and they
//! are never resumed from.

use std::collections::BTreeMap;

use proto::ids::{Epoch, Generation, Step, WorldSize};
use proto::incident::Incidents;
use serde::{Deserialize, Serialize};

use crate::digest::{BlockHash, Digest};
use crate::record::{CheckpointRef, Event, Member, MemoryPoint, Record};
use crate::tensors::TensorRef;
use crate::trust::{Lease, Proof};

/// Where a job is in its life, as far as the chain knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Status {
    /// Waiting for a generation to form.
    Submitted,
    /// A generation was formed.
    Running,
    /// Stopped, to be resumed.
    Paused {
        /// At this step.
        step: Step,
    },
    /// Trained to the end.
    Finished {
        /// The last step.
        step: Step,
        /// The digest of the final state.
        digest: Digest,
        /// The last training loss.
        loss: Option<f64>,
    },
    /// Given up.
    Failed {
        /// Why.
        reason: String,
        /// The exit code.
        code: u8,
    },
    /// Cancelled by hand.
    Cancelled,
}

/// A checkpoint that was committed and not deleted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// What the commit record says.
    pub checkpoint: CheckpointRef,
    /// The number of the commit record.
    pub record: u64,
    /// Whether a later generation started from before it.
    pub abandoned: bool,
    /// Why it was quarantined, if it was.
    pub quarantined: Option<String>,
    /// Why it is pinned, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<String>,
    /// The best proof of its bytes so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
    /// Readers that still need it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leases: Vec<Lease>,
    /// What was measured of its state.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

impl Checkpoint {
    /// A checkpoint as record `record` commits it.
    pub fn committed(checkpoint: CheckpointRef, record: u64) -> Self {
        Self {
            checkpoint,
            record,
            abandoned: false,
            quarantined: None,
            pinned: None,
            proof: None,
            leases: vec![],
            metrics: BTreeMap::new(),
        }
    }

    /// Whether a job may resume from it.
    pub fn is_good(&self) -> bool {
        !self.abandoned && self.quarantined.is_none()
    }
}

/// Everything the chain says about a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// How many records were folded; the next record has this number.
    pub records: u64,
    /// The highest epoch that wrote.
    pub epoch: Epoch,
    /// The present generation; 0 before the first.
    pub generation: Generation,
    /// Where the job is in its life.
    pub status: Status,
    /// The hash of the present specification.
    pub spec_hash: Option<BlockHash>,
    /// Stop, paused, after this step.
    pub stop_at: Option<Step>,
    /// The number of workers asked for by hand since the last submission.
    pub scaled: Option<u32>,
    /// Who led the job last, for people.
    pub leader: Option<String>,
    /// The present generation's size.
    pub world_size: Option<WorldSize>,
    /// The present generation's workers.
    pub members: Vec<Member>,
    /// What the present generation started from; `None` is the initial state.
    pub start: Option<CheckpointRef>,
    /// The step in memory the present generation started from instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryPoint>,
    /// The numeric identity of the job's first generation.
    pub identity: Option<String>,
    /// The fingerprint of the job's data.
    pub fingerprint: Option<String>,
    /// Generations since a checkpoint was last committed: the restart budget counts these.
    pub generations_without_progress: u32,
    /// Committed and not deleted, in the order of their commits.
    pub checkpoints: Vec<Checkpoint>,
    /// Checkpoints of other frameworks' boxes, committed and not deleted; no job resumes from them by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensor_checkpoints: Vec<TensorRef>,
    /// What went wrong since the job was submitted or last started over.
    #[serde(default, skip_serializing_if = "Incidents::is_empty")]
    pub incidents: Incidents,
}

impl Default for History {
    fn default() -> Self {
        Self {
            records: 0,
            epoch: Epoch::ZERO,
            generation: Generation::ZERO,
            status: Status::Submitted,
            spec_hash: None,
            stop_at: None,
            scaled: None,
            leader: None,
            world_size: None,
            members: vec![],
            start: None,
            memory: None,
            identity: None,
            fingerprint: None,
            generations_without_progress: 0,
            checkpoints: vec![],
            tensor_checkpoints: vec![],
            incidents: Incidents::default(),
        }
    }
}

/// Why a record cannot follow a history.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// The author has been superseded.
    #[error(
        "epoch {epoch}, generation {generation} may not write: \
         the chain is at epoch {at_epoch}, generation {at_generation}"
    )]
    Superseded {
        /// The author's epoch.
        epoch: Epoch,
        /// The author's generation.
        generation: Generation,
        /// The chain's epoch.
        at_epoch: Epoch,
        /// The chain's generation.
        at_generation: Generation,
    },
    /// The event makes no sense where the history is.
    #[error("record {number} ({what}) cannot follow: {why}")]
    OutOfPlace {
        /// The record's number.
        number: u64,
        /// Its event.
        what: &'static str,
        /// What it contradicts.
        why: String,
    },
}

impl History {
    /// The newest checkpoint to resume from.
    pub fn newest_good(&self) -> Option<&CheckpointRef> {
        let good = self.checkpoints.iter().filter(|c| c.is_good());
        good.max_by_key(|c| (c.checkpoint.step, c.record)).map(|c| &c.checkpoint)
    }

    /// The checkpoint with this manifest.
    pub fn find(&self, manifest: &str) -> Option<&Checkpoint> {
        self.checkpoints.iter().find(|c| c.checkpoint.manifest == manifest)
    }

    fn has_tensors(&self, manifest: &str) -> bool {
        self.tensor_checkpoints.iter().any(|c| c.manifest == manifest)
    }

    /// The number of the last record.
    pub fn last(&self) -> Option<u64> {
        self.records.checked_sub(1)
    }

    /// Folds one more record; on error the history is as it was.
    pub fn apply(&mut self, record: &Record) -> Result<(), FoldError> {
        if record.epoch < self.epoch || record.generation < self.generation {
            return Err(FoldError::Superseded {
                epoch: record.epoch,
                generation: record.generation,
                at_epoch: self.epoch,
                at_generation: self.generation,
            });
        }
        self.check(record)?;
        match &record.event {
            Event::Submitted { spec_hash, stop_at } | Event::Resumed { spec_hash, stop_at } => {
                self.submitted(*spec_hash, *stop_at);
            }
            Event::Led { leader, .. } => self.leader = Some(leader.clone()),
            Event::Generation { .. } => self.formed(&record.event),
            Event::Committed(checkpoint) => {
                self.generations_without_progress = 0;
                self.checkpoints.push(Checkpoint::committed(checkpoint.clone(), self.records));
            }
            Event::CommittedTensors(checkpoint) => self.tensor_checkpoints.push(checkpoint.clone()),
            Event::Quarantined { manifest, reason } => {
                let named = self.checkpoints.iter_mut().filter(|c| c.checkpoint.manifest == *manifest);
                named.for_each(|c| c.quarantined = Some(reason.clone()));
            }
            Event::Deleted { manifest } => {
                self.checkpoints.retain(|c| c.checkpoint.manifest != *manifest);
                self.tensor_checkpoints.retain(|c| c.manifest != *manifest);
            }
            Event::Paused { step } => self.status = Status::Paused { step: *step },
            Event::Yielded { .. } => self.status = Status::Submitted,
            Event::Incident(incident) => self.incidents.add((**incident).clone()),
            Event::Scaled { workers } => self.scaled = Some(*workers),
            Event::Finished { step, digest, loss } => {
                self.status = Status::Finished { step: *step, digest: *digest, loss: *loss };
            }
            Event::Failed { reason, code } => {
                self.status = Status::Failed { reason: reason.clone(), code: *code };
            }
            Event::Cancelled => self.status = Status::Cancelled,
            Event::Restarted { spec_hash, stop_at } => {
                self.submitted(*spec_hash, *stop_at);
                (self.identity, self.fingerprint, self.start, self.memory) = (None, None, None, None);
                self.checkpoints.iter_mut().for_each(|c| c.abandoned = true);
                self.incidents = Incidents::default();
            }
            event => self.note(event),
        }
        self.epoch = record.epoch;
        self.generation = record.generation;
        // The check has seen that there is a next number.
        self.records = self.records.saturating_add(1);
        Ok(())
    }

    fn submitted(&mut self, spec_hash: BlockHash, stop_at: Option<Step>) {
        (self.spec_hash, self.stop_at, self.scaled) = (Some(spec_hash), stop_at, None);
        self.status = Status::Submitted;
        self.generations_without_progress = 0;
    }

    fn formed(&mut self, event: &Event) {
        let Event::Generation { generation, world_size, members, start, memory, identity, fingerprint } = event else {
            return;
        };
        let step = |start: &Option<CheckpointRef>| start.as_ref().map_or(Step::ZERO, |s| s.step);
        let from = memory.map_or(step(start), |memory| memory.step);
        if memory.is_some() && from > self.memory.map_or(step(&self.start), |memory| memory.step) {
            // It goes on further than the one before it did: that is progress too.
            self.generations_without_progress = 0;
        }
        for c in &mut self.checkpoints {
            c.abandoned |= c.checkpoint.generation < *generation && c.checkpoint.step > from;
        }
        self.status = Status::Running;
        self.world_size = Some(*world_size);
        self.members.clone_from(members);
        self.start.clone_from(start);
        self.memory = *memory;
        self.identity.get_or_insert_with(|| identity.clone());
        self.fingerprint.get_or_insert_with(|| fingerprint.clone());
        self.generations_without_progress = self.generations_without_progress.saturating_add(1);
    }

    /// The rules of order.
    fn check(&self, record: &Record) -> Result<(), FoldError> {
        let out = |what, why: String| Err(FoldError::OutOfPlace { number: self.records, what, why });
        if self.records == u64::MAX {
            return out("order", "the chain is at the end of its numbers".into());
        }
        let first = self.records == 0;
        if first != matches!(record.event, Event::Submitted { .. }) {
            let why = if first { "a chain starts with submitted" } else { "submitted comes first, and once" };
            return out("order", why.into());
        }
        if record.generation != self.generation && !matches!(record.event, Event::Generation { .. }) {
            let why = format!("generation {} was never formed", record.generation);
            return out("generation", why);
        }
        match &record.event {
            Event::Led { epoch, .. } if *epoch != record.epoch => {
                out("led", format!("names epoch {epoch} in a record of epoch {}", record.epoch))
            }
            Event::Generation { generation, .. } if *generation != record.generation => {
                out("generation", format!("names generation {generation} in a record of {}", record.generation))
            }
            Event::Generation { generation, .. } if *generation == self.generation => {
                out("generation", format!("generation {generation} was formed before"))
            }
            Event::Generation { .. } if !matches!(self.status, Status::Submitted | Status::Running) => {
                out("generation", format!("the job is {:?}; it must be resumed first", self.status))
            }
            Event::Generation { start: Some(start), .. } => match self.find(&start.manifest) {
                Some(c) if c.checkpoint == *start && c.is_good() => Ok(()),
                _ => out("generation", format!("it starts from {}, which is no good checkpoint", start.manifest)),
            },
            Event::Yielded { .. } if self.status != Status::Running => {
                out("yielded", format!("the job is {:?}, it has no slots to give up", self.status))
            }
            Event::Committed(c) if c.generation != self.generation || self.status == Status::Submitted => {
                out("committed", format!("generation {} is not the running one", c.generation))
            }
            Event::Committed(c) if self.find(&c.manifest).is_some() || self.has_tensors(&c.manifest) => {
                out("committed", format!("{} was committed before", c.manifest))
            }
            Event::CommittedTensors(c) if c.generation != self.generation || self.status == Status::Submitted => {
                out("committed tensors", format!("generation {} is not the running one", c.generation))
            }
            Event::CommittedTensors(c) if self.has_tensors(&c.manifest) || self.find(&c.manifest).is_some() => {
                out("committed tensors", format!("{} was committed before", c.manifest))
            }
            Event::Deleted { manifest } if self.has_tensors(manifest) => Ok(()),
            Event::Quarantined { manifest, .. } | Event::Deleted { manifest } if self.find(manifest).is_none() => {
                out("checkpoint", format!("there is no checkpoint {manifest}"))
            }
            event => self.check_note(event).or_else(|why| out("checkpoint", why)),
        }
    }
}
