//! What is known of a checkpoint besides its existence: trust, pins, leases and metrics.
//!
//! **Trust.** A committed checkpoint is a *candidate*: each rank hashed what it uploaded, but nobody has read it back.
//! A full verification makes it *verified*; one that finds damage makes it *quarantined*, for good: resume falls back
//! past it. A sample proves a share of the blocks and is told as that share; it does not make a checkpoint verified.
//!
//! **Pins** keep a checkpoint until they are taken away. **Leases** keep one while somebody reads it. Neither needs a
//! clock: both are records, and the fold refuses a `deleted` record of a checkpoint that has either. So a collector
//! with an old view of the chain cannot delete what was leased meanwhile, for it loses the append first.
//!
//! How a lease of a vanished reader ends is the leader's business ([`crate::leases`]): it appends `released`.

use serde::{Deserialize, Serialize};

use crate::history::{Checkpoint, History};
use crate::record::Event;

/// Most leases of a job at once.
pub const MAX_LEASES: usize = 256;
/// The longest time a lease may ask to be kept without a renewal: a day.
pub const MAX_LEASE_SECONDS: u32 = 86_400;
/// Most metrics of a checkpoint.
pub const MAX_METRICS: usize = 64;
/// Longest text for people in these records, in bytes. Every fold carries all of them.
pub const MAX_NOTE: usize = 1_000;
/// Longest name of a lease or metric, in bytes.
const MAX_NAME: usize = 100;

/// How far a checkpoint's bytes are trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// Committed, not yet read back in full.
    Candidate,
    /// Read back in full, every block with its hash.
    Verified,
    /// Found damaged; never resumed from.
    Quarantined,
}

impl Trust {
    /// The word for it, in lists and in JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Candidate => "candidate",
            Self::Verified => "verified",
            Self::Quarantined => "quarantined",
        }
    }
}

/// What a verification has proved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Blocks that were read and had their hashes.
    pub blocks: u64,
    /// Blocks the checkpoint has.
    pub of: u64,
    /// Who read them, for people.
    pub by: String,
}

impl Proof {
    /// Whether every block was read.
    pub fn is_full(&self) -> bool {
        self.blocks >= self.of
    }

    /// The share that was proved, from 0 to 1.
    pub fn share(&self) -> f64 {
        if self.of == 0 { 0.0 } else { self.blocks as f64 / self.of as f64 }
    }
}

/// A reader's hold on a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its name, drawn by the reader.
    pub id: String,
    /// Who reads, for people.
    pub holder: String,
    /// How long a leader waits for a renewal.
    pub seconds: u32,
}

impl Checkpoint {
    /// How far its bytes are trusted.
    pub fn trust(&self) -> Trust {
        match &self.proof {
            _ if self.quarantined.is_some() => Trust::Quarantined,
            Some(proof) if proof.is_full() => Trust::Verified,
            _ => Trust::Candidate,
        }
    }

    /// Whether something other than retention's rules keeps it.
    pub fn is_held(&self) -> bool {
        self.pinned.is_some() || !self.leases.is_empty()
    }
}

impl History {
    /// The checkpoint a lease holds.
    pub fn leased(&self, lease: &str) -> Option<&Checkpoint> {
        self.checkpoints.iter().find(|c| c.leases.iter().any(|l| l.id == lease))
    }

    /// All leases with the checkpoints they hold.
    pub fn leases(&self) -> impl Iterator<Item = (&Checkpoint, &Lease)> {
        self.checkpoints.iter().flat_map(|c| c.leases.iter().map(move |lease| (c, lease)))
    }

    /// Whether an event of this file's kind may follow; the error says why not.
    pub(crate) fn check_note(&self, event: &Event) -> Result<(), String> {
        let known = |manifest: &str| self.find(manifest).ok_or_else(|| format!("there is no checkpoint {manifest}"));
        match event {
            Event::Deleted { manifest } => match known(manifest)? {
                c if c.pinned.is_some() => Err(format!("{manifest} is pinned")),
                c => c.leases.first().map_or(Ok(()), |l| Err(format!("{manifest} is leased by {}", l.holder))),
            },
            Event::Pinned { manifest, reason } => known(manifest).and_then(|_| is_note("the reason", reason)),
            Event::Unpinned { manifest } => known(manifest).map(drop),
            Event::Incident(incident) => {
                is_note("the reason", &incident.reason).and_then(|()| is_note("the source", &incident.source))
            }
            Event::Yielded { reason, .. } => is_note("the reason", reason),
            Event::Verified { manifest, blocks, of, by } => {
                if let Some(reason) = &known(manifest)?.quarantined {
                    return Err(format!("{manifest} was quarantined: {reason}"));
                }
                if *blocks == 0 || blocks > of {
                    return Err(format!("{blocks} of {of} blocks are no proof"));
                }
                is_note("the verifier", by)
            }
            Event::Leased { manifest, lease, holder, seconds } => {
                known(manifest)?;
                is_name("the lease", lease)?;
                is_note("the holder", holder)?;
                if self.leased(lease).is_some() {
                    return Err(format!("lease {lease} exists"));
                }
                if self.leases().count() >= MAX_LEASES {
                    return Err(format!("the job has {MAX_LEASES} leases, which is the most"));
                }
                let good = (1..=MAX_LEASE_SECONDS).contains(seconds);
                if good { Ok(()) } else { Err(format!("{seconds} s: a lease asks for 1 to {MAX_LEASE_SECONDS} s")) }
            }
            Event::Released { lease, reason } => match self.leased(lease) {
                Some(_) => is_note("the reason", reason),
                None => Err("there is no such lease".into()),
            },
            Event::Measured { manifest, metrics } => {
                let c = known(manifest)?;
                let new = metrics.keys().filter(|name| !c.metrics.contains_key(*name)).count();
                if c.metrics.len() + new > MAX_METRICS {
                    return Err(format!("{manifest} would have more than {MAX_METRICS} metrics"));
                }
                metrics.keys().try_for_each(|name| is_name("the metric", name))?;
                let finite = metrics.values().all(|value| value.is_finite());
                if finite { Ok(()) } else { Err("a metric is a finite number".into()) }
            }
            _ => Ok(()),
        }
    }

    /// Takes in an event that [`History::check_note`] has passed; others change nothing here.
    pub(crate) fn note(&mut self, event: &Event) {
        let find = |checkpoints: &mut Vec<Checkpoint>, manifest: &str, change: &dyn Fn(&mut Checkpoint)| {
            checkpoints.iter_mut().filter(|c| c.checkpoint.manifest == manifest).for_each(change);
        };
        let all = &mut self.checkpoints;
        match event {
            Event::Pinned { manifest, reason } => find(all, manifest, &|c| c.pinned = Some(reason.clone())),
            Event::Unpinned { manifest } => find(all, manifest, &|c| c.pinned = None),
            Event::Verified { manifest, blocks, of, by } => find(all, manifest, &|c| {
                // A later sample takes nothing from an earlier full proof.
                if c.proof.as_ref().is_none_or(|before| before.blocks <= *blocks) {
                    c.proof = Some(Proof { blocks: *blocks, of: *of, by: by.clone() });
                }
            }),
            Event::Leased { manifest, lease, holder, seconds } => find(all, manifest, &|c| {
                c.leases.push(Lease { id: lease.clone(), holder: holder.clone(), seconds: *seconds });
            }),
            Event::Released { lease, .. } => all.iter_mut().for_each(|c| c.leases.retain(|l| l.id != *lease)),
            Event::Measured { manifest, metrics } => find(all, manifest, &|c| {
                c.metrics.extend(metrics.iter().map(|(name, value)| (name.clone(), *value)));
            }),
            _ => {}
        }
    }
}

fn is_note(what: &str, text: &str) -> Result<(), String> {
    let good = text.len() <= MAX_NOTE;
    if good { Ok(()) } else { Err(format!("{what} has {} bytes, more than {MAX_NOTE}", text.len())) }
}

fn is_name(what: &str, text: &str) -> Result<(), String> {
    let good = (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if good { Ok(()) } else { Err(format!("{what} is not a name: 1 to {MAX_NAME} printable characters")) }
}

/// A text cut to what a record takes.
pub fn note(text: &str) -> String {
    let mut end = text.len().min(MAX_NOTE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
