//! Several jobs on the same nodes: who goes first, who gives way, and what becomes of those that did.

use std::time::Duration;

use proto::ids::{Epoch, JobName};
use proto::spec::JobSpec;
use proto::wire::SubmitMode;

use super::super::*;
use super::doubting::Pair;
use super::rig::{Rig, STEPS, job_name, node, settings, spec};

fn other() -> JobName {
    JobName::new("other").unwrap()
}

/// Another job, of this priority.
fn another(workers: &str, priority: i32) -> JobSpec {
    let mut other_spec = spec(workers);
    other_spec.name = other();
    other_spec.resources.priority = priority;
    other_spec
}

fn state(rig: &mut Rig, job: JobName) -> (String, String) {
    let request = rig.ask(Ask::Status(job));
    let Ok(Answer::Status(status)) = &rig.replies[&request] else { panic!("{:?}", rig.replies[&request]) };
    (status.state.clone(), status.reason.clone())
}

#[test]
fn a_preempted_job_saves_waits_and_goes_on_by_itself() {
    let mut rig = Rig::running("{ min = 2, max = 2 }", 2);
    rig.train(5);
    rig.submit(another("{ min = 2, max = 2 }", 10), SubmitMode::New, None);
    rig.pass(Duration::from_secs(1));
    assert_eq!((rig.live(), rig.live_of(&other())), (Some((1, 2)), None), "what acts is not cut short");
    assert_eq!(state(&mut rig, job_name()).0, "stopping");
    rig.train(7);
    assert_eq!(rig.ledger.as_ref().unwrap().newest().unwrap().step.get(), 7, "it saved");
    assert!(matches!(rig.records.iter().find(|e| matches!(e, Entry::Yielded { .. })), Some(Entry::Yielded { .. })));
    assert_eq!((rig.live(), rig.live_of(&other())), (None, Some((1, 2))));
    let (state_now, reason) = state(&mut rig, job_name());
    assert_eq!(state_now, "queued");
    assert!(reason.contains("job other") && reason.contains("2 free slots"), "{reason}");
    rig.train_job(&other(), STEPS);
    rig.pass(Duration::from_millis(300));
    assert_eq!(rig.live(), Some((2, 2)));
    rig.train(STEPS);
    assert_eq!(rig.kinds().last(), Some(&"finished"));
    assert!(!rig.kinds().contains(&"failure"), "giving way is no failure: {:?}", rig.kinds());
}

#[test]
fn an_elastic_job_gives_way_to_its_minimum_and_grows_again() {
    let mut rig = Rig::running("{ min = 1, max = 4 }", 4);
    rig.train(5);
    rig.submit(another("{ min = 2, max = 2 }", 1), SubmitMode::New, None);
    rig.pass(Duration::from_secs(1));
    rig.train(6);
    assert_eq!((rig.live(), rig.live_of(&other())), (Some((2, 2)), Some((1, 2))));
    rig.train_job(&other(), STEPS);
    rig.pass(Duration::from_secs(4));
    rig.train(7);
    assert_eq!(rig.live(), Some((3, 4)));
}

#[test]
fn a_job_of_the_same_priority_waits_for_its_turn() {
    let mut rig = Rig::running("2", 2);
    rig.submit(another("{ min = 1, max = 2 }", 0), SubmitMode::New, None);
    rig.pass(Duration::from_secs(10));
    assert_eq!((rig.live(), rig.live_of(&other())), (Some((1, 2)), None));
    // After five minutes it has waited long enough to get back what the first grew by.
    for step in 1..16 {
        rig.pass(Duration::from_secs(20));
        rig.train(step);
    }
    rig.train(16);
    assert_eq!((rig.live(), rig.live_of(&other())), (Some((2, 1)), Some((1, 1))));
}

#[test]
fn a_coordinator_that_comes_later_does_not_look_for_the_workers_of_a_job_that_gave_way() {
    let mut rig = Rig::running("{ min = 2, max = 2 }", 2);
    rig.submit(another("{ min = 2, max = 2 }", 10), SubmitMode::New, None);
    rig.pass(Duration::from_secs(1));
    rig.train(7);
    let mut next = Rig::new();
    next.cluster = Pair::new(Settings { epoch: Epoch::new(2), ..settings() });
    next.ledger.clone_from(&rig.ledger);
    next.handle(Event::Loaded { job: job_name(), ledger: Box::new(rig.ledger.clone().unwrap()) });
    next.attach("b", 2);
    next.pass(Duration::from_secs(1));
    assert_eq!(next.live(), Some((2, 2)));
    assert_eq!(next.kinds(), ["generation"], "nothing failed");
}

#[test]
fn spares_stand_by_and_step_in_at_once() {
    let mut rig = Rig::new();
    for name in ["a", "b", "c"] {
        rig.attach(name, 1);
    }
    let mut job = spec("{ min = 2, max = 2 }");
    job.resources.spares = 1;
    rig.submit(job, SubmitMode::New, None);
    rig.settle();
    assert_eq!(rig.live(), Some((1, 2)));
    assert_eq!(rig.alive().len(), 3, "the spare is prepared");
    rig.train(5);
    rig.lose("b");
    rig.pass(Duration::from_millis(1100));
    assert_eq!(rig.live(), Some((2, 2)), "it stood in");
    assert!(rig.nodes[&node("c")].desired[&job_name()].run.is_some());
}
