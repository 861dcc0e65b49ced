//! The full campaign of the simulated control plane: any number of seeds, each a cluster of coordinators, agents and
//! workers in virtual time, with the invariants checked at every event.
//!
//! ```text
//! cargo run --release -p tests --bin campaign -- --seeds 10000
//! cargo run -p tests --bin campaign -- --first 17 --seeds 1 --trace     one seed, with its trace
//! cargo run -p tests --bin campaign -- --plant OldOrders                a mistake that must be noticed
//! cargo run -p tests --bin campaign -- --shut --seeds 40                a node whose snapshots nobody can read
//! ```
//!
//! It ends with code 1 if an invariant was broken, and says how to see that again.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tests::sim::{Options, Outcome, Plant, Totals, run};

struct Arguments {
    first: u64,
    seeds: u64,
    threads: u64,
    plant: Option<Plant>,
    trace: bool,
    shut: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut found = Arguments { first: 1, seeds: 1_000, threads: 2, plant: None, trace: false, shut: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--trace" {
            found.trace = true;
            continue;
        }
        if word == "--shut" {
            found.shut = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = || value.parse().map_err(|error| format!("{word} {value:?}: {error}"));
        match word.as_str() {
            "--seeds" => found.seeds = number()?,
            "--first" => found.first = number()?,
            "--threads" => found.threads = number()?.clamp(1, 64),
            "--plant" => {
                let plant = Plant::ALL.into_iter().find(|plant| format!("{plant:?}") == value);
                found.plant = Some(plant.ok_or_else(|| format!("--plant: one of {:?}", Plant::ALL))?);
            }
            _ => {
                return Err(format!(
                    "unknown argument {word}; known: --first --seeds --threads --plant --shut --trace"
                ));
            }
        }
    }
    Ok(found)
}

/// Tells of a broken invariant.
fn complain(outcome: &Outcome) {
    println!("{}", outcome.report());
    if let (Some(plant), Some(violation)) = (outcome.options.plant, &outcome.violation) {
        let meant = plant.signs().iter().any(|sign| violation.contains(sign));
        println!("{plant:?} was planted and noticed{}", if meant { "" } else { ", for another reason" });
    }
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(wrong) => {
            eprintln!("{wrong}");
            return ExitCode::from(2);
        }
    };
    let (next, broken) = (AtomicU64::new(arguments.first), AtomicBool::new(false));
    let totals = Mutex::new(Totals::default());
    let end = arguments.first.saturating_add(arguments.seeds);
    let work = || {
        while !broken.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            let outcome = run(Options { plant: arguments.plant, shut: arguments.shut, ..Options::of(seed) });
            let mut totals = totals.lock().expect("no thread panics while it adds");
            totals.add(&outcome);
            if arguments.trace {
                print!("{}", outcome.trace);
            }
            if outcome.violation.is_some() {
                complain(&outcome);
                broken.store(true, Ordering::Relaxed);
            }
            if totals.seeds.is_multiple_of(100) {
                eprintln!("{} seeds, {} virtual seconds", totals.seeds, totals.virtual_time.as_secs());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(work);
        }
    });
    let totals = totals.into_inner().expect("no thread panics while it adds");
    println!("seeds from {}\n{}", arguments.first, totals.table());
    ExitCode::from(u8::from(totals.violations > 0))
}
