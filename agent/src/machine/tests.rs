//! The node's decisions: each case as a person would tell it, then any order of events at all.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proto::wire::{FailureKind, WorkerPhase};

use super::*;

struct Bench {
    machine: Machine,
    next: u128,
    now: Duration,
}

impl Bench {
    fn new() -> Self {
        Self { machine: Machine::new(4), next: 0, now: Duration::ZERO }
    }

    fn event(&mut self, event: Event) -> Vec<Action> {
        let next = &mut self.next;
        self.machine.handle(self.now, event, &mut || {
            *next += 1;
            id(*next)
        })
    }

    fn desire(&mut self, epoch: u64, desired: wire::Desired) -> Vec<Action> {
        self.event(Event::Desired { epoch: Epoch::new(epoch), desired })
    }

    fn state(&mut self, worker: u128, phase: WorkerPhase, generation: Option<u64>) -> Vec<Action> {
        let mut state = wire::WorkerState { generation, ..Default::default() };
        state.set_phase(phase);
        self.event(Event::State { worker: id(worker), state })
    }

    fn exit(&mut self, worker: u128) -> Vec<Action> {
        let (kind, reason) = (FailureKind::Exit.into(), "killed by signal 9".into());
        let failure = proto::wire::Failure { kind, reason, signal: Some(9), ..Default::default() };
        self.event(Event::Exited { worker: id(worker), failure })
    }
}

fn id(n: u128) -> WorkerId {
    uuid::Uuid::from_u128(n).to_string().parse().unwrap()
}

fn desired(workers: u32, fenced: u64, run: Option<(u64, &[u128])>) -> wire::Desired {
    let run = run.map(|(generation, ids)| wire::Announcement {
        generation,
        world_size: ids.len() as u32,
        placements: ids
            .iter()
            .zip(0..)
            .map(|(worker, rank)| wire::Placement { worker: id(*worker).to_string(), rank, ..Default::default() })
            .collect(),
        ..Default::default()
    });
    wire::Desired { job: "tiny".into(), spec: b"{}".to_vec(), workers, fenced, run, keep: false }
}

fn spawned(actions: &[Action]) -> Vec<WorkerId> {
    let spawn = |action: &Action| if let Action::Spawn { worker, .. } = action { Some(*worker) } else { None };
    actions.iter().filter_map(spawn).collect()
}

fn sent(actions: &[Action]) -> Vec<(WorkerId, Command)> {
    let send = |action: &Action| match action {
        Action::Send { worker, command } => Some((*worker, command.clone())),
        _ => None,
    };
    actions.iter().filter_map(send).collect()
}

#[test]
fn what_is_held_of_a_job_is_forgotten_only_when_it_may_go() {
    let mut bench = Bench::new();
    let forgets = |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::Forget(_)));
    bench.desire(1, desired(1, 0, None));
    bench.desire(1, wire::Desired { keep: true, ..desired(0, 1, None) });
    assert!(!forgets(&bench.exit(1)));
    assert!(!forgets(&bench.event(Event::Tick)));
    assert!(forgets(&bench.desire(1, desired(0, 1, None))));
    // Of a job that only an earlier life knew.
    assert!(!forgets(&bench.desire(1, wire::Desired { keep: true, ..desired(0, 1, None) })));
    assert!(forgets(&bench.desire(1, desired(0, 1, None))));
}

#[test]
fn workers_are_started_prepared_and_run_each_told_once() {
    let mut bench = Bench::new();
    assert_eq!(spawned(&bench.desire(1, desired(2, 0, None))), [id(1), id(2)]);
    let told = sent(&bench.event(Event::Attached(id(1))));
    assert_eq!(told, [(id(1), Command::Prepare { spec: b"{}".to_vec(), threads: 2, place: 0 })]);
    bench.event(Event::Attached(id(2)));
    assert!(bench.state(1, WorkerPhase::Ready, None).contains(&Action::Report));
    bench.state(2, WorkerPhase::Ready, None);
    let run = desired(2, 0, Some((1, &[2, 1])));
    let told = sent(&bench.desire(1, run.clone()));
    let ranks: Vec<_> = told
        .iter()
        .map(
            |(worker, command)| {
                if let Command::Run(run) = command { (*worker, run.rank) } else { panic!("{command:?}") }
            },
        )
        .collect();
    assert_eq!(ranks, [(id(1), 1), (id(2), 0)]);
    assert!(sent(&bench.desire(1, run.clone())).is_empty(), "the same again is no news");
    let mut stop = run;
    stop.run.as_mut().unwrap().stop = true;
    assert_eq!(sent(&bench.desire(1, stop.clone())).len(), 2);
    assert!(sent(&bench.desire(1, stop)).is_empty());
}

#[test]
fn a_worker_that_dies_is_reported_and_replaced_at_once() {
    let mut bench = Bench::new();
    bench.desire(1, desired(1, 0, None));
    bench.event(Event::Attached(id(1)));
    bench.state(1, WorkerPhase::Ready, None);
    bench.desire(1, desired(1, 0, Some((1, &[1]))));
    bench.state(1, WorkerPhase::Running, Some(1));
    assert_eq!(spawned(&bench.exit(1)), [id(2)]);
    let report = bench.machine.report();
    assert_eq!(report.workers[0].phase(), WorkerPhase::Exited);
    assert_eq!(report.workers[0].generation, Some(1));
    assert_eq!(report.workers[0].failure.as_ref().unwrap().kind(), FailureKind::Exit);
    assert_eq!(report.workers[1].phase(), WorkerPhase::Starting);
    bench.desire(1, desired(1, 1, None));
    assert_eq!(bench.machine.report().workers.len(), 1, "superseded by the fence");
}

#[test]
fn starts_that_keep_failing_are_spread_out() {
    let mut bench = Bench::new();
    bench.desire(1, desired(1, 0, None));
    assert_eq!(spawned(&bench.exit(1)).len(), 1, "the first again at once");
    assert!(spawned(&bench.exit(2)).is_empty());
    bench.now += Duration::from_millis(250);
    assert_eq!(spawned(&bench.event(Event::Tick)).len(), 1);
    assert!(bench.exit(3).contains(&Action::Report));
    bench.now += Duration::from_millis(250);
    assert!(spawned(&bench.event(Event::Tick)).is_empty());
}

#[test]
fn a_fence_holds_survivors_before_they_run_again() {
    let mut bench = Bench::new();
    bench.desire(1, desired(1, 0, None));
    bench.event(Event::Attached(id(1)));
    bench.desire(1, desired(1, 0, Some((1, &[1]))));
    bench.state(1, WorkerPhase::Running, Some(1));
    assert_eq!(sent(&bench.desire(1, desired(1, 1, None))), [(id(1), Command::Hold(1))]);
    assert!(sent(&bench.state(1, WorkerPhase::Running, Some(1))).is_empty(), "a late report is not held again");
    bench.state(1, WorkerPhase::Ready, None);
    let told = sent(&bench.desire(1, desired(1, 1, Some((2, &[1])))));
    assert!(matches!(&told[..], [(_, Command::Run(run))] if run.announcement.as_ref().unwrap().generation == 2));
}

#[test]
fn lower_epochs_and_generations_are_refused() {
    let mut bench = Bench::new();
    bench.desire(3, desired(1, 4, None));
    let refused =
        |actions: Vec<Action>| matches!(actions[..], [Action::Refused(_)] | [Action::Refused(_), Action::Report]);
    assert!(refused(bench.desire(2, desired(0, 9, None))));
    assert!(refused(bench.desire(3, desired(1, 3, None))));
    assert!(refused(bench.desire(4, desired(1, 3, Some((3, &[1]))))));
    assert_eq!(bench.machine.report().epoch, 4);
}

#[test]
fn an_ended_job_is_forgotten_when_its_last_process_is_gone() {
    let mut bench = Bench::new();
    bench.desire(1, desired(2, 0, None));
    let kills = bench.desire(1, desired(0, 0, None)).iter().filter(|a| matches!(a, Action::Kill { .. })).count();
    assert_eq!(kills, 2);
    assert!(bench.machine.report().workers.is_empty());
    bench.exit(1);
    assert!(bench.exit(2).contains(&Action::Forget(JobName::new("tiny").unwrap())));
    assert_eq!(bench.desire(1, desired(0, 0, None)), [Action::Forget(JobName::new("tiny").unwrap())]);
}

#[derive(Debug, Clone)]
enum Any {
    Desire { epoch: u64, workers: u32, fenced: u64, run: Option<(u64, Vec<u128>)> },
    Attach(u128),
    State(u128, i32, Option<u64>),
    Exit(u128),
    Wait(u64),
}

fn any_event() -> impl Strategy<Value = Any> {
    let run = proptest::option::of((0..6u64, proptest::collection::vec(1..12u128, 0..4)));
    prop_oneof![
        (0..4u64, 0..4u32, 0..5u64, run).prop_map(|(epoch, workers, fenced, run)| Any::Desire {
            epoch,
            workers,
            fenced,
            run
        }),
        (1..12u128).prop_map(Any::Attach),
        (1..12u128, 1..7i32, proptest::option::of(0..6u64)).prop_map(|(w, p, g)| Any::State(w, p, g)),
        (1..12u128).prop_map(Any::Exit),
        (0..3000u64).prop_map(Any::Wait),
    ]
}

proptest! {
    #[test]
    fn any_order_of_events_keeps_the_promises(events in proptest::collection::vec(any_event(), 1..120)) {
        let mut bench = Bench::new();
        let mut alive = BTreeSet::new();
        let mut ran: BTreeMap<WorkerId, u64> = BTreeMap::new();
        let (mut epoch, mut wanted) = (0, 0);
        for event in events {
            let actions = match event {
                Any::Desire { epoch: of, workers, fenced, run } => {
                    let run = run.as_ref().map(|(generation, ids)| (*generation, ids.as_slice()));
                    let actions = bench.desire(of, desired(workers, fenced, run));
                    let refused = actions.iter().any(|action| matches!(action, Action::Refused(_)));
                    prop_assert!(refused || of >= epoch, "a lower epoch was obeyed");
                    if !refused {
                        epoch = of;
                        wanted = workers as usize;
                    }
                    actions
                }
                Any::Attach(worker) => bench.event(Event::Attached(id(worker))),
                Any::State(worker, phase, generation) => {
                    bench.state(worker, WorkerPhase::try_from(phase).unwrap(), generation)
                }
                Any::Exit(worker) => {
                    alive.remove(&id(worker));
                    bench.exit(worker)
                }
                Any::Wait(millis) => {
                    bench.now += Duration::from_millis(millis);
                    bench.event(Event::Tick)
                }
            };
            for action in actions {
                match action {
                    Action::Spawn { worker, .. } => prop_assert!(alive.insert(worker)),
                    Action::Kill { worker, .. } => prop_assert!(alive.remove(&worker)),
                    Action::Send { worker, command: Command::Run(run) } => {
                        let generation = run.announcement.unwrap().generation;
                        let before = ran.insert(worker, generation);
                        prop_assert!(before.is_none_or(|before| before <= generation), "a lower generation was obeyed");
                    }
                    _ => {}
                }
            }
            prop_assert!(alive.len() <= wanted, "{} workers of {wanted}", alive.len());
        }
    }
}
