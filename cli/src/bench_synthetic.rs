//! The store's bookkeeping at the size of the largest open model: 405 billion parameters, three states, 16,384 ranks.
//!
//! Everything measured is the code that real saves run; only the hashes are made up and no tensor bytes exist. It shows
//! what a rank spends on planning, what the coordinator spends from the last receipt to the encoded manifest, what a
//! reader spends on it, and that finding the checkpoint to resume from does not depend on how long a job's history is.

use std::path::Path;
use std::time::Instant;

use checkpoint_store::{
    BlockHash, Chain, CheckpointRef, Digest, Event, HashList, Manifest, ObjectEntry, Reached, Receipt, Record, Run,
    ScalarState, Space, Stage, StateDecl, Store, commit_encoded, lay_out, layout, plan,
};
use proto::ids::{Epoch, Generation, JobName, Rank, Step, WorldSize};
use proto::spec::{Architecture, ModelSpec};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::args::{BenchStoreArgs, Output};
use crate::failure::Failure;
use crate::table::{self, say};

/// Records of the histories in which the newest checkpoint is looked up.
const HISTORIES: [u64; 3] = [10, 1_000, 10_000];
/// Times a lookup is measured; the median counts.
const LOOKUPS: usize = 9;
/// The targets: seconds, seconds, bytes.
const TARGETS: (f64, f64, u64) = (2.0, 1.0, 64 << 20);
const EPOCH: Epoch = Epoch::new(1);
const GENERATION: Generation = Generation::new(1);

/// The published shape of the largest Llama 3.1.
fn model() -> ModelSpec {
    ModelSpec {
        architecture: Architecture::Llama,
        hidden_size: 16_384,
        num_hidden_layers: 126,
        num_attention_heads: 128,
        num_key_value_heads: 8,
        head_dim: 128,
        intermediate_size: 53_248,
        vocab_size: 128_256,
        tie_word_embeddings: false,
        rope_theta: Some(500_000.0),
        rms_norm_eps: Some(1e-5),
        initializer_range: 0.02,
        max_position_embeddings: None,
        layer_norm_epsilon: None,
    }
}

/// Workers that save, unless said otherwise.
const RANKS: u32 = 16_384;

pub(crate) fn run(args: &BenchStoreArgs) -> Result<u8, Failure> {
    tokio::runtime::Handle::current().block_on(measure(args))
}

async fn measure(args: &BenchStoreArgs) -> Result<u8, Failure> {
    let job = JobName::new("synthetic").map_err(Failure::job)?;
    let space = Space::of_model(&model()).map_err(Failure::job)?;
    let ranks = args.ranks.unwrap_or(RANKS);
    let world = WorldSize::new(ranks).ok_or_else(|| Failure::request("--ranks must be at least 1"))?;
    let mut line = json!({
        "event": "bench_store_synthetic", "parameters": space.elements(), "blocks": space.blocks(), "ranks": ranks,
    });
    let (wire, save_plans) = receipts(&job, &space, world)?;
    line["receipt_bytes"] = json!(wire.iter().map(Vec::len).max());
    let manifest = committed(&job, &space, &wire, args.kept, &mut line).await?;
    let load_plans = load_plans(&manifest, world);
    let each: Vec<f64> = save_plans.iter().zip(&load_plans).map(|(save, load)| save + load).collect();
    line["plan_seconds"] = json!({"max": most(&each), "median": median(each.clone())});
    drop(manifest);
    line["lookups"] = lookups(&job, args.kept).await?;
    line["peak_memory_bytes"] = json!(peak_memory());
    let missed = judge(&line);
    if args.output == Output::Json {
        line["missed"] = json!(missed);
        say!("{line}");
    } else {
        print(&line);
    }
    if missed.is_empty() { Ok(0) } else { Err(Failure::job(format!("over the target: {}", missed.join(", ")))) }
}

/// The receipts of all ranks as they come over the wire, and what each rank spends on planning its object.
fn receipts(job: &JobName, space: &Space, world: WorldSize) -> Result<(Vec<Vec<u8>>, Vec<f64>), Failure> {
    let scalar = ScalarState { step: Step::new(5_000), ..ScalarState::start(7, 100_000) };
    let (mut wire, mut seconds) = (Vec::with_capacity(world.count()), Vec::with_capacity(world.count()));
    for rank in world.ranks() {
        let began = Instant::now();
        let (states, shard) = (StateDecl::adamw(), space.shard(rank, world));
        let runs: Vec<Run> = (0..states.len()).map(|state| Run { state, elements: shard.clone() }).collect();
        let (header, extents) = lay_out(space, &states, &runs)?;
        let body: u64 = extents.iter().map(|e| e.elements * 4).sum();
        let path = layout::object(job, scalar.step, GENERATION, rank, Uuid::new_v4());
        let object = ObjectEntry { path, bytes: header.len() as u64 + body, extents };
        seconds.push(began.elapsed().as_secs_f64());
        let blocks = space.shard_blocks(rank, world);
        let hash = |state: usize, block: u64| BlockHash::of(&[block.to_le_bytes(), state.to_le_bytes()].concat());
        let hashes = (0..states.len()).map(|state| HashList(blocks.clone().map(|b| hash(state, b)).collect()));
        let receipt = Receipt {
            job: job.clone(),
            generation: GENERATION,
            rank,
            world_size: world,
            shard: (shard.start, shard.end),
            scalar: scalar.clone(),
            hashes: hashes.collect(),
            states,
            object: (!blocks.is_empty()).then_some(object),
            references: vec![],
            stages: stages(rank, body),
        };
        wire.push(receipt.to_bytes()?);
    }
    Ok((wire, seconds))
}

/// Times as a real save has them, a little different on every rank.
fn stages(rank: Rank, bytes: u64) -> Vec<Stage> {
    let shift = f64::from(rank.get() % 97) / 1e4;
    vec![
        Stage::new("capture", 0.0, 0.05 + shift, bytes),
        Stage::new("hash", 0.05 + shift, 0.08 + shift, bytes),
        Stage::new("parity", 0.14, 0.1 + shift, bytes / 7),
        Stage::new("upload", 0.25 + shift, 2.0 + 3.0 * shift, bytes),
    ]
}

/// From receipts to a committed manifest and back, each part timed.
async fn committed(
    job: &JobName,
    space: &Space,
    wire: &[Vec<u8>],
    kept: usize,
    line: &mut Value,
) -> Result<Manifest, Failure> {
    let (store, began) = (Store::memory(), Instant::now());
    let read: Result<Vec<Receipt>, _> = wire.iter().map(|bytes| Receipt::from_bytes(bytes)).collect();
    let receipts = read?;
    let parsed = began.elapsed().as_secs_f64();
    let scalar = receipts.first().map(|r| r.scalar.clone()).ok_or_else(|| Failure::request("no ranks"))?;
    let mut manifest = Manifest::assemble(space, scalar, receipts).map_err(Failure::job)?;
    let assembled = began.elapsed().as_secs_f64();
    manifest.timeline.set_commit(assembled, 0);
    let encoded = manifest.encode()?;
    let total = began.elapsed().as_secs_f64();
    line["commit_seconds"] = json!({
        "total": total, "receipts": parsed, "assemble": assembled - parsed, "encode": total - assembled,
    });
    line["manifest_bytes"] = json!({"stored": encoded.bytes.len(), "unpacked": encoded.unpacked});
    let bytes = encoded.bytes.clone();
    let mut chain = history(&store, job, 2 * kept as u64, kept).await?;
    let began = Instant::now();
    let mut reached = Reached::default();
    let committed = commit_encoded(&mut chain, &manifest, encoded, EPOCH, Uuid::new_v4(), &mut reached).await;
    committed.map_err(Failure::job)?;
    line["record_seconds"] = json!(began.elapsed().as_secs_f64());
    drop((chain, store));
    let began = Instant::now();
    let hash = BlockHash::of(&bytes);
    let read = Manifest::parse("the manifest", &bytes)?;
    line["parse_seconds"] = json!(began.elapsed().as_secs_f64());
    line["hash"] = json!(hash);
    if read != manifest {
        return Err(Failure::job("the manifest does not read back as it was written"));
    }
    Ok(read)
}

/// What each rank spends on planning the load of its own shard.
fn load_plans(manifest: &Manifest, world: WorldSize) -> Vec<f64> {
    let one = |rank| {
        let began = Instant::now();
        let shard = manifest.space.shard(rank, world);
        let reads: usize = (0..manifest.states.len()).map(|state| plan(manifest, state, shard.clone()).len()).sum();
        std::hint::black_box(reads);
        began.elapsed().as_secs_f64()
    };
    world.ranks().map(one).collect()
}

/// A chain of so many records that keeps at most `kept` checkpoints.
async fn history(store: &Store, job: &JobName, records: u64, kept: usize) -> Result<Chain, Failure> {
    let submitted = Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
    let first = Record::new(EPOCH, Generation::ZERO, submitted);
    let mut chain = Chain::create(store, job, first).await.map_err(Failure::job)?;
    let formed = Event::Generation {
        generation: GENERATION,
        world_size: WorldSize::ONE,
        members: vec![],
        start: None,
        memory: None,
        identity: "cpu".into(),
        fingerprint: "data".into(),
    };
    chain.append(Record::new(EPOCH, GENERATION, formed)).await.map_err(Failure::job)?;
    for step in 1.. {
        let checkpoints = &chain.history().checkpoints;
        let event = match checkpoints.first().filter(|_| checkpoints.len() >= kept.max(1)) {
            Some(oldest) => Event::Deleted { manifest: oldest.checkpoint.manifest.clone() },
            None => Event::Committed(reference(step)),
        };
        if chain.history().records >= records {
            break;
        }
        chain.append(Record::new(EPOCH, GENERATION, event)).await.map_err(Failure::job)?;
    }
    Ok(chain)
}

fn reference(step: u64) -> CheckpointRef {
    let manifest = layout::manifest_name(Step::new(step), GENERATION, Uuid::from_u128(u128::from(step)));
    let digest = Digest::of(&step.to_le_bytes());
    CheckpointRef {
        step: Step::new(step),
        generation: GENERATION,
        hash: BlockHash::of(manifest.as_bytes()),
        manifest,
        digest,
        bytes: 1 << 40,
    }
}

/// Finding a job's newest checkpoint in histories of several lengths, in memory and on disk.
async fn lookups(job: &JobName, kept: usize) -> Result<Value, Failure> {
    let mut rows = vec![];
    for records in HISTORIES {
        let memory = Store::memory();
        drop(history(&memory, job, records, kept).await?);
        let folder = tempfile::tempdir().map_err(Failure::job)?;
        copy(&memory, job, folder.path()).await?;
        let disk = Store::open_existing(&format!("file://{}", folder.path().display()))?;
        for (name, store) in [("memory", memory), ("file", disk)] {
            let (mut seconds, mut checkpoints) = (vec![], 0);
            for _ in 0..LOOKUPS {
                let began = Instant::now();
                let chain = Chain::load(&store, job).await?.ok_or_else(|| Failure::job("the chain is gone"))?;
                let newest = chain.history().newest_good().map(|newest| newest.step);
                checkpoints = chain.history().checkpoints.len();
                seconds.push(began.elapsed().as_secs_f64());
                if newest.is_none() || chain.history().records != records {
                    return Err(Failure::job(format!("{records} records do not read back")));
                }
            }
            let seconds = median(seconds);
            rows.push(json!({"store": name, "records": records, "kept": checkpoints, "seconds": seconds}));
        }
    }
    Ok(json!(rows))
}

/// Copies a job's records to a folder, without the syncs that a store makes: only reading is measured.
async fn copy(store: &Store, job: &JobName, folder: &Path) -> Result<(), Failure> {
    let records = layout::records(job);
    std::fs::create_dir_all(folder.join(&records)).map_err(Failure::job)?;
    let mut after: Option<String> = None;
    loop {
        let page = store.list(&records, after.as_deref(), 1_000).await?;
        for record in &page {
            let bytes = store.get(&record.path, 8 << 20).await?;
            std::fs::write(folder.join(&record.path), bytes).map_err(Failure::job)?;
        }
        match page.last() {
            Some(last) if page.len() == 1_000 => after = Some(last.path.clone()),
            _ => return Ok(()),
        }
    }
}

/// The most memory this process ever had, from the kernel.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The targets that were missed.
fn judge(line: &Value) -> Vec<&'static str> {
    let mut missed = vec![];
    let over = |value: &Value, target: f64| value.as_f64().is_none_or(|value| value > target);
    if over(&line["plan_seconds"]["max"], TARGETS.0) {
        missed.push("plan of a rank, 2 s");
    }
    if over(&line["commit_seconds"]["total"], TARGETS.1) {
        missed.push("commit, 1 s");
    }
    if over(&line["manifest_bytes"]["stored"], TARGETS.2 as f64) {
        missed.push("manifest, 64 MiB");
    }
    missed
}

fn print(line: &Value) {
    let seconds = |value: &Value| format!("{:.1} ms", value.as_f64().unwrap_or(f64::NAN) * 1e3);
    let bytes = |value: &Value| table::bytes(value.as_u64().unwrap_or(0));
    say!("{} parameters in {} blocks, {} ranks, three states", line["parameters"], line["blocks"], line["ranks"]);
    let commit = &line["commit_seconds"];
    let row = |name: &str, value: String, target: &str| vec![name.to_string(), value, target.to_string()];
    let rows = [
        row("plan of a rank, slowest", seconds(&line["plan_seconds"]["max"]), "2 s"),
        row("plan of a rank, median", seconds(&line["plan_seconds"]["median"]), ""),
        row("commit: receipts read", seconds(&commit["receipts"]), ""),
        row("commit: assembled, checked, digest", seconds(&commit["assemble"]), ""),
        row("commit: encoded", seconds(&commit["encode"]), ""),
        row("commit in all", seconds(&commit["total"]), "1 s"),
        row("manifest and record into memory", seconds(&line["record_seconds"]), ""),
        row("manifest parsed and checked", seconds(&line["parse_seconds"]), ""),
        row("manifest stored", bytes(&line["manifest_bytes"]["stored"]), "64 MiB"),
        row("manifest unpacked", bytes(&line["manifest_bytes"]["unpacked"]), ""),
        row("receipt, largest", bytes(&line["receipt_bytes"]), ""),
        row("peak memory of all of this", bytes(&line["peak_memory_bytes"]), ""),
    ];
    table::print(&["", "MEASURED", "TARGET"], &rows);
    say!();
    let lookups = line["lookups"].as_array().map_or(&[][..], Vec::as_slice);
    let row = |r: &Value| {
        let text = |key: &str| r[key].as_str().map_or_else(|| r[key].to_string(), str::to_owned);
        vec![text("store"), text("records"), text("kept"), seconds(&r["seconds"])]
    };
    let rows: Vec<Vec<String>> = lookups.iter().map(row).collect();
    table::print(&["STORE", "RECORDS", "KEPT", "NEWEST FOUND IN"], &rows);
}

fn most(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
