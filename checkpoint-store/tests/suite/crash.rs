//! Saves, commits and collections on a local disk, crashed after any operation with what was not synced lost in any
//! part: each recovery finds the newest acknowledged checkpoint, nothing torn, and clears what is left over.
//!
//! `CAIRN_CRASH_POINTS` sets how many crashes are tried (3,000 by default), `CAIRN_CRASH_SEED` where they begin.
//! A seed decides everything but the UUIDs in names; where two of those share a folder a run has other operations, so
//! a replay may need a few tries.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use checkpoint_store::*;
use tempfile::TempDir;

use crate::crash_disk::{Dice, Disk};
use crate::support::*;

/// Crashes tried on one recorded run.
const POINTS_A_RUN: usize = 100;

/// What was done, and after how many operations which step's commit was acknowledged.
#[derive(Default)]
struct Log {
    ops: Vec<DiskOp>,
    acknowledged: Vec<(usize, u64)>,
}

type Shared = Arc<Mutex<Log>>;

/// A folder in memory where there is one: a real disk would only make the model's work slow.
fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

fn url(folder: &Path) -> String {
    normalize_url(".", folder).unwrap()
}

fn witnessed(folder: &Path) -> (Store, Shared) {
    let log = Shared::default();
    let told = Arc::clone(&log);
    let witness: Witness = Arc::new(move |op| told.lock().unwrap().ops.push(op));
    (Store::open_witnessed(&url(folder), witness).unwrap(), log)
}

fn acknowledge(log: &Shared, step: u64) {
    let mut log = log.lock().unwrap();
    let at = log.ops.len();
    log.acknowledged.push((at, step));
}

/// One block in a small object, or several in objects that are written with direct output.
fn shape(dice: &mut Dice) -> Space {
    if dice.below(10) == 0 { space(&[100_000, 30_001]) } else { space(&[100, 7]) }
}

/// Saves from `step` on and collects, as a job does; some saves are left without a commit.
async fn saves(chain: &mut Chain, space: &Space, mut step: u64, count: usize, dice: &mut Dice, log: &Shared) {
    for _ in 0..count {
        step += 10;
        if dice.below(4) == 0 {
            let store = chain.store().clone();
            let (generation, size) = (chain.history().generation.get(), chain.history().world_size.unwrap().get());
            receipts(&store, space, generation, size, step).await;
            continue;
        }
        save(chain, space, step).await;
        acknowledge(log, step);
        if dice.below(2) == 0 {
            collect(chain, EPOCH, 1 + dice.below(2), &BTreeSet::new()).await.unwrap();
        }
    }
}

/// A job's beginning and a few saves.
async fn run(folder: &Path, space: &Space, dice: &mut Dice) -> Log {
    let (store, log) = witnessed(folder);
    let mut chain = running(&store, 1 + dice.below(2) as u32).await;
    saves(&mut chain, space, 0, 4, dice, &log).await;
    drop((chain, store));
    std::mem::take(&mut log.lock().unwrap())
}

/// Comes up on a disk after a crash, checks what must hold, and goes on with the job. `None` if there is no job yet.
async fn recover(folder: &Path, space: &Space, newest: Option<u64>, dice: &mut Dice) -> Result<Option<Log>, String> {
    let (store, log) = witnessed(folder);
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let chain = Chain::load(&store, &job()).await.map_err(|e| text(&e))?;
    let Some(mut chain) = chain.filter(|c| c.history().world_size.is_some()) else {
        return if newest.is_none() { Ok(None) } else { Err("the job is gone".into()) };
    };
    let found = chain.history().newest_good().map(|c| c.step.get());
    if found < newest {
        return Err(format!("step {newest:?} was acknowledged, the newest found is {found:?}"));
    }
    check(&chain).await?;
    sweep(&chain, &BTreeSet::new()).await.map_err(|e| text(&e))?;
    store.clear_leftovers("jobs").await.map_err(|e| text(&e))?;
    nothing_left_over(&chain, folder).await?;
    if let Some(step) = found {
        acknowledge(&log, step);
    }
    saves(&mut chain, space, found.unwrap_or(0) + 1_000, 2, dice, &log).await;
    check(&chain).await?;
    drop((chain, store));
    Ok(Some(std::mem::take(&mut log.lock().unwrap())))
}

/// Every checkpoint that can be seen is complete and right.
async fn check(chain: &Chain) -> Result<(), String> {
    for checkpoint in &chain.history().checkpoints {
        let step = checkpoint.checkpoint.step;
        let report = verify(chain.store(), chain.job(), &checkpoint.checkpoint).await;
        let report = report.map_err(|e| format!("checkpoint {step}: {e}"))?;
        if let Some(problem) = report.first_problem() {
            return Err(format!("checkpoint {step}: {problem}"));
        }
    }
    Ok(())
}

/// No temporary files, and no objects or manifests but those of checkpoints that can be seen.
async fn nothing_left_over(chain: &Chain, folder: &Path) -> Result<(), String> {
    let mut kept = BTreeSet::new();
    for checkpoint in &chain.history().checkpoints {
        let manifest = open_checkpoint(chain.store(), chain.job(), &checkpoint.checkpoint).await;
        let manifest = manifest.map_err(|e| e.to_string())?;
        kept.extend(manifest.objects.into_iter().map(|o| o.path));
        kept.insert(layout::manifest(chain.job(), &checkpoint.checkpoint.manifest));
    }
    let mut waiting = vec![folder.to_owned()];
    while let Some(next) = waiting.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(folder).unwrap().to_str().unwrap();
            if path.is_dir() {
                waiting.push(path);
            } else if name.contains("/.cairn-") || (!name.contains("/records/") && !kept.contains(name)) {
                return Err(format!("{name} is left over"));
            }
        }
    }
    Ok(())
}

/// Crashes somewhere in a log that began on `base`, and recovers; now and then crashes again in what follows.
async fn crash(base: &Path, log: &Log, space: &Space, dice: &mut Dice, depth: usize) -> Result<usize, String> {
    let at = dice.below(log.ops.len() + 1);
    let mut disk = Disk::of(base);
    for op in &log.ops[..at] {
        disk.apply(op);
    }
    let newest = log.acknowledged.iter().filter(|(when, _)| *when <= at).map(|(_, step)| *step).max();
    let after = folder();
    disk.crash(dice, after.path());
    // A copy to begin from, should this recovery be crashed in its turn.
    let again = (depth > 0 && dice.below(4) == 0).then(folder);
    if let Some(again) = &again {
        copy(after.path(), again.path());
    }
    let failed = |why: String| format!("crash after operation {at} of {}: {why}", log.ops.len());
    let next = recover(after.path(), space, newest, dice).await.map_err(failed)?;
    match (again, next) {
        (Some(again), Some(next)) => Ok(1 + Box::pin(crash(again.path(), &next, space, dice, depth - 1)).await?),
        _ => Ok(1),
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&to).unwrap();
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}

/// Tries `points` crashes; `happens` says which operations the disk really did. Returns how many were tried.
async fn campaign(seed: u64, points: usize, happens: fn(&DiskOp) -> bool) -> Result<usize, String> {
    let (mut tried, mut run_seed) = (0, seed);
    while tried < points {
        let mut dice = Dice(run_seed);
        let (base, empty) = (folder(), folder());
        let space = shape(&mut dice);
        let mut log = run(base.path(), &space, &mut dice).await;
        let keep: Vec<_> = log.ops.iter().map(happens).collect();
        for (when, _) in &mut log.acknowledged {
            *when = keep[..*when].iter().filter(|k| **k).count();
        }
        log.ops.retain(happens);
        let end = points.min(tried + POINTS_A_RUN);
        while tried < end {
            let failed = |why| format!("seed {run_seed}: {why} (replay with CAIRN_CRASH_SEED={run_seed})");
            tried += crash(empty.path(), &log, &space, &mut dice, 1).await.map_err(failed)?;
        }
        run_seed += 1;
    }
    Ok(tried)
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_crash_of_a_local_disk_leaves_whole_checkpoints() {
    let (seed, points) = (setting("CAIRN_CRASH_SEED", 1), setting("CAIRN_CRASH_POINTS", 3_000) as usize);
    let tried = campaign(seed, points, |_| true).await.unwrap_or_else(|why| panic!("{why}"));
    println!("{tried} crashes from seed {seed}");
    assert!(tried >= points);
}

/// The campaign finds what it is there to find: a sync left out.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_sync_is_caught() {
    let without_file_syncs = campaign(1, 1_000, |op| !matches!(op, DiskOp::SyncFile { .. })).await.unwrap_err();
    println!("no file synced: {without_file_syncs}");
    assert!(without_file_syncs.contains("is not valid") || without_file_syncs.contains("damaged"));
    let object_unsynced = |op: &DiskOp| !matches!(op, DiskOp::SyncFile { path } if path.contains("/objects/"));
    let error = campaign(1, 1_000, object_unsynced).await.unwrap_err();
    println!("no object synced: {error}");
    assert!(error.contains(": checkpoint "), "{error}");
    let records_folder = |op: &DiskOp| !matches!(op, DiskOp::SyncFolder { path } if path.ends_with("/records"));
    let error = campaign(1, 1_000, records_folder).await.unwrap_err();
    println!("the records' folder not synced: {error}");
    let lost = ["was acknowledged", "the job is gone", "is missing"];
    assert!(lost.iter().any(|sign| error.contains(sign)), "{error}");
    let without_new_folders = |op: &DiskOp| !matches!(op, DiskOp::SyncFolder { path } if path.matches('/').count() < 2);
    let error = campaign(1, 1_000, without_new_folders).await.unwrap_err();
    assert!(error.contains("the job is gone"), "{error}");
}
