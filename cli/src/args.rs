//! The command line, as data.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use proto::ids::{JobName, NodeName, WorkerId};

use crate::bench_collective::BenchCollectiveArgs;
use crate::certs::CertsCommand;
use crate::checkpoint::CheckpointCommand;
use crate::doctor::DoctorArgs;

/// Launches, heals and reshapes distributed training jobs, and keeps their checkpoints.
#[derive(Debug, Parser)]
#[command(
    name = "cairn",
    version,
    max_term_width = 100,
    after_help = "\
Start here:
  cairn train examples/tiny.toml                 train the shipped example on this machine
  cairn checkpoint list --store examples/cairn-store tiny   what it left behind

Exit codes: 0 done; 2 the request is wrong; 3 the job failed or was cancelled; 4 data is corrupt or missing;
130 interrupted."
)]
pub(crate) struct Cairn {
    /// Log what happens to standard error (CAIRN_LOG sets a finer filter).
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole job on this machine: coordinator, agent and workers.
    Train(TrainArgs),
    /// Run the control plane for a store.
    Coordinator(CoordinatorArgs),
    /// Run this node's agent, which launches workers for the coordinator.
    Agent(AgentArgs),
    /// One training process; started by its agent.
    #[command(hide = true)]
    Worker(WorkerArgs),
    /// Hand a job to a coordinator.
    Submit(SubmitArgs),
    /// List the jobs of a coordinator.
    Jobs(OperatorArgs),
    /// Show one job: state, step, workers.
    Status(JobArgs),
    /// Follow a job until it ends: exit code 0 if it finished or was paused, 3 if it failed or was cancelled.
    Watch(JobArgs),
    /// Change how many workers a running job uses.
    Scale(ScaleArgs),
    /// Save a checkpoint and stop a job; `resume` goes on.
    Pause(JobArgs),
    /// Go on with a paused job.
    Resume(JobArgs),
    /// End a job for good, without a further checkpoint.
    Cancel(JobArgs),
    /// Show what broke a job's generations off: who was to blame, how long each stage took, and the goodput.
    Incidents(JobArgs),
    /// List the nodes: slots, what uses them, who is draining, lost or set aside.
    Nodes(OperatorArgs),
    /// Empty a node: its jobs save and go elsewhere, and it takes no new work until it is undrained.
    Drain(DrainArgs),
    /// Let a drained node take work again.
    Undrain(NodeArgs),
    /// Look into a checkpoint store.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Make the certificates that a cluster of several machines needs.
    #[command(subcommand)]
    Certs(CertsCommand),
    /// Make datasets.
    #[command(subcommand)]
    Data(DataCommand),
    /// Check this machine, the store and the coordinators: what is amiss, and what to do.
    Doctor(DoctorArgs),
    /// Measure this machine.
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// How results are written to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How to treat what the store already holds.
#[derive(Debug, Clone, Copy, Args)]
#[group(multiple = false)]
pub(crate) struct ModeArgs {
    /// Go on from the newest good checkpoint, or from the start if there is none.
    #[arg(long)]
    pub(crate) resume: bool,
    /// Start over; older checkpoints stay until pruned, and are never resumed from.
    #[arg(long)]
    pub(crate) fresh: bool,
}

/// The job file and what overrides it.
#[derive(Debug, Args)]
pub(crate) struct JobFileArgs {
    /// The job file.
    #[arg(value_name = "JOB.toml")]
    pub(crate) file: PathBuf,
    /// Number of workers (overrides resources.workers).
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<u32>,
    /// Store URL or path (overrides checkpoint.store).
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// Stop after step N with a checkpoint, the job paused; the schedule's horizon stays training.steps.
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<u64>,
    /// Override any key of the job file; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) set: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) mode: ModeArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn train examples/tiny.toml --workers 2
  cairn train examples/tiny.toml --set training.steps=50 --fresh
  cairn train examples/tiny.toml --resume --workers 1 --output json

Ctrl-C saves a checkpoint and stops; a second one stops at once. --resume goes on from there.
A job that somebody else pauses ends this command with exit code 0, one that is cancelled with 3.")]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub(crate) job: JobFileArgs,
    /// Folder on a memory file system for snapshots.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub(crate) memory: PathBuf,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  cairn coordinator --store file:///srv/cairn --listen 127.0.0.1:7070
  cairn coordinator --store s3://bucket/prefix --listen 10.0.0.1:7070 --tls certs/coordinator-main")]
pub(crate) struct CoordinatorArgs {
    /// The store the jobs live in.
    #[arg(long, value_name = "URL")]
    pub(crate) store: String,
    /// Address to listen on; off loopback it takes --tls.
    #[arg(long, default_value = "127.0.0.1:7070")]
    pub(crate) listen: SocketAddr,
    /// Token file, made with mode 0600 if it does not exist.
    #[arg(long, value_name = "FILE", env = "CAIRN_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    /// Wait for the present leader to fall silent instead of refusing to start beside it.
    #[arg(long)]
    pub(crate) standby: bool,
    /// Trust a store without atomic conditional create; safe only while this is the one coordinator.
    #[arg(long)]
    pub(crate) allow_single_coordinator: bool,
    /// Give nodes work at once, without having them exchange data with one another first.
    #[arg(long)]
    pub(crate) no_admission: bool,
    /// Answer Prometheus scrapers at this address, under /metrics: HTTP on loopback, else HTTPS for holders of a
    /// certificate of the cluster.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<SocketAddr>,
    /// Lead this one job of the store and leave others as they are.
    #[arg(long, value_name = "JOB")]
    pub(crate) only: Option<JobName>,
    /// Take the job of --only, if it is unfinished, for interrupted: wait until it is submitted again.
    #[arg(long, requires = "only")]
    pub(crate) held: bool,
    /// Stop when standard input closes.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn agent --coordinator 127.0.0.1:7070 --node a --slots 2
  cairn agent --coordinator 10.0.0.1:7070,10.0.0.2:7070 --node a --tls certs/agent-a
  cairn agent --coordinator 10.0.0.1:7070 --node a --ring-host 10.1.0.3 --tls certs/agent-a")]
pub(crate) struct AgentArgs {
    /// The coordinator's address; of several, with commas between them, the one that leads is found.
    #[arg(long, value_name = "HOST:PORT,…", default_value = "127.0.0.1:7070", env = "CAIRN_COORDINATOR")]
    pub(crate) coordinator: String,
    /// The coordinator's token file.
    #[arg(long, value_name = "FILE", env = "CAIRN_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    /// This node's name; by default the host name.
    #[arg(long)]
    pub(crate) node: Option<NodeName>,
    /// Workers this node can run at once; by default one a core.
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<u32>,
    /// Folder on a memory file system for snapshots.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub(crate) memory: PathBuf,
    /// Bytes that snapshots and parity may take, such as 8GiB; by default half of the memory file system.
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    pub(crate) memory_budget: Option<u64>,
    /// What this node may fail together with, such as its rack: parity is spread over different ones.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) domain: String,
    /// Interface the workers' data plane and this node's snapshots listen on; off loopback it takes --tls. By default
    /// the one by which this machine reaches the coordinator.
    #[arg(long, value_name = "IP")]
    pub(crate) ring_host: Option<IpAddr>,
    /// Stop when standard input closes.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// The agent's socket.
    #[arg(long)]
    pub(crate) agent: PathBuf,
    /// This process's id.
    #[arg(long)]
    pub(crate) id: WorkerId,
    /// The job it works for.
    #[arg(long)]
    pub(crate) job: JobName,
}

/// How connections are closed to others.
#[derive(Debug, Clone, Args)]
pub(crate) struct SecurityArgs {
    /// Folder with ca.pem, cert.pem and key.pem (from `cairn certs issue`): all connections are mutual TLS.
    #[arg(long, value_name = "DIR", env = "CAIRN_TLS")]
    pub(crate) tls: Option<PathBuf>,
    /// Use the network without TLS: token and jobs can be read by whoever is on the way.
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
}

/// Where the coordinator is.
#[derive(Debug, Clone, Args)]
pub(crate) struct OperatorArgs {
    /// The coordinator's address; of several, with commas between them, the one that leads is asked.
    #[arg(long, value_name = "HOST:PORT,…", default_value = "127.0.0.1:7070", env = "CAIRN_COORDINATOR")]
    pub(crate) coordinator: String,
    /// The coordinator's token file.
    #[arg(long, value_name = "FILE", env = "CAIRN_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn submit examples/tiny.toml --coordinator 127.0.0.1:7070 && cairn watch tiny
  cairn submit examples/tiny.toml --coordinator 10.0.0.1:7070 --tls certs/operator-me

The job's checkpoints go to the coordinator's store, whatever checkpoint.store says.
With --resume, a job that has finished already prints its `finished` event.")]
pub(crate) struct SubmitArgs {
    #[command(flatten)]
    pub(crate) job: JobFileArgs,
    #[command(flatten)]
    pub(crate) operator: OperatorArgs,
}

#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// The job's name.
    #[arg(value_name = "JOB")]
    pub(crate) name: JobName,
    #[command(flatten)]
    pub(crate) operator: OperatorArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ScaleArgs {
    /// The job's name.
    #[arg(value_name = "JOB")]
    pub(crate) name: JobName,
    /// The most workers it shall use.
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) workers: u32,
    #[command(flatten)]
    pub(crate) operator: OperatorArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "A node stays drained until it is undrained, also if its agent or the coordinator is restarted."
)]
pub(crate) struct DrainArgs {
    /// The node's name.
    pub(crate) node: NodeName,
    /// Return only when nothing runs on the node any more.
    #[arg(long)]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) operator: OperatorArgs,
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// The node's name.
    pub(crate) node: NodeName,
    #[command(flatten)]
    pub(crate) operator: OperatorArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Tokenize text into indexed datasets, one for each input file.
    Prepare(PrepareArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn data prepare --tokenizer bytes --output data book.txt
  cairn data prepare --tokenizer gpt2 --output data train.txt held-out.txt
  cairn data prepare --tokenizer tokenizer.json --output data corpus.jsonl

Writes DIR/<file name without ending>.bin and .idx; name that path without ending in data.train.")]
pub(crate) struct PrepareArgs {
    /// `bytes`, `gpt2`, or the path of a Hugging Face tokenizer.json.
    #[arg(long)]
    pub(crate) tokenizer: String,
    /// The folder to write to.
    #[arg(long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Text files, or .jsonl files with a "text" field in each line.
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Tokens a second of full training steps on this machine.
    Train(crate::bench::BenchTrainArgs),
    /// Saves and loads of a store, beside a plain writer and reader of the same bytes.
    Store(BenchStoreArgs),
    /// The workers' exchange by operation, size and number of ranks.
    Collective(BenchCollectiveArgs),
    /// The control plane with thousands of simulated agents: heartbeats, agreeing on a generation, memory.
    Coordinator(BenchCoordinatorArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn bench store
  cairn bench store --store /mnt/scratch --size 4GiB --ranks 4
  cairn bench store --peer --python venv/bin/python
  cairn bench store --synthetic
  cairn bench store --capture --size 256MiB

What it writes it removes again. --peer runs tests/peers/dcp.py: PyTorch's distributed checkpoint and, where it is
installed, Orbax (pip install torch numpy orbax-checkpoint jax).")]
pub(crate) struct BenchStoreArgs {
    /// A folder or an s3:// URL; without it a folder that is made here and removed.
    #[arg(long)]
    pub(crate) store: Option<String>,
    /// Bytes of state over all ranks.
    #[arg(long, default_value = "1GiB", value_parser = crate::size::parse)]
    pub(crate) size: u64,
    /// Ranks that save and load at once: 2, with --synthetic 16,384.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) ranks: Option<u32>,
    /// Measurements of each kind; medians count.
    #[arg(long, default_value_t = 7)]
    pub(crate) rounds: usize,
    /// Instead, plan and commit checkpoints of 405 billion parameters, with made-up hashes and no tensors.
    #[arg(long, conflicts_with_all = ["store", "size", "peer", "capture"])]
    pub(crate) synthetic: bool,
    /// With --synthetic: checkpoints kept in the long histories.
    #[arg(long, default_value_t = 1_000, requires = "synthetic")]
    pub(crate) kept: usize,
    /// Instead, train for a while and capture the state at every step: how long that holds the training thread.
    #[arg(long, conflicts_with_all = ["store", "peer"])]
    pub(crate) capture: bool,
    /// Also measure PyTorch's distributed checkpoint and Orbax.
    #[arg(long)]
    pub(crate) peer: bool,
    /// The Python that has them.
    #[arg(long, default_value = "python3", env = "CAIRN_PYTHON")]
    pub(crate) python: PathBuf,
    /// The peer script.
    #[arg(long, default_value = "tests/peers/dcp.py", requires = "peer")]
    pub(crate) script: PathBuf,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn bench coordinator
  cairn bench coordinator --agents 1000 --workers 4 --seconds 10
  cairn bench coordinator --output json

Nothing is written and nothing is sent over a network. It fails if a figure is over its target.")]
pub(crate) struct BenchCoordinatorArgs {
    /// Simulated agents.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) agents: u32,
    /// Workers of each.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: u32,
    /// Seconds of heartbeats, in simulated time.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) seconds: u32,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once('=').ok_or_else(|| format!("{text:?} is not KEY=VALUE, such as training.steps=50"))?;
    Ok((key.trim().to_string(), value.trim().to_string()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cairn;

    #[test]
    fn the_command_line_is_well_formed() {
        Cairn::command().debug_assert();
    }
}
