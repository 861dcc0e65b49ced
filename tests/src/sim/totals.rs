//! Sums over many runs, as a table for people.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Outcome;

/// Sums over runs.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Runs.
    pub seeds: u64,
    /// Virtual time of all of them.
    pub virtual_time: Duration,
    /// What happened, by kind.
    pub events: BTreeMap<&'static str, u64>,
    /// What went wrong, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// How often each invariant was checked.
    pub checks: BTreeMap<&'static str, u64>,
    /// Records, generations, commits and epochs.
    pub history: [u64; 4],
    /// Runs in which an invariant was broken.
    pub violations: u64,
}

fn add(sums: &mut BTreeMap<&'static str, u64>, counts: &BTreeMap<&'static str, u64>) {
    for (kind, count) in counts {
        *sums.entry(kind).or_default() += count;
    }
}

fn line(counts: &BTreeMap<&'static str, u64>) -> String {
    let counts: Vec<String> = counts.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    counts.join(", ")
}

impl Totals {
    /// Adds a run.
    pub fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.virtual_time += outcome.virtual_time;
        add(&mut self.events, &outcome.events);
        add(&mut self.faults, &outcome.faults);
        add(&mut self.checks, &outcome.checks);
        for (sum, count) in self.history.iter_mut().zip(outcome.history) {
            *sum += count;
        }
        self.violations += u64::from(outcome.violation.is_some());
    }

    /// The sums of two sets of runs.
    pub fn join(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.virtual_time += other.virtual_time;
        add(&mut self.events, &other.events);
        add(&mut self.faults, &other.faults);
        add(&mut self.checks, &other.checks);
        for (sum, count) in self.history.iter_mut().zip(other.history) {
            *sum += count;
        }
        self.violations += other.violations;
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let sum = |counts: &BTreeMap<&'static str, u64>| counts.values().sum::<u64>();
        let [records, generations, commits, epochs] = self.history;
        [
            format!(
                "{} seeds, {} virtual seconds, {} events, {} faults, {} checks, {} violations",
                self.seeds,
                self.virtual_time.as_secs(),
                sum(&self.events),
                sum(&self.faults),
                sum(&self.checks),
                self.violations
            ),
            format!("history: {records} records, {generations} generations, {commits} commits, {epochs} epochs"),
            format!("events: {}", line(&self.events)),
            format!("faults: {}", line(&self.faults)),
            format!("checks: {}", line(&self.checks)),
        ]
        .join("\n")
    }
}
