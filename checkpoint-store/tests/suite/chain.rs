//! The chain: folding, racing, fencing, and what retention makes of it.

use std::collections::BTreeSet;

use checkpoint_store::retention::delete;
use checkpoint_store::*;
use proptest::prelude::*;
use proto::ids::{Epoch, Generation, Step};

use crate::support::*;

/// A checkpoint of which only the record exists.
fn fake(generation: u64, step: u64) -> CheckpointRef {
    CheckpointRef {
        step: Step::new(step),
        generation: Generation::new(generation),
        manifest: format!("{step:012}-{generation:06}-x.json"),
        hash: BlockHash::of(b"manifest"),
        digest: Digest::of(&step.to_le_bytes()),
        bytes: 1,
    }
}

fn by(generation: u64, event: Event) -> Record {
    Record::new(EPOCH, Generation::new(generation), event)
}

fn good(history: &History) -> Vec<u64> {
    history.checkpoints.iter().filter(|c| c.is_good()).map(|c| c.checkpoint.step.get()).collect()
}

#[test]
fn a_new_generation_abandons_what_lies_beyond_its_start() {
    let mut history = History::default();
    let mut tell = |record: Record| history.apply(&record).map(|()| history.clone());
    tell(submitted()).unwrap();
    tell(formed(1, 2, None)).unwrap();
    for step in [10, 20, 30] {
        tell(by(1, Event::Committed(fake(1, step)))).unwrap();
    }
    let quarantined = Event::Quarantined { manifest: fake(1, 30).manifest, reason: "flipped byte".into() };
    let h = tell(by(1, quarantined)).unwrap();
    assert_eq!(h.newest_good(), Some(&fake(1, 20)));
    assert!(tell(formed(2, 2, Some(fake(1, 30)))).is_err(), "a quarantined checkpoint is no start");
    let h = tell(formed(2, 3, Some(fake(1, 10)))).unwrap();
    assert_eq!(good(&h), [10], "20 lies in a future that did not happen");
    assert!(matches!(tell(by(1, Event::Committed(fake(1, 40)))), Err(FoldError::Superseded { .. })));
    tell(by(2, Event::Committed(fake(2, 20)))).unwrap();
    let h = tell(by(2, Event::Restarted { spec_hash: BlockHash::of(b"2"), stop_at: None })).unwrap();
    assert_eq!((h.newest_good(), h.checkpoints.len(), h.identity.clone()), (None, 4, None));
    assert!(tell(by(2, Event::Committed(fake(2, 30)))).is_err(), "the generation ended with the restart");
    let h = tell(formed(3, 1, None)).unwrap();
    assert_eq!(h.generations_without_progress, 1);
}

#[test]
fn events_out_of_place_change_nothing() {
    let mut history = History::default();
    assert!(history.apply(&formed(1, 1, None)).is_err());
    history.apply(&submitted()).unwrap();
    let before = history.clone();
    let led = |epoch| Event::Led { epoch: Epoch::new(epoch), leader: "a".into() };
    for record in [
        submitted(),
        by(1, Event::Cancelled),
        by(0, Event::Committed(fake(0, 1))),
        by(0, Event::Deleted { manifest: "none".into() }),
        by(0, led(5)),
        formed(1, 1, Some(fake(1, 1))),
        by(0, Event::Yielded { step: Step::ZERO, reason: String::new() }),
        Record::new(Epoch::ZERO, Generation::ZERO, Event::Cancelled),
    ] {
        assert!(history.apply(&record).is_err(), "{record:?}");
        assert_eq!(history, before);
    }
    // A job that gives its slots up is no longer running, and goes on without being asked to.
    history.apply(&formed(1, 1, None)).unwrap();
    history.apply(&by(1, Event::Yielded { step: Step::ZERO, reason: "room".into() })).unwrap();
    assert_eq!(history.status, Status::Submitted);
    assert!(history.apply(&by(1, Event::Committed(fake(1, 1)))).is_err(), "its generation is over");
    history.apply(&formed(2, 1, None)).unwrap();
    history.apply(&by(2, Event::Cancelled)).unwrap();
    assert!(history.apply(&formed(3, 1, None)).is_err(), "a cancelled job must be resumed first");
}

#[test]
fn incidents_are_folded_and_survive_a_fold() {
    let text = r#"{"format":3,"number":1,"epoch":1,"generation":0,"author":"a","event":{"kind":"incident","number":1,
        "cause":"worker_exit","outcome":"recovered","reason":"killed","signal":9,"node":"a","generation":0,"step":7,
        "start":5,"detect_ms":3,"productive_ms":1,"wall_ms":2}}"#;
    let record = Record::parse("r", 1, text.as_bytes()).unwrap();
    let Event::Incident(incident) = &record.event else { panic!("{record:?}") };
    assert_eq!((incident.steps_lost(), incident.signal), (Some(2), Some(9)));
    let mut history = History::default();
    history.apply(&submitted()).unwrap();
    history.apply(&record).unwrap();
    let json = serde_json::to_string(&history).unwrap();
    assert_eq!(serde_json::from_str::<History>(&json).unwrap(), history);
    let mut long = incident.clone();
    long.reason = "x".repeat(2000);
    assert!(history.apply(&by(0, Event::Incident(long))).is_err(), "a reason has a bound");
    let restarted = Event::Restarted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
    history.apply(&by(0, restarted)).unwrap();
    assert!(history.incidents.is_empty(), "another run begins");
}

#[tokio::test]
async fn of_two_appenders_one_loses_and_reads_again() {
    let store = Store::memory();
    let mut first = running(&store, 2).await;
    let mut second = Chain::load(&store, &job()).await.unwrap().unwrap();
    assert_eq!(first.history(), second.history());
    first.append(by(1, Event::Scaled { workers: 3 })).await.unwrap();
    // Even the same event: it is not the loser's.
    let lost = second.append(by(1, Event::Scaled { workers: 3 })).await.unwrap_err();
    assert!(matches!(lost, ChainError::Lost { number: 2, .. }), "{lost}");
    assert_eq!(lost.kind(), Kind::Fenced);
    assert_eq!(second.refresh().await.unwrap().added, 1);
    second.append(Record::new(Epoch::new(2), Generation::new(1), Event::Paused { step: Step::new(1) })).await.unwrap();
    first.refresh().await.unwrap();
    let fenced = first.append(by(1, Event::Cancelled)).await.unwrap_err();
    assert_eq!(fenced.kind(), Kind::Fenced, "{fenced}");
    assert!(Chain::create(&store, &job(), submitted()).await.is_err());
    assert_eq!(list_jobs(&store).await.unwrap(), [job()]);
}

#[tokio::test]
async fn a_repeated_create_finds_its_own_record_and_no_one_elses() {
    let memory = std::sync::Arc::new(object_store::memory::InMemory::new());
    let store = Store::from_object_store("memory://", memory.clone());
    // As after a first try whose answer was lost although it took effect.
    Chain::create(&store, &job(), submitted()).await.unwrap();
    let mut chain = Chain::create(&store, &job(), submitted()).await.unwrap();
    assert_eq!(chain.history(), Chain::load(&store, &job()).await.unwrap().unwrap().history());
    let event = Event::Submitted { spec_hash: BlockHash::of(b"another"), stop_at: None };
    let different = Chain::create(&store, &job(), by(0, event)).await.unwrap_err();
    assert!(matches!(different, ChainError::Lost { number: 0, .. }), "{different}");
    let other = Store::from_object_store("memory://", memory);
    let elsewhere = Chain::create(&other, &job(), submitted()).await.unwrap_err();
    assert!(matches!(elsewhere, ChainError::Lost { number: 0, .. }), "{elsewhere}");
    chain.append(formed(1, 1, None)).await.unwrap();
    let late = Chain::create(&store, &job(), submitted()).await.unwrap_err();
    assert!(matches!(late, ChainError::Lost { number: 0, .. }), "{late}");
}

#[tokio::test]
async fn strange_names_do_not_hide_the_newest_record() {
    let store = Store::memory();
    for i in 0..1_100 {
        let path = format!("{}/0-strange-{i:04}", layout::records(&job()));
        store.create(&path, "x".into()).await.unwrap();
    }
    assert!(Chain::load(&store, &job()).await.unwrap().is_none());
    let chain = running(&store, 2).await;
    assert_eq!(Chain::load(&store, &job()).await.unwrap().unwrap().history(), chain.history());
}

#[tokio::test]
async fn the_last_number_is_an_error_and_no_overflow() {
    let store = Store::memory();
    running(&store, 1).await;
    store.create(&layout::record(&job(), u64::MAX), "{}".into()).await.unwrap();
    assert_eq!(Chain::load(&store, &job()).await.unwrap_err().kind(), Kind::Corrupt);
    let mut history = History { records: u64::MAX, ..History::default() };
    assert!(matches!(history.apply(&by(0, Event::Cancelled)), Err(FoldError::OutOfPlace { .. })));
}

#[tokio::test]
async fn racing_writers_make_one_chain() {
    let store = Store::memory();
    running(&store, 1).await;
    let race = |writer: u32| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut chain = Chain::load(&store, &job()).await.unwrap().unwrap();
            let mut won = 0;
            while won < 40 {
                match chain.append(by(1, Event::Scaled { workers: writer })).await {
                    Ok(_) => won += 1,
                    Err(ChainError::Lost { .. }) => {
                        chain.refresh().await.unwrap();
                    }
                    Err(e) => panic!("{e}"),
                }
            }
        })
    };
    futures::future::join_all((0..4).map(race)).await.into_iter().for_each(|r| r.unwrap());
    assert_eq!(Chain::load(&store, &job()).await.unwrap().unwrap().history().records, 162);
}

#[tokio::test]
async fn a_long_chain_loads_from_its_newest_fold() {
    let store = Store::memory();
    let mut chain = running(&store, 1).await;
    for step in 1..=600 {
        chain.append(by(1, Event::Committed(fake(1, step)))).await.unwrap();
        if step > 3 {
            chain.append(by(1, Event::Deleted { manifest: fake(1, step - 3).manifest })).await.unwrap();
        }
        if step % 97 == 0 {
            let loaded = Chain::load(&store, &job()).await.unwrap().unwrap();
            assert_eq!(loaded.history(), chain.history(), "step {step}");
        }
    }
    assert_eq!(good(chain.history()), [598, 599, 600]);
    // What lies before the newest fold is not read any more, so it may go.
    for number in 0..1024 {
        store.delete(&layout::record(&job(), number)).await.unwrap();
    }
    let loaded = Chain::load(&store, &job()).await.unwrap().unwrap();
    assert_eq!(loaded.history(), chain.history());
}

#[test]
fn retention_keeps_the_newest_good_ones() {
    let mut history = History::default();
    let mut tell = |record: Record| history.apply(&record).map(|()| history.clone()).unwrap();
    tell(submitted());
    tell(formed(1, 1, None));
    for step in [10, 20, 30, 40] {
        tell(by(1, Event::Committed(fake(1, step))));
    }
    let h = tell(formed(2, 1, Some(fake(1, 20))));
    let steps =
        |h: &History, keep| condemned(h, keep).iter().map(|c| (c.step.get(), c.generation.get())).collect::<Vec<_>>();
    // 30 and 40 are abandoned, but nothing good has come after them yet.
    assert_eq!(steps(&h, 1), [(10, 1)]);
    assert_eq!(steps(&h, 0), [(10, 1)], "the newest good one always stays");
    let h = tell(by(2, Event::Committed(fake(2, 30))));
    // 20 is what the running generation started from.
    assert_eq!(steps(&h, 1), [(10, 1), (30, 1), (40, 1)]);
    let h = tell(by(2, Event::Paused { step: Step::new(30) }));
    assert_eq!(steps(&h, 1), [(10, 1), (20, 1), (30, 1), (40, 1)]);
    assert_eq!(steps(&h, 2), [(10, 1)]);
    assert_eq!(steps(&h, 3), []);
}

#[tokio::test]
async fn collection_removes_exactly_what_nothing_reaches() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&normalize_url("store", folder.path()).unwrap()).unwrap();
    let space = medium();
    let mut chain = running(&store, 2).await;
    for step in [10, 20, 30] {
        save(&mut chain, &space, step).await;
    }
    // A save that is still open, and the remains of one that never was finished.
    let open = receipts(&store, &space, 1, 2, 40).await;
    receipts(&store, &space, 1, 2, 35).await;
    let (gone, _) = collect(&mut chain, EPOCH, 2, &BTreeSet::from([Step::new(40)])).await.unwrap();
    assert_eq!(gone.iter().map(|c| c.step.get()).collect::<Vec<_>>(), [10]);
    assert_eq!(store.list(&layout::objects(&job()), None, 100).await.unwrap().len(), 6);
    let manifest = Manifest::assemble(&space, scalar(40), open).unwrap();
    let checkpoint = commit(&mut chain, &manifest, EPOCH, uuid::Uuid::new_v4()).await.unwrap();
    let again = commit(&mut chain, &manifest, EPOCH, uuid::Uuid::new_v4()).await.unwrap();
    assert_eq!(again, checkpoint);
    for checkpoint in chain.history().checkpoints.clone() {
        assert!(verify(&store, &job(), &checkpoint.checkpoint).await.unwrap().is_good());
    }
    // A crash between the record and the bytes: the next sweep finds them.
    delete(&mut chain, EPOCH, &[checkpoint]).await.unwrap();
    assert_eq!(sweep(&chain, &BTreeSet::new()).await.unwrap(), 3);
    assert_eq!(good(chain.history()), [20, 30]);
}

/// A collection leaves alone only what comes after the newest commit, so nothing before it may be committed any more.
#[tokio::test]
async fn a_generation_commits_its_steps_in_order() {
    let (store, space) = (Store::memory(), medium());
    let mut chain = running(&store, 2).await;
    let late = receipts(&store, &space, 1, 2, 10).await;
    save(&mut chain, &space, 20).await;
    let manifest = Manifest::assemble(&space, scalar(10), late).unwrap();
    let error = commit(&mut chain, &manifest, EPOCH, uuid::Uuid::new_v4()).await.unwrap_err();
    assert!(error.to_string().contains("step 10 comes too late: generation 1 has committed step 20"), "{error}");
    assert_eq!(good(chain.history()), [20]);
    chain.append(formed(2, 2, None)).await.unwrap();
    save(&mut chain, &space, 10).await;
    assert_eq!(good(chain.history()), [10], "another generation has an order of its own");
}

#[tokio::test]
async fn a_step_is_not_committed_after_a_newer_one_of_its_generation() {
    let (store, space) = (Store::memory(), space(&[70_000]));
    let mut chain = running(&store, 2).await;
    let late = Manifest::assemble(&space, scalar(10), receipts(&store, &space, 1, 2, 10).await).unwrap();
    save(&mut chain, &space, 20).await;
    // No save is open at or before the newest step: the older one's objects go.
    sweep(&chain, &BTreeSet::from([Step::new(21)])).await.unwrap();
    let error = commit(&mut chain, &late, EPOCH, uuid::Uuid::new_v4()).await.unwrap_err();
    assert!(error.to_string().contains("has committed step 20"), "{error}");
    assert_eq!(chain.history().checkpoints.len(), 1);
    // A later generation may save an older step again.
    let start = chain.history().newest_good().cloned();
    chain.append(formed(2, 2, None)).await.unwrap();
    assert!(chain.history().checkpoints.iter().all(|c| c.abandoned) && start.is_some());
    let checkpoint = save(&mut chain, &space, 10).await;
    expect_loads(&store, &checkpoint, &space, 3).await;
}

#[tokio::test]
async fn specifications_are_kept_by_hash() {
    let store = Store::memory();
    let first = write_spec(&store, &job(), "one".into()).await.unwrap();
    let second = write_spec(&store, &job(), "two".into()).await.unwrap();
    assert_eq!(write_spec(&store, &job(), "two".into()).await.unwrap(), second);
    assert_eq!(read_spec(&store, &job(), first).await.unwrap(), "one");
    assert_eq!(read_spec(&store, &job(), second).await.unwrap(), "two");
    assert!(read_spec(&store, &job(), BlockHash::of(b"three")).await.is_err());
}

/// Any sequence of events, sensible or not.
fn any_event() -> impl Strategy<Value = (u64, u8, u64)> {
    (0u64..6, 0u8..9, 0u64..20)
}

proptest! {
    #[test]
    fn histories_keep_their_rules(script in proptest::collection::vec(any_event(), 1..60)) {
        let mut history = History::default();
        history.apply(&submitted()).unwrap();
        for (generation, kind, step) in script {
            let at = history.generation.get();
            let pick = history.checkpoints.get(step as usize).map_or_else(|| fake(1, step), |c| c.checkpoint.clone());
            let record = match kind {
                0 | 1 => by(at, Event::Committed(fake(at, step))),
                2 => formed(generation, 2, history.newest_good().cloned()),
                3 => formed(generation, 2, Some(pick)),
                4 => by(at, Event::Quarantined { manifest: pick.manifest, reason: "r".into() }),
                5 => by(at, Event::Deleted { manifest: pick.manifest }),
                6 => by(at, Event::Resumed { spec_hash: BlockHash::of(b"s"), stop_at: None }),
                7 => by(at, Event::Paused { step: Step::new(step) }),
                _ => by(generation, Event::Restarted { spec_hash: BlockHash::of(b"s"), stop_at: None }),
            };
            let before = history.clone();
            if history.apply(&record).is_err() {
                prop_assert_eq!(&history, &before);
                continue;
            }
            prop_assert_eq!(history.records, before.records + 1);
            prop_assert!(history.generation >= before.generation && history.epoch >= before.epoch);
            // What is bad stays bad.
            for c in before.checkpoints.iter().filter(|c| !c.is_good()) {
                prop_assert!(history.find(&c.checkpoint.manifest).is_none_or(|now| !now.is_good()));
            }
            // Retention never takes the one a resume needs.
            for keep in 0..4 {
                let newest = history.newest_good();
                prop_assert!(condemned(&history, keep).iter().all(|c| Some(c) != newest));
            }
            let json = serde_json::to_string(&history).unwrap();
            prop_assert_eq!(serde_json::from_str::<History>(&json).unwrap(), history.clone());
        }
    }
}
