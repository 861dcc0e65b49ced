//! `cairn checkpoint verify`: reading checkpoints again, and with a coordinator recording what was found.
//!
//! While it reads, the checkpoint is leased, so that retention does not take it away half-way. The lease is renewed in
//! the background and given back at the end; if this process dies, the coordinator ends it after a minute.

use std::time::Duration;

use checkpoint_store::{Chain, Change, Checkpoint, Kind, Store, VerifyReport, verify_sample};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::args::VerifyArgs;
use super::door::Door;
use super::{bar, chosen, open};
use crate::args::Output;
use crate::failure::{BAD_DATA, Failure};
use crate::parts::host_identity;
use crate::table::{self, say};

/// How long a lease holds without a renewal, and how often it is renewed.
const LEASE: (u32, Duration) = (60, Duration::from_secs(20));

pub(super) async fn verify(args: VerifyArgs) -> Result<u8, Failure> {
    let (store, mut chain) = open(&args.job).await?;
    let checkpoints = chosen(&chain, args.step)?;
    let door = Door::named(&args.leader, &store, &args.job.name).await?;
    let mut problems = Vec::new();
    for c in &checkpoints {
        // A job at work deletes old checkpoints while others are read.
        if args.step.is_none() && is_gone(&mut chain, c).await? {
            continue;
        }
        let found = match &door {
            None => prove(&args, &store, c).await?,
            Some(door) => {
                let lease = Leased::take(door, c).await?;
                let found = prove(&args, &store, c).await;
                lease.give_back().await?;
                let found = found?;
                door.ask(&found.verdict(c)).await?;
                found
            }
        };
        if !found.problems.is_empty() && is_gone(&mut chain, c).await? {
            let step = c.checkpoint.step;
            let why = format!("step {step} was deleted by retention while it was read; nothing is said of it");
            if args.step.is_some() {
                return Err(Failure::request(why));
            }
            tracing::warn!("{why}");
            continue;
        }
        found.say(&args, c, door.is_some());
        problems.extend(found.problems.into_iter().map(|problem| format!("step {}: {problem}", c.checkpoint.step)));
    }
    if problems.is_empty() { Ok(0) } else { Err(Failure::new(BAD_DATA, problems.join("\n       "))) }
}

/// Whether a checkpoint is no more in the chain, which is read on.
async fn is_gone(chain: &mut Chain, c: &Checkpoint) -> Result<bool, Failure> {
    chain.refresh().await?;
    Ok(chain.history().find(&c.checkpoint.manifest).is_none())
}

/// What was found of one checkpoint.
struct Found {
    proved: u64,
    blocks: u64,
    problems: Vec<String>,
}

async fn prove(args: &VerifyArgs, store: &Store, c: &Checkpoint) -> Result<Found, Failure> {
    let place = &c.checkpoint;
    let sample = args.sample();
    let bar = bar(&format!("step {}", place.step), (place.bytes as f64 * sample.share.min(1.0)) as u64);
    let outcome = verify_sample(store, &args.job.name, place, sample, &|bytes| bar.inc(bytes)).await;
    bar.finish_and_clear();
    match outcome {
        Ok(VerifyReport { objects, proved, blocks, .. }) => {
            let problems = objects.into_iter().filter_map(|object| object.problem).collect();
            Ok(Found { proved, blocks, problems })
        }
        Err(error) if error.kind() == Kind::Corrupt => {
            Ok(Found { proved: 0, blocks: 0, problems: vec![error.to_string()] })
        }
        Err(error) => Err(error.into()),
    }
}

impl Found {
    /// What the coordinator is to record.
    fn verdict(&self, c: &Checkpoint) -> Change {
        let manifest = c.checkpoint.manifest.clone();
        match self.problems.first() {
            Some(problem) => Change::Quarantine { manifest, reason: problem.clone() },
            None => Change::Verified { manifest, blocks: self.proved, of: self.blocks, by: holder() },
        }
    }

    fn say(&self, args: &VerifyArgs, c: &Checkpoint, recorded: bool) {
        let place = &c.checkpoint;
        let good = self.problems.is_empty();
        let share = if self.blocks == 0 { 0.0 } else { self.proved as f64 / self.blocks as f64 };
        match args.job.output {
            Output::Json => say!(
                "{}",
                json!({"event": "verified", "step": place.step, "digest": place.digest, "good": good,
                       "bytes": place.bytes, "problems": self.problems, "blocks": self.blocks,
                       "proved": self.proved, "share": share, "recorded": recorded})
            ),
            Output::Text if good => {
                let part = format!("{} of {} blocks ({:.1}%)", self.proved, self.blocks, share * 100.0);
                say!("step {}  good  {part} of {}  digest {}", place.step, table::bytes(place.bytes), place.digest);
            }
            Output::Text if recorded => say!("step {}  damaged, quarantined", place.step),
            Output::Text => say!("step {}  damaged", place.step),
        }
    }
}

fn holder() -> String {
    let host = host_identity();
    let host = host.split('/').next().unwrap_or_default();
    format!("cairn checkpoint verify on {host}, process {}", std::process::id())
}

/// A lease, renewed in the background.
struct Leased {
    door: Door,
    id: String,
    renewing: JoinHandle<()>,
}

impl Leased {
    async fn take(door: &Door, c: &Checkpoint) -> Result<Self, Failure> {
        let (id, (seconds, every)) = (uuid::Uuid::new_v4().to_string(), LEASE);
        let manifest = c.checkpoint.manifest.clone();
        door.ask(&Change::Lease { manifest, lease: id.clone(), holder: holder(), seconds }).await?;
        let (renew, lease) = (door.clone(), id.clone());
        let renewing = tokio::spawn(async move {
            loop {
                sleep(every).await;
                if let Err(error) = renew.ask(&Change::Renew { lease: lease.clone() }).await {
                    tracing::warn!("the lease was not renewed: {error}");
                }
            }
        });
        Ok(Self { door: door.clone(), id, renewing })
    }

    async fn give_back(self) -> Result<(), Failure> {
        self.renewing.abort();
        self.door.ask(&Change::Release { lease: self.id.clone() }).await.map(drop)
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}
