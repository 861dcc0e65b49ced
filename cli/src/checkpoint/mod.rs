//! `cairn checkpoint …`: looking into a store and changing what it keeps; one file for each command.
//!
//! `list`, `show`, `diff` and `prune --dry-run` read only. `pin`, `unpin` and `prune` change the store: through the
//! job's coordinator if one is named, else the command leads the store for its own length (`door`). `verify` reads, and
//! records what it found if a coordinator is named.

mod args;
mod change;
mod diff;
mod door;
mod list;
mod show;
mod verify;

use std::io::IsTerminal;

use checkpoint_store::{Chain, Checkpoint, Store, list_jobs, normalize_url};
use indicatif::{ProgressBar, ProgressStyle};
use proto::ids::JobName;

pub(crate) use args::CheckpointCommand;
use args::CheckpointListArgs;

use crate::failure::Failure;

pub(crate) async fn run(command: CheckpointCommand) -> Result<u8, Failure> {
    match command {
        CheckpointCommand::List(args) => list::list(args).await,
        CheckpointCommand::Show(args) => show::show(args.checkpoint, args.timeline).await,
        CheckpointCommand::Verify(args) => verify::verify(args).await,
        CheckpointCommand::Diff(args) => diff::diff(args).await,
        CheckpointCommand::Pin(args) => change::pin(args).await,
        CheckpointCommand::Unpin(args) => change::unpin(args).await,
        CheckpointCommand::Prune(args) => change::prune(args).await,
    }
}

/// Opens the store for reading and finds the job in it.
async fn open(args: &CheckpointListArgs) -> Result<(Store, Chain), Failure> {
    open_job(&args.store, &args.name).await
}

async fn open_job(store: &str, name: &JobName) -> Result<(Store, Chain), Failure> {
    let here = std::env::current_dir().map_err(Failure::job)?;
    let url = normalize_url(store, &here)?;
    let store = Store::open_existing(&url)?;
    if let Some(chain) = Chain::load(&store, name).await? {
        return Ok((store, chain));
    }
    let jobs: Vec<String> = list_jobs(&store).await?.iter().map(ToString::to_string).collect();
    let have = if jobs.is_empty() { "no jobs".to_string() } else { jobs.join(", ") };
    Err(Failure::request(format!("{url} holds no job {:?}; it holds {have}", name.as_str())))
}

/// A job's checkpoints, oldest first.
fn in_order(chain: &Chain) -> Vec<Checkpoint> {
    let mut all = chain.history().checkpoints.clone();
    all.sort_by_key(|c| (c.checkpoint.step, c.checkpoint.generation));
    all
}

/// The checkpoints a command is about: those of the step, or all, oldest first.
fn chosen(chain: &Chain, step: Option<u64>) -> Result<Vec<Checkpoint>, Failure> {
    let (mut all, name) = (in_order(chain), chain.job());
    let steps: Vec<String> = all.iter().map(|c| c.checkpoint.step.to_string()).collect();
    let Some(step) = step else {
        let empty = || Failure::request(format!("job {name} has no checkpoints yet"));
        return if all.is_empty() { Err(empty()) } else { Ok(all) };
    };
    all.retain(|c| c.checkpoint.step.get() == step);
    if all.is_empty() {
        let have = if steps.is_empty() { "none".to_string() } else { steps.join(", ") };
        return Err(Failure::request(format!("job {name} has no checkpoint of step {step}; it has {have}")));
    }
    Ok(all)
}

/// The one checkpoint of a step that a person means: the good one, else the newest of what there is.
fn best(chain: &Chain, step: Option<u64>) -> Result<Checkpoint, Failure> {
    let found = chosen(chain, step)?;
    let best = found.iter().rev().find(|c| c.is_good()).or(found.last());
    best.cloned().ok_or_else(|| Failure::request("there is no such checkpoint"))
}

/// Whether a job may resume from it, in one word.
fn state(checkpoint: &Checkpoint) -> &'static str {
    match (&checkpoint.quarantined, checkpoint.abandoned) {
        (Some(_), _) => "quarantined",
        (None, true) => "abandoned",
        (None, false) => "good",
    }
}

/// A bar of bytes on standard error; nothing where that is no terminal.
fn bar(message: &str, bytes: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(bytes).with_message(message.to_string());
    let template = "{msg}  {bar:28.cyan/blue} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar
}
