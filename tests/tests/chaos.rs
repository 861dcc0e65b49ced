//! A short campaign of faults on real processes in network namespaces, and what several nodes look like there.
//!
//! Needs root, namespaces, `ip`, `nft`, `tc` and an S3 server; says what is missing and passes where it is. The long
//! campaign is `cargo run --release -p tests --bin chaos`.

use std::time::{Duration, Instant};

use tests::chaos::campaign::{self, Plan};
use tests::chaos::fault::Kind;
use tests::chaos::lab::{self, Lab, Shape};
use tests::chaos::net::Plane;
use tests::job::Job;
use tests::process::signal;
use tests::run::{LIMIT, undisturbed};

/// Whether the machine can do it. Where namespaces are not permitted nobody can help it, so this is never an error.
fn usable() -> bool {
    let usable = lab::usable();
    if let Err(why) = &usable {
        println!("skipped: {why}");
    }
    usable.is_ok()
}

/// Another seed for the short campaign.
const SEED: &str = "CAIRN_CHAOS_SEED";

#[test]
fn a_handful_of_faults_changes_nothing() {
    if !usable() {
        return;
    }
    let only = vec![
        Kind::KillWorker,
        Kind::KillAgent,
        Kind::StopLeader,
        Kind::StopAgentBriefly,
        Kind::NodeOff,
        Kind::Loss,
        Kind::StoreStop,
        Kind::StoreKill,
        Kind::FullStore,
        Kind::FullMemory,
    ];
    let seed = std::env::var(SEED).ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let plan = Plan { seed, faults: only.len(), nodes: 3, only, overlap: false, steps: None, keep: false };
    let report = campaign::run(&plan).unwrap_or_else(|why| panic!("{why}"));
    println!("{report}");
    assert!(report.is_exact(), "{report}");
    assert!(report.wrong.is_empty(), "{report}");
    assert_eq!(report.faults(), plan.faults, "each found something to strike");
}

/// Trains the standard job on a lab; the bytes its first node has sent on each plane.
fn train(lab: &Lab) -> (u64, u64) {
    let job = Job::new();
    let workers = ["--set", "resources.workers={ min = 2, max = 2 }"];
    let submitted = lab.call(&[&["submit", &job.file().display().to_string()][..], &workers].concat());
    assert_eq!(submitted.code, Some(0), "{}", submitted.stderr);
    assert_eq!(lab.call(&["watch", "t"]).digest(), undisturbed());
    (lab.net.sent("n0", Plane::Control), lab.net.sent("n0", Plane::Data))
}

/// What the exchange of the standard job comes to at least: 30 steps of 64-bit sums of some 200,000 parameters.
const EXCHANGED: u64 = 30 * 8 * 100_000;

#[test]
fn nodes_join_with_one_command_and_find_their_own_address() {
    if !usable() {
        return;
    }
    let lab = Lab::new(Shape { nodes: 2, coordinators: 1, planes: false, admission: true });
    let (control, data) = train(&lab);
    assert!(control > EXCHANGED, "the ring took the way to the coordinator: {control} bytes");
    assert!(data < EXCHANGED / 100, "and no other: {data} bytes");
}

#[test]
fn the_data_plane_can_be_a_network_of_its_own() {
    if !usable() {
        return;
    }
    let lab = Lab::new(Shape { nodes: 2, coordinators: 1, planes: true, admission: true });
    let (control, data) = train(&lab);
    assert!(data > EXCHANGED, "the ring was on the data plane: {data} bytes");
    assert!(control < data, "control and checkpoints were not: {control} bytes");
}

/// Waits until a node is in a state; how it is then.
fn wait_for(lab: &mut Lab, node: &str, state: &str) -> serde_json::Value {
    let deadline = Instant::now() + LIMIT;
    loop {
        lab.tend();
        let nodes = lab.call(&["nodes"]);
        if let Some(found) = nodes.events.iter().find(|event| event["node"] == node && event["state"] == state) {
            return found.clone();
        }
        assert!(Instant::now() < deadline, "{node} is not {state}: {:?}", nodes.events);
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn two_nodes_cut_from_one_another_are_named_as_a_link() {
    if !usable() {
        return;
    }
    let mut lab = Lab::new(Shape { nodes: 3, coordinators: 1, planes: true, admission: false });
    let job = Job::with(&[&campaign::KEYS[..], &["training.steps=10000000"]].concat());
    let file = job.file().display().to_string();
    let submitted = lab.call(&["submit", &file, "--set", "resources.workers={ min = 3, max = 3 }"]);
    assert_eq!(submitted.code, Some(0), "{}", submitted.stderr);
    let mut watch = lab.operate(&["watch", "t"]);
    watch.wait_for_step(20);
    let cut = [lab.net.cut("n1", "n2", Plane::Data), lab.net.cut("n2", "n1", Plane::Data)];
    // Longer than `fault.collective`, so that the exchange is given up while the link is away.
    std::thread::sleep(Duration::from_secs(9));
    lab.net.remove(&cut);
    let over = watch.wait_for("incident", |_| true);
    assert_eq!((&over["cause"], &over["link"]), (&"collective".into(), &serde_json::json!(["n1", "n2"])), "{over}");
    assert!(over["node"].is_null(), "either may be the cause: {over}");
    let told = lab.call(&["incidents", "t"]);
    let first = told.of("incident").into_iter().find(|one| one["planned"] == false).cloned().unwrap_or_default();
    assert_eq!(first["link"], over["link"], "and it is recorded: {first}");
    lab.tend();
    assert_eq!(lab.ends, [], "no part has ended");
}

#[test]
fn a_node_the_others_cannot_reach_is_set_aside_and_let_back() {
    if !usable() {
        return;
    }
    let mut lab = Lab::new(Shape { nodes: 3, coordinators: 1, planes: true, admission: true });
    for node in lab.nodes() {
        let found = wait_for(&mut lab, &node, "ready");
        assert!(found["exchange_bytes_per_second"].as_f64() > Some(0.0), "it was tested: {found}");
    }
    // The way to the coordinator stays, so nothing but the exchange can tell.
    let filters = ["n0", "n1"].map(|node| lab.net.cut(node, "n2", Plane::Data));
    assert!(signal(lab.process("n2").expect("an agent"), "KILL"));
    let found = wait_for(&mut lab, "n2", "aside");
    assert!(found["reason"].as_str().is_some_and(|reason| reason.contains("its exchange with n")), "{found}");
    lab.net.remove(&filters);
    assert_eq!(lab.call(&["undrain", "n2"]).events[0]["state"], "ready");
}
