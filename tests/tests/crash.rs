//! P1 and P4 under SIGKILL: of a worker, an agent with its workers, the coordinator, at moments drawn from a seed.

use std::thread::sleep;
use std::time::Duration;

use proptest::prelude::Rng;
use tests::job::Job;
use tests::run::Run;

/// Long enough to be struck: a second or two.
const LONG: [&str; 2] = ["training.steps=150", "checkpoint.every_steps=10"];
const STEPS: u64 = 150;

/// The digest of the undisturbed run.
fn undisturbed() -> String {
    Run::train(&Job::with(&LONG), &["--workers", "1"]).finish().digest()
}

/// Moments to strike: a step to wait for, then some milliseconds, and which process.
struct Moments(proptest::test_runner::TestRng);

impl Moments {
    fn new(seed: u8) -> Self {
        println!("seed {seed}");
        Self(proptest::test_runner::TestRng::from_seed(proptest::test_runner::RngAlgorithm::ChaCha, &[seed; 32]))
    }

    fn next(&mut self) -> (u64, Duration, usize) {
        let draw = self.0.next_u64();
        (draw % (STEPS - 20), Duration::from_millis(draw >> 8 & 63), (draw >> 20) as usize)
    }
}

/// Trains with three workers, kills one process of a part at each given moment, and returns the outcome's digest.
fn struck(part: &str, moments: &mut Moments, strikes: usize) -> (String, usize) {
    let job = Job::with(&LONG);
    let mut run = Run::train(&job, &["--workers", "3"]);
    let mut last = 0;
    for _ in 0..strikes {
        let (step, pause, pick) = moments.next();
        last = last.max(step);
        if last > 0 {
            run.wait_for_step(last);
        } else {
            // Before the first step: while the workers start, prepare and join.
            run.wait_for("generation", |_| true);
        }
        sleep(pause);
        run.kill(part, pick);
    }
    let outcome = run.finish();
    let recoveries = outcome.of("recovered").len();
    (outcome.digest(), recoveries)
}

#[test]
fn a_killed_worker_changes_nothing_ten_times_over() {
    let expected = undisturbed();
    let mut moments = Moments::new(1);
    let mut recoveries = 0;
    for round in 0..10 {
        let (digest, recovered) = struck("worker", &mut moments, 1);
        assert_eq!(digest, expected, "round {round}");
        recoveries += recovered;
    }
    // A strike at the very end may come too late to matter, not ten of them.
    assert!(recoveries >= 5, "only {recoveries} of 10 strikes met a running generation");
}

#[test]
fn a_killed_agent_with_its_workers_changes_nothing() {
    let expected = undisturbed();
    let mut moments = Moments::new(2);
    let mut recoveries = 0;
    for round in 0..10 {
        let (digest, recovered) = struck("agent", &mut moments, 1);
        assert_eq!(digest, expected, "round {round}");
        recoveries += recovered;
    }
    assert!(recoveries >= 5, "only {recoveries} of 10 strikes met a running generation");
}

/// A plain `kill` of a part is no wish to end the job: the part leaves in order and is started again.
#[test]
fn a_part_asked_to_stop_is_started_again() {
    let expected = undisturbed();
    for part in ["coordinator", "agent"] {
        let job = Job::with(&LONG);
        let mut run = Run::train(&job, &["--workers", "3"]);
        run.wait_for_step(30);
        let asked = run.parts(part)[0].id;
        assert!(tests::process::signal(asked, "TERM"), "the {part} is gone");
        let outcome = run.finish();
        assert_eq!(outcome.digest(), expected, "{part}: {}", outcome.stderr);
        let again = format!("the {part} process ended");
        assert!(outcome.stderr.contains(&again), "the {part} did not leave: {}", outcome.stderr);
    }
}

#[test]
fn a_killed_coordinator_changes_nothing_and_stops_no_training() {
    let expected = undisturbed();
    let mut moments = Moments::new(3);
    for round in 0..10 {
        let job = Job::with(&LONG);
        let mut run = Run::train(&job, &["--workers", "3"]);
        let (step, pause, _) = moments.next();
        run.wait_for_step(step.max(1));
        sleep(pause);
        run.kill("coordinator", 0);
        let outcome = run.finish();
        assert_eq!(outcome.digest(), expected, "round {round}");
        let generations = outcome.of("generation");
        let highest = generations.iter().filter_map(|event| event["generation"].as_u64()).max();
        assert_eq!(highest, Some(1), "the workers were disturbed: {generations:?}\n{}", outcome.stderr);
        let steps: Vec<_> = outcome.of("step").iter().filter_map(|event| event["step"].as_u64()).collect();
        assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "each step is told once");
    }
}

#[test]
fn several_strikes_on_all_parts_change_nothing() {
    let expected = undisturbed();
    let mut moments = Moments::new(4);
    let job = Job::with(&LONG);
    let mut run = Run::train(&job, &["--workers", "3"]);
    for (step, part) in [(10, "worker"), (40, "coordinator"), (70, "agent"), (100, "worker")] {
        run.wait_for_step(step);
        let (_, pause, pick) = moments.next();
        sleep(pause);
        run.kill(part, pick);
    }
    assert_eq!(run.finish().digest(), expected);
}

#[test]
fn a_job_that_never_gets_anywhere_is_given_up_with_the_reason() {
    // With snapshots in memory it would get somewhere.
    let keys = ["checkpoint.every_steps=1000", "checkpoint.memory=false", "fault.restarts_without_progress=2"];
    let job = Job::with(&keys);
    let mut run = Run::train(&job, &["--workers", "2", "--set", "training.steps=5000"]);
    for _ in 0..3 {
        run.wait_for("step", |_| true);
        run.kill("worker", 0);
        run.wait_for("failure", |_| true);
    }
    let outcome = run.finish();
    assert_eq!(outcome.code, Some(3), "{}", outcome.stderr);
    let reason = outcome.of("failed")[0]["reason"].as_str().expect("a reason").to_string();
    assert!(reason.contains("fault.restarts_without_progress"), "{reason}");
}

#[test]
fn a_killed_command_leaves_no_process_and_a_job_that_resumes() {
    let expected = undisturbed();
    let job = Job::with(&LONG);
    let mut run = Run::train(&job, &["--workers", "2"]);
    run.wait_for("checkpoint", |event| event["step"].as_u64() >= Some(10));
    let below: Vec<u32> = tests::process::descendants(run.id()).iter().map(|process| process.id).collect();
    assert!(below.len() >= 4, "a coordinator, an agent and two workers: {below:?}");
    run.signal("KILL");
    let outcome = run.finish();
    assert_eq!(outcome.code, None);
    let gone = |id: &u32| !std::path::Path::new(&format!("/proc/{id}")).exists();
    for _ in 0..200 {
        if below.iter().all(gone) {
            break;
        }
        sleep(Duration::from_millis(50));
    }
    assert!(below.iter().all(gone), "processes outlived the command");
    let resumed = Run::train(&job, &["--workers", "3", "--resume"]).finish();
    assert_eq!(resumed.digest(), expected);
    let first = resumed.of("step")[0]["step"].as_u64();
    assert!(first > Some(10), "resumed from a checkpoint, not from the start: {first:?}");
}
