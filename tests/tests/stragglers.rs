//! A rank that is slowed down is named with its node, and forgotten when it keeps up again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tests::job::Job;
use tests::nodes::nodes;
use tests::process;
use tests::run::Run;

/// Stops a process for three quarters of the time, in turns shorter than its part of a step.
fn throttle(id: u32, on: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        while on.load(Ordering::Relaxed) && process::signal(id, "STOP") {
            std::thread::sleep(Duration::from_millis(30));
            process::signal(id, "CONT");
            std::thread::sleep(Duration::from_millis(10));
        }
    })
}

#[test]
fn a_slow_rank_is_named_with_its_node() {
    let keys = ["training.steps=500", "fault.straggler=1.7"];
    let expected = Run::train(&Job::with(&keys), &["--workers", "1"]).finish().digest();
    let job = Job::with(&keys);
    let (nodes, mut watch) = nodes(&job, 2, &[]);
    watch.wait_for("generation", |event| event["world_size"] == 2);
    watch.wait_for_step(5);
    let worker = process::descendants(nodes.agents[1].id()).into_iter().find(|process| process.part() == "worker");
    let on = Arc::new(AtomicBool::new(true));
    let throttled = throttle(worker.expect("a worker on n1").id, on.clone());
    let named = watch.wait_for("straggler", |event| event["node"] == "n1");
    assert!(named["ratio"].as_f64() > Some(1.7), "{named}");
    let status = nodes.cluster.call(&["status", "t"]);
    let of = &status.events[0]["stragglers"][0];
    assert_eq!((&of["node"], &of["rank"]), (&named["node"], &named["rank"]), "{:?}", status.events);
    let listed = nodes.cluster.call(&["nodes"]);
    let n1 = listed.events.iter().find(|event| event["node"] == "n1").expect("n1 is listed");
    assert_eq!(n1["stragglers"][0]["job"], "t", "{n1}");
    on.store(false, Ordering::Relaxed);
    throttled.join().expect("the throttle does not panic");
    watch.wait_for("straggler", |event| event["node"] == "n1" && event["ratio"].is_null());
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    assert!(outcome.of("failure").is_empty(), "slow is no failure: {:?}", outcome.of("failure"));
}
