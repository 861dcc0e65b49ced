//! The job specification: what was asked.
//!
//! A [`JobSpec`] is complete: presets are expanded, defaults filled in, paths absolute. It is read from a TOML job file
//! by [`JobSpec::load`], checked as a whole, and kept as JSON beside the job's records. Every value a user can set is a
//! field here, with its default beside it in `read.rs` and `read_model.rs`.

mod architecture;
mod compare;
pub mod detect;
mod model;
mod read;
mod read_model;
mod reader;
mod validate;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use architecture::{Block, FeedForward, Layout, Norm, Positions};
pub use compare::Difference;
pub use detect::Detection;
pub use model::{Architecture, ModelSpec, PRESETS};
pub use reader::SpecError;

use crate::ids::JobName;

/// The version of the specification's JSON form.
pub const SPEC_FORMAT: u32 = 1;

/// The largest seed: TOML's largest integer, so that every seed can be written in a job file.
const MOST_SEED: u64 = i64::MAX as u64;
/// The most CPU threads of one worker.
const MOST_THREADS: u64 = 1024;
/// The least and the highest priority of a job.
const PRIORITIES: (i64, i64) = (-1000, 1000);
/// The most spares of a job.
const MOST_SPARES: u64 = 4096;
/// The smallest and largest time of `[fault]`, in seconds.
const SECONDS: (f64, f64) = (0.01, 86_400.0);
/// What `fault.straggler` can be.
const STRAGGLER: (f64, f64) = (1.05, 1e6);

/// Everything that defines a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Version of this record; [`SPEC_FORMAT`].
    pub format: u32,
    /// The job's name, its identity within a store.
    pub name: JobName,
    /// What is trained.
    pub model: ModelSpec,
    /// What it is trained on.
    pub data: DataSpec,
    /// How long, in what portions.
    pub training: TrainingSpec,
    /// How gradients become updates.
    pub optimizer: OptimizerSpec,
    /// The learning rate over the steps.
    pub schedule: ScheduleSpec,
    /// Where and when state is stored.
    pub checkpoint: CheckpointSpec,
    /// On how many workers.
    pub resources: ResourcesSpec,
    /// How failures are treated.
    pub fault: FaultSpec,
}

/// `[data]`: indexed datasets, each a path without its `.bin` or `.idx` ending.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSpec {
    /// The training set.
    pub train: String,
    /// The held-out set, if the loss on it is wanted.
    pub validation: Option<String>,
}

/// How micro-batch gradients are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// On an integer grid: the same bits for every world size.
    Exact,
    /// In float32: fewer bytes, but the bits depend on the world size.
    Fast,
}

/// `[training]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingSpec {
    /// Optimizer updates of the whole job, and the schedule's horizon.
    pub steps: u64,
    /// Tokens of one sample.
    pub sequence_length: usize,
    /// Sequences of one update.
    pub global_batch: usize,
    /// Sequences of one micro-batch, the unit of exact arithmetic; divides `global_batch`.
    pub micro_batch: usize,
    /// Seeds initialisation and sample order.
    pub seed: u64,
    /// How gradients are summed.
    pub reduction: Reduction,
    /// Keep a layer's input only, and compute the rest of its activations again in the backward.
    #[serde(default)]
    pub recompute: bool,
    /// Steps between validations; 0 for none.
    pub validate_every: u64,
    /// Sequences of one validation, taken from the start of the held-out set.
    pub validate_sequences: usize,
}

impl TrainingSpec {
    /// M, the number of micro-batches of one update, the same for every world size.
    pub fn micro_batches(&self) -> usize {
        self.global_batch / self.micro_batch
    }

    /// Tokens whose loss one update averages.
    pub fn tokens_per_step(&self) -> u64 {
        self.global_batch as u64 * self.sequence_length as u64
    }
}

/// The update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019).
    Adamw,
}

/// `[optimizer]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerSpec {
    /// The update rule.
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Parameters whose name contains one of these are not decayed.
    pub no_decay: Vec<String>,
    /// Largest global gradient norm; `None` does not clip.
    pub clip_norm: Option<f64>,
}

/// The shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine from the peak down to the minimum.
    Cosine,
    /// A straight line from the peak down to the minimum.
    Linear,
    /// Warm-up, stable, decay: the peak, then a straight line down over the last `decay_steps`.
    Wsd,
    /// The peak for ever.
    Constant,
}

/// `[schedule]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScheduleSpec {
    /// The shape after warm-up.
    pub kind: ScheduleKind,
    /// Steps of linear warm-up from zero.
    pub warmup_steps: u64,
    /// Length of the final decay of `wsd`, in steps.
    pub decay_steps: u64,
    /// The final learning rate as a share of the peak.
    pub minimum_ratio: f64,
}

/// `[checkpoint]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointSpec {
    /// The store's URL (`file:///…`, `s3://…`, `gs://…`, `az://…`).
    pub store: String,
    /// Steps between stored checkpoints; the last step is always stored.
    pub every_steps: u64,
    /// How many of the newest checkpoints are kept.
    pub keep_last: usize,
    /// Whether snapshots are kept in the nodes' memory between stored checkpoints.
    #[serde(default = "yes")]
    pub memory: bool,
    /// Steps between snapshots in memory; 0: as often as they cost under 2% of a step.
    #[serde(default)]
    pub memory_every: u64,
    /// Nodes of a parity group that may be lost at once; a group of n nodes can afford n - 1.
    #[serde(default = "one")]
    pub parity: u32,
    /// Checkpoints whose step is a multiple of this are kept; 0 for none.
    #[serde(default)]
    pub keep_every: u64,
    /// How many of the best by `keep_best_metric` are kept.
    #[serde(default)]
    pub keep_best: usize,
    /// What the best are best in.
    #[serde(default = "validation_loss")]
    pub keep_best_metric: String,
    /// Which end of the metric is best.
    #[serde(default)]
    pub keep_best_order: BestOrder,
    /// Checkpoints at most this many steps older than the newest are kept.
    #[serde(default)]
    pub keep_within_steps: u64,
}

/// Which end of a metric is best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BestOrder {
    /// As of a loss.
    #[default]
    Lowest,
    /// As of an accuracy.
    Highest,
}

/// The loss on `data.validation`, which a job measures itself.
pub const VALIDATION_LOSS: &str = "validation_loss";

fn validation_loss() -> String {
    VALIDATION_LOSS.into()
}

fn yes() -> bool {
    true
}

fn one() -> u32 {
    1
}

/// The device kind a worker computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A GPU if there is one and this build can use it, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// `[resources]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourcesSpec {
    /// How many workers the job may run on.
    pub workers: Workers,
    /// What they compute on.
    pub device: DeviceKind,
    /// CPU threads of one worker; 0 shares the node's cores out among its workers.
    pub threads: usize,
    /// Jobs of a higher one are placed first, and may take the slots of those of a lower one after a checkpoint.
    #[serde(default)]
    pub priority: i32,
    /// Prepared workers beyond the job's own, which take the places of lost ones at once.
    #[serde(default)]
    pub spares: u32,
}

/// The elastic range of workers. `workers = 4` in a job file means `{ min = 1, max = 4 }`: the weights are the same
/// bits at any size, so a job that has lost a node goes on with what is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workers {
    /// Fewer than this and the job waits.
    pub min: u32,
    /// More than this are never used.
    pub max: u32,
}

/// `[fault]`: one chain of timeouts, `heartbeat < suspicion < collective < hang < restart`, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FaultSpec {
    /// New generations in a row without a new checkpoint before the job is given up.
    pub restarts_without_progress: u32,
    /// Between two signs of life of an agent.
    pub heartbeat: f64,
    /// Silence after which an agent is taken for lost.
    pub suspicion: f64,
    /// The longest one exchange may take.
    pub collective: f64,
    /// The longest a step may take, first step and load included.
    pub hang: f64,
    /// The longest a new generation may take to form.
    pub restart: f64,
    /// Time to save and stop after an interrupt.
    pub grace: f64,
    /// Above so many times the median time for a micro-batch a rank is slow; persistently so, it is named.
    #[serde(default = "straggler")]
    pub straggler: f64,
}

/// The default of [`FaultSpec::straggler`].
pub(crate) fn straggler() -> f64 {
    1.5
}

/// One `--set key=value`: the dotted key and the value's TOML text.
pub type Overrides = BTreeMap<String, String>;
