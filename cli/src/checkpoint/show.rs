//! `cairn checkpoint show`: one checkpoint in detail.

use checkpoint_store::{Checkpoint, Manifest, open_checkpoint};
use serde_json::{Value, json};

use super::args::CheckpointArgs;
use super::list::{marks, trust};
use super::{best, open, state};
use crate::args::Output;
use crate::failure::Failure;
use crate::table::{self, say};

/// Characters of a bar of a timeline.
const TIMELINE_WIDTH: usize = 64;

pub(super) async fn show(args: CheckpointArgs, timeline: bool) -> Result<u8, Failure> {
    let (store, chain) = open(&args.job).await?;
    // Without a step: the one a job would resume from, if there is any; else the newest of what there is.
    let best = best(&chain, args.step)?;
    let manifest = open_checkpoint(&store, &args.job.name, &best.checkpoint).await?;
    match args.job.output {
        Output::Json => {
            let mut line = details(&best, &manifest);
            if timeline {
                line["timeline"] = manifest.timeline.to_json();
            }
            say!("{line}");
        }
        Output::Text if timeline => manifest.timeline.render(TIMELINE_WIDTH).iter().for_each(|row| say!("{row}")),
        Output::Text => print_details(&args, &best, &manifest),
    }
    Ok(0)
}

fn details(c: &Checkpoint, m: &Manifest) -> Value {
    let tensors: Vec<Value> =
        m.space.tensors().iter().map(|t| json!({"name": t.name, "shape": t.shape, "dtype": t.dtype})).collect();
    let objects: Vec<Value> = m.objects.iter().map(|o| json!({"path": o.path, "bytes": o.bytes})).collect();
    json!({
        "event": "checkpoint",
        "job": m.job, "step": m.step, "generation": m.generation, "digest": m.digest, "parameters": m.parameters(),
        "world_size": m.world_size, "bytes": m.bytes(), "state": state(c), "scalar": m.scalar,
        "block_elements": m.block_elements, "states": m.states, "tensors": tensors, "objects": objects,
        "manifest": c.checkpoint.manifest, "trust": c.trust(), "pinned": c.pinned, "metrics": c.metrics,
    })
}

fn print_details(args: &CheckpointArgs, c: &Checkpoint, m: &Manifest) {
    say!("job         {}", args.job.name);
    say!("step        {} (generation {}, {})", m.step, m.generation, state(c));
    say!("digest      {}", m.digest);
    say!("trust       {}", trust(c));
    if marks(c) != "-" {
        let why = c.pinned.as_ref().filter(|why| !why.is_empty()).map_or(String::new(), |why| format!(" ({why})"));
        say!("marks       {}{why}", marks(c));
    }
    for (name, value) in &c.metrics {
        say!("metric      {name} {value:.6}");
    }
    say!("parameters  {} in {} tensors", m.parameters(), m.space.tensors().len());
    let states: Vec<&str> = m.states.iter().map(|s| s.name.as_str()).collect();
    say!("states      {}", states.join(", "));
    say!("saved by    {} workers, {} in {} objects", m.world_size, table::bytes(m.bytes()), m.objects.len());
    say!("data        next sample {} of the seeded order, seed {}", m.scalar.cursor, m.scalar.seed);
    say!();
    let rows: Vec<Vec<String>> = m.objects.iter().map(|o| vec![table::bytes(o.bytes), o.path.clone()]).collect();
    table::print(&["SIZE", "OBJECT"], &rows);
}
