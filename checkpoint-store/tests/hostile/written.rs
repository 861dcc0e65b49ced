//! What this build writes is accepted: the valid seeds, made anew. `CAIRN_WRITE_SEEDS=1` puts them into `fuzz/seeds`.

use bytes::Bytes;
use checkpoint_store::leader::LEADER_FORMAT;
use checkpoint_store::node_book::NODES_FORMAT;
use checkpoint_store::*;
use proto::ids::{Epoch, Generation, JobName, NodeName, Rank, Step, WorkerId, WorldSize};
use proto::spec::{JobSpec, Overrides};
use uuid::Uuid;

use crate::harness::folder;

const JOB_FILE: &str = r#"name = "tiny"
[model]
preset = "tiny"
[data]
train = "corpus/train"
[training]
steps = 20
global_batch = 8
micro_batch = 2
[optimizer]
betas = [0.9, 0.99]
clip_norm = false
[schedule]
kind = "wsd"
[resources]
workers = { min = 1, max = 4 }
[fault]
heartbeat = 0.5
"#;

fn job() -> JobName {
    JobName::new("tiny").unwrap()
}

fn source(rank: Rank, world_size: WorldSize) -> ShardSource {
    let space = hostile::small_space();
    let shard = space.shard(rank, world_size);
    let state = |decl: StateDecl| {
        let bytes = Bytes::from(vec![7; 4 * (shard.end - shard.start) as usize]);
        let hashes = HashList(hash_blocks(&bytes, space.block_elements(), decl.dtype));
        ShardState { decl, bytes, hashes }
    };
    let states = StateDecl::adamw().into_iter().map(state).collect();
    let scalar = ScalarState { step: Step::new(50), exponents: vec![-3, 4], ..ScalarState::start(7, 100) };
    ShardSource { job: job(), space, generation: Generation::new(2), rank, world_size, scalar, states }
}

async fn receipts(world: WorldSize) -> Vec<Receipt> {
    let mut receipts = vec![];
    for rank in world.ranks() {
        receipts.push(upload_shard(&Store::memory(), &source(rank, world), Uuid::nil()).await.unwrap());
    }
    receipts
}

fn records(checkpoint: CheckpointRef) -> Vec<Record> {
    let generation = Generation::new(2);
    let member =
        Member { node: NodeName::new("n1").unwrap(), worker: WorkerId::from_uuid(Uuid::nil()), rank: Rank::ZERO };
    let formed = Event::Generation {
        generation,
        world_size: WorldSize::ONE,
        members: vec![member],
        start: Some(checkpoint.clone()),
        memory: None,
        identity: "cpu".into(),
        fingerprint: "data".into(),
    };
    let manifest = checkpoint.manifest.clone();
    let events = [
        Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: Some(Step::new(9)) },
        Event::Led { epoch: Epoch::new(3), leader: "127.0.0.1:1 on host".into() },
        formed,
        Event::Committed(checkpoint.clone()),
        Event::Quarantined { manifest: manifest.clone(), reason: "its block 3".into() },
        Event::Deleted { manifest },
        Event::Finished { step: Step::new(50), digest: checkpoint.digest, loss: Some(0.25) },
        Event::Failed { reason: "out of memory".into(), code: 3 },
    ];
    events.into_iter().map(|event| Record::new(Epoch::new(3), generation, event)).collect()
}

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

/// The name of each target, with inputs that it must accept.
async fn written() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let (one, two) = (receipts(WorldSize::ONE).await, receipts(WorldSize::new(2).unwrap()).await);
    let whole = source(Rank::ZERO, WorldSize::ONE);
    let manifest = |receipts: &[Receipt]| {
        Manifest::assemble(&hostile::small_space(), receipts[0].scalar.clone(), receipts.to_vec()).unwrap()
    };
    let both = |m: Manifest| [m.to_json().unwrap().to_vec(), m.encode().unwrap().bytes.to_vec()];
    let manifests = [manifest(&one), manifest(&two)].map(both).concat();
    let checkpoint = CheckpointRef {
        step: Step::new(50),
        generation: Generation::new(2),
        manifest: layout::manifest_name(Step::new(50), Generation::new(2), Uuid::nil()),
        hash: BlockHash::of(&manifests[0]),
        digest: manifest(&one).digest,
        bytes: manifest(&one).bytes(),
    };
    let mut records = records(checkpoint);
    let mut history = History::default();
    history.apply(&Record::new(Epoch::new(1), Generation::ZERO, records[0].event.clone())).unwrap();
    history.records = 256;
    let mut folding = records[1].clone();
    (folding.number, folding.folded) = (256, Some(Box::new(history)));
    records.push(folding);
    let capture = Capture {
        format: CAPTURE_FORMAT,
        job: job(),
        generation: whole.generation,
        rank: whole.rank,
        world_size: whole.world_size,
        space: whole.space.clone(),
        scalar: whole.scalar.clone(),
        states: whole.states.iter().map(|s| s.decl.clone()).collect(),
        hashes: whole.states.iter().map(|s| s.hashes.clone()).collect(),
        stages: vec![],
    };
    let (parts, entry) = whole.layout(Uuid::nil()).unwrap().unwrap();
    let leader = LeaderRecord {
        format: LEADER_FORMAT,
        epoch: Epoch::new(3),
        address: Some("127.0.0.1:7000".into()),
        host: "host/boot".into(),
        token: "t".into(),
    };
    let drained = ["gpu-1", "gpu-2"].map(|name| NodeName::new(name).unwrap()).into();
    let nodes = NodesRecord { format: NODES_FORMAT, number: 7, epoch: Epoch::new(3), drained };
    let paths = [layout::record(&job(), 7), entry.path, layout::spec(&job()), layout::beat(Epoch::new(1), 2)];
    let urls = ["file:///data/cairn", "s3://bucket/a/b/", "../store", "memory://", "az://container/x%20y", "gs://b"];
    let spec = JobSpec::parse("job.toml", JOB_FILE, "/jobs".as_ref(), &Overrides::new()).unwrap();
    vec![
        ("capture", vec![json(&capture)]),
        ("header", vec![parts[0][8..].to_vec()]),
        ("leader", vec![json(&leader)]),
        ("manifest", manifests.clone()),
        ("nodes", vec![json(&nodes)]),
        ("path", paths.map(String::into_bytes).to_vec()),
        ("receipt", one.iter().chain(&two).map(|receipt| receipt.to_bytes().unwrap()).collect()),
        ("record", records.iter().map(json).collect()),
        ("specification", vec![JOB_FILE.into(), json(&spec)]),
        ("url", urls.map(|url| url.as_bytes().to_vec()).to_vec()),
    ]
}

#[tokio::test]
async fn what_this_build_writes_is_accepted() {
    let write = std::env::var("CAIRN_WRITE_SEEDS").is_ok();
    for (name, inputs) in written().await {
        let (_, target) = hostile::TARGETS.into_iter().find(|(target, _)| *target == name).unwrap();
        for (number, bytes) in inputs.iter().enumerate() {
            assert!(target(bytes), "{name} {number}: {}", String::from_utf8_lossy(bytes));
            if write {
                std::fs::create_dir_all(folder(name)).unwrap();
                std::fs::write(folder(name).join(format!("valid-{number}")), bytes).unwrap();
            }
        }
    }
}
