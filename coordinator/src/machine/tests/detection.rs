//! The worst cases that `FaultSpec::detection` promises, held against the machine: each failure comes at its worst
//! moment, and is noticed by then but not before it could be.

use std::time::Duration;

use proto::event::JobEvent;
use proto::spec::detect::TICK;
use proto::wire::{FailureKind, SubmitMode, WorkerPhase};

use super::super::*;
use super::rig::{Rig, spec};

/// How long it takes until a failure is told, the agents beating or all silent.
fn until_failure(rig: &mut Rig, beating: bool) -> f64 {
    let began = rig.now;
    while !rig.events.iter().any(|event| matches!(event, JobEvent::Failure { .. })) {
        rig.now += TICK;
        let names: Vec<_> = if beating { rig.nodes.keys().cloned().collect() } else { vec![] };
        for name in &names {
            rig.report(name);
        }
        rig.handle(Event::Tick);
        assert!(rig.now < began + Duration::from_secs(1000), "it is never noticed");
    }
    rig.now.saturating_sub(began).as_secs_f64()
}

fn expect_within(took: f64, (least, most): (f64, f64)) {
    assert!(took >= least - 1e-6 && took <= most + 1e-6, "noticed after {took} s, not from {least} to {most} s");
}

#[test]
fn each_failure_is_noticed_in_the_time_promised() {
    let fault = spec("2").fault;
    let promised = fault.detection();

    let mut rig = Rig::running("2", 2);
    rig.forget();
    expect_within(until_failure(&mut rig, false), (fault.suspicion, promised.lost_node));

    let mut rig = Rig::running("2", 2);
    rig.train(5);
    rig.forget();
    expect_within(until_failure(&mut rig, true), (fault.hang, promised.no_progress));

    // The ring has given up after fault.collective; what follows is the search for the cause.
    let mut rig = Rig::running("2", 2);
    rig.forget();
    rig.fail("a", 0, WorkerPhase::Failed, FailureKind::Exchange, "deadline passed");
    expect_within(until_failure(&mut rig, true), (0.1, promised.broken_exchange - fault.collective));
}

#[test]
fn the_news_of_a_worker_comes_in_time_also_if_its_agent_goes_as_well() {
    let mut rig = Rig::new();
    rig.attach("a", 1);
    rig.attach("b", 1);
    rig.submit(spec("2"), SubmitMode::New, None);
    rig.settle();
    rig.forget();
    rig.lose("b");
    expect_within(until_failure(&mut rig, true), (0.5, spec("2").fault.detection().worker_exit));
}
