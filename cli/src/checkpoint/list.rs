//! `cairn checkpoint list`: what there is, how far it is trusted, and what keeps it.

use checkpoint_store::Checkpoint;
use serde_json::{Value, json};

use super::args::CheckpointListArgs;
use super::{in_order, open, state};
use crate::args::Output;
use crate::failure::Failure;
use crate::table::{self, say};

pub(super) async fn list(args: CheckpointListArgs) -> Result<u8, Failure> {
    let (_, chain) = open(&args).await?;
    let checkpoints = in_order(&chain);
    if args.output == Output::Json {
        for c in &checkpoints {
            say!("{}", summary(c));
        }
        return Ok(0);
    }
    if checkpoints.is_empty() {
        say!("job {} has no checkpoints yet", args.name);
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = checkpoints
        .iter()
        .map(|c| {
            let place = &c.checkpoint;
            vec![
                place.step.to_string(),
                place.generation.to_string(),
                table::bytes(place.bytes),
                trust(c),
                marks(c),
                place.digest.to_string(),
            ]
        })
        .collect();
    table::print(&["STEP", "GENERATION", "SIZE", "TRUST", "MARKS", "DIGEST"], &rows);
    Ok(0)
}

/// How far it is trusted, for people; a sample is told with its share.
pub(super) fn trust(c: &Checkpoint) -> String {
    match &c.proof {
        Some(proof) if !proof.is_full() && c.quarantined.is_none() => {
            format!("{} ({:.0}% proved)", c.trust().word(), proof.share() * 100.0)
        }
        _ => c.trust().word().to_string(),
    }
}

/// What else is to be said of it.
pub(super) fn marks(c: &Checkpoint) -> String {
    let marks = [(c.abandoned, "abandoned"), (c.pinned.is_some(), "pinned"), (!c.leases.is_empty(), "leased")];
    let said: Vec<&str> = marks.into_iter().filter(|(is, _)| *is).map(|(_, word)| word).collect();
    if said.is_empty() { "-".into() } else { said.join(",") }
}

fn summary(c: &Checkpoint) -> Value {
    let leases: Vec<Value> =
        c.leases.iter().map(|l| json!({"lease": l.id, "holder": l.holder, "seconds": l.seconds})).collect();
    json!({
        "event": "checkpoint",
        "step": c.checkpoint.step, "generation": c.checkpoint.generation, "digest": c.checkpoint.digest,
        "bytes": c.checkpoint.bytes, "state": state(c), "reason": c.quarantined, "manifest": c.checkpoint.manifest,
        "trust": c.trust(), "proved": c.proof.as_ref().map(checkpoint_store::Proof::share),
        "abandoned": c.abandoned, "pinned": c.pinned, "leases": leases, "metrics": c.metrics,
    })
}
