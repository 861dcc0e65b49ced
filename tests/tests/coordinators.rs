//! The coordinator is on no step's path: one that dies, stops or is cut off costs no step, another takes its place, and
//! when the first one comes back it does no harm.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::cluster::{Cluster, Part};
use tests::job::Job;
use tests::process::signal;
use tests::relay::Relay;
use tests::run::{LIMIT, Outcome, Run, cairn};
use tests::s3::Server;

/// Steps of a job during which its coordinator is away.
const STEPS: u64 = 200;
/// When it goes.
const AWAY_AT: u64 = 40;

fn job() -> Job {
    Job::with(&[&format!("training.steps={STEPS}"), "checkpoint.every_steps=1000", "training.global_batch=16"])
}

fn undisturbed() -> String {
    Run::train(&job(), &["--workers", "1"]).finish().digest()
}

/// Hands the job in, for a worker on each of two nodes, and follows it until it is well under way.
fn under_way(cluster: &Cluster, job: &Job) -> ([Part; 2], Run) {
    let agents = [cluster.agent_with("a", 1), cluster.agent_with("b", 1)];
    let file = job.file().display().to_string();
    let submitted = cluster.call(&["submit", &file, "--set", "resources.workers={ min = 2, max = 2 }"]);
    assert_eq!(submitted.code, Some(0), "{}", submitted.stderr);
    let variables: Vec<(&str, &str)> = cluster.environment.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let mut watch = Run::start_in(&cluster.words(&["watch", "t"]), &variables);
    watch.wait_for_step(AWAY_AT);
    (agents, watch)
}

/// One generation took every step once, nothing is called an incident, and the weights are the undisturbed run's.
fn nothing_happened(cluster: &Cluster, outcome: &Outcome, expected: &str) {
    assert_eq!(outcome.digest(), expected);
    let steps: Vec<u64> = outcome.of("step").iter().filter_map(|event| event["step"].as_u64()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "every step is told, and once");
    let generations: BTreeSet<_> = outcome.of("generation").iter().filter_map(|e| e["generation"].as_u64()).collect();
    assert_eq!(generations, BTreeSet::from([1]), "{}", outcome.stderr);
    let incidents = cluster.call(&["incidents", "t"]);
    assert_eq!(incidents.code, Some(0), "{}", incidents.stderr);
    assert!(incidents.of("incident").is_empty(), "{:?}", incidents.events);
    assert!(outcome.of("failure").is_empty(), "{:?}", outcome.of("failure"));
}

fn median_milliseconds(outcome: &Outcome, of: impl Fn(u64) -> bool) -> f64 {
    let told = outcome.of("step");
    let chosen = told.iter().filter(|event| event["step"].as_u64().is_some_and(&of));
    let seconds = |event: &&&Value| Some(16.0 * 128.0 / event["tokens_per_second"].as_f64()?);
    let mut times: Vec<f64> = chosen.filter_map(|event| seconds(&event)).collect();
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).map_or(f64::NAN, |time| time * 1e3)
}

#[test]
fn a_coordinator_killed_and_started_again_costs_no_step() {
    let expected = undisturbed();
    let job = job();
    let cluster = Cluster::new(&job);
    let first = cluster.coordinator();
    let (_agents, watch) = under_way(&cluster, &job);
    first.kill();
    sleep(Duration::from_secs(1));
    let _second = cluster.coordinator();
    // It knows of no step until the agents have come back to it.
    let told = || cluster.call(&["status", "t"]).events[0]["step"].as_u64().filter(|step| *step > AWAY_AT);
    let back = std::iter::repeat_with(told).flatten().next().unwrap();
    let outcome = watch.finish();
    nothing_happened(&cluster, &outcome, &expected);
    let away = |step| (AWAY_AT..back).contains(&step);
    println!(
        "a step without a coordinator (steps {AWAY_AT} to {back}): {:.1} ms; with one: {:.1} ms",
        median_milliseconds(&outcome, away),
        median_milliseconds(&outcome, |step| step > 5 && !away(step))
    );
}

/// Waits until the coordinator at an address leads.
fn wait_for_leader(cluster: &Cluster, address: &str) {
    let deadline = Instant::now() + LIMIT;
    let words = ["jobs", "--coordinator", address, "--token-file", &cluster.token];
    while cairn(&words).code != Some(0) {
        assert!(Instant::now() < deadline, "nobody leads at {address}");
        sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_coordinator_that_stands_by_says_so() {
    let job = job();
    let cluster = Cluster::new(&job);
    let _leader = cluster.coordinator();
    let address = Cluster::free_address();
    let _standby = cluster.standby(&address, &[]);
    let deadline = Instant::now() + LIMIT;
    loop {
        let asked = cairn(&["jobs", "--coordinator", &address, "--token-file", &cluster.token]);
        assert_ne!(asked.code, Some(0), "the leader lives");
        if asked.stderr.contains("stands by") {
            break;
        }
        assert!(Instant::now() < deadline, "{}", asked.stderr);
    }
    // Whoever is named first, the one that leads is asked.
    let both = format!("{address},{}", cluster.address);
    let asked = cairn(&["jobs", "--coordinator", &both, "--token-file", &cluster.token]);
    assert_eq!(asked.code, Some(0), "{}", asked.stderr);
}

#[test]
fn a_stopped_coordinator_is_replaced_and_when_it_wakes_steps_down() {
    let expected = undisturbed();
    let job = job();
    let mut cluster = Cluster::new(&job);
    let mut old = cluster.coordinator();
    let address = Cluster::free_address();
    let _new = cluster.standby(&address, &[]);
    cluster.address = format!("{},{address}", cluster.address);
    let (_agents, watch) = under_way(&cluster, &job);
    signal(old.id(), "STOP");
    wait_for_leader(&cluster, &address);
    signal(old.id(), "CONT");
    assert_eq!(old.end().code(), Some(3), "it steps down");
    nothing_happened(&cluster, &watch.finish(), &expected);
}

/// A coordinator behind wires that can be cut, beside another one, both on a store in a bucket.
struct Wired {
    cluster: Cluster,
    old: Part,
    _new: Part,
    /// From agents and operators to the first one, and from it to the store.
    wires: [Relay; 2],
    new: String,
    _server: Server,
}

/// `None` where there is no S3 server.
fn wired(job: &Job) -> Option<Wired> {
    let server = Server::start()?;
    server.make_bucket("bucket");
    let mut cluster = Cluster::new(job);
    cluster.store = "s3://bucket/cairn".into();
    cluster.environment = server.environment().into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    let (here, new) = (Cluster::free_address(), Cluster::free_address());
    let wires = [Relay::start(&here), Relay::start(&server.address)];
    let endpoint = format!("http://{}", wires[1].address);
    let old = cluster.standby(&here, &[("AWS_ENDPOINT_URL", &endpoint)]);
    wait_for_leader(&cluster, &wires[0].address);
    let second = cluster.standby(&new, &[]);
    cluster.address = format!("{},{new}", wires[0].address);
    Some(Wired { cluster, old, _new: second, wires, new, _server: server })
}

/// Cuts a coordinator off from everybody, stopped or not, until another one leads.
fn cut_off(stopped: bool) {
    let job = job();
    let Some(mut lab) = wired(&job) else {
        tests::skip("no S3 server (run ./test, which installs moto, or set CAIRN_MOTO)");
        return;
    };
    let expected = undisturbed();
    let (_agents, watch) = under_way(&lab.cluster, &job);
    if stopped {
        signal(lab.old.id(), "STOP");
    }
    lab.wires.iter().for_each(|wire| wire.cut(true));
    wait_for_leader(&lab.cluster, &lab.new);
    if stopped {
        // Awake, but still alone: what it does not hear of it finds out by not being heard.
        signal(lab.old.id(), "CONT");
        assert_eq!(lab.old.end().code(), Some(3), "it steps down");
    }
    lab.wires.iter().for_each(|wire| wire.cut(false));
    assert_eq!(lab.old.end().code(), Some(3), "it steps down");
    nothing_happened(&lab.cluster, &watch.finish(), &expected);
}

#[test]
fn a_coordinator_that_is_cut_off_is_replaced_and_steps_down() {
    cut_off(false);
}

#[test]
fn a_coordinator_that_is_stopped_and_cut_off_is_replaced_and_steps_down() {
    cut_off(true);
}
