//! What stays and what goes: the rules under random histories, and on a real store with readers and open saves.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use checkpoint_store::policy::Keep;
use checkpoint_store::*;
use proptest::prelude::*;
use proto::ids::{Epoch, Generation, Step};
use proto::spec::BestOrder;

use crate::support::*;

const NOW: Duration = Duration::from_secs(1);

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

fn measured(checkpoint: &CheckpointRef, value: f64) -> Event {
    let metrics = BTreeMap::from([("validation_loss".to_string(), value)]);
    Event::Measured { manifest: checkpoint.manifest.clone(), metrics }
}

fn leased(checkpoint: &CheckpointRef, lease: &str) -> Event {
    let (manifest, lease) = (checkpoint.manifest.clone(), lease.to_string());
    Event::Leased { manifest, lease, holder: "a test".into(), seconds: 60 }
}

fn best(count: usize) -> Policy {
    Policy { best: count, metric: "validation_loss".into(), ..Policy::last(1) }
}

/// A generation with checkpoints of these steps and losses.
fn history(steps: &[(u64, f64)]) -> History {
    let mut history = History::default();
    history.apply(&submitted()).unwrap();
    history.apply(&formed(1, 1, None)).unwrap();
    for (step, loss) in steps {
        history.apply(&by(1, Event::Committed(fake(1, *step)))).unwrap();
        history.apply(&by(1, measured(&fake(1, *step), *loss))).unwrap();
    }
    history
}

fn kept(history: &History, policy: &Policy) -> Vec<u64> {
    let judged = history.checkpoints.iter().zip(policy.judge(history));
    judged.filter(|(_, why)| why.is_some()).map(|(c, _)| c.checkpoint.step.get()).collect()
}

#[test]
fn each_rule_keeps_what_it_says() {
    let mut h = history(&[(10, 3.0), (20, 1.0), (30, 2.0), (40, 1.0), (50, 4.0), (60, 5.0)]);
    assert_eq!(kept(&h, &Policy::last(2)), [50, 60]);
    assert_eq!(kept(&h, &Policy { every: 20, ..Policy::last(1) }), [20, 40, 60]);
    assert_eq!(kept(&h, &Policy { within_steps: 20, ..Policy::last(1) }), [40, 50, 60]);
    assert_eq!(kept(&h, &best(1)), [40, 60], "of equals the newer");
    assert_eq!(kept(&h, &best(3)), [20, 30, 40, 60]);
    assert_eq!(kept(&h, &Policy { order: BestOrder::Highest, ..best(2) }), [50, 60]);
    assert_eq!(kept(&h, &Policy { metric: "unknown".into(), ..best(3) }), [60]);
    h.apply(&by(1, Event::Pinned { manifest: fake(1, 10).manifest, reason: "paper".into() })).unwrap();
    h.apply(&by(1, leased(&fake(1, 30), "l"))).unwrap();
    assert_eq!(kept(&h, &Policy::last(1)), [10, 30, 60]);
    let words: Vec<String> = best(1).judge(&h).into_iter().flatten().map(|why| why.to_string()).collect();
    assert_eq!(words, ["pinned", "leased", "keep_best", "newest"]);
    // The fold itself refuses what the rules would not do.
    for step in [10, 30] {
        assert!(h.apply(&by(1, Event::Deleted { manifest: fake(1, step).manifest })).is_err(), "{step}");
    }
    h.apply(&by(1, Event::Released { lease: "l".into(), reason: "done".into() })).unwrap();
    h.apply(&by(1, Event::Unpinned { manifest: fake(1, 10).manifest })).unwrap();
    assert_eq!(kept(&h, &Policy::last(1)), [60]);
}

#[test]
fn trust_grows_by_proof_and_ends_with_damage() {
    let mut h = history(&[(10, 1.0)]);
    let verified = |blocks, of| Event::Verified { manifest: fake(1, 10).manifest, blocks, of, by: "a test".into() };
    let trust = |h: &History| h.checkpoints[0].trust();
    assert_eq!(trust(&h), Trust::Candidate);
    h.apply(&by(1, verified(2, 8))).unwrap();
    assert_eq!((trust(&h), h.checkpoints[0].proof.as_ref().unwrap().share()), (Trust::Candidate, 0.25));
    h.apply(&by(1, verified(8, 8))).unwrap();
    h.apply(&by(1, verified(1, 8))).unwrap();
    assert_eq!(trust(&h), Trust::Verified, "a sample takes nothing away");
    for (blocks, of) in [(0, 8), (9, 8)] {
        assert!(h.apply(&by(1, verified(blocks, of))).is_err());
    }
    h.apply(&by(1, Event::Quarantined { manifest: fake(1, 10).manifest, reason: "bit".into() })).unwrap();
    assert_eq!((trust(&h), h.newest_good()), (Trust::Quarantined, None));
    assert!(h.apply(&by(1, verified(8, 8))).is_err(), "there is no way back");
}

#[test]
fn what_is_out_of_bounds_does_not_enter_the_history() {
    let mut h = history(&[(10, 1.0)]);
    let (c, long) = (fake(1, 10), "x".repeat(2_000));
    let lease = |lease: &str, seconds, holder: &str| Event::Leased {
        manifest: c.manifest.clone(),
        lease: lease.into(),
        holder: holder.into(),
        seconds,
    };
    let before = h.clone();
    for event in [
        measured(&c, f64::NAN),
        measured(&c, f64::INFINITY),
        measured(&fake(1, 11), 1.0),
        Event::Pinned { manifest: c.manifest.clone(), reason: long.clone() },
        lease("l", 0, "h"),
        lease("l", u32::MAX, "h"),
        lease("a b", 1, "h"),
        lease(&long, 1, "h"),
        lease("l", 1, &long),
        Event::Released { lease: "l".into(), reason: String::new() },
    ] {
        assert!(h.apply(&by(1, event.clone())).is_err(), "{event:?}");
        assert_eq!(h, before);
    }
    for n in 0..checkpoint_store::trust::MAX_LEASES {
        h.apply(&by(1, lease(&n.to_string(), 1, "h"))).unwrap();
    }
    assert!(h.apply(&by(1, lease("more", 1, "h"))).is_err());
}

#[test]
fn records_of_older_formats_are_read_and_newer_ones_refused() {
    let text = |format: u32| {
        format!(
            r#"{{"format":{format},"number":1,"epoch":1,"generation":1,"author":"a",
                "event":{{"kind":"deleted","manifest":"m"}}}}"#
        )
    };
    for format in 1..=3 {
        let old = Record::parse("r", 1, text(format).as_bytes()).unwrap();
        assert_eq!(old.event, Event::Deleted { manifest: "m".into() });
    }
    let newer = Record::parse("r", 1, text(4).as_bytes()).unwrap_err().to_string();
    assert!(newer.contains("format 4") && newer.contains("1 to 3"), "{newer}");
    // A checkpoint as a fold of format 1 wrote it.
    let mut json = serde_json::to_value(history(&[(10, 1.0)])).unwrap();
    json["checkpoints"][0].as_object_mut().unwrap().remove("metrics");
    let read: History = serde_json::from_value(json).unwrap();
    assert_eq!((read.checkpoints[0].trust(), read.checkpoints[0].is_held()), (Trust::Candidate, false));
}

/// What can happen to a history, by number.
fn tell(history: &mut History, (kind, pick, step): (u8, usize, u64)) {
    let at = history.generation.get();
    let any = history.checkpoints.get(pick % history.checkpoints.len().max(1)).map(|c| c.checkpoint.clone());
    let any = any.unwrap_or_else(|| fake(at, step));
    let manifest = any.manifest.clone();
    let event = match kind {
        0..=3 => Event::Committed(fake(at, step)),
        4 => Event::Quarantined { manifest, reason: "r".into() },
        5 => Event::Pinned { manifest, reason: "r".into() },
        6 => Event::Unpinned { manifest },
        7 => leased(&any, &format!("l{step}")),
        8 => Event::Released { lease: format!("l{step}"), reason: "r".into() },
        9 => measured(&any, (step % 7) as f64),
        10 => Event::Restarted { spec_hash: BlockHash::of(b"s"), stop_at: None },
        _ => {
            let start = if step % 2 == 0 { history.newest_good().cloned() } else { Some(any) };
            drop(history.apply(&formed(at + 1, 2, start)));
            return;
        }
    };
    // What cannot follow does not happen.
    drop(history.apply(&by(at, event)));
}

fn policies() -> impl Strategy<Value = Policy> {
    (0usize..5, 0u64..4, 0usize..4, 0u64..12, any::<bool>()).prop_map(|(last, every, best, within_steps, low)| {
        let order = if low { BestOrder::Lowest } else { BestOrder::Highest };
        Policy { last, every: every * 3, best, metric: "validation_loss".into(), order, within_steps }
    })
}

proptest! {
    #[test]
    fn no_policy_breaks_the_rules(
        script in proptest::collection::vec((0u8..13, 0usize..9, 1u64..25), 1..80),
        policy in policies(),
        more in (0usize..3, 0usize..3, 0u64..5, any::<bool>()),
    ) {
        let mut history = History::default();
        history.apply(&submitted()).unwrap();
        history.apply(&formed(1, 2, None)).unwrap();
        for event in script {
            tell(&mut history, event);
        }
        let condemned: BTreeSet<String> = policy.condemned(&history).into_iter().map(|c| c.manifest).collect();
        let gone = |c: &CheckpointRef| condemned.contains(&c.manifest);
        prop_assert!(!history.newest_good().is_some_and(gone));
        let running = history.status == Status::Running;
        prop_assert!(!(running && history.start.as_ref().is_some_and(gone)));
        for c in &history.checkpoints {
            prop_assert!(!(gone(&c.checkpoint) && (c.pinned.is_some() || !c.leases.is_empty())));
        }
        // More kept, never more gone. A divisor of k has all the multiples of k.
        let wider = Policy {
            last: policy.last + more.0,
            best: policy.best + more.1,
            within_steps: policy.within_steps + more.2,
            every: if more.3 && policy.every > 0 { 3 } else { policy.every },
            ..policy.clone()
        };
        prop_assert!(wider.condemned(&history).iter().all(gone), "{wider:?} deletes what {policy:?} keeps");
        // The fold takes every deletion, and a second collection finds nothing.
        for manifest in condemned {
            history.apply(&by(history.generation.get(), Event::Deleted { manifest })).unwrap();
        }
        prop_assert!(policy.condemned(&history).is_empty());
    }
}

#[test]
fn rules_are_replaced_one_by_one() {
    let policy = Policy { every: 7, ..best(2) };
    let keep = Keep { last: Some(9), best: Some(0), ..Keep::default() };
    assert_eq!(policy.with(&keep).unwrap(), Policy { last: 9, best: 0, ..policy.clone() });
    let nameless = Policy::last(1).with(&Keep { best: Some(1), ..Keep::default() }).unwrap_err();
    assert_eq!(nameless.kind(), Kind::Input);
}

#[tokio::test]
async fn a_lease_holds_a_checkpoint_against_every_collector() {
    let store = Store::memory();
    let space = medium();
    let mut chain = running(&store, 2).await;
    let first = save(&mut chain, &space, 10).await;
    for step in [20, 30] {
        save(&mut chain, &space, step).await;
    }
    let policy = Policy::last(1);
    // A collector that has read the chain before the lease loses its append, and with it the right to delete.
    let mut stale = Chain::load(&store, &job()).await.unwrap().unwrap();
    let mut keeper = Keeper::default();
    let manifest = first.manifest.clone();
    let lease = Change::Lease { manifest, lease: "l".into(), holder: "a reader".into(), seconds: 60 };
    let done = keeper.perform(&mut chain, EPOCH, NOW, &policy, &lease).await.unwrap();
    assert_eq!(done.records, 1);
    assert_eq!(
        keeper.perform(&mut chain, EPOCH, NOW, &policy, &lease).await.unwrap().records,
        0,
        "repeats are harmless"
    );
    let lost = Collector::default().collect(&mut stale, EPOCH, &policy, Open::After(Step::new(30))).await.unwrap_err();
    assert_eq!(lost.kind(), Kind::Fenced, "{lost}");
    expect_loads(&store, &first, &space, 3).await;
    let done = keeper.collect(&mut chain, EPOCH, NOW, &policy).await.unwrap();
    assert_eq!(done.deleted.iter().map(|c| c.step.get()).collect::<Vec<_>>(), [20]);
    expect_loads(&store, &first, &space, 3).await;
    // Renewed at 50 s it lasts to 110 s; a successor starts anew.
    let renew = Change::Renew { lease: "l".into() };
    keeper.perform(&mut chain, EPOCH, Duration::from_secs(50), &policy, &renew).await.unwrap();
    assert!(keeper.collect(&mut chain, EPOCH, Duration::from_secs(109), &policy).await.unwrap().deleted.is_empty());
    let mut next = Keeper::default();
    next.observe(Duration::ZERO, &chain);
    assert!(next.collect(&mut chain, EPOCH, Duration::from_secs(59), &policy).await.unwrap().deleted.is_empty());
    let done = next.collect(&mut chain, EPOCH, Duration::from_secs(60), &policy).await.unwrap();
    assert_eq!((done.deleted, done.files), (vec![first], 3));
    let over = next.perform(&mut chain, EPOCH, Duration::from_secs(61), &policy, &renew).await.unwrap_err();
    assert_eq!(over.kind(), Kind::Input, "{over}");
}

#[tokio::test]
async fn a_pruning_says_what_it_frees_and_leaves_the_rest_whole() {
    let store = Store::memory();
    let space = medium();
    let mut chain = running(&store, 2).await;
    for step in [10, 20, 30, 40] {
        save(&mut chain, &space, step).await;
    }
    let (mut keeper, policy) = (Keeper::default(), Policy::last(9));
    let manifest = chain.history().checkpoints[0].checkpoint.manifest.clone();
    let pin = Change::Pin { manifest: manifest.clone(), reason: "for the paper".into() };
    keeper.perform(&mut chain, EPOCH, NOW, &policy, &pin).await.unwrap();
    let keep = Keep { last: Some(1), ..Keep::default() };
    let condemned = policy.with(&keep).unwrap().condemned(chain.history());
    let expected = Collector::default().freed(&chain, &condemned).await.unwrap();
    let objects = store.list(&layout::objects(&job()), None, 100).await.unwrap();
    let bytes: u64 = objects.iter().map(|o| o.bytes).sum();
    assert_eq!((expected.objects, expected.bytes), (4, bytes / 2), "half of four equal checkpoints");
    let done = keeper.perform(&mut chain, EPOCH, NOW, &policy, &Change::Prune { keep: keep.clone() }).await.unwrap();
    assert_eq!((done.freed, done.deleted.len(), done.files, done.records), (expected, 2, 6, 2));
    let again = keeper.perform(&mut chain, EPOCH, NOW, &policy, &Change::Prune { keep }).await.unwrap();
    assert_eq!(again, ChangeReport::default());
    for c in chain.history().checkpoints.clone() {
        assert!(verify(&store, &job(), &c.checkpoint).await.unwrap().is_good());
    }
    let gone = Change::Unpin { manifest: "000000000020-000001-x.json".into() };
    let refused = keeper.perform(&mut chain, EPOCH, NOW, &policy, &gone).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Input);
    let json = Change::from_json(&pin.to_json().unwrap()).unwrap();
    assert_eq!(json, pin);
    assert!(Change::from_json(br#"{"format":2,"change":"pin"}"#).unwrap_err().to_string().contains("format 2"));
}

#[tokio::test]
async fn a_superseded_collector_that_wakes_deletes_nothing_its_successor_needs() {
    let store = Store::memory();
    let space = medium();
    let mut old = running(&store, 2).await;
    for step in [10, 20] {
        save(&mut old, &space, step).await;
    }
    // The successor takes over, commits on in the same generation and then in the next one.
    let mut new = Chain::load(&store, &job()).await.unwrap().unwrap();
    let led = Event::Led { epoch: Epoch::new(2), leader: "successor".into() };
    new.append(Record::new(Epoch::new(2), Generation::new(1), led)).await.unwrap();
    let commits = async |chain: &mut Chain, generation: u64, step: u64| {
        let receipts = receipts(&store, &space, generation, 2, step).await;
        let manifest = Manifest::assemble(&space, scalar(step), receipts).unwrap();
        commit(chain, &manifest, Epoch::new(2), uuid::Uuid::new_v4()).await.unwrap()
    };
    let third = commits(&mut new, 1, 30).await;
    let formed = Record { epoch: Epoch::new(2), ..formed(2, 2, Some(third)) };
    new.append(formed).await.unwrap();
    commits(&mut new, 2, 40).await;
    // The old leader still has its view: its sweep runs, its records do not.
    let open = Open::of(old.history());
    Collector::default().sweep(&old, open).await.unwrap();
    let lost = Collector::default().collect(&mut old, EPOCH, &Policy::last(1), open).await.unwrap_err();
    assert_eq!(lost.kind(), Kind::Fenced);
    for c in new.history().checkpoints.clone() {
        assert!(verify(&store, &job(), &c.checkpoint).await.unwrap().is_good(), "step {}", c.checkpoint.step);
    }
    // A manifest that was written and lost its commit goes with the next sweep of whoever leads.
    let orphan = layout::manifest(&job(), &layout::manifest_name(Step::new(30), Generation::new(1), uuid::Uuid::nil()));
    store.create(&orphan, "{}".into()).await.unwrap();
    assert_eq!(Collector::default().sweep(&new, Open::of(new.history())).await.unwrap(), 1);
}
