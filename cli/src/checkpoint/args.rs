//! The command line of `cairn checkpoint …`, as data.

use std::path::PathBuf;

use checkpoint_store::Sample;
use checkpoint_store::policy::Keep;
use clap::{Args, Subcommand, ValueEnum};
use proto::ids::JobName;
use proto::spec::BestOrder;

use crate::args::{Output, SecurityArgs};

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// The checkpoints of a job, oldest first, and what is known of each.
    List(CheckpointListArgs),
    /// One checkpoint: digest, parameters, scalar state, objects.
    Show(CheckpointShowArgs),
    /// Read one checkpoint (or all) again and prove it, every byte or a sample.
    Verify(VerifyArgs),
    /// What two checkpoints differ in, and by how much.
    Diff(DiffArgs),
    /// Keep a checkpoint, whatever retention says.
    Pin(PinArgs),
    /// Leave a pinned checkpoint to retention again.
    Unpin(StepArgs),
    /// Delete what retention does not keep.
    Prune(PruneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointListArgs {
    /// The store, a URL or a path.
    #[arg(long, value_name = "URL")]
    pub(crate) store: String,
    /// The job's name.
    #[arg(value_name = "JOB")]
    pub(crate) name: JobName,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  cairn checkpoint show --store examples/cairn-store tiny   the newest")]
pub(crate) struct CheckpointArgs {
    #[command(flatten)]
    pub(crate) job: CheckpointListArgs,
    /// The step; by default the newest.
    #[arg(value_name = "STEP")]
    pub(crate) step: Option<u64>,
}

/// Who leads the job, for commands that change its store.
#[derive(Debug, Args)]
pub(crate) struct LeaderArgs {
    /// The job's coordinator. Without one the command leads the store itself for its length, and is refused while a
    /// coordinator does.
    #[arg(long, value_name = "HOST:PORT", env = "CAIRN_COORDINATOR")]
    pub(crate) coordinator: Option<String>,
    /// The coordinator's token file.
    #[arg(long, value_name = "FILE", env = "CAIRN_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn checkpoint verify --store s3://bucket/prefix tiny 150
  cairn checkpoint verify --store s3://bucket/prefix tiny --sample 0.1 --seed 7   a tenth of the blocks of each
  cairn checkpoint verify --store examples/cairn-store tiny --coordinator 127.0.0.1:7070

With a coordinator the checkpoint is leased while it is read, and the outcome recorded: verified if every block was
proved, quarantined if any is damaged. Without one the command only reports.")]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) job: CheckpointListArgs,
    /// The step; by default every one.
    #[arg(value_name = "STEP")]
    pub(crate) step: Option<u64>,
    /// The share of the blocks to read, above 0 and at most 1; sizes and headers are always checked.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub(crate) sample: Option<f64>,
    /// Chooses the blocks of the sample.
    #[arg(long, default_value_t = 0, requires = "sample")]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) leader: LeaderArgs,
}

impl VerifyArgs {
    pub(crate) fn sample(&self) -> Sample {
        self.sample.map_or(Sample::ALL, |share| Sample { share, seed: self.seed })
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| format!("{text:?} is no share: a number above 0 and at most 1, such as 0.1"))
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn checkpoint diff --store examples/cairn-store tiny 150 200
  cairn checkpoint diff --store a/cairn-store tiny 200 200 --other-store b/cairn-store
  cairn checkpoint diff --store a/cairn-store tiny 200 50 --other-job tuned

Only blocks whose hashes differ are read. Exit code 0, whether they differ or not.")]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    pub(crate) job: CheckpointListArgs,
    /// The first checkpoint's step.
    #[arg(value_name = "STEP_A")]
    pub(crate) a: u64,
    /// The second one's.
    #[arg(value_name = "STEP_B")]
    pub(crate) b: u64,
    /// The second one's store; by default the same.
    #[arg(long, value_name = "URL")]
    pub(crate) other_store: Option<String>,
    /// The second one's job; by default the same.
    #[arg(long, value_name = "JOB")]
    pub(crate) other_job: Option<JobName>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn checkpoint unpin --store examples/cairn-store tiny 150
  cairn checkpoint unpin --store s3://bucket/prefix tiny 150 --coordinator 127.0.0.1:7070")]
pub(crate) struct StepArgs {
    #[command(flatten)]
    pub(crate) job: CheckpointListArgs,
    /// The step.
    #[arg(value_name = "STEP")]
    pub(crate) step: u64,
    #[command(flatten)]
    pub(crate) leader: LeaderArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn checkpoint pin --store examples/cairn-store tiny 150 --reason \"figure 3\"
  cairn checkpoint pin --store s3://bucket/prefix tiny 150 --coordinator 127.0.0.1:7070")]
pub(crate) struct PinArgs {
    #[command(flatten)]
    pub(crate) at: StepArgs,
    /// Why, for whoever finds it.
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn checkpoint prune --store examples/cairn-store tiny --dry-run
  cairn checkpoint prune --store examples/cairn-store tiny --keep-last 1 --keep-every 100
  cairn checkpoint prune --store examples/cairn-store tiny --keep-best 2 --keep-best-metric validation_loss

What is not said is as in the job file. The newest good checkpoint, pinned and leased ones always stay.")]
pub(crate) struct PruneArgs {
    #[command(flatten)]
    pub(crate) job: CheckpointListArgs,
    /// Keep the last N.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) keep_last: Option<u64>,
    /// Keep those whose step is a multiple of K; 0 for none.
    #[arg(long, value_name = "K")]
    pub(crate) keep_every: Option<u64>,
    /// Keep the best M by the metric.
    #[arg(long, value_name = "M")]
    pub(crate) keep_best: Option<u64>,
    /// The metric.
    #[arg(long, value_name = "NAME")]
    pub(crate) keep_best_metric: Option<String>,
    /// Which end of it is best.
    #[arg(long, value_enum)]
    pub(crate) keep_best_order: Option<Order>,
    /// Keep those at most S steps older than the newest.
    #[arg(long, value_name = "S")]
    pub(crate) keep_within_steps: Option<u64>,
    /// Say what would go, and change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) leader: LeaderArgs,
}

/// Which end of a metric is best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Order {
    /// As of a loss.
    Lowest,
    /// As of an accuracy.
    Highest,
}

impl PruneArgs {
    pub(crate) fn keep(&self) -> Keep {
        Keep {
            last: self.keep_last,
            every: self.keep_every,
            best: self.keep_best,
            metric: self.keep_best_metric.clone(),
            order: self.keep_best_order.map(|order| match order {
                Order::Lowest => BestOrder::Lowest,
                Order::Highest => BestOrder::Highest,
            }),
            within_steps: self.keep_within_steps,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointShowArgs {
    #[command(flatten)]
    pub(crate) checkpoint: CheckpointArgs,
    /// Draw where the time of the save went, the slowest ranks first.
    #[arg(long)]
    pub(crate) timeline: bool,
}
