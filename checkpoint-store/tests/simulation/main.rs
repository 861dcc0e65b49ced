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
