//! Changes to a job's checkpoints that somebody asks for: pins, verdicts, leases, pruning.
//!
//! They are performed by whoever leads the job, in the one queue in which it also commits and collects: a coordinator,
//! or a command that leads for its own length. [`Keeper`] is what such a leader remembers of one job. Each change is
//! harmless to repeat: what is so already is not recorded again, so a caller that got no answer asks once more.

use std::time::Duration;

use proto::ids::Epoch;
use serde::{Deserialize, Serialize};

use crate::chain::{Chain, ChainError};
use crate::error::{StoreError, check_format};
use crate::history::Checkpoint;
use crate::leases::LeaseClock;
use crate::policy::{Keep, Policy};
use crate::record::{CheckpointRef, Event, Record};
use crate::retention::{Collected, Collector, Freed, Open};
use crate::trust::note;

/// The version of a change's JSON form.
pub const CHANGE_FORMAT: u32 = 1;
/// A change's JSON larger than this is refused.
pub const MAX_CHANGE: usize = 64 << 10;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// Keep a checkpoint until it is unpinned.
    Pin {
        /// Its manifest's file name.
        manifest: String,
        /// Why, for people.
        reason: String,
    },
    /// Leave a checkpoint to the rules of retention again.
    Unpin {
        /// Its manifest's file name.
        manifest: String,
    },
    /// A checkpoint was read and nothing was wrong.
    Verified {
        /// Its manifest's file name.
        manifest: String,
        /// Blocks that were read.
        blocks: u64,
        /// Blocks it has.
        of: u64,
        /// Who read them, for people.
        by: String,
    },
    /// A checkpoint was found damaged.
    Quarantine {
        /// Its manifest's file name.
        manifest: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A reader needs a checkpoint for a while.
    Lease {
        /// Its manifest's file name.
        manifest: String,
        /// The lease's name, drawn by the reader.
        lease: String,
        /// Who reads, for people.
        holder: String,
        /// How long it holds without a renewal.
        seconds: u32,
    },
    /// A reader still needs its checkpoint.
    Renew {
        /// The lease's name.
        lease: String,
    },
    /// A reader is done.
    Release {
        /// The lease's name.
        lease: String,
    },
    /// Delete what the rules do not keep.
    Prune {
        /// Rules in place of the job's own.
        keep: Keep,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    format: u32,
    #[serde(flatten)]
    change: Change,
}

impl Change {
    /// As JSON.
    pub fn to_json(&self) -> Result<Vec<u8>, StoreError> {
        let envelope = Envelope { format: CHANGE_FORMAT, change: self.clone() };
        serde_json::to_vec(&envelope).map_err(|e| StoreError::Bug(format!("a change cannot be written: {e}")))
    }

    /// Reads a change from the wire.
    pub fn from_json(bytes: &[u8]) -> Result<Self, StoreError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        if bytes.len() > MAX_CHANGE {
            return Err(StoreError::Input(format!("a change of {} bytes is larger than {MAX_CHANGE}", bytes.len())));
        }
        let wrong = |e: serde_json::Error| StoreError::Input(format!("not a change of a checkpoint: {e}"));
        let head: Head = serde_json::from_slice(bytes).map_err(wrong)?;
        check_format("the change", head.format, CHANGE_FORMAT)?;
        serde_json::from_slice::<Envelope>(bytes).map(|envelope| envelope.change).map_err(wrong)
    }
}

/// What came of a change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeReport {
    /// Records appended; 0 if it was so already.
    pub records: u64,
    /// Checkpoints that went.
    pub deleted: Vec<CheckpointRef>,
    /// Files removed.
    pub files: u64,
    /// What came free with them.
    pub freed: Freed,
    /// Why files that should go are still there; the next collection removes them.
    pub unfinished: Option<String>,
    /// A checkpoint that was set aside, and why.
    pub quarantined: Option<(CheckpointRef, String)>,
}

/// What a leader remembers of one job's checkpoints.
#[derive(Debug, Default)]
pub struct Keeper {
    collector: Collector,
    leases: LeaseClock,
}

impl Keeper {
    /// The leader has read the chain: leases it has not heard of begin their time. `now` is its monotonic time.
    pub fn observe(&mut self, now: Duration, chain: &Chain) {
        self.leases.observe(now, chain.history());
    }

    /// Performs a change. `policy` is the job's own.
    pub async fn perform(
        &mut self,
        chain: &mut Chain,
        epoch: Epoch,
        now: Duration,
        policy: &Policy,
        change: &Change,
    ) -> Result<ChangeReport, ChainError> {
        let before = chain.history().records;
        let mut report = ChangeReport::default();
        match change {
            Change::Renew { lease } => {
                self.observe(now, chain);
                if !self.leases.renew(now, lease) {
                    let why = format!("lease {lease} is over: it was released, or not renewed in time");
                    return Err(StoreError::Input(why).into());
                }
            }
            Change::Prune { keep } => {
                let policy = policy.with(keep)?;
                self.end_leases(chain, epoch, now).await?;
                let condemned = policy.condemned(chain.history());
                report.freed = self.collector.freed(chain, &condemned).await?;
                let open = Open::of(chain.history());
                let done = self.collector.collect(chain, epoch, &policy, open).await?;
                (report.deleted, report.files) = (done.deleted, done.files as u64);
                report.unfinished = done.unfinished;
            }
            other => {
                if let Some(event) = event(chain, other)? {
                    append(chain, epoch, event).await?;
                    report.quarantined = set_aside(chain, other);
                }
                self.observe(now, chain);
            }
        }
        report.records = chain.history().records - before;
        Ok(report)
    }

    /// Applies the job's policy, after a commit.
    pub async fn collect(
        &mut self,
        chain: &mut Chain,
        epoch: Epoch,
        now: Duration,
        policy: &Policy,
    ) -> Result<Collected, ChainError> {
        self.end_leases(chain, epoch, now).await?;
        let open = Open::of(chain.history());
        self.collector.collect(chain, epoch, policy, open).await
    }

    /// Releases what was not renewed in time.
    async fn end_leases(&mut self, chain: &mut Chain, epoch: Epoch, now: Duration) -> Result<(), ChainError> {
        self.observe(now, chain);
        for lease in self.leases.expired(now) {
            append(chain, epoch, Event::Released { lease, reason: "not renewed in time".into() }).await?;
        }
        self.observe(now, chain);
        Ok(())
    }
}

async fn append(chain: &mut Chain, epoch: Epoch, event: Event) -> Result<u64, ChainError> {
    let generation = chain.history().generation;
    chain.append(Record::new(epoch, generation, event)).await
}

/// The record a change asks for; `None` if it is so already.
fn event(chain: &Chain, change: &Change) -> Result<Option<Event>, StoreError> {
    let history = chain.history();
    let find = |manifest: &String| -> Result<(&Checkpoint, String), StoreError> {
        let found = history.find(manifest).map(|c| (c, manifest.clone()));
        found.ok_or_else(|| StoreError::Input(format!("job {} has no checkpoint {manifest} any more", chain.job())))
    };
    let event = match change {
        Change::Pin { manifest, reason } => {
            let ((c, manifest), reason) = (find(manifest)?, note(reason));
            (c.pinned.as_ref() != Some(&reason)).then_some(Event::Pinned { manifest, reason })
        }
        Change::Unpin { manifest } => {
            let (c, manifest) = find(manifest)?;
            c.pinned.is_some().then_some(Event::Unpinned { manifest })
        }
        Change::Verified { manifest, blocks, of, by } => {
            let (c, manifest) = find(manifest)?;
            let more = c.proof.as_ref().is_none_or(|proof| proof.blocks < *blocks);
            more.then(|| Event::Verified { manifest, blocks: *blocks, of: *of, by: note(by) })
        }
        Change::Quarantine { manifest, reason } => {
            let (c, manifest) = find(manifest)?;
            c.quarantined.is_none().then(|| Event::Quarantined { manifest, reason: note(reason) })
        }
        Change::Lease { manifest, lease, holder, seconds } => {
            let (c, manifest) = find(manifest)?;
            let held = c.leases.iter().any(|l| l.id == *lease);
            let (lease, holder, seconds) = (lease.clone(), note(holder), *seconds);
            (!held).then_some(Event::Leased { manifest, lease, holder, seconds })
        }
        Change::Release { lease } => {
            let held = history.leased(lease).is_some();
            held.then(|| Event::Released { lease: lease.clone(), reason: "the reader is done".into() })
        }
        Change::Renew { .. } | Change::Prune { .. } => None,
    };
    // What the fold would refuse is the caller's mistake here, not a defect.
    let wrong = event.as_ref().and_then(|event| history.check_note(event).err());
    wrong.map_or(Ok(event), |why| Err(StoreError::Input(why)))
}

/// The checkpoint a change has just quarantined.
fn set_aside(chain: &Chain, change: &Change) -> Option<(CheckpointRef, String)> {
    let Change::Quarantine { manifest, .. } = change else { return None };
    let found = chain.history().find(manifest)?;
    Some((found.checkpoint.clone(), found.quarantined.clone()?))
}
