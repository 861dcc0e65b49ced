//! P5 and the rules of stopping and going on: any size to any other, the same bits.

use std::path::Path;
use std::process::Command;

use checkpoint_store::{HashList, ScalarState, Space, StateDecl, TensorDecl, hash_blocks, state_digest};
use proto::ids::Step;
use proto::spec::{JobSpec, Overrides};
use tests::job::Job;
use tests::run::{Outcome, Run, cairn, undisturbed};

#[test]
fn stop_with_four_resume_with_one_stop_resume_with_three() {
    let expected = undisturbed();
    let job = Job::new();
    let first = Run::train(&job, &["--workers", "4", "--steps", "10"]).finish();
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    assert_eq!(first.of("paused")[0]["step"], 10);
    let second = Run::train(&job, &["--workers", "1", "--resume", "--steps", "20"]).finish();
    assert_eq!(second.code, Some(0), "{}", second.stderr);
    assert_eq!(second.of("step")[0]["step"], 11);
    let third = Run::train(&job, &["--workers", "3", "--resume"]).finish();
    assert_eq!(third.of("step")[0]["step"], 21);
    assert_eq!(third.digest(), expected);
}

/// An operator's command to the coordinator of a running `cairn train`.
fn operate(run: &Run, words: &[&str]) -> Outcome {
    let coordinator = &run.parts("coordinator")[0].words;
    let value = |key: &str| {
        let at = coordinator.iter().position(|word| word == key).expect("the coordinator was told");
        coordinator[at + 1].clone()
    };
    let (address, token) = (value("--listen"), value("--token-file"));
    let to = ["--coordinator", &address, "--token-file", &token, "--output", "json"];
    cairn(&[words, &to].concat())
}

/// The command was not interrupted, and the job did not get to its end.
#[test]
fn a_job_that_somebody_cancels_ends_the_command_with_3() {
    let job = Job::with(&["training.steps=100000"]);
    let mut run = Run::train(&job, &["--workers", "2"]);
    run.wait_for_step(3);
    assert_eq!(operate(&run, &["cancel", "t"]).code, Some(0));
    let outcome = run.finish();
    assert_eq!(outcome.code, Some(3), "{}", outcome.stderr);
    assert_eq!(outcome.of("cancelled").len(), 1);
    assert!(outcome.stderr.contains("the job was cancelled"), "{}", outcome.stderr);
}

#[test]
fn scale_in_mid_run() {
    let long = ["training.steps=300", "checkpoint.every_steps=100"];
    let expected = Run::train(&Job::with(&long), &["--workers", "1"]).finish().digest();
    let job = Job::with(&long);
    let mut run = Run::train(&job, &["--workers", "2"]);
    run.wait_for_step(3);
    let scaled = operate(&run, &["scale", "t", "3"]);
    assert_eq!(scaled.code, Some(0), "{}", scaled.stderr);
    run.wait_for("generation", |event| event["world_size"] == 3);
    assert_eq!(run.finish().digest(), expected);
}

#[test]
fn interrupt_saves_and_stops() {
    let expected = undisturbed();
    for name in ["INT", "TERM"] {
        let job = Job::with(&["checkpoint.every_steps=1000"]);
        let mut run = Run::train(&job, &["--workers", "2"]);
        run.wait_for_step(7);
        run.signal(name);
        let stopped = run.finish();
        assert_eq!(stopped.code, Some(130), "{}", stopped.stderr);
        let paused = stopped.of("paused")[0]["step"].as_u64().expect("a step");
        assert!(paused >= 7, "{paused}");
        let resumed = Run::train(&job, &["--workers", "1", "--resume"]).finish();
        assert_eq!(resumed.of("step")[0]["step"].as_u64(), Some(paused + 1));
        assert_eq!(resumed.digest(), expected);
    }
}

#[test]
fn the_rules_of_resume_and_fresh() {
    let job = Job::new();
    let first = Run::train(&job, &["--workers", "2"]).finish();
    let digest = first.digest();

    let again = Run::train(&job, &[]).finish();
    assert_eq!(again.code, Some(2), "{}", again.stderr);
    assert!(again.stderr.contains("--resume") && again.stderr.contains("--fresh"), "{}", again.stderr);

    let finished = Run::train(&job, &["--resume"]).finish();
    assert_eq!(finished.digest(), digest);
    assert!(finished.of("step").is_empty(), "nothing is trained again");

    let other = Run::train(&job, &["--resume", "--set", "model.hidden_size=32"]).finish();
    assert_eq!(other.code, Some(2));
    assert!(other.stderr.contains("model.hidden_size"), "{}", other.stderr);

    let validation = tests::root().join("data/corpus.validation").display().to_string();
    let data = Run::train(&job, &["--fresh", "--steps", "5"]).finish();
    assert_eq!(data.code, Some(0), "{}", data.stderr);
    let other = Run::train(&job, &["--resume", "--set", &format!("data.train={validation}")]).finish();
    assert_eq!(other.code, Some(2), "{}", other.stderr);
    assert!(other.stderr.contains("data"), "{}", other.stderr);

    let fresh = Run::train(&job, &["--fresh", "--workers", "3"]).finish();
    assert_eq!(fresh.digest(), digest);
    assert_eq!(fresh.of("step")[0]["step"], 1);
}

#[test]
fn old_checkpoints_go_and_the_rest_verifies() {
    let job = Job::with(&["checkpoint.keep_last=2"]);
    let outcome = Run::train(&job, &["--workers", "2"]).finish();
    let digest = outcome.digest();
    let store = job.store().display().to_string();
    let list = cairn(&["checkpoint", "list", "--store", &store, "t", "--output", "json"]);
    let steps: Vec<_> = list.events.iter().filter_map(|line| line["step"].as_u64()).collect();
    assert_eq!(steps, [25, 30], "{list:?}");
    assert_eq!(job.stored(".safetensors").len(), 4, "two checkpoints of two ranks");
    let show = cairn(&["checkpoint", "show", "--store", &store, "t", "--output", "json"]);
    let shown = &show.events[0];
    assert_eq!(shown["digest"].as_str(), Some(&*digest));
    assert_eq!(shown["step"], 30);
    assert_eq!(shown["world_size"], 2);
    assert!(shown["parameters"].as_u64() > Some(10_000) && shown["bytes"].as_u64() > Some(100_000), "{shown}");
    let verify = cairn(&["checkpoint", "verify", "--store", &store, "t", "--output", "json"]);
    assert_eq!(verify.code, Some(0), "{}", verify.stderr);
}

/// The Python with `safetensors` and `numpy`, if the test command has set one up.
fn python() -> Option<String> {
    let named = std::env::var("CAIRN_PYTHON").ok();
    let own = tests::root().join(".venv/bin/python").display().to_string();
    named.into_iter().chain([own, "python3".into()]).find(|python| {
        let import = Command::new(python).args(["-c", "import safetensors, numpy"]).output();
        import.is_ok_and(|output| output.status.success())
    })
}

#[test]
fn objects_open_with_pythons_safetensors_and_make_up_the_parameters() {
    let Some(python) = python() else {
        tests::skip("no Python with safetensors and numpy (run ./test, which installs them, or set CAIRN_PYTHON)");
        return;
    };
    let job = Job::new();
    let digest = Run::train(&job, &["--workers", "3"]).finish().digest();
    let single = Job::new();
    assert_eq!(Run::train(&single, &["--workers", "1"]).finish().digest(), digest);
    let read = |job: &Job| {
        let script = tests::root().join("tests/peers/read_checkpoint.py");
        let tensors = job.folder().join("tensors");
        let mut command = Command::new(&python);
        command.arg(script).arg(job.store()).args(["t", "30"]).arg(&tensors);
        let output = command.output().expect("python runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{error}");
        String::from_utf8(output.stdout).expect("the script prints text")
    };
    let (three, one) = (read(&job), read(&single));
    assert!(three.contains("param/model.embed_tokens.weight [256, 96]"), "{three}");
    assert!(three.contains("exp_avg_sq/model.norm.weight [96]"), "{three}");
    assert_eq!(three, one, "the slices of three ranks and of one make up the same tensors");
    // The workers hashed what they had in memory; what Python read from the store has the same digest.
    for job in [&job, &single] {
        assert_eq!(digest_of_tensors(job, &job.folder().join("tensors")), digest);
    }
    let lost = job.folder().join("tensors/exp_avg/model.norm.weight");
    let mut bytes = std::fs::read(&lost).expect("read");
    bytes[5] ^= 1;
    std::fs::write(&lost, bytes).expect("written");
    assert_ne!(digest_of_tensors(&job, &job.folder().join("tensors")), digest, "each bit counts");
}

/// The digest of a finished job's last state, from the bytes of whole tensors in `<folder>/<state>/<tensor>` and from
/// the job file alone.
fn digest_of_tensors(job: &Job, folder: &Path) -> String {
    let spec = JobSpec::load(&job.file(), &Overrides::new()).expect("a good job file");
    let space = Space::of_model(&spec.model).expect("a good model");
    let states = StateDecl::adamw();
    let hashes: Vec<HashList> = states
        .iter()
        .map(|state| {
            let read = |tensor: &TensorDecl| std::fs::read(folder.join(&state.name).join(&tensor.name)).expect("read");
            let bytes: Vec<u8> = space.tensors().iter().flat_map(read).collect();
            assert_eq!(bytes.len() as u64, space.elements() * state.dtype.size());
            HashList(hash_blocks(&bytes, space.block_elements(), state.dtype))
        })
        .collect();
    let training = &spec.training;
    let scalar = ScalarState {
        step: Step::new(training.steps),
        cursor: training.steps * training.global_batch as u64,
        ..ScalarState::start(training.seed, training.steps)
    };
    state_digest(&scalar, &space, &states, &hashes).to_string()
}
