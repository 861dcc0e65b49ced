//! Crash safety over buckets, by simulation: thousands of deaths and faults here, any number by the example
//! `crash_campaign`; and the simulation itself is tested, by planted mistakes and by repetition.

mod sim;

use sim::product::Plant;
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
    for seed in 1..=6 {
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
    const OPERATIONS: u64 = 160;
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
