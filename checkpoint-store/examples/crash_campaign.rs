//! The full campaign of crash safety over buckets: any number of deaths of processes, at their requests to a store on
//! which everything goes wrong, with the invariants checked at every operation.
//!
//! ```text
//! cargo run -p checkpoint-store --release --example crash_campaign -- --points 100000
//! cargo run -p checkpoint-store --example crash_campaign -- --replay 17           one seed, with its trace
//! cargo run -p checkpoint-store --example crash_campaign -- --plant NeverSweeps   a mistake that must be noticed
//! ```
//!
//! It ends with code 1 at the first violation, and says how to see it again.

#[path = "../tests/simulation/sim/mod.rs"]
mod sim;

use std::process::ExitCode;

use sim::product::Plant;
use sim::{Options, Outcome, Totals, run};

struct Arguments {
    points: u64,
    first_seed: u64,
    operations: u64,
    replay: Option<u64>,
    calm: bool,
    crash_at: Option<(u64, bool)>,
    plant: Option<Plant>,
}

fn arguments() -> Result<Arguments, String> {
    let mut found = Arguments {
        points: 100_000,
        first_seed: 1,
        operations: Options::storm(0).operations,
        replay: None,
        calm: false,
        crash_at: None,
        plant: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--calm" {
            found.calm = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = || value.parse().map_err(|e| format!("{word} {value:?}: {e}"));
        match word.as_str() {
            "--points" => found.points = number()?,
            "--first-seed" => found.first_seed = number()?,
            "--operations" => found.operations = number()?,
            "--replay" => found.replay = Some(number()?),
            "--crash-before" => found.crash_at = Some((number()?, false)),
            "--crash-after" => found.crash_at = Some((number()?, true)),
            "--plant" => {
                let plant = Plant::ALL.into_iter().find(|plant| format!("{plant:?}") == value);
                found.plant = Some(plant.ok_or_else(|| format!("--plant: one of {:?}", Plant::ALL))?);
            }
            _ => return Err(format!("unknown argument {word}")),
        }
    }
    Ok(found)
}

impl Arguments {
    fn options(&self, seed: u64) -> Options {
        let options = if self.calm || self.crash_at.is_some() {
            Options::one_death(seed, self.operations, self.crash_at)
        } else {
            Options { operations: self.operations, ..Options::storm(seed) }
        };
        Options { plant: self.plant, ..options }
    }
}

/// Whether a violation was found, told with how to see it again.
fn is_bad(outcome: &Outcome) -> bool {
    let Some(violation) = &outcome.violation else { return false };
    println!("seed {}: {}", outcome.options.seed, outcome.report());
    if let Some(plant) = outcome.options.plant {
        let meant = plant.signs().iter().any(|sign| violation.contains(sign));
        println!("{plant:?} was planted and noticed{}", if meant { "" } else { ", for another reason" });
    }
    true
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(wrong) => {
            eprintln!("{wrong}");
            return ExitCode::from(2);
        }
    };
    let mut totals = Totals::default();
    if let Some(seed) = arguments.replay {
        let outcome = run(arguments.options(seed));
        println!("{}", outcome.trace);
        totals.add(&outcome);
        println!("{}", totals.table());
        return ExitCode::from(u8::from(is_bad(&outcome)));
    }
    let mut seed = arguments.first_seed;
    while totals.crash_points() < arguments.points {
        let outcome = run(arguments.options(seed));
        if is_bad(&outcome) {
            return ExitCode::FAILURE;
        }
        totals.add(&outcome);
        seed += 1;
        if totals.runs.is_multiple_of(500) {
            eprintln!("seed {seed}: {} crash points", totals.crash_points());
        }
    }
    println!("seeds {} to {}\n{}", arguments.first_seed, seed - 1, totals.table());
    ExitCode::SUCCESS
}
