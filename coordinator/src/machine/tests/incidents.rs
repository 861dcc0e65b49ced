//! The account of what went wrong: who is blamed, how long each stage took, what was lost.

use std::time::Duration;

use proto::ids::{Generation, Rank};
use proto::incident::{Cause, Incident, Outcome as End};
use proto::wire::{FailureKind, IncidentsReply, SubmitMode, WorkerPhase};

use super::super::*;
use super::rig::{Rig, STEPS, job_name, node, spec};

fn recorded(rig: &Rig) -> Vec<Incident> {
    rig.ledger.as_ref().unwrap().incidents.latest.iter().cloned().collect()
}

fn reply(rig: &mut Rig) -> IncidentsReply {
    let request = rig.ask(Ask::Incidents(job_name()));
    let Ok(Answer::Incidents(reply)) = &rig.replies[&request] else { panic!("{:?}", rig.replies[&request]) };
    (**reply).clone()
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn a_killed_worker_is_accounted_for_stage_by_stage() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    rig.train(7);
    rig.now += millis(70);
    rig.kill("a", 1);
    assert!(recorded(&rig).is_empty(), "it is under way");
    let open: Incident = serde_json::from_str(reply(&mut rig).incidents.last().unwrap()).unwrap();
    assert_eq!((open.outcome, open.number), (End::Open, 1));
    rig.now += millis(300);
    while rig.obey() {}
    rig.now += millis(20);
    rig.settle();
    rig.now += millis(400);
    rig.train(8);
    let all = recorded(&rig);
    let [incident] = &all[..] else { panic!("{all:?}") };
    assert_eq!((incident.cause, incident.signal, incident.outcome), (Cause::WorkerExit, Some(9), End::Recovered));
    assert_eq!((incident.node.clone(), incident.rank.map(Rank::get)), (Some(node("a")), Some(1)));
    assert_eq!((incident.generation.get(), incident.next.map(Generation::get)), (1, Some(2)));
    assert_eq!((incident.step.get(), incident.steps_lost(), incident.source.as_str()), (7, Some(0), "store"));
    assert_eq!((incident.detect_ms, incident.abort_ms, incident.agree_ms), (70, Some(300), Some(20)));
    assert_eq!((incident.restore_ms, incident.first_step_ms, incident.total_ms()), (Some(0), Some(400), 790));
    rig.train(STEPS);
    assert_eq!(recorded(&rig).len(), 1);
}

#[test]
fn steps_since_the_last_state_are_lost_and_count_once() {
    let mut rig = Rig::running("1", 1);
    rig.train(5);
    let step = |rig: &mut Rig, step, generation| {
        rig.now += millis(100);
        let (job, seconds) = (job_name().to_string(), 0.1);
        let report = proto::wire::StepReport { job, generation, step, seconds, ..Default::default() };
        rig.handle(Event::Stepped { job: job_name(), report });
    };
    (6..10).for_each(|at| step(&mut rig, at, 1));
    assert_eq!(reply(&mut rig).productive_ms, 500, "step 5 was told of, and 6 to 9");
    rig.kill("a", 0);
    rig.settle();
    (6..11).for_each(|at| step(&mut rig, at, 2));
    rig.settle();
    let reply = reply(&mut rig);
    assert_eq!((reply.productive_ms, reply.wall_ms), (600, 900));
    assert_eq!(recorded(&rig)[0].steps_lost(), Some(4));
    assert_eq!(
        reply.counts.iter().map(|count| (count.cause.as_str(), count.count)).collect::<Vec<_>>(),
        [("worker_exit", 1)]
    );
}

#[test]
fn each_cause_is_told_apart() {
    let causes = |rig: &Rig| recorded(rig).iter().map(|incident| incident.cause).collect::<Vec<_>>();
    let mut rig = Rig::new();
    rig.attach("a", 2);
    rig.attach("b", 2);
    rig.submit(spec("{ min = 1, max = 4 }"), SubmitMode::New, None);
    rig.settle();
    rig.train(1);
    rig.fail("a", 0, WorkerPhase::Failed, FailureKind::Exchange, "deadline passed");
    rig.pass(Duration::from_secs(1));
    rig.train(2);
    rig.pass(Duration::from_secs(121));
    rig.train(3);
    rig.lose("b");
    rig.pass(Duration::from_secs(2));
    rig.train(4);
    assert_eq!(causes(&rig), [Cause::Collective, Cause::NoProgress, Cause::LostNode]);
    assert_eq!(recorded(&rig)[2].node, Some(node("b")));
    assert!(recorded(&rig)[1].detect_ms >= 120_000);
    // What somebody wanted is no failure.
    rig.ask(Ask::Scale(job_name(), 1));
    rig.pass(Duration::from_millis(300));
    rig.train(5);
    rig.train(6);
    rig.ask(Ask::Drain(node("a"), true));
    rig.pass(Duration::from_millis(300));
    rig.train(7);
    rig.attach("c", 1);
    rig.settle();
    rig.train(8);
    assert_eq!(causes(&rig)[3..], [Cause::Scale, Cause::Drain]);
    let counts = reply(&mut rig).counts;
    assert_eq!(counts.iter().filter(|count| count.planned).map(|count| count.count).sum::<u64>(), 2);
    rig.fail("c", 0, WorkerPhase::Failed, FailureKind::NonFinite, "the loss is NaN");
    rig.settle();
    let last = recorded(&rig).pop().unwrap();
    assert_eq!((last.cause, last.outcome), (Cause::NonFinite, End::Ended));
    assert!(rig.ledger.unwrap().end.is_some());
}

#[test]
fn a_failure_on_the_way_back_is_another_incident() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    rig.kill("a", 0);
    rig.settle();
    rig.kill("a", 1);
    rig.settle();
    rig.train(6);
    let outcomes: Vec<_> = recorded(&rig).iter().map(|incident| (incident.number, incident.outcome)).collect();
    assert_eq!(outcomes, [(1, End::Interrupted), (2, End::Recovered)]);
}

#[test]
fn incidents_and_goodput_outlive_the_coordinator() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    rig.kill("a", 0);
    rig.settle();
    rig.train(6);
    let before = reply(&mut rig);
    let mut next = Rig::new();
    next.ledger.clone_from(&rig.ledger);
    next.handle(Event::Loaded { job: job_name(), ledger: Box::new(rig.ledger.clone().unwrap()) });
    let after = reply(&mut next);
    assert_eq!((after.incidents.len(), &after.incidents, &after.counts), (1, &before.incidents, &before.counts));
    assert_eq!(after.productive_ms, before.productive_ms);
}

#[test]
fn an_incident_that_is_open_at_a_takeover_is_brought_to_its_end() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    rig.kill("a", 0);
    rig.settle();
    let before = recorded(&rig);
    let [open] = &before[..] else { panic!("{before:?}") };
    assert_eq!((open.number, open.outcome, open.cause), (1, End::Open, Cause::WorkerExit));
    assert_eq!((open.next.map(Generation::get), open.first_step_ms), (Some(2), None));
    let mut next = rig.successor();
    next.pass(Duration::from_secs(1));
    assert_eq!(reply(&mut next).incidents.len(), 1);
    next.train(6);
    let after = recorded(&next);
    let [closed] = &after[..] else { panic!("{after:?}") };
    assert_eq!(closed.outcome, End::Recovered);
    let same = Incident { outcome: End::Open, source: String::new(), productive_ms: 0, wall_ms: 0, ..closed.clone() };
    assert_eq!(same, Incident { source: String::new(), productive_ms: 0, wall_ms: 0, ..open.clone() });
    assert_eq!(reply(&mut next).counts.iter().map(|count| count.count).sum::<u64>(), 1);
    next.kill("a", 0);
    next.settle();
    next.train(7);
    let numbers: Vec<_> = recorded(&next).iter().map(|incident| (incident.number, incident.outcome)).collect();
    assert_eq!(numbers, [(1, End::Recovered), (2, End::Recovered)]);
}

#[test]
fn a_broken_exchange_names_the_link_that_lost_its_bytes() {
    let broken = |moved: [(u64, u64); 3]| {
        let mut rig = Rig::new();
        for name in ["a", "b", "c"] {
            rig.attach(name, 1);
        }
        rig.submit(spec("3"), SubmitMode::New, None);
        rig.settle();
        rig.train(5);
        ["a", "b", "c"].into_iter().zip(moved).for_each(|(name, moved)| rig.give_up(name, moved));
        rig.pass(millis(500));
        rig.settle();
        rig.train(6);
        let last = recorded(&rig).pop().unwrap();
        (last.cause, last.node.clone(), last.link.clone(), last.rank)
    };
    let link = Some((node("b"), node("c")));
    assert_eq!(broken([(50, 50), (70, 50), (50, 50)]), (Cause::Collective, None, link, None));
    assert_eq!(broken([(50, 50), (50, 50), (50, 50)]), (Cause::Collective, None, None, None));
}
