//! The parts started by hand: a coordinator, two agents, a submitted job.

use std::process::Command;

use tests::cluster::Cluster;
use tests::job::Job;
use tests::run::{Run, cairn, undisturbed};

#[test]
fn two_agents_run_a_submitted_job_and_one_may_die() {
    let expected = undisturbed();
    let job = Job::new();
    let cluster = Cluster::new(&job);
    let _coordinator = cluster.coordinator();
    let (_a, b) = (cluster.agent("a"), cluster.agent("b"));
    let file = job.file().display().to_string();
    // Both agents take part: the job wants all four slots.
    let set = ["--set", "resources.workers={ min = 4, max = 4 }"];
    let submitted = cluster.call(&[&["submit", &file][..], &set].concat());
    assert_eq!(submitted.code, Some(0), "{}", submitted.stderr);
    let outcome = Run::start(&cluster.words(&["watch", "t"])).finish();
    assert_eq!(outcome.digest(), expected);

    // Again, and this time one of the two nodes dies for good.
    let set = ["--fresh", "--set", "resources.workers=4"];
    assert_eq!(cluster.call(&[&["submit", &file][..], &set].concat()).code, Some(0));
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    watch.wait_for_step(6);
    b.kill();
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let sizes: Vec<_> = outcome.of("generation").iter().filter_map(|event| event["world_size"].as_u64()).collect();
    assert_eq!(sizes.last(), Some(&2), "the world shrank to the node that is left: {sizes:?}");
    let status = cluster.call(&["status", "t"]);
    assert_eq!(status.events[0]["state"], "finished", "{status:?}");
}

#[test]
fn a_restarted_coordinator_carries_on_with_the_jobs_it_finds() {
    let expected = undisturbed();
    let job = Job::new();
    let cluster = Cluster::new(&job);
    let first = cluster.coordinator();
    let file = job.file().display().to_string();
    // Handed in while there is nobody to run it.
    assert_eq!(cluster.call(&["submit", &file]).code, Some(0));
    first.kill();
    let _second = cluster.coordinator();
    let _agent = cluster.agent("a");
    let outcome = Run::start(&cluster.words(&["watch", "t"])).finish();
    assert_eq!(outcome.digest(), expected);
}

#[test]
fn pause_resume_and_cancel() {
    let expected = undisturbed();
    let job = Job::new();
    let cluster = Cluster::new(&job);
    let _coordinator = cluster.coordinator();
    let _agent = cluster.agent("a");
    let file = job.file().display().to_string();
    assert_eq!(cluster.call(&["submit", &file, "--workers", "2"]).code, Some(0));
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    watch.wait_for_step(4);
    let paused = cluster.call(&["pause", "t"]);
    assert_eq!(paused.events[0]["state"], "paused", "{paused:?}");
    assert_eq!(watch.finish().code, Some(0));
    let resumed = cluster.call(&["resume", "t"]);
    assert_eq!(resumed.code, Some(0), "{}", resumed.stderr);
    let outcome = Run::start(&cluster.words(&["watch", "t"])).finish();
    assert_eq!(outcome.digest(), expected);

    // There is nothing to go on with; it ends as it ended before.
    let again = cluster.call(&["submit", &file, "--resume"]);
    assert_eq!(again.digest(), expected);
    assert_eq!(again.events, [(*outcome.of("finished")[0]).clone()], "one event, the same");

    let long = ["--fresh", "--set", "training.steps=100000"];
    assert_eq!(cluster.call(&[&["submit", &file][..], &long].concat()).code, Some(0));
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    watch.wait_for_step(2);
    assert_eq!(cluster.call(&["cancel", "t"]).code, Some(0));
    watch.wait_for("cancelled", |_| true);
    let outcome = watch.finish();
    assert_eq!(outcome.code, Some(3), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("the job was cancelled"), "{}", outcome.stderr);
    let fast = cluster.call(&["submit", &file, "--fresh", "--steps", "1", "--set", "training.reduction=fast"]);
    assert_eq!(fast.code, Some(0), "{}", fast.stderr);
    assert!(fast.stderr.contains("the weights will depend on the number of workers"), "{}", fast.stderr);
}

#[test]
fn an_agent_asked_to_stop_leaves_in_order() {
    let long = ["training.steps=400", "checkpoint.every_steps=1000"];
    let expected = Run::train(&Job::with(&long), &["--workers", "1"]).finish().digest();
    let job = Job::with(&long);
    let cluster = Cluster::new(&job);
    let _coordinator = cluster.coordinator();
    let (_a, mut b) = (cluster.agent("a"), cluster.agent("b"));
    let file = job.file().display().to_string();
    assert_eq!(cluster.call(&["submit", &file, "--set", "resources.workers={ min = 2, max = 4 }"]).code, Some(0));
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    watch.wait_for("generation", |event| event["world_size"] == 4);
    watch.wait_for_step(20);
    assert!(tests::process::signal(b.id(), "TERM"));
    let status = b.wait();
    assert!(status.success(), "{status:?}");
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    assert!(outcome.of("failure").is_empty(), "leaving is no failure: {:?}", outcome.of("failure"));
    // There was a checkpoint before the move, so no step was taken twice.
    let steps = outcome.of("step").iter().filter_map(|event| event["step"].as_u64()).collect::<Vec<_>>();
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]), "{steps:?}");
}

#[test]
fn nobody_gets_in_without_the_token() {
    let job = Job::new();
    let cluster = Cluster::new(&job);
    let _coordinator = cluster.coordinator();
    let other = job.folder().join("other");
    std::fs::write(&other, format!("{}\n", "ab".repeat(32))).expect("written");
    let other = other.display().to_string();
    let words = ["jobs", "--coordinator", &cluster.address, "--token-file", &other];
    let open = cairn(&words);
    assert_eq!(open.code, Some(2));
    assert!(open.stderr.contains("chmod 600"), "{}", open.stderr);
    assert!(Command::new("chmod").args(["600", &other]).status().expect("chmod runs").success());
    let wrong = cairn(&words);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("token"), "{}", wrong.stderr);
}

#[test]
fn a_second_coordinator_is_refused_while_the_first_lives() {
    let job = Job::new();
    let cluster = Cluster::new(&job);
    let _first = cluster.coordinator();
    let second =
        cairn(&["coordinator", "--store", &cluster.store, "--listen", "127.0.0.1:0", "--token-file", &cluster.token]);
    assert_eq!(second.code, Some(2), "{}", second.stderr);
    assert!(second.stderr.contains(&cluster.address), "{}", second.stderr);
    let train = Run::train(&job, &[]).finish();
    assert_eq!(train.code, Some(2), "{}", train.stderr);
    assert!(train.stderr.contains(&cluster.address), "{}", train.stderr);
}
