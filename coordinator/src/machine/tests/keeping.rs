//! Changes of checkpoints: their turn in the queue, what the machine learns from them, and who is answered.

use std::sync::Arc;

use proto::event::JobEvent;
use proto::ids::{Generation, Step};
use proto::wire::{FailureKind, StepReport, SubmitMode, WorkerPhase};

use super::super::*;
use super::rig::{Rig, job_name, spec};

fn ask(rig: &mut Rig, change: &'static [u8]) -> RequestId {
    rig.ask(Ask::Change(job_name(), Arc::from(change)))
}

/// Answers the store operation that is under way.
fn answer(rig: &mut Rig, outcome: Outcome) {
    let (job, _) = rig.pending.pop_front().expect("an operation is under way");
    rig.handle(Event::Stored { job, outcome });
}

fn first(generation: u64, step: u64) -> (Step, Generation) {
    (Step::new(step), Generation::new(generation))
}

#[test]
fn a_change_is_answered_and_what_is_gone_is_no_start_any_more() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    rig.train(10);
    let request = ask(&mut rig, b"prune");
    assert_eq!(rig.pending.front().map(|(_, operation)| operation), Some(&Operation::Change(Arc::from(&b"prune"[..]))));
    let quarantined = Some((Step::new(10), "a flipped byte".to_string()));
    rig.ledger.as_mut().unwrap().forget(&[first(1, 10)]);
    answer(&mut rig, Outcome::Changed(Changed { report: b"done".to_vec(), gone: vec![first(1, 10)], quarantined }));
    assert_eq!(rig.replies[&request], Ok(Answer::Changed(b"done".to_vec())));
    assert!(rig.kinds().contains(&"quarantined"));
    assert_eq!(rig.live(), Some((1, 2)), "a live generation goes on");
    rig.forget();
    rig.kill("a", 0);
    rig.settle();
    let start = rig.ledger.as_ref().unwrap().membership.clone().unwrap().start.unwrap();
    assert_eq!(start.step.get(), 5, "the next one falls back");
}

#[test]
fn a_refused_or_failed_change_changes_nothing() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    let (refused, failed) = (ask(&mut rig, b"a"), ask(&mut rig, b"b"));
    assert_eq!(rig.pending.len(), 1, "one operation at a time");
    answer(&mut rig, Outcome::Refused("no such checkpoint".into()));
    answer(&mut rig, Outcome::Failed("no route".into()));
    assert_eq!(rig.replies[&refused], Err(Refusal::Precondition("no such checkpoint".into())));
    assert_eq!(rig.replies[&failed], Err(Refusal::Unavailable("no route".into())));
    rig.train(10);
    assert_eq!(rig.ledger.as_ref().unwrap().newest().unwrap().step.get(), 10);
    let nobody = rig.ask(Ask::Change(proto::ids::JobName::new("other").unwrap(), Arc::from(&b"a"[..])));
    assert!(matches!(rig.replies[&nobody], Err(Refusal::NotFound(_))));
}

#[test]
fn changes_come_before_commits_and_a_job_at_rest_is_led_first() {
    let mut rig = Rig::running("2", 2);
    let (generation, world) = rig.live().unwrap();
    let busy = ask(&mut rig, b"first");
    rig.receipts(generation, 5, world);
    let next = ask(&mut rig, b"second");
    answer(&mut rig, Outcome::Changed(Changed::default()));
    assert!(matches!(rig.pending.front(), Some((_, Operation::Change(_)))), "{:?}", rig.pending);
    answer(&mut rig, Outcome::Changed(Changed::default()));
    assert!(matches!(rig.pending.front(), Some((_, Operation::Commit { .. }))), "{:?}", rig.pending);
    assert!(rig.replies[&busy].is_ok() && rig.replies[&next].is_ok());
    rig.settle();
    rig.ask(Ask::Cancel(job_name()));
    rig.settle();
    let mut other = Rig::new();
    other.ledger.clone_from(&rig.ledger);
    other.handle(Event::Loaded { job: job_name(), ledger: Box::new(rig.ledger.clone().unwrap()) });
    assert!(other.pending.is_empty());
    ask(&mut other, b"pin");
    assert_eq!(other.pending.front(), Some(&(job_name(), Operation::Append(Entry::Led))));
    assert!(other.store());
    assert!(matches!(other.pending.front(), Some((_, Operation::Change(_)))));
}

#[test]
fn a_job_without_a_good_checkpoint_left_ends_and_says_why() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    let (kind, reason) = (FailureKind::Exit, "killed");
    rig.fail("a", 0, WorkerPhase::Exited, kind, reason);
    // Before the next generation forms, the only checkpoint turns out to be damaged.
    ask(&mut rig, b"quarantine");
    let quarantined = Some((Step::new(5), "a flipped byte".to_string()));
    assert!(matches!(rig.pending.front(), Some((_, Operation::Change(_)))), "{:?}", rig.pending);
    answer(&mut rig, Outcome::Changed(Changed { report: vec![], gone: vec![first(1, 5)], quarantined }));
    rig.settle();
    let Some(JobEvent::Failed { code: 4, reason }) = rig.events.last() else { panic!("{:?}", rig.events) };
    assert!(reason.contains("a flipped byte") && reason.contains("--fresh"), "{reason}");
}

#[test]
fn a_commit_carries_the_validation_loss_of_its_own_step() {
    let mut rig = Rig::new();
    rig.attach("a", 2);
    rig.submit(spec("2"), SubmitMode::New, None);
    rig.settle();
    let (generation, world) = rig.live().unwrap();
    for (step, validation_loss) in [(4, Some(9.0)), (5, Some(2.5)), (6, None)] {
        let report =
            StepReport { job: "tiny".into(), generation, step, loss: 1.0, validation_loss, ..Default::default() };
        rig.handle(Event::Stepped { job: job_name(), report });
    }
    for (step, expected) in [(5, Some(2.5)), (6, None)] {
        rig.receipts(generation, step, world);
        let Some((_, Operation::Commit { validation_loss, .. })) = rig.pending.front() else { panic!() };
        assert_eq!(*validation_loss, expected, "step {step}");
        rig.settle();
    }
}
