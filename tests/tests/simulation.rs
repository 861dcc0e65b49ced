//! The control plane in virtual time: many seeds of faults, the mistakes that must be noticed, and that a seed says
//! everything. Any number of seeds by `cargo run --release -p tests --bin campaign`.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tests::sim::{Options, Outcome, Plant, Totals, run};

/// Seeds of the ordinary test; another number by the variable.
const SEEDS: u64 = 2_000;
const VARIABLE: &str = "CAIRN_SIMULATION_SEEDS";
/// Simulations at once.
const THREADS: usize = 2;

/// Runs seeds on some threads, until one is done with them all or `stop` says so.
fn each(seeds: std::ops::Range<u64>, plant: Option<Plant>, stop: impl Fn(Outcome) -> bool + Sync) {
    let next = AtomicU64::new(seeds.start);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || stop(run(Options { plant, ..Options::of(seed) })) {
                        return next.store(seeds.end, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

#[test]
fn no_fault_breaks_an_invariant_and_every_job_finishes() {
    let seeds = std::env::var(VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS);
    let (totals, broken) = (Mutex::new(Totals::default()), Mutex::new(None));
    each(1..seeds + 1, None, |outcome| {
        totals.lock().unwrap().add(&outcome);
        let is_broken = outcome.violation.is_some();
        if is_broken {
            broken.lock().unwrap().get_or_insert(outcome.report());
        }
        is_broken
    });
    let totals = totals.into_inner().unwrap();
    println!("{}", totals.table());
    assert_eq!(broken.into_inner().unwrap(), None);
    assert_eq!(totals.seeds, seeds);
    assert!(totals.history[1] > totals.seeds, "generations are broken: {:?}", totals.history);
    assert!(totals.faults.values().all(|count| *count > 0) && totals.faults.len() > 10, "{:?}", totals.faults);
}

/// The same seed twice: the same events, faults and answers, byte for byte. Both runs go on at once, so that nothing
/// that they share with the rest of the process, such as the numbers of tasks, is the same for both.
#[test]
fn a_seed_says_everything() {
    let twice = |seed| {
        let [first, second] = [(); 2].map(|()| std::thread::spawn(move || run(Options::of(seed))));
        (first.join().unwrap(), second.join().unwrap())
    };
    let mut before = String::new();
    for seed in 1..=30 {
        let (first, second) = twice(seed);
        assert!(first.trace.lines().count() > 30, "there is something to compare");
        let lines = |outcome: &Outcome| outcome.trace.lines().map(str::to_string).collect::<Vec<_>>();
        let (one, other) = (lines(&first), lines(&second));
        let differs = one.iter().zip(&other).position(|(a, b)| a != b);
        let around = |all: &[String], at: usize| all[at.saturating_sub(4)..all.len().min(at + 4)].join("\n");
        if let Some(at) = differs {
            panic!("seed {seed} differs:\n{}\n\nand\n\n{}", around(&one, at), around(&other, at));
        }
        assert_eq!((&first.trace, first.events, first.checks), (&second.trace, second.events, second.checks));
        assert_ne!(first.trace, before, "another seed is another run");
        before = first.trace;
    }
}

/// The simulation notices what it is there to notice, and for what it is.
#[test]
fn every_planted_mistake_is_noticed() {
    for plant in Plant::ALL {
        let noticed = Mutex::new(None::<Outcome>);
        each(1..400, Some(plant), |outcome| {
            let Some(violation) = &outcome.violation else { return false };
            let meant = plant.signs().iter().any(|sign| violation.contains(sign));
            let mut noticed = noticed.lock().unwrap();
            if meant || noticed.is_none() {
                *noticed = Some(outcome);
            }
            meant
        });
        let outcome = noticed.into_inner().unwrap().unwrap_or_else(|| panic!("{plant:?} was not noticed"));
        let violation = outcome.violation.clone().unwrap_or_default();
        println!("{plant:?}, seed {}: {violation}", outcome.options.seed);
        let meant = plant.signs().iter().any(|sign| violation.contains(sign));
        assert!(meant, "{plant:?} was noticed for another reason: {}", outcome.report());
    }
}

/// While one node's port for snapshots stays shut no parity of its snapshots can be made, by the others or, where it
/// holds back what it has made, by anybody. That must not keep the job from storing checkpoints.
#[test]
fn a_port_that_stays_shut_does_not_keep_checkpoints_from_the_store() {
    for seed in 1..=25 {
        let outcome = run(Options { shut: true, ..Options::of(seed) });
        assert_eq!(outcome.violation, None, "{}", outcome.report());
        let shut = outcome.trace.lines().position(|line| line.contains("begins: Shut"));
        let shut = shut.unwrap_or_else(|| panic!("the port was never shut: {}", outcome.report()));
        let after = || outcome.trace.lines().skip(shut);
        let stored = after().filter(|line| line.contains(": committed step")).count();
        let skipped = after().filter(|line| line.contains("capture skipped") && line.ends_with("Store")).count();
        println!("seed {seed}: {stored} checkpoints stored, {skipped} skips");
        assert!(stored >= 3, "seed {seed}: {stored} checkpoints stored\n{}", outcome.trace);
    }
}
