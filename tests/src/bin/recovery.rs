//! What losing a worker, and losing a node, costs: `cargo run --release -p tests --bin recovery`.
//!
//! Three nodes of one worker each run `examples/recovery.toml` on this machine. Again and again a worker is killed with
//! SIGKILL, and later a node, that is an agent and its worker at once; the time counts from the signal to the event
//! that all ranks of the next generation hold their state, which is the start of its first step.
//!
//! `--peer PYTHON` then measures torchrun's restart of a job of the same size with that interpreter, which needs torch.

use std::process::Command;
use std::time::{Duration, Instant};

use tests::cluster::{Cluster, Part};
use tests::job::Job;
use tests::process;
use tests::run::Run;

/// Kills of each kind.
const ROUNDS: usize = 7;
/// Steps that are let pass before each.
const STEPS: u64 = 6;

fn main() {
    let peer = peer();
    let mut bench = Bench::start();
    let (mut worker, mut node) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        worker.push(bench.lose_worker(round % bench.agents.len()));
    }
    for round in 0..ROUNDS {
        node.push(bench.lose_node(round % bench.agents.len()));
    }
    let ledger = bench.cluster.call(&["incidents", "recovery"]);
    println!(
        "{:<13} {:>8} {:>8} {:>8} {:>8} {:>10}  source",
        "cause", "detect", "abort", "agree", "restore", "first step"
    );
    for incident in ledger.events.iter().filter(|event| event["event"] == "incident" && event["cause"] != "grow") {
        let ms = |key: &str| incident[key].as_u64().map_or("-".into(), |ms| format!("{ms} ms"));
        let text = |key: &str| incident[key].as_str().unwrap_or("-").to_string();
        println!(
            "{:<13} {:>8} {:>8} {:>8} {:>8} {:>10}  {}",
            text("cause"),
            ms("detect_ms"),
            ms("abort_ms"),
            ms("agree_ms"),
            ms("restore_ms"),
            ms("first_step_ms"),
            text("source")
        );
    }
    report("a worker killed → its job's next first step", &mut worker);
    report("a node killed → its job's next first step", &mut node);
    drop(bench);
    if let Some(python) = peer {
        let script = tests::root().join("tests/peers/torchrun_recovery.py");
        let status = Command::new(&python).arg(script).args(["--rounds", &ROUNDS.to_string()]).status();
        assert!(status.as_ref().is_ok_and(std::process::ExitStatus::success), "{python}: {status:?}");
    }
}

/// The interpreter that `--peer` names.
fn peer() -> Option<String> {
    let mut words = std::env::args().skip(1);
    let first = words.next()?;
    let python = words.next();
    assert!(first == "--peer" && python.is_some() && words.next().is_none(), "usage: recovery [--peer PYTHON]");
    python
}

fn report(what: &str, seconds: &mut [f64]) {
    seconds.sort_by(f64::total_cmp);
    let each: Vec<String> = seconds.iter().map(|seconds| format!("{seconds:.2}")).collect();
    println!("{what}: median {:.2} s ({})", seconds[seconds.len() / 2], each.join(" "));
}

/// The job on its nodes.
struct Bench {
    cluster: Cluster,
    agents: Vec<Part>,
    watch: Run,
    _coordinator: Part,
    _folder: Job,
}

impl Bench {
    fn start() -> Self {
        let folder = Job::new();
        let cluster = Cluster::new(&folder);
        let coordinator = cluster.coordinator();
        let agents = (0..3).map(|at| cluster.agent_with(&format!("n{at}"), 1)).collect();
        std::thread::sleep(Duration::from_secs(2));
        let file = tests::root().join("examples/recovery.toml").display().to_string();
        let submitted = cluster.call(&["submit", &file]);
        assert_eq!(submitted.code, Some(0), "{}", submitted.stderr);
        let mut watch = Run::start(&cluster.words(&["watch", "recovery"]));
        watch.wait_for("generation", |event| event["world_size"] == 3);
        Self { cluster, agents, watch, _coordinator: coordinator, _folder: folder }
    }

    /// Lets some steps pass, so that a snapshot of one of them is whole.
    fn settle(&mut self) {
        let first = self.watch.wait_for("step", |_| true)["step"].as_u64().unwrap_or(0);
        self.watch.wait_for_step(first + STEPS);
    }

    fn lose_worker(&mut self, agent: usize) -> f64 {
        self.settle();
        let parts = process::descendants(self.agents[agent].id());
        let worker = parts.iter().find(|process| process.part() == "worker").expect("a worker");
        let began = Instant::now();
        assert!(process::signal(worker.id, "KILL"), "the worker was there");
        self.back(began)
    }

    fn lose_node(&mut self, agent: usize) -> f64 {
        self.settle();
        let lost = self.agents.remove(agent);
        let began = Instant::now();
        for process in process::descendants(lost.id()) {
            process::signal(process.id, "KILL");
        }
        lost.kill();
        let seconds = self.back(began);
        // Another agent takes its place, and the job grows again.
        self.agents.insert(agent, self.cluster.agent_with(&format!("n{agent}"), 1));
        self.watch.wait_for("generation", |event| event["world_size"] == 3);
        seconds
    }

    fn back(&mut self, began: Instant) -> f64 {
        let recovered = self.watch.wait_for("recovered", |_| true);
        let seconds = began.elapsed().as_secs_f64();
        assert_ne!(recovered["source"], "store", "nothing was stored: {recovered}");
        seconds
    }
}
