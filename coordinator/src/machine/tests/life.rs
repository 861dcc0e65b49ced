//! Jobs without failures: forming, finishing, pausing, resizing, and what operators may ask.

use std::time::Duration;

use proto::event::JobEvent;
use proto::ids::Step;
use proto::wire::SubmitMode;

use super::super::*;
use super::rig::{Rig, STEPS, job_name, node, spec};

#[test]
fn a_job_forms_trains_and_finishes() {
    let mut rig = Rig::new();
    let request = rig.submit(spec("2"), SubmitMode::New, None);
    rig.settle();
    assert_eq!(rig.replies[&request], Ok(Answer::Submitted { finished: false }));
    assert!(rig.live().is_none(), "no agent, no generation");
    rig.attach("a", 4);
    rig.settle();
    assert_eq!(rig.live(), Some((1, 2)));
    rig.train(5);
    rig.train(STEPS);
    assert_eq!(rig.kinds(), ["generation", "checkpoint", "checkpoint", "finished"]);
    let digest = format!("digest-{STEPS}");
    assert_eq!(rig.events.last(), Some(&JobEvent::Finished { step: STEPS, loss: Some(1.0), digest }));
    assert!(rig.alive().is_empty(), "its workers are ended");
    assert_eq!(rig.settled.iter().filter(|(.., committed)| *committed).count(), 4);
    let again = rig.submit(spec("2"), SubmitMode::Resume, None);
    assert_eq!(rig.replies[&again], Ok(Answer::Submitted { finished: true }));
}

/// A leader before this one had asked for the record, and it landed when this one had read the store.
#[test]
fn a_job_that_was_in_the_store_all_along_is_taken_up() {
    let mut rig = Rig::new();
    let request = rig.submit(spec("2"), SubmitMode::New, None);
    let (job, operation) = rig.pending.pop_front().unwrap();
    assert!(matches!(operation, Operation::Append(Entry::Submitted { .. })));
    let ledger = Ledger::new(spec("1"), None);
    rig.ledger = Some(ledger.clone());
    rig.handle(Event::Stored { job, outcome: Outcome::Found(Box::new(ledger)) });
    assert!(matches!(&rig.replies[&request], Err(Refusal::Precondition(why)) if why.contains("--resume")));
    rig.attach("a", 4);
    rig.settle();
    assert_eq!(rig.live(), Some((1, 1)), "as it was submitted first");
    rig.train(STEPS);
    assert_eq!(rig.kinds().last(), Some(&"finished"));
}

#[test]
fn a_job_is_announced_only_after_its_record() {
    let mut rig = Rig::new();
    rig.attach("a", 2);
    rig.submit(spec("2"), SubmitMode::New, None);
    rig.store();
    while rig.obey() {}
    assert!(matches!(rig.pending.front(), Some((_, Operation::Append(Entry::Generation(_))))));
    assert!(rig.live().is_none());
    rig.store();
    assert_eq!(rig.live(), Some((1, 2)));
}

#[test]
fn workers_spread_over_two_nodes_and_one_waits_for_the_other() {
    let mut rig = Rig::new();
    rig.attach("a", 2);
    rig.submit(spec("{ min = 4, max = 4 }"), SubmitMode::New, None);
    rig.settle();
    assert!(rig.live().is_none());
    rig.attach("b", 2);
    rig.settle();
    assert_eq!(rig.live(), Some((1, 4)));
    assert_eq!(rig.nodes[&node("b")].desired[&job_name()].run.as_ref().unwrap().placements.len(), 2);
}

#[test]
fn stop_at_pauses_and_resume_goes_on_at_another_size() {
    let mut rig = Rig::new();
    rig.attach("a", 8);
    rig.submit(spec("4"), SubmitMode::New, Some(7));
    rig.settle();
    rig.train(7);
    assert_eq!(rig.kinds(), ["generation", "checkpoint", "paused"]);
    rig.forget();
    rig.submit(spec("1"), SubmitMode::Resume, None);
    rig.settle();
    assert_eq!(rig.live(), Some((2, 1)));
    rig.train(STEPS);
    assert_eq!(rig.kinds(), ["generation", "checkpoint", "finished"]);
}

#[test]
fn resuming_behind_the_newest_checkpoint_pauses_at_once() {
    let mut rig = Rig::new();
    rig.attach("a", 8);
    rig.submit(spec("2"), SubmitMode::New, Some(7));
    rig.settle();
    rig.train(7);
    rig.forget();
    rig.submit(spec("2"), SubmitMode::Resume, Some(6));
    rig.settle();
    assert_eq!(rig.kinds(), ["paused"]);
}

#[test]
fn pause_saves_and_stops_and_resume_goes_on() {
    let mut rig = Rig::running("2", 4);
    rig.train(5);
    let pause = rig.ask(Ask::Pause(job_name()));
    assert!(!rig.replies.contains_key(&pause));
    rig.train(6);
    let Ok(Answer::Status(status)) = &rig.replies[&pause] else { panic!("{:?}", rig.replies[&pause]) };
    assert_eq!((status.state.as_str(), status.step), ("paused", 6));
    let resume = rig.ask(Ask::Resume(job_name()));
    rig.settle();
    assert!(matches!(&rig.replies[&resume], Ok(Answer::Status(_))));
    assert_eq!(rig.live(), Some((2, 2)));
}

#[test]
fn scaling_stops_with_a_checkpoint_and_forms_anew() {
    let mut rig = Rig::running("2", 4);
    rig.train(5);
    let request = rig.ask(Ask::Scale(job_name(), 3));
    rig.pass(Duration::from_secs(4));
    assert!(rig.replies[&request].is_ok());
    assert_eq!(rig.live(), Some((1, 2)), "training goes on until the stop");
    rig.train(6);
    assert_eq!(rig.live(), Some((2, 3)));
    rig.ask(Ask::Scale(job_name(), 1));
    rig.pass(Duration::from_millis(200));
    rig.train(7);
    assert_eq!(rig.live(), Some((3, 1)));
    assert!(!rig.kinds().contains(&"failure"));
    let too_many = rig.ask(Ask::Scale(job_name(), 9));
    let Err(Refusal::Invalid(text)) = &rig.replies[&too_many] else { panic!() };
    assert!(text.contains("1 to 8"), "{text}");
}

#[test]
fn a_new_node_lets_the_job_grow() {
    let mut rig = Rig::running("4", 2);
    assert_eq!(rig.live(), Some((1, 2)));
    rig.attach("b", 2);
    rig.pass(Duration::from_secs(2));
    rig.train(5);
    assert_eq!(rig.live(), Some((1, 2)), "not before the membership is stable");
    rig.pass(Duration::from_secs(2));
    rig.train(6);
    assert_eq!(rig.live(), Some((2, 4)));
}

#[test]
fn what_submissions_are_refused() {
    let mut rig = Rig::running("2", 4);
    for mode in [SubmitMode::New, SubmitMode::Resume, SubmitMode::Fresh] {
        let request = rig.submit(spec("2"), mode, None);
        let Err(Refusal::Precondition(text)) = &rig.replies[&request] else { panic!() };
        assert!(text.contains("127.0.0.1:1"), "{text}");
    }
    rig.ask(Ask::Pause(job_name()));
    rig.train(5);
    let request = rig.submit(spec("2"), SubmitMode::New, None);
    let Err(Refusal::Precondition(text)) = &rig.replies[&request] else { panic!() };
    assert!(text.contains("--resume") && text.contains("--fresh"), "{text}");
    let mut other = spec("2");
    other.training.seed += 1;
    let request = rig.submit(other.clone(), SubmitMode::Resume, None);
    let Err(Refusal::Invalid(text)) = &rig.replies[&request] else { panic!() };
    assert!(text.contains("training.seed"), "{text}");
    rig.submit(other, SubmitMode::Fresh, None);
    rig.settle();
    let Some(Entry::Generation(membership)) = rig.records.last() else { panic!() };
    assert_eq!((membership.generation.get(), &membership.start), (2, &None));
}

#[test]
fn cancel_ends_for_good() {
    let mut rig = Rig::running("2", 4);
    let request = rig.ask(Ask::Cancel(job_name()));
    rig.settle();
    let Ok(Answer::Status(status)) = &rig.replies[&request] else { panic!() };
    assert_eq!(status.state, "cancelled");
    assert!(rig.alive().is_empty());
    let request = rig.submit(spec("2"), SubmitMode::Resume, None);
    assert!(matches!(&rig.replies[&request], Err(Refusal::Precondition(_))));
}

#[test]
fn a_restarted_coordinator_adopts_a_living_generation() {
    let mut rig = Rig::running("2", 4);
    rig.train(5);
    let mut next = rig.successor();
    next.pass(Duration::from_secs(7));
    assert_eq!(next.kinds(), Vec::<&str>::new(), "training was not interrupted");
    next.train(STEPS);
    assert_eq!(next.kinds(), ["checkpoint", "finished"]);
}

#[test]
fn a_restarted_coordinator_replaces_a_dead_generation_and_leaves_paused_jobs() {
    let mut rig = Rig::running("2", 4);
    rig.train(5);
    let mut next = Rig::new();
    next.ledger.clone_from(&rig.ledger);
    next.handle(Event::Loaded { job: job_name(), ledger: Box::new(rig.ledger.clone().unwrap()) });
    next.settle();
    next.attach("a", 4);
    next.settle();
    assert_eq!(next.kinds(), ["failure", "generation", "recovered"]);
    let Some(JobEvent::Recovered { generation: 2, step: 5, .. }) = next.events.last() else { panic!() };

    rig.ask(Ask::Pause(job_name()));
    rig.train(6);
    let mut third = Rig::new();
    third.handle(Event::Loaded { job: job_name(), ledger: Box::new(rig.ledger.clone().unwrap()) });
    third.attach("a", 4);
    third.pass(Duration::from_secs(1));
    assert!(third.pending.is_empty() && third.live().is_none());
    assert_eq!(third.kinds(), ["paused"]);
    let status = third.ask(Ask::Status(job_name()));
    let Ok(Answer::Status(status)) = &third.replies[&status] else { panic!() };
    assert_eq!(status.checkpoint_step, Some(6));
    assert_eq!(third.ledger.as_ref().map(Ledger::newest), None);
    assert_eq!(rig.ledger.unwrap().newest().unwrap().step, Step::new(6));
}
