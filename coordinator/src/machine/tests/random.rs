//! Random events in random order: whatever happens, the rig's promises hold, and the job ends in the end. Among them is
//! that what the machine keeps up to date by and by is what it would work out from scratch (`doubting`).

use std::time::Duration;

use proptest::prelude::*;
use proto::wire::{FailureKind, SubmitMode, WorkerPhase};

use super::super::*;
use super::rig::{Rig, STEPS, job_name, node, spec};

#[derive(Debug, Clone)]
enum Move {
    Pass(u64),
    Store,
    Obey,
    Train(u64),
    Receipt(u64, u64, u32),
    Attach(u8, u32),
    Lose(u8),
    Kill(u8, usize),
    Fail(u8, usize, FailureKind),
    Scale(u32),
    Pause,
    Resume,
    Refuse,
    Drain(u8, bool),
    Reattach(u8, u8),
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        (0u64..3000).prop_map(Move::Pass),
        Just(Move::Store),
        Just(Move::Store),
        Just(Move::Obey),
        Just(Move::Obey),
        (1u64..4).prop_map(Move::Train),
        (0u64..6, 0u64..=STEPS, 0u32..4).prop_map(|(g, s, r)| Move::Receipt(g, s, r)),
        (0u8..3, 1u32..4).prop_map(|(n, s)| Move::Attach(n, s)),
        (0u8..3).prop_map(Move::Lose),
        (0u8..3, 0usize..3).prop_map(|(n, i)| Move::Kill(n, i)),
        (
            0u8..3,
            0usize..3,
            prop_oneof![Just(FailureKind::Exchange), Just(FailureKind::Transient), Just(FailureKind::Corrupt)]
        )
            .prop_map(|(n, i, k)| Move::Fail(n, i, k)),
        (1u32..9).prop_map(Move::Scale),
        Just(Move::Pause),
        Just(Move::Resume),
        Just(Move::Refuse),
        (0u8..3, any::<bool>()).prop_map(|(n, empty)| Move::Drain(n, empty)),
        (0u8..3, 0u8..3).prop_map(|(n, port)| Move::Reattach(n, port)),
    ]
}

fn name(index: u8) -> &'static str {
    ["a", "b", "c"][usize::from(index) % 3]
}

fn has(rig: &Rig, index: u8, worker: usize) -> bool {
    rig.nodes.get(&node(name(index))).is_some_and(|fake| fake.workers.len() > worker)
}

fn play(rig: &mut Rig, step: &mut u64, next: Move) {
    match next {
        Move::Pass(millis) => {
            rig.now += Duration::from_millis(millis);
            rig.handle(Event::Tick);
        }
        Move::Store => drop(rig.store()),
        Move::Obey => drop(rig.obey()),
        Move::Train(more) => {
            let newest = rig.ledger.as_ref().and_then(|ledger| ledger.newest().map(|newest| newest.step.get()));
            *step = (newest.unwrap_or(0) + more).min(STEPS);
            rig.train(*step);
        }
        Move::Receipt(generation, step, rank) => rig.receipt(generation, step, rank),
        Move::Attach(node, slots) => {
            rig.lose(name(node));
            rig.attach(name(node), slots);
        }
        Move::Lose(node) => rig.lose(name(node)),
        Move::Kill(node, worker) if has(rig, node, worker) => rig.kill(name(node), worker),
        Move::Fail(node, worker, kind) if has(rig, node, worker) => {
            rig.fail(name(node), worker, WorkerPhase::Failed, kind, "trouble");
        }
        Move::Scale(workers) => drop(rig.ask(Ask::Scale(job_name(), workers))),
        Move::Pause => drop(rig.ask(Ask::Pause(job_name()))),
        Move::Resume => drop(rig.ask(Ask::Resume(job_name()))),
        Move::Refuse => {
            if let Some((job, _)) = rig.pending.pop_front() {
                rig.handle(Event::Stored { job, outcome: Outcome::Failed("busy".into()) });
            }
        }
        Move::Drain(at, empty) => {
            rig.ask(Ask::Drain(node(name(at)), empty));
        }
        Move::Reattach(at, port) => rig.reattach(name(at), port),
        Move::Kill(..) | Move::Fail(..) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_promises_hold_whatever_happens(script in proptest::collection::vec(moves(), 1..80)) {
        let mut rig = Rig::new();
        rig.attach("a", 3);
        rig.submit(spec("{ min = 1, max = 4 }"), SubmitMode::New, None);
        rig.store();
        let mut step = 0;
        for next in script {
            play(&mut rig, &mut step, next);
        }
        for at in 0..3 {
            rig.ask(Ask::Drain(node(name(at)), false));
        }
        // With a good node and no more trouble the job comes to an end.
        rig.lose("a");
        rig.pass(Duration::from_secs(2));
        rig.attach("a", 3);
        rig.pass(Duration::from_secs(20));
        let ended = |rig: &Rig| rig.ledger.as_ref().is_none_or(|ledger| ledger.end.is_some());
        for _ in 0..20 {
            if ended(&rig) {
                break;
            }
            rig.pass(Duration::from_secs(1));
            let newest = rig.ledger.as_ref().and_then(|ledger| ledger.newest().map(|newest| newest.step.get()));
            rig.train((newest.unwrap_or(0) + 4).min(STEPS));
        }
        prop_assert!(ended(&rig), "still going: live {:?}, records {:?}", rig.live(), rig.records.last());
    }
}
