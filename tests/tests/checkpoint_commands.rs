//! `cairn checkpoint …` on real trained jobs: looking, comparing, proving, keeping and pruning, with the job's
//! coordinator at work and without one.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;
use tests::job::Job;
use tests::run::{Outcome, Run, cairn};

/// A job that keeps every checkpoint, trained to its end.
fn trained() -> Job {
    let job = Job::with(&["checkpoint.keep_last=100"]);
    assert_eq!(Run::train(&job, &["--workers", "2"]).finish().code, Some(0));
    job
}

/// Runs `cairn checkpoint COMMAND` on the job and expects an exit code.
fn command(job: &Job, command: &str, code: i32, words: &[&str]) -> Outcome {
    let store = job.store().display().to_string();
    let all = [&["checkpoint", command, "--store", &store, "t", "--output", "json"], words].concat();
    let outcome = cairn(&all);
    assert_eq!(outcome.code, Some(code), "{all:?}: {outcome:?}");
    outcome
}

fn list(job: &Job) -> Vec<Value> {
    command(job, "list", 0, &[]).events
}

fn steps(events: &[Value]) -> Vec<u64> {
    events.iter().filter_map(|event| event["step"].as_u64()).collect()
}

fn of(events: &[Value], step: u64) -> &Value {
    events.iter().find(|event| event["step"] == step).expect("the step is listed")
}

/// Bytes of all objects in the store.
fn stored(job: &Job) -> u64 {
    let size = |path: &std::path::PathBuf| path.metadata().expect("a file").len();
    job.stored(".safetensors").iter().map(size).sum()
}

/// A store as a set of paths: what a command that only looks may not change.
fn files(job: &Job) -> BTreeSet<std::path::PathBuf> {
    job.stored("").into_iter().collect()
}

/// Flips the last byte of an object of a step.
fn damage(job: &Job, step: u64) {
    let start = format!("{step:012}-");
    let named =
        |path: &std::path::PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start));
    let object = job.stored(".safetensors").into_iter().find(named).expect("an object of the step");
    let mut bytes = std::fs::read(&object).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&object, bytes).expect("written");
}

#[test]
fn pins_and_rules_decide_what_a_pruning_takes() {
    let job = trained();
    let all = list(&job);
    assert_eq!(steps(&all), [5, 10, 15, 20, 25, 30]);
    let losses: Vec<f64> =
        [10, 20, 30].iter().filter_map(|s| of(&all, *s)["metrics"]["validation_loss"].as_f64()).collect();
    assert_eq!(losses.len(), 3, "each validated checkpoint has its loss: {all:?}");
    assert!(losses[2] < losses[0], "{losses:?}");
    assert!(of(&all, 5)["metrics"]["validation_loss"].is_null() && of(&all, 5)["trust"] == "candidate");

    assert_eq!(command(&job, "pin", 0, &["10", "--reason", "figure 3"]).events[0]["changed"], true);
    assert_eq!(command(&job, "pin", 0, &["10", "--reason", "figure 3"]).events[0]["changed"], false);
    assert_eq!(of(&list(&job), 10)["pinned"], "figure 3");
    command(&job, "pin", 2, &["11"]);

    let before = files(&job);
    let dry = command(&job, "prune", 0, &["--keep-last", "1", "--keep-every", "15", "--dry-run"]);
    assert_eq!(dry.of("would_delete").iter().map(|e| e["step"].as_u64().unwrap()).collect::<Vec<_>>(), [5, 20, 25]);
    assert_eq!(files(&job), before, "a dry run changes nothing");
    let (full, would) = (stored(&job), dry.of("pruned")[0]["bytes"].as_u64().expect("bytes"));
    let done = command(&job, "prune", 0, &["--keep-last", "1", "--keep-every", "15"]);
    assert_eq!(done.of("deleted").len(), 3);
    assert_eq!((done.of("pruned")[0]["bytes"].as_u64(), full - stored(&job)), (Some(would), would));
    assert_eq!(steps(&list(&job)), [10, 15, 30]);

    assert_eq!(command(&job, "unpin", 0, &["10"]).events[0]["changed"], true);
    // Of the measured ones 30 is both the newest and the best.
    command(&job, "prune", 0, &["--keep-last", "1", "--keep-best", "2"]);
    assert_eq!(steps(&list(&job)), [10, 30]);
    command(&job, "verify", 0, &[]);
    let text = cairn(&["checkpoint", "list", "--store", &job.store().display().to_string(), "t"]);
    assert!(text.events[0].as_str().is_some_and(|line| line.contains("TRUST") && line.contains("MARKS")), "{text:?}");
    // The job goes on as if nothing had been done to it.
    let again = Run::train(&job, &["--resume"]).finish();
    assert_eq!(again.digest(), of(&list(&job), 30)["digest"].as_str().expect("a digest"));
}

#[test]
fn differences_are_told_tensor_by_tensor() {
    let job = trained();
    let report = command(&job, "diff", 0, &["25", "30"]).events.remove(0);
    assert_eq!(report["equal"], false);
    let tensors = report["tensors"].as_array().expect("a list").clone();
    assert_eq!(Some(tensors.len() as u64), report["compared"].as_u64(), "five updates change every tensor");
    for t in &tensors {
        let (max, rms) = (t["max_abs"].as_f64().unwrap(), t["rms"].as_f64().unwrap());
        assert!(max > 0.0 && rms > 0.0 && rms <= max && t["not_finite"] == 0, "{t}");
    }
    let scalars: Vec<_> = report["scalars"].as_array().unwrap().iter().filter_map(|s| s["name"].as_str()).collect();
    assert!(scalars.contains(&"step") && scalars.contains(&"cursor"), "{scalars:?}");
    assert!(report["bytes_read"].as_u64() > Some(0));

    // Another run of the same job, on another number of workers: the same state, and nothing is read.
    let other = Job::new();
    Run::train(&other, &["--workers", "3"]).finish().digest();
    let there = other.store().display().to_string();
    let same = command(&job, "diff", 0, &["30", "30", "--other-store", &there]).events.remove(0);
    assert_eq!((&same["equal"], &same["bytes_read"]), (&Value::Bool(true), &Value::from(0)));
    let missing = command(&job, "diff", 2, &["25", "31"]);
    assert!(missing.stderr.contains("31") && missing.stderr.contains("25, 30"), "{}", missing.stderr);
    let nobody = command(&job, "diff", 2, &["25", "30", "--other-job", "u"]);
    assert!(nobody.stderr.contains("holds no job"), "{}", nobody.stderr);
}

#[test]
fn verifying_without_a_coordinator_only_reports() {
    let job = trained();
    let before = files(&job);
    let sample = ["30", "--sample", "0.5", "--seed", "3"];
    let event = command(&job, "verify", 0, &sample).events.remove(0);
    let (proved, blocks) = (event["proved"].as_u64().unwrap(), event["blocks"].as_u64().unwrap());
    assert!(0 < proved && proved <= blocks, "{event}");
    assert_eq!(event["share"].as_f64().unwrap(), proved as f64 / blocks as f64);
    assert_eq!(command(&job, "verify", 0, &sample).events[0], event, "a sample is a function of its seed");
    for bad in ["0", "1.5", "-1", "many"] {
        command(&job, "verify", 2, &[&format!("--sample={bad}")]);
    }
    damage(&job, 30);
    let found = command(&job, "verify", 4, &[]);
    let bad: Vec<_> = found.events.iter().filter(|e| e["good"] == false).map(|e| e["step"].clone()).collect();
    assert_eq!(bad, [30]);
    assert_eq!(files(&job), before);
    assert_eq!(of(&list(&job), 30)["trust"], "candidate");
}

/// Where a running job's coordinator listens, and its token file.
fn coordinator(run: &Run) -> [String; 4] {
    let words = run.parts("coordinator")[0].words.clone();
    let value = |key: &str| {
        let at = words.iter().position(|word| word == key).expect("the coordinator was told");
        words[at + 1].clone()
    };
    ["--coordinator".into(), value("--listen"), "--token-file".into(), value("--token-file")]
}

#[test]
fn a_running_jobs_coordinator_records_what_is_asked() {
    let long = ["training.steps=300", "checkpoint.keep_last=100"];
    let expected = Run::train(&Job::with(&long), &["--workers", "1"]).finish().digest();
    let job = Job::with(&long);
    let mut run = Run::train(&job, &["--workers", "2"]);
    run.wait_for("checkpoint", |event| event["step"].as_u64() >= Some(20));
    let leader = coordinator(&run);
    let leader: Vec<&str> = leader.iter().map(String::as_str).collect();
    let with = |words: &[&'static str]| [words, &leader[..]].concat();

    let refused = command(&job, "pin", 2, &["5"]);
    assert!(refused.stderr.contains("--coordinator") && refused.stderr.contains(leader[1]), "{}", refused.stderr);
    let pinned = command(&job, "pin", 0, &with(&["5", "--reason", "first"]));
    assert_eq!(pinned.events[0]["changed"], true);
    let verified = command(&job, "verify", 0, &with(&["10"]));
    assert_eq!(
        (&verified.events[0]["recorded"], &verified.events[0]["share"]),
        (&Value::Bool(true), &Value::from(1.0))
    );
    damage(&job, 15);
    command(&job, "verify", 4, &with(&["15"]));
    let now = list(&job);
    let known = [5, 10, 15, 20].map(|step| of(&now, step)["trust"].as_str().unwrap_or_default().to_string());
    assert_eq!(known, ["candidate", "verified", "quarantined", "candidate"]);
    assert!(now.iter().all(|event| event["leases"].as_array().is_some_and(Vec::is_empty)), "leases are given back");
    run.wait_for("quarantined", |event| event["step"] == 15);
    let pruned = command(&job, "prune", 0, &with(&["--keep-last", "1"]));
    assert!(pruned.of("deleted").iter().any(|event| event["step"] == 10), "{pruned:?}");

    // A copy of the store is not the coordinator's store.
    let copy = tempfile::tempdir().expect("a folder");
    copy_without_leader(&job.store(), copy.path());
    let foreign = copy.path().display().to_string();
    let words = with(&["checkpoint", "pin", "t", "5", "--store"]);
    let words = [&words[..5], &[foreign.as_str()][..], &words[5..]].concat();
    let elsewhere = cairn(&words);
    assert_eq!(elsewhere.code, Some(2), "{elsewhere:?}");

    // None of it can be seen in the training.
    assert_eq!(run.finish().digest(), expected);
    let left = list(&job);
    assert_eq!(of(&left, 5)["pinned"], "first");
    assert!(steps(&left).contains(&300) && !steps(&left).contains(&10), "{left:?}");
}

fn copy_without_leader(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("a folder").flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() && entry.file_name() != "leader" {
            std::fs::create_dir_all(&target).expect("a folder");
            copy_without_leader(&path, &target);
        } else if path.is_file() {
            // A running job may have taken it away meanwhile.
            let _ = std::fs::copy(&path, &target);
        }
    }
}

#[test]
fn a_jobs_own_rules_hold_while_it_trains() {
    let job = Job::with(&["checkpoint.keep_last=1", "checkpoint.keep_every=10", "checkpoint.keep_within_steps=5"]);
    assert_eq!(Run::train(&job, &["--workers", "2"]).finish().code, Some(0));
    assert_eq!(steps(&list(&job)), [10, 20, 25, 30]);
    let best = Job::with(&["checkpoint.keep_last=1", "checkpoint.keep_best=2"]);
    assert_eq!(Run::train(&best, &["--workers", "1"]).finish().code, Some(0));
    assert_eq!(steps(&list(&best)), [20, 30], "the loss falls");
    let blind = Run::train(&best, &["--fresh", "--set", "training.validate_every=0"]).finish();
    assert_eq!(blind.code, Some(2));
    assert!(
        blind.stderr.contains("checkpoint.keep_best") && blind.stderr.contains("validate_every"),
        "{}",
        blind.stderr
    );
}
