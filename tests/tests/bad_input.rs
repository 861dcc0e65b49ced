//! What is wrong is refused with exit code 2 (or 4 for bad data) and a message that names the place and what would be
//! right, with nothing started and nothing lost. One row each.

use std::fs;
use std::path::{Path, PathBuf};

use checkpoint_store::{BlockHash, Event, Manifest, Record, layout};
use proto::ids::JobName;
use serde_json::Value;
use tests::job::Job;
use tests::run::{Outcome, Run, cairn};

/// What the parts of a job say on standard error when they start; see `a_good_job_starts_the_parts`.
const STARTED: [&str; 3] = ["this coordinator leads", "taken in by the coordinator", "worker started"];

/// Runs `cairn train` on a job with further arguments and expects a refusal that says all of `parts`, before any
/// process was started.
fn refused(job: &Job, arguments: &[&str], code: i32, parts: &[&str]) {
    refused_before(&STARTED, job, arguments, code, parts);
}

/// The same, before certain processes were started.
fn refused_before(started: &[&str], job: &Job, arguments: &[&str], code: i32, parts: &[&str]) {
    let outcome = Run::train(job, arguments).finish();
    expect(&outcome, code, parts, &format!("{arguments:?}"));
    assert!(outcome.events.is_empty(), "{arguments:?}: something was started: {:?}", outcome.events);
    for word in started {
        assert!(!outcome.stderr.contains(word), "{arguments:?}: a process was started: {}", outcome.stderr);
    }
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
        ("data.train=\"s3://bucket/x\"", &["data.train", "s3://", "file:///"]),
        ("training.validate_sequences=9000000", &["training.validate_sequences", "at most 1048576"]),
        ("optimizer.epsilon=1e-40", &["optimizer.epsilon", "32-bit"]),
        ("checkpoint.store=\"ftp://host/x\"", &["ftp", "file", "s3"]),
        ("checkpoint.store=\"/proc/nowhere\"", &["/proc/nowhere"]),
    ];
    let job = Job::new();
    for (set, parts) in rows {
        refused(&job, &["--set", set], 2, parts);
    }
    // Each number is in its range, but not the model they make.
    let vast = ["--set", "model.hidden_size=16777216", "--set", "model.intermediate_size=16777216"];
    refused(&job, &vast, 2, &["job.toml", "[model]", "2^48 elements"]);
    let file = job.file().display().to_string();
    // Found wrong before a coordinator is looked for: there is none.
    let submitted = cairn(&[&["submit", &file][..], &vast, &["--coordinator", "127.0.0.1:1"]].concat());
    expect(&submitted, 2, &["[model]", "2^48 elements"], "submit");
    refused(&job, &["--steps", "31"], 2, &["--steps", "30"]);
    refused(&job, &["--workers", "0"], 2, &["resources.workers"]);
    assert!(!job.store().exists() || job.stored(".json").is_empty(), "nothing was started");
    let missing = cairn(&["train", "/nowhere/job.toml"]);
    expect(&missing, 2, &["/nowhere/job.toml"], "a missing job file");
    fs::write(job.folder().join("bad.toml"), "name = \n").expect("written");
    let syntax = cairn(&["train", &job.folder().join("bad.toml").display().to_string()]);
    expect(&syntax, 2, &["bad.toml", "line 1"], "broken TOML");
    let text = fs::read_to_string(job.file()).expect("read");
    for (right, wrong, near) in [("name = ", "nmae = ", "name"), ("model = ", "modle = ", "model")] {
        fs::write(job.folder().join("near.toml"), text.replacen(right, wrong, 1)).expect("written");
        let outcome = cairn(&["train", &job.folder().join("near.toml").display().to_string()]);
        expect(&outcome, 2, &["near.toml: unknown key", &format!("did you mean `{near}`?")], wrong);
    }
}

/// A dataset on which a change was made: what it is, the change to the paths of `.idx` and `.bin`, the file that is to
/// blame, and the advice.
type BadData = (&'static str, fn(&Path, &Path), &'static str, &'static str);

const BAD_DATA: [BadData; 7] = [
    ("no index", |idx, _| fs::remove_file(idx).expect("removed"), "d.idx", "`cairn data prepare`"),
    ("no tokens", |_, bin| fs::remove_file(bin).expect("removed"), "d.bin", "`cairn data prepare`"),
    ("half the tokens", |_, bin| cut(bin, 100_000), "d.bin", "`cairn data prepare`"),
    ("empty tokens", |_, bin| cut(bin, 0), "d.bin", "`cairn data prepare`"),
    ("an empty index", |idx, _| cut(idx, 0), "d.idx", "`cairn data prepare`"),
    ("a truncated index", |idx, _| cut(idx, 30), "d.idx", "`cairn data prepare`"),
    (
        "a foreign index",
        |idx, _| fs::write(idx, b"PK\x03\x04 not an index").expect("written"),
        "d.idx",
        "`cairn data prepare`",
    ),
];

fn cut(path: &Path, length: u64) {
    fs::File::options().write(true).open(path).and_then(|file| file.set_len(length)).expect("cut");
}

#[test]
fn data_files() {
    let job = Job::new();
    let good = tests::root().join("data/corpus.validation").display().to_string();
    let prefix = job.folder().join("d");
    let set = format!("data.train={}", prefix.display());
    let place = |ending: &str| PathBuf::from(format!("{}.{ending}", prefix.display()));
    let restore = || {
        for ending in ["bin", "idx"] {
            fs::copy(format!("{good}.{ending}"), place(ending)).expect("copied");
        }
    };
    for (what, change, file, advice) in BAD_DATA {
        restore();
        change(&place("idx"), &place("bin"));
        println!("{what}");
        refused(&job, &["--set", &set], 2, &[file, advice]);
    }
    restore();
    let small = [&["--set", &set][..], &["--set", "model.vocab_size=100"]].concat();
    refused(&job, &small, 2, &["d.bin", "raise model.vocab_size", "100"]);
    let long = [&["--set", &set][..], &["--set", "training.sequence_length=100000000"]].concat();
    refused(&job, &long, 2, &["d.bin", "smaller training.sequence_length"]);
    let held_out = format!("data.validation={}", job.folder().join("none").display());
    refused(&job, &["--set", &held_out], 2, &["none.idx", "`cairn data prepare`"]);
    assert!(!job.store().exists(), "a store was made");
}

/// What the refusals above are told from, with the data named by a URL.
#[test]
fn a_good_job_starts_the_parts() {
    let job = Job::new();
    let data = format!("data.train=\"file://{}\"", tests::root().join("data/corpus.train").display());
    let outcome = Run::train(&job, &["--steps", "1", "--set", &data]).finish();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(job.store().exists() && !outcome.of("step").is_empty());
    for word in STARTED {
        assert!(outcome.stderr.contains(word), "{}", outcome.stderr);
    }
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
    // It takes a coordinator to read what the job was, but no worker.
    for (set, parts) in [
        ("model.intermediate_size=128", &["model.intermediate_size", "128", "256"][..]),
        ("training.validate_sequences=4", &["training.validate_sequences"]),
    ] {
        refused_before(&STARTED[2..], &job, &["--resume", "--set", set], 2, parts);
    }
    assert!(before.iter().filter(|file| is_checkpoint(file)).all(|file| file.exists()));
}

#[test]
fn a_flipped_byte() {
    let job = stored();
    let object = &job.stored(".safetensors")[0];
    let mut bytes = fs::read(object).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(object, bytes).expect("written");
    damaged(&job, &["safetensors"]);
}

#[test]
fn a_missing_object() {
    let job = stored();
    let object = &job.stored(".safetensors")[0];
    fs::remove_file(object).expect("removed");
    damaged(&job, &[&*object.file_name().expect("a name").to_string_lossy()]);
}

/// A job with a store that is a copy of another's.
fn copy_of(template: &Job) -> Job {
    let job = Job::with(&["checkpoint.keep_last=1"]);
    for file in template.stored("") {
        let to = job.store().join(file.strip_prefix(template.store()).expect("below the store"));
        fs::create_dir_all(to.parent().expect("a file lies in a folder")).expect("made");
        fs::copy(&file, &to).expect("copied");
    }
    job
}

/// The one manifest of a job.
fn manifest_of(job: &Job) -> PathBuf {
    let mut found = job.stored(".manifest");
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Writes the commit record of a manifest anew, with the hash of what the manifest's file now holds.
fn commit_again(job: &Job, manifest: &Path) {
    let name = manifest.file_name().expect("a name").to_string_lossy().into_owned();
    let hash = BlockHash::of(&fs::read(manifest).expect("read"));
    let id = JobName::new("t").expect("a good name");
    let mut written = 0;
    for file in job.stored(".json") {
        let path = file.strip_prefix(job.store()).expect("below the store").display().to_string();
        let Some(number) = layout::record_number(&id, &path) else { continue };
        let mut record = Record::parse(&path, number, &fs::read(&file).expect("read")).expect("a good record");
        if let Event::Committed(checkpoint) = &mut record.event
            && checkpoint.manifest == name
        {
            checkpoint.hash = hash;
            fs::write(&file, serde_json::to_vec(&record).expect("encoded")).expect("written");
            written += 1;
        }
    }
    assert_eq!(written, 1, "the commit of {name}");
}

#[test]
fn truncated_and_hostile_manifests() {
    let template = stored();
    let good = fs::read(manifest_of(&template)).expect("read");
    let nested = [b"[".repeat(200_000), b"]".repeat(200_000)].concat();
    // A frame whose lengths are as large as they can be.
    let huge = [&good[..20], &[0xff; 4096]].concat();
    for hostile in [good[..good.len() / 2].to_vec(), nested, huge, b"{}".to_vec()] {
        let job = copy_of(&template);
        let manifest = manifest_of(&job);
        fs::write(&manifest, hostile).expect("written");
        damaged(&job, &[&*manifest.file_name().expect("a name").to_string_lossy(), "the chain says"]);
    }
    let resumed = Run::train(&template, &["--resume", "--fresh"]).finish();
    assert_eq!(resumed.code, Some(2), "--resume and --fresh exclude each other");
    // The same store undamaged, and committed again as it was, is good.
    let job = copy_of(&template);
    commit_again(&job, &manifest_of(&job));
    assert_eq!(Run::train(&job, &["--resume", "--workers", "1", "--steps", "11"]).finish().code, Some(0));
}

/// Manifests whose hash is right, so that their reader itself must see what is wrong with them. Most are in the first
/// format, which is text and is still read; what both formats claim goes through the same checks.
#[test]
fn hostile_manifests_with_the_right_hash() {
    let template = stored();
    let packed = fs::read(manifest_of(&template)).expect("read");
    let good = Manifest::parse("packed", &packed).expect("a good manifest").to_json().expect("encoded");
    let changed = |change: fn(&mut Value)| {
        let mut manifest = serde_json::from_slice(&good).expect("a manifest is JSON");
        change(&mut manifest);
        serde_json::to_vec(&manifest).expect("encoded")
    };
    let nested = [b"{\"format\":1,\"job\":".to_vec(), b"[".repeat(200_000), b"]".repeat(200_000)].concat();
    let rows = [
        ("truncated", good[..good.len() / 2].to_vec(), "not valid"),
        ("truncated and packed", packed[..packed.len() / 2].to_vec(), ""),
        ("other bits, packed", [&packed[..packed.len() / 2], &[0xa5; 64], &packed[packed.len() / 2..]].concat(), ""),
        ("deep nesting", nested, "not valid"),
        ("a state twice", changed(|m| m["objects"][0]["extents"][1]["state"] = "param".into()), "param lie twice"),
        ("overlap", changed(|m| m["objects"][0]["extents"][1]["offset"] = 8.into()), "overlap at byte"),
        ("uncovered", changed(|m| drop(m["objects"][1]["extents"].as_array_mut().map(|e| e.remove(0)))), "are missing"),
        ("a gap", changed(|m| m["objects"][0]["extents"][0]["first"] = 65536.into()), "elements 0..65536"),
        ("huge", changed(|m| m["objects"][0]["extents"][0]["elements"] = u64::MAX.into()), "outside the space"),
        ("far", changed(|m| m["objects"][0]["extents"][0]["offset"] = u64::MAX.into()), "outside the object's bytes"),
        ("huge space", changed(|m| m["space"][0]["shape"] = vec![1_u64 << 40; 3].into()), "2^48 elements"),
        ("a way out", changed(|m| m["objects"][0]["path"] = "../../etc/passwd".into()), "not a path of an object"),
        ("another state's digest", changed(|m| m["scalar"]["seed"] = 8.into()), "its hashes give"),
    ];
    for (what, hostile, problem) in rows {
        println!("{what}");
        let job = copy_of(&template);
        let manifest = manifest_of(&job);
        fs::write(&manifest, hostile).expect("written");
        commit_again(&job, &manifest);
        damaged(&job, &[&*manifest.file_name().expect("a name").to_string_lossy(), problem]);
    }
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
    let mut bytes = fs::read(&newest).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&newest, bytes).expect("written");
    let resumed = Run::train(&job, &["--resume", "--workers", "2"]).finish();
    assert_eq!(resumed.of("quarantined")[0]["step"], 10, "{}", resumed.stderr);
    assert_eq!(resumed.of("step")[0]["step"], 6);
    assert_eq!(resumed.digest(), tests::run::undisturbed());
}
