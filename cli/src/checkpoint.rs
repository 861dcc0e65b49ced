//! `cairn checkpoint list|show|verify`: looking into a store, with no coordinator needed and nothing changed.

use std::io::IsTerminal;
use std::time::Duration;

use checkpoint_store::{Chain, Checkpoint, Kind, Manifest, Store, list_jobs, normalize_url, open_checkpoint, verify};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::args::{CheckpointArgs, CheckpointCommand, CheckpointListArgs, Output};
use crate::failure::{BAD_DATA, Failure};
use crate::table::{self, say};

/// Characters of a bar of a timeline.
const TIMELINE_WIDTH: usize = 64;

pub(crate) async fn run(command: CheckpointCommand) -> Result<u8, Failure> {
    match command {
        CheckpointCommand::List(args) => list(args).await,
        CheckpointCommand::Show(args) => show(args.checkpoint, args.timeline).await,
        CheckpointCommand::Verify(args) => prove(args).await,
    }
}

/// Opens the store for reading and finds the job in it.
async fn open(args: &CheckpointListArgs) -> Result<(Store, Chain), Failure> {
    let here = std::env::current_dir().map_err(Failure::job)?;
    let url = normalize_url(&args.store, &here)?;
    let store = Store::open_existing(&url)?;
    if let Some(chain) = Chain::load(&store, &args.name).await? {
        return Ok((store, chain));
    }
    let jobs: Vec<String> = list_jobs(&store).await?.iter().map(ToString::to_string).collect();
    let have = if jobs.is_empty() { "no jobs".to_string() } else { jobs.join(", ") };
    Err(Failure::request(format!("{url} holds no job {:?}; it holds {have}", args.name.as_str())))
}

fn state(checkpoint: &Checkpoint) -> &'static str {
    match (&checkpoint.quarantined, checkpoint.abandoned) {
        (Some(_), _) => "quarantined",
        (None, true) => "abandoned",
        (None, false) => "good",
    }
}

async fn list(args: CheckpointListArgs) -> Result<u8, Failure> {
    let (_, chain) = open(&args).await?;
    let mut checkpoints = chain.history().checkpoints.clone();
    checkpoints.sort_by_key(|c| (c.checkpoint.step, c.checkpoint.generation));
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
                state(c).to_string(),
                place.digest.to_string(),
            ]
        })
        .collect();
    table::print(&["STEP", "GENERATION", "SIZE", "STATE", "DIGEST"], &rows);
    Ok(0)
}

fn summary(c: &Checkpoint) -> Value {
    json!({
        "event": "checkpoint",
        "step": c.checkpoint.step, "generation": c.checkpoint.generation, "digest": c.checkpoint.digest,
        "bytes": c.checkpoint.bytes, "state": state(c), "reason": c.quarantined, "manifest": c.checkpoint.manifest,
    })
}

/// The checkpoints a command is about: those of the step, or all, oldest first.
fn chosen(args: &CheckpointArgs, chain: &Chain) -> Result<Vec<Checkpoint>, Failure> {
    let mut all = chain.history().checkpoints.clone();
    all.sort_by_key(|c| (c.checkpoint.step, c.checkpoint.generation));
    let steps: Vec<String> = all.iter().map(|c| c.checkpoint.step.to_string()).collect();
    let Some(step) = args.step else {
        let empty = || Failure::request(format!("job {} has no checkpoints yet", args.job.name));
        return if all.is_empty() { Err(empty()) } else { Ok(all) };
    };
    all.retain(|c| c.checkpoint.step.get() == step);
    if all.is_empty() {
        let have = if steps.is_empty() { "none".to_string() } else { steps.join(", ") };
        return Err(Failure::request(format!("job {} has no checkpoint of step {step}; it has {have}", args.job.name)));
    }
    Ok(all)
}

async fn show(args: CheckpointArgs, timeline: bool) -> Result<u8, Failure> {
    let (store, chain) = open(&args.job).await?;
    let found = chosen(&args, &chain)?;
    // The one a job would resume from, if there is any; else the newest of what there is.
    let best = found.iter().rev().find(|c| c.is_good()).or(found.last());
    let best = best.ok_or_else(|| Failure::request("no checkpoint to show"))?;
    let manifest = open_checkpoint(&store, &args.job.name, &best.checkpoint).await?;
    match args.job.output {
        Output::Json => {
            let mut line = details(best, &manifest);
            if timeline {
                line["timeline"] = manifest.timeline.to_json();
            }
            say!("{line}");
        }
        Output::Text if timeline => manifest.timeline.render(TIMELINE_WIDTH).iter().for_each(|row| say!("{row}")),
        Output::Text => print_details(&args, best, &manifest),
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
        "manifest": c.checkpoint.manifest,
    })
}

fn print_details(args: &CheckpointArgs, c: &Checkpoint, m: &Manifest) {
    say!("job         {}", args.job.name);
    say!("step        {} (generation {}, {})", m.step, m.generation, state(c));
    say!("digest      {}", m.digest);
    say!("parameters  {} in {} tensors", m.parameters(), m.space.tensors().len());
    let states: Vec<&str> = m.states.iter().map(|s| s.name.as_str()).collect();
    say!("states      {}", states.join(", "));
    say!("saved by    {} workers, {} in {} objects", m.world_size, table::bytes(m.bytes()), m.objects.len());
    say!("data        next sample {} of the seeded order, seed {}", m.scalar.cursor, m.scalar.seed);
    say!();
    let rows: Vec<Vec<String>> = m.objects.iter().map(|o| vec![table::bytes(o.bytes), o.path.clone()]).collect();
    table::print(&["SIZE", "OBJECT"], &rows);
}

async fn prove(args: CheckpointArgs) -> Result<u8, Failure> {
    let (store, chain) = open(&args.job).await?;
    let checkpoints = chosen(&args, &chain)?;
    let mut problems = Vec::new();
    for c in &checkpoints {
        let place = &c.checkpoint;
        let spinner = progress(&format!("step {}: reading {}", place.step, table::bytes(place.bytes)));
        let outcome = verify(&store, &args.job.name, place).await;
        spinner.finish_and_clear();
        let found: Vec<String> = match outcome {
            Ok(report) => report.objects.into_iter().filter_map(|object| object.problem).collect(),
            Err(error) if error.kind() == Kind::Corrupt => vec![error.to_string()],
            Err(error) => return Err(error.into()),
        };
        match args.job.output {
            Output::Json => say!(
                "{}",
                json!({"event": "verified", "step": place.step, "digest": place.digest, "good": found.is_empty(),
                       "bytes": place.bytes, "problems": found})
            ),
            Output::Text if found.is_empty() => {
                say!("step {}  good  {}  digest {}", place.step, table::bytes(place.bytes), place.digest);
            }
            Output::Text => say!("step {}  damaged", place.step),
        }
        problems.extend(found.into_iter().map(|problem| format!("step {}: {problem}", place.step)));
    }
    if problems.is_empty() { Ok(0) } else { Err(Failure::new(BAD_DATA, problems.join("\n       "))) }
}

fn progress(message: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(message.to_string());
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
