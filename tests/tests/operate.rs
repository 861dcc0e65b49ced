//! What operators do to a cluster and see of it: nodes drained, jobs that give way, incidents.

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::cluster::Cluster;
use tests::job::Job;
use tests::process;
use tests::run::{LIMIT, Outcome, Run, undisturbed};

/// Long enough to be interrupted in the middle, and nothing is stored before the end unless somebody asks for it.
const LONG: [&str; 2] = ["training.steps=300", "checkpoint.every_steps=1000"];

fn expected() -> String {
    Run::train(&Job::with(&LONG), &["--workers", "1"]).finish().digest()
}

fn submit(cluster: &Cluster, job: &Job, workers: &str) {
    let (file, workers) = (job.file().display().to_string(), format!("resources.workers={workers}"));
    let submitted = cluster.call(&["submit", &file, "--set", &workers]);
    assert_eq!(submitted.code, Some(0), "{}", submitted.stderr);
}

/// The account of a job: its incidents, and the line on goodput.
fn incidents(cluster: &Cluster, job: &str) -> (Vec<Value>, Value) {
    let outcome = cluster.call(&["incidents", job]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let goodput = outcome.of("goodput")[0].clone();
    (outcome.of("incident").into_iter().cloned().collect(), goodput)
}

fn expect_no_step_twice(outcome: &Outcome) {
    let steps = outcome.of("step").iter().filter_map(|event| event["step"].as_u64()).collect::<Vec<_>>();
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]), "{steps:?}");
    assert!(outcome.of("failure").is_empty(), "{:?}", outcome.of("failure"));
}

#[test]
fn a_drained_node_is_left_in_order_and_the_weights_are_the_same() {
    let expected = expected();
    let job = Job::with(&LONG);
    let cluster = Cluster::new(&job);
    let _coordinator = cluster.coordinator();
    let (_a, _b) = (cluster.agent("a"), cluster.agent("b"));
    submit(&cluster, &job, "{ min = 2, max = 4 }");
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    watch.wait_for("generation", |event| event["world_size"] == 4);
    watch.wait_for_step(20);
    let drained = cluster.call(&["drain", "b", "--wait"]);
    assert_eq!(drained.code, Some(0), "{}", drained.stderr);
    assert_eq!((&drained.events[0]["state"], &drained.events[0]["used"]), (&"drained".into(), &0.into()));
    let nodes = cluster.call(&["nodes"]);
    let states: Vec<_> = nodes.of("node").iter().map(|node| (node["node"].as_str(), node["state"].as_str())).collect();
    assert_eq!(states, [(Some("a"), Some("ready")), (Some("b"), Some("drained"))]);
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    expect_no_step_twice(&outcome);
    let (all, goodput) = incidents(&cluster, "t");
    let drain = all.iter().find(|incident| incident["cause"] == "drain").unwrap();
    assert_eq!(
        (&drain["node"], &drain["steps_lost"], &drain["outcome"]),
        (&"b".into(), &0.into(), &"recovered".into())
    );
    assert_eq!(goodput["failures"], 0);
    assert_eq!(cluster.call(&["undrain", "b"]).events[0]["state"], "ready");
    let unknown = cluster.call(&["drain", "z"]);
    assert_eq!(unknown.code, Some(2), "{}", unknown.stderr);
    assert!(unknown.stderr.contains("known are a, b"), "{}", unknown.stderr);
}

#[test]
fn a_drained_node_stays_empty_under_the_next_coordinator() {
    let job = Job::with(&LONG);
    let cluster = Cluster::new(&job);
    let first = cluster.coordinator();
    let (_a, _b) = (cluster.agent("a"), cluster.agent("b"));
    let states = || -> Vec<(String, String)> {
        let text = |node: &Value, key: &str| node[key].as_str().unwrap_or_default().to_string();
        let nodes = cluster.call(&["nodes"]);
        nodes.of("node").into_iter().map(|node| (text(node, "node"), text(node, "state"))).collect()
    };
    let wait_for = |expected: [(&str, &str); 2]| {
        let expected = expected.map(|(node, state)| (node.to_string(), state.to_string()));
        let deadline = Instant::now() + LIMIT;
        while states() != expected {
            assert!(Instant::now() < deadline, "{:?} and not {expected:?}", states());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait_for([("a", "ready"), ("b", "ready")]);
    assert_eq!(cluster.call(&["drain", "b"]).events[0]["state"], "drained");
    first.kill();
    let _second = cluster.coordinator();
    wait_for([("a", "ready"), ("b", "drained")]);
    submit(&cluster, &job, "{ min = 1, max = 4 }");
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    let formed = watch.wait_for("generation", |_| true);
    assert_eq!(formed["world_size"], 2, "on node a alone: {formed}");
    assert_eq!(cluster.call(&["undrain", "b"]).events[0]["state"], "ready");
    watch.wait_for("generation", |event| event["world_size"] == 4);
}

#[test]
fn a_job_of_low_priority_gives_way_and_goes_on_by_itself() {
    let (expected, short) = (expected(), undisturbed());
    let job = Job::with(&LONG);
    let urgent = Job::with(&["name=\"u\"", "resources.priority=10"]);
    let cluster = Cluster::new(&job);
    let _coordinator = cluster.coordinator();
    let _a = cluster.agent("a");
    submit(&cluster, &job, "{ min = 2, max = 2 }");
    let mut low = Run::start(&cluster.words(&["watch", "t"]));
    low.wait_for_step(20);
    submit(&cluster, &urgent, "{ min = 2, max = 2 }");
    let mut high = Run::start(&cluster.words(&["watch", "u"]));
    high.wait_for_step(1);
    let status = &cluster.call(&["status", "t"]).events[0];
    assert_eq!(status["state"], "queued", "{status}");
    assert!(status["reason"].as_str().unwrap().contains("job u"), "{status}");
    assert!(status["checkpoint_step"].as_u64() >= Some(20), "it saved: {status}");
    assert_eq!(high.finish().digest(), short);
    let outcome = low.finish();
    assert_eq!(outcome.digest(), expected);
    expect_no_step_twice(&outcome);
    let (all, _) = incidents(&cluster, "t");
    assert_eq!(all.iter().filter(|incident| incident["cause"] == "preempt").count(), 1, "{all:?}");
}

#[test]
fn a_killed_worker_is_accounted_for_also_after_a_restart_of_the_coordinator() {
    let expected = expected();
    let job = Job::with(&LONG);
    let cluster = Cluster::new(&job);
    let first = cluster.coordinator();
    let (_a, b) = (cluster.agent_with("a", 1), cluster.agent_with("b", 1));
    submit(&cluster, &job, "{ min = 2, max = 2 }");
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    watch.wait_for_step(40);
    let victim = process::descendants(b.id()).into_iter().find(|process| process.part() == "worker").unwrap();
    assert!(process::signal(victim.id, "KILL"));
    watch.wait_for("incident", |event| event["outcome"] == "recovered");
    let deadline = Instant::now() + LIMIT;
    while incidents(&cluster, "t").0.is_empty() {
        assert!(Instant::now() < deadline, "it is never recorded");
        std::thread::sleep(Duration::from_millis(50));
    }
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    first.kill();
    let _second = cluster.coordinator();
    let (all, goodput) = incidents(&cluster, "t");
    let [incident] = &all[..] else { panic!("{all:?}") };
    assert_eq!((&incident["cause"], &incident["signal"]), (&"worker_exit".into(), &9.into()), "{incident}");
    assert_eq!((&incident["node"], &incident["source"]), (&"b".into(), &"memory".into()), "{incident}");
    let stages = ["detect_ms", "abort_ms", "agree_ms", "restore_ms", "first_step_ms"];
    let sum: u64 = stages.iter().map(|stage| incident[stage].as_u64().unwrap_or_else(|| panic!("{incident}"))).sum();
    assert_eq!(incident["total_ms"].as_u64(), Some(sum));
    assert!(incident["steps_lost"].as_u64() < Some(40), "{incident}");
    assert_eq!((&goodput["failures"], &goodput["planned"]), (&1.into(), &0.into()));
    assert!(goodput["goodput"].as_f64().is_some_and(|share| share > 0.0 && share <= 1.0), "{goodput}");
}
