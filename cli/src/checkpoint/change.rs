//! `cairn checkpoint pin`, `unpin` and `prune`: changing what a store keeps.

use checkpoint_store::{Chain, Change, CheckpointRef, Collector, Freed};
use serde_json::json;

use super::args::{PinArgs, PruneArgs, StepArgs};
use super::{best, door, open};
use crate::args::Output;
use crate::failure::Failure;
use crate::table::{self, say};

pub(super) async fn pin(args: PinArgs) -> Result<u8, Failure> {
    let reason = args.reason.clone();
    mark(&args.at, "pinned", |manifest| Change::Pin { manifest, reason }).await
}

pub(super) async fn unpin(args: StepArgs) -> Result<u8, Failure> {
    mark(&args, "unpinned", |manifest| Change::Unpin { manifest }).await
}

async fn mark(args: &StepArgs, what: &str, change: impl FnOnce(String) -> Change) -> Result<u8, Failure> {
    let (store, chain) = open(&args.job).await?;
    let checkpoint = best(&chain, Some(args.step))?.checkpoint;
    let change = change(checkpoint.manifest.clone());
    let report = Box::pin(door::perform(&args.leader, &store, chain, &change)).await?;
    let changed = report.records > 0;
    match args.job.output {
        Output::Json => {
            say!(
                "{}",
                json!({"event": what, "step": checkpoint.step, "manifest": checkpoint.manifest, "changed": changed})
            );
        }
        Output::Text if changed => say!("step {} of job {} is {what}", checkpoint.step, args.job.name),
        Output::Text => say!("step {} of job {} was {what} already", checkpoint.step, args.job.name),
    }
    Ok(0)
}

pub(super) async fn prune(args: PruneArgs) -> Result<u8, Failure> {
    let (store, chain) = open(&args.job).await?;
    let keep = args.keep();
    if args.dry_run {
        let policy = door::policy(&chain).await?.with(&keep)?;
        let condemned = policy.condemned(chain.history());
        let freed = Collector::default().freed(&chain, &condemned).await?;
        tell(&args, &condemned, freed, None);
        if args.job.output == Output::Text {
            let judged = chain.history().checkpoints.iter().zip(policy.judge(chain.history()));
            let kept: Vec<Vec<String>> =
                judged.filter_map(|(c, why)| Some(vec![c.checkpoint.step.to_string(), why?.to_string()])).collect();
            say!();
            table::print(&["STAYS", "BECAUSE"], &kept);
        }
        return Ok(0);
    }
    let before: Chain = chain.clone();
    let report = Box::pin(door::perform(&args.leader, &store, chain, &Change::Prune { keep })).await?;
    tell(&args, &report.deleted, report.freed, Some(report.files));
    if let Some(why) = &report.unfinished {
        let job = before.job();
        return Err(Failure::job(format!(
            "what job {job} no longer keeps is recorded as deleted, but not all files are gone: {why}; prune again"
        )));
    }
    Ok(0)
}

/// Says what went, or with no count of files what would go.
fn tell(args: &PruneArgs, gone: &[CheckpointRef], freed: Freed, files: Option<u64>) {
    if args.job.output == Output::Json {
        for c in gone {
            let event = if files.is_some() { "deleted" } else { "would_delete" };
            let (step, generation, manifest) = (c.step, c.generation, &c.manifest);
            say!("{}", json!({"event": event, "step": step, "generation": generation, "manifest": manifest}));
        }
        say!(
            "{}",
            json!({"event": "pruned", "dry_run": files.is_none(), "checkpoints": gone.len(),
                   "objects": freed.objects, "bytes": freed.bytes, "files": files})
        );
        return;
    }
    let (did, comes) = if files.is_some() { ("deleted", "freed") } else { ("would delete", "would free") };
    for c in gone {
        say!("{did} step {} (generation {})", c.step, c.generation);
    }
    let (count, objects, bytes) = (gone.len(), freed.objects, table::bytes(freed.bytes));
    say!("{did} {count} checkpoints of job {}, {comes} {bytes} in {objects} objects", args.job.name);
}
