//! What is wrong is refused with exit code 2 (or 4 for bad data) and a message that names the place and what would be
//! right, with nothing started and nothing lost. One row each.

use std::path::Path;

use tests::job::Job;
use tests::run::{Outcome, Run, cairn};

/// Runs `cairn train` on a job with one `--set` and expects a refusal that says all of `parts`.
fn refused(job: &Job, arguments: &[&str], code: i32, parts: &[&str]) {
    let outcome = Run::train(job, arguments).finish();
    expect(&outcome, code, parts, &format!("{arguments:?}"));
    assert!(outcome.of("step").is_empty(), "{arguments:?}: something was started");
}

fn expect(outcome: &Outcome, code: i32, parts: &[&str], what: &str) {
    assert_eq!(outcome.code, Some(code), "{what}: {}", outcome.stderr);
    for part in parts {
        assert!(outcome.stderr.contains(part), "{what}: {:?} lacks {part:?}", outcome.stderr);
    }
}

#[test]
fn job_files() {
    let rows: &[(&str, &[&str])] = &[
        ("training.stepz=5", &["training.stepz", "training.steps"]),
        ("modle.hidden_size=5", &["modle", "model"]),
        ("training.steps=\"many\"", &["training.steps", "whole number"]),
        ("training.steps=0", &["training.steps", "at least 1"]),
        ("training.micro_batch=-1", &["training.micro_batch", "-1"]),
        ("model.hidden_size=0", &["model.hidden_size", "at least 1"]),
        ("model.num_attention_heads=5", &["model.num_attention_heads", "divisor of model.hidden_size = 96"]),
        ("training.micro_batch=3", &["training.global_batch", "multiple of training.micro_batch = 3"]),
        ("resources.workers=9", &["resources.workers", "at most 8"]),
        ("checkpoint.store=\"ftp://host/x\"", &["ftp", "file", "s3"]),
        ("checkpoint.store=\"/proc/nowhere\"", &["/proc/nowhere"]),
    ];
    let job = Job::new();
    for (set, parts) in rows {
        refused(&job, &["--set", set], 2, parts);
    }
    refused(&job, &["--steps", "31"], 2, &["--steps", "30"]);
    refused(&job, &["--workers", "0"], 2, &["resources.workers"]);
    assert!(!job.store().exists() || job.stored(".json").is_empty(), "nothing was started");
    let missing = cairn(&["train", "/nowhere/job.toml"]);
    expect(&missing, 2, &["/nowhere/job.toml"], "a missing job file");
    std::fs::write(job.folder().join("bad.toml"), "name = \n").expect("written");
    let syntax = cairn(&["train", &job.folder().join("bad.toml").display().to_string()]);
    expect(&syntax, 2, &["bad.toml", "line 1"], "broken TOML");
}

#[test]
fn data_files() {
    let job = Job::new();
    let good = tests::root().join("data/corpus.validation");
    let prefix = job.folder().join("d");
    let set = format!("data.train={}", prefix.display());
    let place = |ending: &str| format!("{}.{ending}", prefix.display());
    let copy = |ending: &str| {
        std::fs::copy(format!("{}.{ending}", good.display()), place(ending)).expect("copied");
    };
    refused(&job, &["--set", &set], 2, &["d.idx", "cairn data prepare"]);
    copy("bin");
    copy("idx");
    let whole = std::fs::read(place("bin")).expect("read");
    std::fs::write(place("bin"), &whole[..whole.len() / 2]).expect("written");
    refused(&job, &["--set", &set], 2, &["d."]);
    std::fs::write(place("bin"), b"").expect("written");
    refused(&job, &["--set", &set], 2, &["d."]);
    copy("bin");
    let index = std::fs::read(place("idx")).expect("read");
    for (what, bytes) in
        [("empty", &b""[..]), ("truncated", &index[..30]), ("foreign", &b"PK\x03\x04 not an index"[..])]
    {
        std::fs::write(place("idx"), bytes).expect("written");
        let outcome = Run::train(&job, &["--set", &set]).finish();
        expect(&outcome, 2, &["d.idx"], what);
    }
    copy("idx");
    refused(&job, &["--set", &set, "--set", "model.vocab_size=100"], 2, &["model.vocab_size", "100"]);
    refused(&job, &["--set", &set, "--set", "training.sequence_length=100000000"], 2, &["sequence_length"]);
}

/// A finished job with one checkpoint, to be damaged.
fn stored() -> Job {
    let job = Job::with(&["checkpoint.keep_last=1"]);
    assert_eq!(Run::train(&job, &["--workers", "2", "--steps", "10"]).finish().code, Some(0));
    job
}

/// Both ways of meeting the damage: `verify` reports it, and resuming refuses to go on without a good checkpoint.
fn damaged(job: &Job, parts: &[&str]) {
    let store = job.store().display().to_string();
    expect(&cairn(&["checkpoint", "verify", "--store", &store, "t"]), 4, parts, "verify");
    let before = job.stored("");
    let resumed = Run::train(job, &["--resume", "--workers", "2"]).finish();
    expect(&resumed, 4, parts, "resume");
    assert!(resumed.of("step").is_empty());
    let lost: Vec<_> = before.into_iter().filter(|file| is_checkpoint(file) && !file.exists()).collect();
    assert!(lost.is_empty(), "files were removed: {lost:?}");
}

fn is_checkpoint(file: &Path) -> bool {
    let text = file.to_string_lossy();
    text.contains("/checkpoints/") || text.contains("/objects/")
}

#[test]
fn resume_with_another_model() {
    let job = stored();
    let before = job.stored("");
    refused(&job, &["--resume", "--set", "model.intermediate_size=128"], 2, &["model.intermediate_size", "128", "256"]);
    refused(&job, &["--resume", "--set", "training.validate_sequences=4"], 2, &["training.validate_sequences"]);
    assert!(before.iter().filter(|file| is_checkpoint(file)).all(|file| file.exists()));
}

#[test]
fn a_flipped_byte() {
    let job = stored();
    let object = &job.stored(".safetensors")[0];
    let mut bytes = std::fs::read(object).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(object, bytes).expect("written");
    damaged(&job, &["safetensors"]);
}

#[test]
fn a_missing_object() {
    let job = stored();
    let object = &job.stored(".safetensors")[0];
    std::fs::remove_file(object).expect("removed");
    damaged(&job, &[&*object.file_name().expect("a name").to_string_lossy()]);
}

#[test]
fn truncated_and_hostile_manifests() {
    let job = stored();
    let manifest = &job.stored(".manifest")[0];
    let good = std::fs::read(manifest).expect("read");
    let name = manifest.file_name().expect("a name").to_string_lossy().into_owned();
    let nested = [b"[".repeat(200_000), b"]".repeat(200_000)].concat();
    // A frame whose lengths are as large as they can be.
    let huge = [&good[..20], &[0xff; 4096]].concat();
    for hostile in [good[..good.len() / 2].to_vec(), nested, huge, b"{}".to_vec()] {
        std::fs::write(manifest, hostile).expect("written");
        damaged(&job, &[&name]);
    }
    std::fs::write(manifest, good).expect("written");
    let resumed = Run::train(&job, &["--resume", "--fresh"]).finish();
    assert_eq!(resumed.code, Some(2), "--resume and --fresh exclude each other");
}

#[test]
fn a_newer_good_checkpoint_is_fallen_back_from() {
    let job = Job::with(&["checkpoint.keep_last=3"]);
    assert_eq!(Run::train(&job, &["--workers", "2", "--steps", "10"]).finish().code, Some(0));
    let newest = job.stored(".safetensors").into_iter().find(|file| {
        let name = file.file_name().expect("a file has a name").to_string_lossy().into_owned();
        name.split('-').next().and_then(|step| step.parse::<u64>().ok()) == Some(10)
    });
    let newest = newest.expect("an object of step 10");
    let mut bytes = std::fs::read(&newest).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&newest, bytes).expect("written");
    let resumed = Run::train(&job, &["--resume", "--workers", "2"]).finish();
    assert_eq!(resumed.of("quarantined")[0]["step"], 10, "{}", resumed.stderr);
    assert_eq!(resumed.of("step")[0]["step"], 6);
    assert_eq!(resumed.digest(), tests::run::undisturbed());
}
