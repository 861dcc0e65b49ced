//! `cairn bench store`: saves and loads beside a plain writer and reader of the same bytes, and beside DCP if asked.
//!
//! The plain side has the same mode, block size, streams and final sync, so the ratio is what the format, the commit
//! and the verification cost. Both sides take turns, so that a disk that drifts slows both, and medians count.

mod ours;
mod plain;
mod rates;
mod report;

use std::process::Command;
use std::time::Instant;

use checkpoint_store::{AlignedBuffer, LoadReport, StoreError, normalize_url};
use serde_json::Value;

use self::ours::Saved;
use self::plain::Plain;
use self::rates::Rates;
use self::report::{Pair, Report, Reshard};
use crate::args::BenchStoreArgs;
use crate::failure::{Failure, chain};

/// Sizes of saving and loading jobs that are compared.
const RESHARDS: [(u32, u32); 3] = [(4, 3), (8, 3), (3, 8)];
/// Most bytes of state.
const MOST: u64 = 1 << 40;

pub(crate) async fn run(args: BenchStoreArgs) -> Result<u8, Failure> {
    let bytes = args.size;
    if args.rounds == 0 || !((1 << 20) * u64::from(ranks(&args))..=MOST).contains(&bytes) {
        let wanted = "--rounds must be at least 1, and --size between 1MiB for each rank and 1TiB";
        return Err(Failure::request(wanted));
    }
    // Beside the working folder, whose disk is the one meant; removed at the end.
    let here = tempfile::tempdir_in(".").map_err(|e| Failure::request(format!("no folder can be made here: {e}")))?;
    let url = args.store.clone().unwrap_or_else(|| here.path().display().to_string());
    let current = std::env::current_dir().map_err(Failure::request)?;
    let url = normalize_url(&url, &current).map_err(Failure::request)?;
    let report = measure(&args, &url, bytes).await?;
    report.print(args.output);
    Ok(0)
}

/// Ranks that save and load at once.
fn ranks(args: &BenchStoreArgs) -> u32 {
    args.ranks.unwrap_or(2)
}

pub(super) fn store_failure(error: &StoreError) -> Failure {
    Failure::job(chain(error))
}

async fn measure(args: &BenchStoreArgs, url: &str, bytes: u64) -> Result<Report, Failure> {
    let ours = ours::Ours::open(url, bytes).map_err(|e| store_failure(&e))?;
    // Names that no job of the store has.
    let run = uuid::Uuid::new_v4().simple().to_string()[..12].to_owned();
    let plain = Plain::open(url, &run)?;
    let shape = ours.shape(ranks(args));
    let mut report = Report::new(url, bytes, ranks(args), args.rounds);
    let mut buffers = shape.buffers();
    for round in 0..args.rounds {
        let name = format!("bench-{run}-{round}");
        // What one side leaves the disk to do falls into the other's time, so each goes first in turn.
        let first = round % 2 == 1;
        if first {
            report.save.plain.push(plain.write(&shape).await?);
        }
        let (began, saved) = (Instant::now(), ours.save(&name, &shape).await.map_err(|e| store_failure(&e))?);
        report.save.ours.push(began.elapsed().as_secs_f64());
        if !first {
            report.save.plain.push(plain.write(&shape).await?);
        }
        loads((&ours, &plain), &saved, first, &mut buffers, &mut report).await?;
        ours.remove(&name).await.map_err(|e| store_failure(&e))?;
    }
    plain.remove().await?;
    drop((buffers, shape));
    for (from, to) in RESHARDS {
        report.reshards.push(reshard(&ours, &run, (from, to), args.rounds).await?);
    }
    report.rates = tokio::task::block_in_place(Rates::measure)?;
    if args.peer {
        report.peer = Some(tokio::task::block_in_place(|| peer(args, url, bytes))?);
    }
    Ok(report)
}

async fn loads(
    (ours, plain): (&ours::Ours, &Plain),
    saved: &Saved,
    plain_first: bool,
    buffers: &mut Vec<AlignedBuffer>,
    report: &mut Report,
) -> Result<(), Failure> {
    for (cold, pair) in [(true, &mut report.cold), (false, &mut report.warm)] {
        if !cold && !plain.has_cache() {
            continue;
        }
        if plain_first {
            pair.plain.push(plain.read(buffers, cold, false).await?);
        }
        ours.prepare(saved, cold)?;
        let (seconds, load) = ours.load(saved, buffers).await.map_err(|e| store_failure(&e))?;
        pair.ours.push(seconds);
        if !plain_first {
            pair.plain.push(plain.read(buffers, cold, false).await?);
        }
        if cold {
            report.load = load;
        } else {
            report.warm_hashed.push(plain.read(buffers, cold, true).await?);
        }
    }
    Ok(())
}

/// Loads what `from` ranks saved at `to` ranks, in turn with what `to` ranks saved.
async fn reshard(ours: &ours::Ours, run: &str, (from, to): (u32, u32), rounds: usize) -> Result<Reshard, Failure> {
    let (first, second) = (format!("bench-{run}-from"), format!("bench-{run}-to"));
    let (mut same, mut across, mut last) = (vec![], vec![], LoadReport::default());
    let saved = ours.save(&first, &ours.shape(from)).await.map_err(|e| store_failure(&e))?;
    let base = ours.save(&second, &ours.shape(to)).await.map_err(|e| store_failure(&e))?;
    let mut buffers = ours.shape(to).buffers();
    for _ in 0..rounds {
        for (checkpoint, times) in [(&base, &mut same), (&saved, &mut across)] {
            ours.prepare(checkpoint, true)?;
            let (seconds, load) = ours.load(checkpoint, &mut buffers).await.map_err(|e| store_failure(&e))?;
            times.push(seconds);
            last = load;
        }
    }
    for name in [&first, &second] {
        ours.remove(name).await.map_err(|e| store_failure(&e))?;
    }
    Ok(Reshard { from, to, times: Pair { ours: across, plain: same }, over_read: last.over_read() })
}

/// Bytes a second of BLAKE3 over blocks and of a copy, each on one thread; the best of five.
/// The same bytes by PyTorch's distributed checkpoint, and Orbax.
fn peer(args: &BenchStoreArgs, url: &str, bytes: u64) -> Result<Value, Failure> {
    let Some(root) = plain::folder(url) else {
        return Err(Failure::request("--peer writes to a local disk: give --store a folder"));
    };
    let folder = root.join("bench-peer");
    let output = Command::new(&args.python)
        .arg(&args.script)
        .arg("--folder")
        .arg(&folder)
        .args(["--bytes", &bytes.to_string(), "--ranks", &ranks(args).to_string()])
        .args(["--rounds", &args.rounds.to_string()])
        .output()
        .map_err(|e| Failure::request(format!("cannot run the peer with {}: {e}", args.python.display())))?;
    // What the script made is gone by now unless it failed half-way.
    let _ = std::fs::remove_dir_all(&folder);
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().rev().find_map(|line| serde_json::from_str::<Value>(line).ok()).ok_or_else(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = error.lines().rev().take(3).collect();
        Failure::request(format!(
            "the peer did not run (install it with: pip install torch numpy orbax-checkpoint jax; name its Python \
             with --python or CAIRN_PYTHON): {}",
            tail.into_iter().rev().collect::<Vec<_>>().join(" | ")
        ))
    })
}
