//! Crash safety over buckets, by simulation: thousands of deaths and faults here, any number by the example
//! `crash_campaign`; and the simulation itself is tested, by planted mistakes and by repetition.

mod sim;

use std::sync::Arc;

use bytes::Bytes;
use checkpoint_store::{Kind, Limits, Store, conformance, probe_atomic_create};
use sim::net::{Faults, Net};
use sim::product::Plant;
use sim::supervisor::begin;
use sim::{Options, Totals, run};

/// Crash points of the ordinary test; more by the variable.
const POINTS: u64 = 3_000;
const VARIABLE: &str = "CAIRN_CRASH_POINTS";

#[test]
fn no_death_and_no_fault_harms_a_visible_checkpoint() {
    let points = std::env::var(VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(POINTS);
    let mut totals = Totals::default();
    let mut seed = 1;
    while totals.crash_points() < points {
        let outcome = run(Options::storm(seed));
        assert!(outcome.violation.is_none(), "seed {seed}: {}", outcome.report());
        totals.add(&outcome);
        seed += 1;
    }
    println!("{}", totals.table());
    assert!(totals.commits > 2 * totals.runs, "the processes get somewhere");
    for (kind, tally) in &totals.kinds {
        assert!(tally.deaths_before + tally.deaths_after > 0, "no process died at a {kind}");
    }
}

/// The same seed twice: the same requests, faults, deaths and answers, byte for byte.
#[test]
fn a_seed_says_everything() {
    for seed in 1..=12 {
        let (first, second) = (run(Options::storm(seed)), run(Options::storm(seed)));
        assert!(first.trace.len() > 10_000, "there is something to compare");
        let differs = first.trace.lines().zip(second.trace.lines()).find(|(a, b)| a != b);
        assert_eq!(differs, None, "seed {seed}");
        assert!(first.trace == second.trace && first.checks == second.checks, "seed {seed}");
    }
    assert!(run(Options::storm(1)).trace != run(Options::storm(2)).trace, "another seed is another run");
}

/// One death in an otherwise undisturbed run: at each of its requests, before the effect and after it.
#[test]
fn a_death_at_each_request_of_a_run_is_harmless() {
    const OPERATIONS: u64 = 400;
    let mut totals = Totals::default();
    for at in 1..OPERATIONS {
        for after in [false, true] {
            let outcome = run(Options::one_death(7, OPERATIONS, Some((at, after))));
            assert!(outcome.violation.is_none(), "death at {at}, after: {after}: {}", outcome.report());
            totals.add(&outcome);
        }
    }
    println!("{}", totals.table());
    assert_eq!(totals.crash_points(), totals.runs);
    assert!(totals.commits > totals.runs, "there is something to harm");
}

/// The simulation notices what it is there to notice.
#[test]
fn every_planted_mistake_is_noticed() {
    for plant in Plant::ALL {
        let planted = |seed| run(Options { plant: Some(plant), ..Options::storm(seed) });
        let noticed = (1..=60).map(planted).find(|outcome| outcome.violation.is_some());
        let outcome = noticed.unwrap_or_else(|| panic!("{plant:?} was not noticed"));
        let violation = outcome.violation.clone().unwrap_or_default();
        println!("{plant:?}, seed {}: {violation}", outcome.options.seed);
        let meant = plant.signs().iter().any(|sign| violation.contains(sign));
        assert!(meant, "{plant:?} was noticed for another reason: {}", outcome.report());
    }
}

/// A store over a network of its own, on which processes do not die.
fn faulty(seed: u64, faults: Faults, limits: &Limits) -> (Arc<Net>, Store) {
    let options = Options { faults, lags: false, operations: u64::MAX, ..Options::storm(seed) };
    let (net, _) = begin(options);
    let (process, _) = net.start("client".into(), None);
    let store = Store::from_object_store_with("sim://bucket", Arc::new(process), limits);
    (net, store)
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_conforms_because_it_is_asked_again() {
    let limits = Limits { part_bytes: 8 << 20, ..Limits::default() };
    let (net, store) = faulty(1, Faults::USUAL, &limits);
    conformance::check(&store).await;
    probe_atomic_create(&store).await.unwrap();
    let (operations, tallies, _) = net.totals();
    let wrong: u64 = tallies.values().map(|tally| tally.failed + tally.lost + tally.hung).sum();
    assert!(wrong > operations / 40, "{wrong} of {operations} requests went wrong");
    assert_eq!(net.violation(), None);
}

#[tokio::test(start_paused = true)]
async fn an_upload_of_which_a_part_fails_is_aborted_and_leaves_nothing() {
    let limits = Limits { part_bytes: 1_000, retries: 2, ..Limits::default() };
    let faults = Faults { always: Some(("part", false)), ..Faults::USUAL };
    let faults = Faults { lost: 0, hung: 0, ..faults };
    let (net, store) = faulty(2, faults, &limits);
    let error = store.upload("probe/x", vec![Bytes::from(vec![1; 5_000])]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Retry, "{error}");
    assert!(store.get("probe/x", 10_000).await.unwrap_err().is_not_found());
    assert!(store.list("probe", None, 10).await.unwrap().is_empty());
    let (_, tallies, _) = net.totals();
    assert!(tallies["begin"].operations >= 3 && !tallies.contains_key("complete"), "{tallies:?}");
    let begun = tallies["begin"].operations - tallies["begin"].failed;
    assert_eq!(tallies["abort"].operations, begun, "{tallies:?}");
}

#[tokio::test(start_paused = true)]
async fn a_completion_without_an_answer_is_settled_by_looking() {
    let limits = Limits { part_bytes: 1_000, retries: 0, ..Limits::default() };
    let faults = Faults { failed: 1, always: Some(("complete", true)), lost: 1, ..Faults::NONE };
    let (net, store) = faulty(3, faults, &limits);
    store.upload("probe/x", vec![Bytes::from(vec![1; 5_000])]).await.unwrap();
    assert_eq!(store.head("probe/x").await.unwrap(), 5_000);
    assert_eq!(net.totals().1["complete"].lost, 1);
}

/// A call that never comes back is given up after its time, asked again, and in the end reported.
#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_is_an_error_in_bounded_time() {
    let limits = Limits { retries: 2, ..Limits::default() };
    let (net, store) = faulty(4, Faults { hung: 1_000, ..Faults::NONE }, &limits);
    let started = tokio::time::Instant::now();
    let (mut errors, mut answers) = (0, 0);
    for _ in 0..20 {
        match store.create("probe/x", "x".into()).await {
            Ok(_) => answers += 1,
            Err(error) if error.kind() == Kind::Retry => errors += 1,
            Err(error) => panic!("{error}"),
        }
    }
    // A request is held up for at most 20 s here and waits for a minute: slow, but never lost.
    assert_eq!((errors, answers), (0, 20));
    let impatient = Limits { request_timeout: std::time::Duration::from_millis(900), ..limits };
    let (process, _) = net.start("impatient".into(), None);
    let store = Store::from_object_store_with("sim://bucket", Arc::new(process), &impatient);
    let before = tokio::time::Instant::now();
    assert_eq!(store.head("probe/x").await.unwrap_err().kind(), Kind::Retry);
    assert!(before.elapsed() < std::time::Duration::from_secs(4), "{:?}", before.elapsed());
    assert!(started.elapsed() < std::time::Duration::from_hours(1));
}

/// However many callers there are, only so many requests are in flight.
#[tokio::test(start_paused = true)]
async fn requests_in_flight_are_limited() {
    let limits = Limits { requests_in_flight: 3, ..Limits::default() };
    let (net, store) = faulty(5, Faults::NONE, &limits);
    let calls = futures::future::join_all((0..50).map(|i| {
        let store = store.clone();
        async move { store.create(&format!("probe/{i}"), "x".into()).await }
    }));
    let watch = async {
        let mut most = 0;
        loop {
            most = most.max(net.waiting());
            if net.totals().0 == 50 {
                return most;
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    let (done, most) = tokio::join!(calls, watch);
    assert!(done.into_iter().all(|create| create.is_ok()));
    assert_eq!(most, 3);
}
