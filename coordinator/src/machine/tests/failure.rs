//! What goes wrong, and what becomes of the job then.

use std::time::Duration;

use proto::event::JobEvent;
use proto::wire::{FailureKind, SubmitMode, WorkerPhase};

use super::super::*;
use super::rig::{Rig, STEPS, job_name, node, spec};

fn failure(rig: &Rig) -> (Option<u32>, String) {
    let failures: Vec<_> = rig
        .events
        .iter()
        .filter_map(|event| match event {
            JobEvent::Failure { rank, reason, .. } => Some((*rank, reason.clone())),
            _ => None,
        })
        .collect();
    assert_eq!(failures.len(), 1, "{failures:?}");
    failures[0].clone()
}

#[test]
fn a_killed_worker_is_replaced_and_the_job_goes_on() {
    let mut rig = Rig::running("3", 3);
    rig.train(5);
    rig.forget();
    rig.kill("a", 1);
    rig.settle();
    assert_eq!(rig.kinds(), ["failure", "generation", "recovered"]);
    assert_eq!(failure(&rig).0, Some(1));
    assert_eq!(rig.live(), Some((2, 3)));
    rig.train(STEPS);
    assert_eq!(rig.kinds().last(), Some(&"finished"));
}

#[test]
fn the_root_cause_is_told_not_its_echo() {
    let mut rig = Rig::running("3", 3);
    rig.forget();
    rig.fail("a", 0, WorkerPhase::Failed, FailureKind::Exchange, "peer 1 vanished");
    assert!(rig.events.is_empty(), "an echo waits for its cause");
    rig.kill("a", 1);
    rig.settle();
    assert_eq!(failure(&rig), (Some(1), "killed by signal 9".into()));

    let mut rig = Rig::running("3", 3);
    rig.forget();
    rig.fail("a", 2, WorkerPhase::Failed, FailureKind::Exchange, "deadline passed");
    rig.pass(Duration::from_millis(500));
    assert_eq!(failure(&rig), (Some(2), "deadline passed".into()));
}

#[test]
fn a_lost_agent_shrinks_the_world() {
    let mut rig = Rig::new();
    rig.attach("a", 2);
    rig.attach("b", 2);
    rig.submit(spec("4"), SubmitMode::New, None);
    rig.settle();
    assert_eq!(rig.live(), Some((1, 4)));
    rig.forget();
    rig.lose("b");
    rig.pass(Duration::from_millis(500));
    assert!(rig.events.is_empty(), "a closed stream has a second to come back");
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.live(), Some((2, 2)));
    assert!(failure(&rig).1.contains('b'));
}

#[test]
fn a_silent_agent_is_lost_after_the_suspicion_time() {
    let mut rig = Rig::running("2", 2);
    rig.forget();
    let quiet = |rig: &mut Rig, seconds: u64| {
        for _ in 0..seconds {
            rig.now += Duration::from_secs(1);
            rig.handle(Event::Tick);
        }
    };
    quiet(&mut rig, 4);
    assert!(rig.events.is_empty());
    quiet(&mut rig, 2);
    assert!(failure(&rig).1.contains("silent"));
}

#[test]
fn a_pause_of_the_coordinator_itself_loses_nobody() {
    let mut rig = Rig::running("2", 2);
    rig.forget();
    rig.now += Duration::from_secs(60);
    rig.handle(Event::Tick);
    assert!(rig.events.is_empty(), "the agents' reports are still waiting to be read");
}

#[test]
fn a_hung_step_is_a_failure() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    rig.forget();
    rig.pass(Duration::from_secs(121));
    assert!(failure(&rig).1.contains("no step after 5"));
    assert_eq!(rig.live(), Some((2, 2)));
}

#[test]
fn the_budget_ends_a_job_without_progress() {
    let mut rig = Rig::running("2", 2);
    for _ in 0..5 {
        rig.kill("a", 0);
        rig.settle();
        assert!(rig.live().is_some());
    }
    rig.train(5);
    for _ in 0..5 {
        rig.kill("a", 0);
        rig.settle();
    }
    assert!(rig.live().is_some(), "a checkpoint sets the count back");
    rig.kill("a", 0);
    rig.settle();
    let Some(JobEvent::Failed { code: 3, reason }) = rig.events.last() else { panic!("{:?}", rig.events.last()) };
    assert!(reason.contains("killed by signal 9"), "{reason}");
    assert!(rig.alive().is_empty());
}

#[test]
fn workers_that_end_while_they_prepare_count_too() {
    let mut rig = Rig::new();
    rig.attach("a", 1);
    rig.submit(spec("1"), SubmitMode::New, None);
    rig.store();
    for _ in 0..6 {
        rig.obey();
        let index = rig.nodes[&node("a")].workers.len() - 1;
        rig.kill("a", index);
    }
    rig.settle();
    assert!(matches!(rig.events.last(), Some(JobEvent::Failed { code: 3, .. })));
}

#[test]
fn fatal_and_input_failures_end_the_job_at_once() {
    for (kind, expected) in [(FailureKind::Fatal, 3), (FailureKind::Input, 2)] {
        let mut rig = Rig::running("2", 2);
        rig.fail("a", 0, WorkerPhase::Failed, kind, "gradient overflow");
        rig.settle();
        let Some(JobEvent::Failed { code, .. }) = rig.events.last() else { panic!() };
        assert_eq!(*code, expected);
    }
}

#[test]
fn a_corrupt_checkpoint_falls_back_and_the_last_one_ends_the_job() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    rig.train(10);
    rig.kill("a", 0);
    rig.settle();
    rig.forget();
    rig.fail("a", 0, WorkerPhase::Failed, FailureKind::Corrupt, "block 3 has another hash");
    rig.settle();
    assert_eq!(rig.kinds(), ["failure", "quarantined", "generation", "recovered"]);
    let start = |rig: &Rig| rig.ledger.as_ref().unwrap().membership.clone().unwrap().start.unwrap().step.get();
    assert_eq!(start(&rig), 5);
    rig.fail("a", 0, WorkerPhase::Failed, FailureKind::Corrupt, "block 4 has another hash");
    rig.settle();
    let Some(JobEvent::Failed { code: 4, reason }) = rig.events.last() else { panic!() };
    assert!(reason.contains("--fresh"));
    let request = rig.submit(spec("2"), SubmitMode::Resume, None);
    assert!(matches!(rig.replies[&request], Err(Refusal::DataLoss(_))));
}

#[test]
fn receipts_of_a_fenced_generation_commit_until_the_next_is_stored() {
    let mut rig = Rig::running("2", 2);
    rig.receipt(1, 5, 0);
    rig.kill("a", 0);
    rig.receipt(1, 5, 1);
    assert!(rig.store(), "the uploads outlived the worker");
    assert_eq!(rig.ledger.as_ref().unwrap().newest().unwrap().step.get(), 5);
    rig.settle();
    assert_eq!(rig.live(), Some((2, 2)));
    rig.forget();
    rig.receipts(1, 10, 2);
    assert_eq!(rig.settled, [(1, 10, 0, false), (1, 10, 1, false)]);
    assert!(rig.pending.is_empty());
}

#[test]
fn another_arithmetic_is_refused_and_other_data_fail_the_job() {
    let mut rig = Rig::running("{ min = 1, max = 4 }", 2);
    rig.attach("b", 2);
    rig.nodes.get_mut(&node("b")).unwrap().identity = "avx512".into();
    rig.pass(Duration::from_secs(5));
    rig.train(5);
    assert_eq!(rig.live(), Some((1, 2)), "a node with other arithmetic is no reason to stop");
    let status = rig.ask(Ask::Status(job_name()));
    let Ok(Answer::Status(status)) = &rig.replies[&status] else { panic!() };
    assert!(status.reason.contains("avx512"), "{}", status.reason);

    rig.nodes.get_mut(&node("a")).unwrap().fingerprint = "other".into();
    rig.kill("a", 0);
    rig.settle();
    let Some(JobEvent::Failed { code: 2, reason }) = rig.events.last() else { panic!("{:?}", rig.events.last()) };
    assert!(reason.contains("fingerprint"), "{reason}");
}

#[test]
fn a_failed_commit_is_tried_again_and_a_lost_one_fences() {
    let mut rig = Rig::running("2", 2);
    rig.receipts(1, 5, 2);
    let (job, _) = rig.pending.pop_front().unwrap();
    rig.handle(Event::Stored { job, outcome: Outcome::Failed("no route".into()) });
    assert!(rig.pending.is_empty());
    rig.pass(Duration::from_millis(300));
    assert!(rig.kinds().contains(&"checkpoint"));
    rig.receipts(1, 10, 2);
    let (job, _) = rig.pending.pop_front().unwrap();
    rig.handle(Event::Stored { job, outcome: Outcome::Lost("record 7 is another's".into()) });
    assert!(rig.fenced.is_some());
}

#[test]
fn an_agent_of_a_higher_epoch_fences() {
    let mut rig = Rig::running("1", 1);
    let connection = rig.nodes[&node("a")].connection;
    let state = NodeState { epoch: 2, ..NodeState::default() };
    rig.handle(Event::Report { node: node("a"), connection, state });
    assert!(rig.fenced.is_some());
    assert_eq!(rig.live(), Some((1, 1)), "its report is not believed");
}
