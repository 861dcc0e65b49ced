//! `cairn doctor` as people run it: what is well, and each thing that can be amiss with what to do about it.

use std::os::unix::fs::PermissionsExt;

use serde_json::Value;
use tests::cluster::Cluster;
use tests::job::Job;
use tests::run::{Outcome, Run, cairn};

/// The report as JSON lines.
fn doctor(words: &[&str]) -> Outcome {
    cairn(&[&["doctor", "--output", "json"], words].concat())
}

/// The one line of a check.
fn check<'a>(outcome: &'a Outcome, name: &str) -> &'a Value {
    let found = outcome.of("check").into_iter().find(|line| line["check"] == name);
    found.unwrap_or_else(|| panic!("no check {name}: {:?}\n{}", outcome.events, outcome.stderr))
}

/// Expects that one check fails, and that its line says all of `parts`.
fn expect_failed(outcome: &Outcome, name: &str, parts: &[&str]) {
    let line = check(outcome, name);
    assert_eq!((outcome.code, &line["verdict"]), (Some(2), &"fail".into()), "{line}");
    let said = format!("{} {}", line["found"], line["advice"]);
    assert!(parts.iter().all(|part| said.contains(part)), "{said} lacks one of {parts:?}");
    let failed = outcome.of("check").into_iter().filter(|line| line["verdict"] == "fail");
    assert_eq!(failed.count(), 1, "{:?}", outcome.events);
}

#[test]
fn a_job_and_its_coordinator_are_well() {
    let job = Job::new();
    let cluster = Cluster::new(&job);
    let _coordinator = cluster.coordinator();
    let file = job.file().display().to_string();
    // Until the coordinator answers.
    assert_eq!(cluster.call(&["submit", &file]).code, Some(0));
    let outcome = cluster.call(&["doctor", &file, "--slots", "1"]);
    assert_eq!(outcome.code, Some(0), "{:?}\n{}", outcome.events, outcome.stderr);
    let coordinator = check(&outcome, "coordinator");
    assert_eq!((&coordinator["verdict"], &coordinator["epoch"]), (&"ok".into(), &1.into()), "{coordinator}");
    for name in ["job", "data", "store", "store bandwidth", "token", "loopback ring"] {
        assert_eq!(check(&outcome, name)["verdict"], "ok", "{}", check(&outcome, name));
    }
    let seconds = &check(&outcome, "timeouts")["seconds"];
    assert!((seconds["lost_node"].as_f64().unwrap() - 5.1).abs() < 1e-6, "{seconds}");
    let left = std::fs::read_dir(job.store().join("probe")).into_iter().flatten().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert!(left.iter().all(|name| !name.starts_with("doctor-")), "{left:?}");
}

#[test]
fn what_is_amiss_is_named_with_what_to_do() {
    let job = Job::new();
    let file = job.file().display().to_string();
    let missing = job.folder().join("no/such/store").display().to_string();
    expect_failed(&doctor(&["--store", &missing]), "store", &["no/such", "make the folder"]);

    let short = doctor(&[&file, "--memory-budget", "64KiB", "--slots", "2"]);
    expect_failed(&short, "memory folder", &["budget 64.0 KiB", "raise --memory-budget to"]);

    let token = job.folder().join("token");
    std::fs::write(&token, "0".repeat(64)).unwrap();
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
    let open = doctor(&["--token-file", &token.display().to_string()]);
    expect_failed(&open, "token", &["mode 0644", "chmod 600"]);

    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let words = ["--token-file", &token.display().to_string(), "--coordinator", "127.0.0.1:1"];
    expect_failed(&doctor(&words), "coordinator", &["no coordinator answers at 127.0.0.1:1"]);

    let chain = doctor(&[&file, "--set", "fault.hang=20"]);
    expect_failed(&chain, "job", &["`fault.hang` is 20 s", "fault.collective = 30 s"]);
}

#[test]
fn a_train_says_how_soon_failures_are_noticed() {
    let job = Job::with(&["training.steps=2", "fault.suspicion=3"]);
    let outcome = Run::train(&job, &["--workers", "1"]).finish();
    outcome.digest();
    let seconds = &outcome.of("detection")[0]["seconds"];
    assert!((seconds["lost_node"].as_f64().unwrap() - 3.1).abs() < 1e-6, "{seconds}");
}
