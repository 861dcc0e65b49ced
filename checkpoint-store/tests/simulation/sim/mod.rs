//! A seeded simulation of a job's processes over a bucket on which everything goes wrong.
//!
//! Workers save shards, leaders commit and collect and are superseded, readers load; requests fail, hang, land without
//! an answer or long after their client has gone; processes die at their requests, before or after the effect; and
//! listings lag behind. An oracle checks the invariants at every operation. Everything follows from one seed.

pub(crate) mod actors;
pub(crate) mod cluster;
pub(crate) mod disk;
pub(crate) mod faulty;
pub(crate) mod net;
pub(crate) mod oracle;
pub(crate) mod product;
pub(crate) mod random;
pub(crate) mod supervisor;

use std::collections::BTreeMap;

use net::{Faults, Tally};
use product::Plant;

/// What to run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) seed: u64,
    /// Requests before all is made quiet.
    pub(crate) operations: u64,
    pub(crate) faults: Faults,
    /// Whether processes die by chance.
    pub(crate) deaths: bool,
    /// Whether listings lag.
    pub(crate) lags: bool,
    /// One process dies at this operation: before its effect or after it.
    pub(crate) crash_at: Option<(u64, bool)>,
    pub(crate) plant: Option<Plant>,
}

impl Options {
    /// All that can go wrong.
    pub(crate) fn storm(seed: u64) -> Self {
        let faults = Faults::USUAL;
        Self { seed, operations: 1_500, faults, deaths: true, lags: true, crash_at: None, plant: None }
    }

    /// Nothing goes wrong but one death at a known operation.
    pub(crate) fn one_death(seed: u64, operations: u64, crash_at: Option<(u64, bool)>) -> Self {
        Self { operations, faults: Faults::NONE, deaths: false, lags: false, crash_at, ..Self::storm(seed) }
    }
}

/// What came of a run.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) options: Options,
    pub(crate) operations: u64,
    pub(crate) tallies: BTreeMap<&'static str, Tally>,
    pub(crate) checks: BTreeMap<&'static str, u64>,
    /// Records in the chain, checkpoints ever committed, leaders that led.
    pub(crate) history: (u64, u64, u64),
    pub(crate) trace: String,
    pub(crate) violation: Option<String>,
}

impl Outcome {
    /// The message of a failed run: what happened, the last requests, and how to see it again.
    pub(crate) fn report(&self) -> String {
        let lines: Vec<&str> = self.trace.lines().collect();
        let last = lines[lines.len().saturating_sub(60)..].join("\n");
        let what = self.violation.as_deref().unwrap_or("nothing is wrong");
        let at = self.operations;
        format!("{last}\n{what}\nafter {at} operations; to see it again: {}", self.replay())
    }

    /// The command that repeats the run and prints its trace.
    pub(crate) fn replay(&self) -> String {
        let Options { seed, operations, crash_at, deaths, plant, .. } = self.options;
        let plant = plant.map(|plant| format!(" --plant {plant:?}")).unwrap_or_default();
        let death = match crash_at {
            Some((at, true)) => format!(" --crash-after {at}"),
            Some((at, false)) => format!(" --crash-before {at}"),
            None if !deaths => " --calm".into(),
            None => String::new(),
        };
        let program = "cargo run -p checkpoint-store --example crash_campaign --";
        format!("{program} --replay {seed} --operations {operations}{plant}{death}")
    }
}

/// Sums over runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) runs: u64,
    pub(crate) records: u64,
    pub(crate) commits: u64,
    pub(crate) leaders: u64,
    pub(crate) kinds: BTreeMap<&'static str, Tally>,
    pub(crate) checks: BTreeMap<&'static str, u64>,
}

impl Totals {
    pub(crate) fn add(&mut self, outcome: &Outcome) {
        self.runs += 1;
        self.records += outcome.history.0;
        self.commits += outcome.history.1;
        self.leaders += outcome.history.2;
        for (kind, tally) in &outcome.tallies {
            let sum = self.kinds.entry(kind).or_default();
            sum.operations += tally.operations;
            sum.failed += tally.failed;
            sum.lost += tally.lost;
            sum.hung += tally.hung;
            sum.late += tally.late;
            sum.deaths_before += tally.deaths_before;
            sum.deaths_after += tally.deaths_after;
        }
        for (what, times) in &outcome.checks {
            *self.checks.entry(what).or_default() += times;
        }
    }

    /// Deaths of processes at a request.
    pub(crate) fn crash_points(&self) -> u64 {
        self.kinds.values().map(|tally| tally.deaths_before + tally.deaths_after).sum()
    }

    /// Requests that went wrong without a death.
    pub(crate) fn faults(&self) -> u64 {
        self.kinds.values().map(|tally| tally.failed + tally.lost + tally.hung + tally.late).sum()
    }

    /// A table for people.
    pub(crate) fn table(&self) -> String {
        let operations: u64 = self.kinds.values().map(|tally| tally.operations).sum();
        let checks: u64 = self.checks.values().sum();
        let (runs, points, faults) = (self.runs, self.crash_points(), self.faults());
        let mut lines = vec![
            format!("{runs} runs, {operations} operations, {points} crash points, {faults} faults, {checks} checks"),
            format!("{} records, {} commits, {} leaders", self.records, self.commits, self.leaders),
            "request     number  failed    lost    hung    late  death before  death after".into(),
        ];
        lines.extend(self.kinds.iter().map(|(kind, t)| {
            let Tally { operations, failed, lost, hung, late, deaths_before, deaths_after } = t;
            format!(
                "{kind:<9} {operations:>8} {failed:>7} {lost:>7} {hung:>7} {late:>7} {deaths_before:>13} \
                 {deaths_after:>12}"
            )
        }));
        lines.extend(self.checks.iter().map(|(what, times)| format!("checked {what}: {times}")));
        lines.join("\n")
    }
}

/// Runs a simulation to its end.
pub(crate) fn run(options: Options) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(supervisor::supervise(options))
}
