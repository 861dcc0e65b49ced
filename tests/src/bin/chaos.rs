//! The campaign of faults on real processes in network namespaces, `cargo run --release -p tests --bin chaos`; see
//! `tests::chaos`.
//!
//! `… --bin chaos -- --seed 7 --faults 100 [--nodes 4] [--steps N] [--only KIND]… [--keep]`
//! `… --bin chaos -- --price [--nodes 2] [--rounds 5] [--steps 150] [--batch 16] [--link MBIT]`
//!
//! Needs root, `ip`, `nft`, `tc`, `bash`, `python3` and an S3 server (`./test` installs one). Exit code 0 if the digest
//! is the undisturbed one, nothing hung, and every incident was attributed rightly.

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use tests::chaos::campaign::{self, INTERRUPTED};
use tests::chaos::fault::{KINDS, Kind};
use tests::chaos::{lab, price};
use tokio::signal::unix::{SignalKind, signal};

/// The command line.
struct Arguments(Vec<String>);

impl Arguments {
    /// Whether a word is there.
    fn has(&self, word: &str) -> bool {
        self.0.iter().any(|given| given == word)
    }

    /// The words after each of a flag.
    fn all(&self, flag: &str) -> Vec<&str> {
        self.0.windows(2).filter(|pair| pair[0] == flag).map(|pair| pair[1].as_str()).collect()
    }

    /// The number after a flag.
    fn number(&self, flag: &str) -> Result<Option<u64>, String> {
        let last = self.all(flag).pop();
        last.map(|text| text.parse().map_err(|_| format!("{flag} takes a number, not {text:?}"))).transpose()
    }
}

fn kinds(names: &[&str]) -> Result<Vec<Kind>, String> {
    let find = |name: &&str| {
        let found = KINDS.iter().find(|(_, known, _)| known == name).map(|(kind, ..)| *kind);
        let known: Vec<&str> = KINDS.iter().map(|(_, name, _)| *name).collect();
        found.ok_or_else(|| format!("no fault is called {name:?}; these are: {}", known.join("; ")))
    };
    names.iter().map(find).collect()
}

fn measure(arguments: &Arguments) -> Result<bool, String> {
    let plan = price::Plan {
        nodes: arguments.number("--nodes")?.unwrap_or(2) as usize,
        rounds: arguments.number("--rounds")?.unwrap_or(5) as usize,
        steps: arguments.number("--steps")?.unwrap_or(150),
        batch: arguments.number("--batch")?.unwrap_or(16).max(1),
        link: arguments.number("--link")?.map(|rate| rate as u32),
    };
    println!("{}", price::measure(plan)?);
    Ok(true)
}

fn strike(arguments: &Arguments) -> Result<bool, String> {
    let plan = campaign::Plan {
        seed: arguments.number("--seed")?.unwrap_or(1),
        faults: arguments.number("--faults")?.unwrap_or(100) as usize,
        nodes: arguments.number("--nodes")?.unwrap_or(4).clamp(2, 50) as usize,
        only: kinds(&arguments.all("--only"))?,
        overlap: !arguments.has("--one-at-a-time"),
        steps: arguments.number("--steps")?,
        keep: arguments.has("--keep"),
    };
    let report = campaign::run(&plan)?;
    println!("{report}");
    Ok(report.is_exact() && report.wrong.is_empty())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> ExitCode {
    // The campaign looks at the flag and tidies up behind itself.
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let mut asked = signal(kind).expect("signals can be listened for");
        tokio::spawn(async move {
            if asked.recv().await.is_some() {
                INTERRUPTED.store(true, Ordering::Relaxed);
            }
        });
    }
    let arguments = Arguments(std::env::args().skip(1).collect());
    if let Err(why) = lab::usable() {
        eprintln!("chaos: {why}");
        return ExitCode::from(2);
    }
    let work = move || if arguments.has("--price") { measure(&arguments) } else { strike(&arguments) };
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Err(why)) => {
            eprintln!("chaos: {why}");
            ExitCode::FAILURE
        }
        // Of the second it has said why, and tidied up.
        Ok(Ok(false)) | Err(_) => ExitCode::FAILURE,
    }
}
