//! The memory tier on real processes: what is lost comes back from the nearest copy, and the weights are the same bits.
//!
//! Unless a test says otherwise nothing is stored before the last step, so whatever a generation starts from beyond
//! step 0 was in memory.

use serde_json::Value;
use tests::job::Job;
use tests::nodes::nodes;
use tests::process;
use tests::run::{Outcome, Run};

/// Long enough to be killed in the middle, and a snapshot at every step.
const KEYS: [&str; 3] = ["training.steps=160", "checkpoint.memory_every=1", "fault.suspicion=3"];
const UNSTORED: &str = "checkpoint.every_steps=1000";
/// When something is killed, and what must have been in memory by then.
const KILL_AT: u64 = 60;
const AT_LEAST: u64 = 30;

fn job(keys: &[&str]) -> Job {
    Job::with(&[&KEYS[..], keys].concat())
}

/// The digest of the same job, undisturbed with one worker.
fn expected() -> String {
    Run::train(&job(&[]), &["--workers", "1"]).finish().digest()
}

/// The last recovery: its step and its source.
fn recovered(outcome: &Outcome) -> (u64, String) {
    let events = outcome.of("recovered");
    let last: &Value = events.last().unwrap_or_else(|| panic!("nothing was recovered:\n{}", outcome.stderr));
    (last["step"].as_u64().unwrap(), last["source"].as_str().unwrap().to_string())
}

#[test]
fn a_killed_worker_resumes_from_memory() {
    let expected = expected();
    let job = job(&[UNSTORED]);
    let mut run = Run::train(&job, &["--workers", "2"]);
    run.wait_for_step(KILL_AT);
    run.kill("worker", 1);
    let outcome = run.finish();
    assert_eq!(outcome.digest(), expected);
    let (step, source) = recovered(&outcome);
    // Other ranks read the killed one's slot on the same node.
    assert_eq!(source, "memory", "{:?}", outcome.events);
    assert!(step >= AT_LEAST, "at most the steps since the last snapshot: went on from {step}");
}

#[test]
fn a_killed_agent_takes_its_earlier_lifes_snapshots_over() {
    let expected = expected();
    let job = job(&[UNSTORED]);
    let mut run = Run::train(&job, &["--workers", "2"]);
    run.wait_for_step(KILL_AT);
    run.kill("agent", 0);
    let outcome = run.finish();
    assert_eq!(outcome.digest(), expected);
    let (step, source) = recovered(&outcome);
    assert_eq!(source, "memory");
    assert!(step >= AT_LEAST, "went on from {step}");
}

#[test]
fn a_killed_node_comes_back_from_parity() {
    let expected = expected();
    let job = job(&[UNSTORED]);
    let (mut nodes, mut watch) = nodes(&job, 3, &[]);
    watch.wait_for("generation", |event| event["world_size"] == 3);
    watch.wait_for_step(KILL_AT);
    nodes.agents.remove(1).kill();
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let (step, source) = recovered(&outcome);
    assert_eq!(source, "parity", "{:?}", outcome.events);
    assert!(step >= AT_LEAST, "went on from {step}");
    let sizes: Vec<_> = outcome.of("generation").iter().filter_map(|event| event["world_size"].as_u64()).collect();
    assert_eq!(sizes, [3, 2]);
    let status = nodes.cluster.call(&["status", "t"]);
    assert_eq!(status.events[0]["state"], "finished");
}

#[test]
fn with_two_parities_two_nodes_may_be_killed() {
    let expected = expected();
    let job = job(&[UNSTORED]);
    let (mut nodes, mut watch) = nodes(&job, 4, &["checkpoint.parity=2"]);
    watch.wait_for("generation", |event| event["world_size"] == 4);
    watch.wait_for_step(KILL_AT);
    let (one, two) = (nodes.agents.remove(3), nodes.agents.remove(0));
    tests::process::signal(one.id(), "KILL");
    two.kill();
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let (step, source) = recovered(&outcome);
    assert_eq!(source, "parity", "{:?}", outcome.events);
    assert!(step >= AT_LEAST, "went on from {step}");
}

#[test]
fn two_killed_nodes_of_a_group_with_one_parity_come_back_from_the_store() {
    let expected = expected();
    let job = job(&["checkpoint.every_steps=20"]);
    let (mut nodes, mut watch) = nodes(&job, 3, &[]);
    watch.wait_for("generation", |event| event["world_size"] == 3);
    watch.wait_for("checkpoint", |event| event["step"].as_u64() >= Some(40));
    watch.wait_for_step(70);
    let (one, two) = (nodes.agents.remove(2), nodes.agents.remove(0));
    tests::process::signal(one.id(), "KILL");
    two.kill();
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let (step, source) = recovered(&outcome);
    assert_eq!((step % 20, source.as_str()), (0, "store"), "{:?}", outcome.events);
    assert!(step >= 40, "went on from {step}");
}

#[test]
fn what_may_be_lost_and_what_it_takes_is_shown() {
    let job = job(&[UNSTORED]);
    let (nodes, mut watch) = nodes(&job, 2, &[]);
    watch.wait_for("generation", |event| event["world_size"] == 2);
    watch.wait_for_step(100);
    let status = &nodes.cluster.call(&["status", "t"]).events[0];
    assert!(status["memory"].as_str().unwrap().contains("1 of 2 nodes"), "{status}");
    assert!(status["memory_step"].as_u64().is_some_and(|step| step >= 1), "{status}");
    let rooms = status["rooms"].as_array().unwrap();
    assert_eq!(rooms.len(), 2);
    assert!(
        rooms.iter().all(|room| room["used"].as_u64() > Some(0) && room["used"].as_u64() < room["budget"].as_u64())
    );
    watch.finish().digest();
}

#[test]
fn what_an_agent_takes_over_makes_up_for_a_node_lost_with_it() {
    let expected = expected();
    let job = job(&[UNSTORED]);
    let (mut nodes, mut watch) = nodes(&job, 2, &[]);
    watch.wait_for("generation", |event| event["world_size"] == 2);
    watch.wait_for_step(KILL_AT);
    let (first, second) = (nodes.agents.remove(0), nodes.agents.remove(0));
    process::signal(first.id(), "KILL");
    second.kill();
    first.kill();
    // It finds its own snapshots, the other's parity, and what the other has said of both.
    nodes.agents.push(nodes.cluster.agent_with("n0", 1));
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let (step, source) = recovered(&outcome);
    assert_eq!(source, "parity", "{:?}", outcome.events);
    assert!(step >= AT_LEAST, "went on from {step}");
}
