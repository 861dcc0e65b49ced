//! A short campaign of faults on real processes in network namespaces, and what several nodes look like there.
//!
//! Needs root, namespaces, `ip`, `nft`, `tc` and an S3 server; says what is missing and passes where it is. The long
//! campaign is `cargo run --release -p tests --bin chaos`.

use tests::chaos::campaign::{self, Plan};
use tests::chaos::fault::Kind;
use tests::chaos::lab::{self, Lab, Shape};
use tests::chaos::net::Plane;
use tests::job::Job;
use tests::run::undisturbed;

/// Whether the machine can do it. Where namespaces are not permitted nobody can help it, so this is never an error.
fn usable() -> bool {
    let usable = lab::usable();
    if let Err(why) = &usable {
        println!("skipped: {why}");
    }
    usable.is_ok()
}

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
    ];
    let plan = Plan { seed: 5, faults: only.len(), nodes: 3, only, overlap: false, steps: None, keep: false };
    let report = campaign::run(&plan).unwrap_or_else(|why| panic!("{why}"));
    println!("{report}");
    assert!(report.is_exact() && report.wrong.is_empty(), "{report}");
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
    let lab = Lab::new(Shape { nodes: 2, coordinators: 1, planes: false });
    let (control, data) = train(&lab);
    assert!(control > EXCHANGED, "the ring took the way to the coordinator: {control} bytes");
    assert!(data < EXCHANGED / 100, "and no other: {data} bytes");
}

#[test]
fn the_data_plane_can_be_a_network_of_its_own() {
    if !usable() {
        return;
    }
    let lab = Lab::new(Shape { nodes: 2, coordinators: 1, planes: true });
    let (control, data) = train(&lab);
    assert!(data > EXCHANGED, "the ring was on the data plane: {data} bytes");
    assert!(control < data, "control and checkpoints were not: {control} bytes");
}
