//! `cairn bench train`: tokens a second of full training steps, beside PyTorch if asked.

use std::path::PathBuf;
use std::process::Command;

use proto::spec::{DeviceKind, JobSpec, Overrides, PRESETS};
use serde_json::{Value, json};
use worker::bench_table::bench_table;

use crate::args::{BenchCommand, Output, key_value};
use crate::failure::{Failure, chain};
use crate::table::{self, say};
use crate::{bench_capture, bench_collective, bench_coordinator, bench_store, bench_synthetic};

/// Measurements of each side; they alternate, so that a machine that drifts slows both.
const ROUNDS: usize = 3;

/// What a benchmark computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BenchDevice {
    Cpu,
    Cuda,
}

/// PyTorch beside Cairn.
#[derive(Debug, clap::Args)]
pub(crate) struct PeerArgs {
    /// Also measure PyTorch on the same model, in turn.
    #[arg(long)]
    peer: bool,
    /// The Python that has PyTorch.
    #[arg(long, default_value = "python3", requires = "peer")]
    python: PathBuf,
    /// The peer script.
    #[arg(long, default_value = "tests/peers/torch_train.py", requires = "peer")]
    script: PathBuf,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cairn bench train --workers 1 --threads 2
  cairn bench train --workers 2 --threads 1 --peer
  cairn bench train --device cuda --preset gpt2-124m --sequence-length 1024 --global-batch 64 --micro-batch 64 --table

--peer runs tests/peers/torch_train.py (PyTorch must be installed) in turn with Cairn and prints the ratio.")]
pub(crate) struct BenchTrainArgs {
    /// A preset, such as small, llama-110m or gpt2-124m; docs/job-file.md lists them.
    #[arg(long, default_value = "small")]
    pub(crate) preset: String,
    /// Tokens of one sequence.
    #[arg(long, default_value_t = 256)]
    pub(crate) sequence_length: usize,
    /// Sequences of one step.
    #[arg(long, default_value_t = 16)]
    pub(crate) global_batch: usize,
    /// Sequences of one micro-batch.
    #[arg(long, default_value_t = 4)]
    pub(crate) micro_batch: usize,
    /// What to compute on; with cuda all workers share the first GPU.
    #[arg(long, value_enum, default_value = "cpu")]
    pub(crate) device: BenchDevice,
    /// Workers.
    #[arg(long, default_value_t = 1)]
    pub(crate) workers: u32,
    /// Threads of each worker; 0 shares the cores out.
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 10.0)]
    pub(crate) seconds: f64,
    /// Then a table of the step's operations: the time of each, and its floor on this machine.
    #[arg(long)]
    pub(crate) table: bool,
    /// Then a run with a snapshot of the state at every step, beside one without.
    #[arg(long)]
    pub(crate) snapshots: bool,
    /// Override a key of the job, such as training.reduction=fast; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) set: Vec<(String, String)>,
    #[command(flatten)]
    peers: PeerArgs,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

impl BenchDevice {
    pub(crate) fn kind(self) -> DeviceKind {
        match self {
            Self::Cpu => DeviceKind::Cpu,
            Self::Cuda => DeviceKind::Cuda,
        }
    }
}

pub(crate) async fn run(command: BenchCommand) -> Result<u8, Failure> {
    match command {
        BenchCommand::Train(args) => tokio::task::block_in_place(|| train(&args)),
        BenchCommand::Collective(args) => tokio::task::block_in_place(|| bench_collective::run(&args)),
        BenchCommand::Coordinator(args) => tokio::task::block_in_place(|| bench_coordinator::run(&args)),
        BenchCommand::Store(args) if args.synthetic => tokio::task::block_in_place(|| bench_synthetic::run(&args)),
        BenchCommand::Store(args) if args.capture => tokio::task::block_in_place(|| bench_capture::run(&args)),
        BenchCommand::Store(args) => bench_store::run(args).await,
    }
}

fn train(args: &BenchTrainArgs) -> Result<u8, Failure> {
    let spec = spec(args)?;
    let shape = (args.preset.as_str(), args.sequence_length, args.global_batch);
    if args.peers.peer && shape != ("small", 256, 16) {
        return Err(Failure::request(
            "--peer trains preset small, 16 sequences of 256 tokens a step: leave --preset, --sequence-length and \
             --global-batch at their defaults",
        ));
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = if args.threads == 0 { (cores / args.workers as usize).max(1) } else { args.threads };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut device, mut parameters) = (String::new(), 0);
    let (mut steps, mut again) = (0, 0);
    for _ in 0..ROUNDS {
        let report =
            worker::bench::bench_train(&spec, args.device.kind(), threads, args.workers as usize, args.seconds, false)
                .map_err(|error| Failure::job(chain(&error)))?;
        ours.push(report.tokens_per_second);
        (steps, again) = (steps + report.steps, again + report.again);
        (device, parameters) = (report.device, report.parameters);
        if args.peers.peer {
            theirs.push(peer(args, threads)?);
        }
    }
    let mine = median(&mut ours);
    let peer = args.peers.peer.then(|| median(&mut theirs));
    if args.output == Output::Json {
        let line = json!({
            "event": "bench_train", "preset": args.preset, "device": device, "parameters": parameters,
            "workers": args.workers, "threads": threads, "steps": steps, "again": again,
            "tokens_per_second": mine, "rounds": ours, "peer_tokens_per_second": peer, "peer_rounds": theirs,
            "ratio": peer.map(|peer| mine / peer),
        });
        say!("{line}");
        return further(args, &spec, threads);
    }
    heading(args, &spec);
    say!("{parameters} parameters on {device}");
    let each = match args.device {
        BenchDevice::Cpu => format!("{} workers × {threads} threads", args.workers),
        BenchDevice::Cuda => format!("{} workers on one GPU", args.workers),
    };
    say!("{each}, median of {ROUNDS} runs of {} s", args.seconds);
    if again > 0 {
        say!("{again} of {steps} steps were computed twice: a gradient outgrew its grid");
    }
    let row = |name: &str, rate: f64, all: &[f64]| {
        let each: Vec<String> = all.iter().map(|rate| table::count(*rate)).collect();
        vec![name.to_string(), format!("{rate:.0}"), each.join(" ")]
    };
    let mut rows = vec![row("cairn", mine, &ours)];
    if let Some(peer) = peer {
        rows.push(row("PyTorch", peer, &theirs));
    }
    table::print(&["", "TOKENS/S", "RUNS"], &rows);
    if let Some(peer) = peer {
        say!("ratio {:.2}", mine / peer);
    }
    further(args, &spec, threads)
}

/// What is measured.
fn heading(args: &BenchTrainArgs, spec: &JobSpec) {
    let m = &spec.model;
    say!(
        "model {}: {} wide, {} layers, {} heads, ffn {}, vocabulary {}; {} sequences of {} tokens a step, {} sums",
        args.preset,
        m.hidden_size,
        m.num_hidden_layers,
        m.num_attention_heads,
        m.intermediate_size,
        m.vocab_size,
        args.global_batch,
        args.sequence_length,
        format!("{:?}", spec.training.reduction).to_lowercase()
    );
}

/// What else was asked for.
fn further(args: &BenchTrainArgs, spec: &JobSpec, threads: usize) -> Result<u8, Failure> {
    if args.snapshots {
        let (kind, workers) = (args.device.kind(), args.workers as usize);
        let seconds = args.seconds * ROUNDS as f64;
        let report = worker::bench_capture::bench_snapshots(spec, kind, threads, workers, seconds);
        bench_capture::print(&report.map_err(|error| Failure::job(chain(&error)))?, args.output);
    }
    operations(args, spec, threads)
}

/// The table of a step's operations, if it was asked for.
fn operations(args: &BenchTrainArgs, spec: &JobSpec, threads: usize) -> Result<u8, Failure> {
    if !args.table {
        return Ok(0);
    }
    let measured = bench_table(spec, args.device.kind(), threads, args.seconds);
    let measured = measured.map_err(|error| Failure::job(chain(&error)))?;
    if args.output == Output::Json {
        for line in &measured.lines {
            let mut line = json!(line);
            line["event"] = "operation".into();
            say!("{line}");
        }
        return Ok(0);
    }
    let total: f64 = measured.lines.iter().map(|line| line.seconds).sum();
    say!(
        "\none worker's step by operation, each waited for; floors at {:.2} TFLOP/s and {:.1} GB/s, measured here",
        measured.operations_per_second / 1e12,
        measured.bytes_per_second / 1e9
    );
    let rows: Vec<Vec<String>> = measured
        .lines
        .iter()
        .map(|line| {
            let of_floor =
                if line.floor > 0.0 { format!("{:.0}%", 100.0 * line.floor / line.seconds) } else { "-".into() };
            vec![
                line.operation.clone(),
                line.calls.to_string(),
                format!("{:.3}", line.seconds * 1e3),
                format!("{:.1}%", 100.0 * line.seconds / total),
                of_floor,
            ]
        })
        .collect();
    table::print(&["OPERATION", "CALLS", "MS A STEP", "SHARE", "FLOOR/TIME"], &rows);
    Ok(0)
}

/// The measured job, through the same checks as any other.
fn spec(args: &BenchTrainArgs) -> Result<JobSpec, Failure> {
    if !PRESETS.contains(&args.preset.as_str()) {
        return Err(Failure::request(format!("--preset {:?} must be one of {}", args.preset, PRESETS.join(", "))));
    }
    let text = format!(
        "name = \"bench\"\nmodel.preset = {:?}\ndata.train = \"synthetic\"\ntraining.steps = 1000000\n\
         training.sequence_length = {}\ntraining.global_batch = {}\ntraining.micro_batch = {}\n\
         resources.workers = {}\n",
        args.preset, args.sequence_length, args.global_batch, args.micro_batch, args.workers
    );
    let overrides: Overrides = args.set.iter().cloned().collect();
    Ok(JobSpec::parse("bench", &text, std::path::Path::new("/"), &overrides)?)
}

/// One run of the peer: the same model, batch and threads.
fn peer(args: &BenchTrainArgs, threads: usize) -> Result<f64, Failure> {
    let output = Command::new(&args.peers.python)
        .arg(&args.peers.script)
        .args(["--processes", &args.workers.to_string(), "--threads", &threads.to_string()])
        .args(["--seconds", &args.seconds.to_string()])
        .output()
        .map_err(|error| {
            Failure::request(format!("cannot run the peer with {}: {error}", args.peers.python.display()))
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let rate = text.lines().rev().find_map(|line| serde_json::from_str::<Value>(line).ok());
    rate.and_then(|line| line["tokens_per_second"].as_f64()).ok_or_else(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = error.lines().rev().take(3).collect();
        Failure::request(format!(
            "the peer did not run (install it with: pip install torch): {}",
            tail.into_iter().rev().collect::<Vec<_>>().join(" | ")
        ))
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
