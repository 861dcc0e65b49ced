//! A stand-in for the node agent and the coordinator: it starts real workers as threads of this process, speaks the
//! wire contract over a Unix socket, stores what they capture, and commits it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use checkpoint_store::{
    BlockHash, Capture, Chain, CheckpointRef, Dtype, Event, Manifest, Receipt, Record, ShardSource, Store, commit,
    hash_blocks, upload_shard,
};
use futures::StreamExt;
use proto::ids::{Epoch, Generation, WorldSize};
use proto::spec::JobSpec;
use proto::wire::node_server::{Node, NodeServer};
use proto::wire::{self, WorkerPhase, agent_command, worker_message};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};
use worker::data::{ElementType, IndexedWriter};

type Commands = mpsc::Sender<Result<wire::AgentCommand, Status>>;
type Heard = (String, worker_message::Body);

const PATIENCE: Duration = Duration::from_mins(1);

struct Service {
    heard: mpsc::Sender<Heard>,
    commands: Arc<Mutex<HashMap<String, Commands>>>,
}

#[tonic::async_trait]
impl Node for Service {
    type AttachStream = std::pin::Pin<Box<dyn futures::Stream<Item = Result<wire::AgentCommand, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<wire::WorkerMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut messages = request.into_inner();
        let first = messages.next().await.unwrap().unwrap().body.unwrap();
        let worker_message::Body::Hello(worker) = first.clone() else { panic!("no hello: {first:?}") };
        let (sender, commands) = mpsc::channel(16);
        self.commands.lock().unwrap().insert(worker.clone(), sender);
        let heard = self.heard.clone();
        heard.send((worker.clone(), first)).await.unwrap();
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                let _ = heard.send((worker.clone(), message.body.unwrap())).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(commands))))
    }
}

/// What a generation came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The committed state of the last step.
    pub(crate) checkpoint: CheckpointRef,
    /// Losses by step, as rank 0 reported them.
    pub(crate) losses: Vec<(u64, f64)>,
    /// Held-out losses by step.
    pub(crate) validation: Vec<(u64, f64)>,
}

pub(crate) struct Agent {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) spec: JobSpec,
    heard: mpsc::Receiver<Heard>,
    commands: Arc<Mutex<HashMap<String, Commands>>>,
    chain: Chain,
    pub(crate) workers: Vec<String>,
    next: u128,
    states: HashMap<String, wire::WorkerState>,
    /// The newest snapshot of each worker, as it lay in its slot.
    held: HashMap<String, (u64, Vec<u8>)>,
    /// The step in memory that the next generation starts from.
    pub(crate) memory: Option<wire::MemoryStart>,
}

impl Agent {
    /// An agent with a fresh store and a data set, for a job changed by `change`.
    pub(crate) async fn new(change: impl FnOnce(&mut JobSpec)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_data(&folder.path().join("train"), 30_000);
        write_data(&folder.path().join("held"), 2_000);
        let mut spec = job(folder.path());
        change(&mut spec);
        let (sender, heard) = mpsc::channel(1024);
        let commands = Arc::new(Mutex::new(HashMap::new()));
        let listener = tokio::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        let service = NodeServer::new(Service { heard: sender, commands: commands.clone() });
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        let store = Store::open(&spec.checkpoint.store).unwrap();
        let submitted = Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
        let record = Record::new(Epoch::new(1), Generation::ZERO, submitted);
        let chain = Chain::create(&store, &spec.name, record).await.unwrap();
        let (states, held) = (HashMap::new(), HashMap::new());
        Self { folder, spec, heard, commands, chain, workers: vec![], next: 0, states, held, memory: None }
    }

    /// Starts workers and waits until each is ready, or has failed.
    pub(crate) async fn start(&mut self, workers: usize, threads: u32) {
        for _ in 0..workers {
            self.next += 1;
            let id = uuid::Uuid::from_u128(self.next).to_string();
            let options = worker::Options {
                agent_socket: self.folder.path().join("socket"),
                worker: id.parse().unwrap(),
                job: self.spec.name.clone(),
            };
            std::thread::spawn(move || worker::run(options));
            self.workers.push(id);
        }
        let mut ready = 0;
        while ready < workers {
            let (worker, body) = self.hear().await;
            match body {
                worker_message::Body::Hello(_) => self.prepare(&worker, threads).await,
                worker_message::Body::State(state) if state.phase() != WorkerPhase::Starting => ready += 1,
                _ => {}
            }
        }
    }

    async fn prepare(&self, worker: &str, threads: u32) {
        let slots = self.folder.path().join(worker);
        std::fs::create_dir(&slots).unwrap();
        let prepare = wire::Prepare {
            spec: serde_json::to_vec(&self.spec).unwrap(),
            threads,
            slots: slots.display().to_string(),
            ring_host: "127.0.0.1".into(),
            slot_budget: 0,
            place: 0,
        };
        self.tell(worker, agent_command::Body::Prepare(prepare)).await;
    }

    pub(crate) async fn tell(&self, worker: &str, body: agent_command::Body) {
        let commands = self.commands.lock().unwrap()[worker].clone();
        commands.send(Ok(wire::AgentCommand { body: Some(body) })).await.unwrap();
    }

    /// The next message of any worker.
    pub(crate) async fn hear(&mut self) -> Heard {
        let heard = tokio::time::timeout(PATIENCE, self.heard.recv()).await.expect("a message in time").unwrap();
        if let worker_message::Body::State(state) = &heard.1 {
            self.states.insert(heard.0.clone(), state.clone());
        }
        heard
    }

    pub(crate) fn state(&self, worker: &str) -> &wire::WorkerState {
        &self.states[worker]
    }

    /// Ends a worker as a lost process would.
    pub(crate) fn drop_worker(&mut self, index: usize) {
        let worker = self.workers.remove(index);
        self.commands.lock().unwrap().remove(&worker);
    }

    /// Announces a generation to all workers.
    pub(crate) async fn announce(&mut self, generation: u64, start: Option<&CheckpointRef>, stop_at: u64, stop: bool) {
        let workers = self.workers.iter().zip(self.workers.iter().cycle().skip(1)).zip(0..);
        let placement = |((worker, next), rank): ((&String, &String), u32)| wire::Placement {
            worker: worker.clone(),
            rank,
            next: self.states[next].ring_address.clone(),
        };
        let announcement = wire::Announcement {
            generation,
            world_size: self.workers.len() as u32,
            placements: workers.map(placement).collect(),
            key: vec![9; 32],
            start: start.map(|start| serde_json::to_vec(start).unwrap()).unwrap_or_default(),
            stop_at,
            stop,
            memory: self.memory.clone(),
            ..Default::default()
        };
        for (rank, worker) in self.workers.clone().iter().enumerate() {
            let run = wire::WorkerRun { rank: rank as u32, announcement: Some(announcement.clone()) };
            self.tell(worker, agent_command::Body::Run(run)).await;
        }
    }

    /// Sees a generation through until all workers have stopped and its last state is committed. Holds the workers.
    pub(crate) async fn finish(
        &mut self,
        generation: u64,
        start: Option<&CheckpointRef>,
    ) -> Result<Outcome, wire::Failure> {
        let world = self.workers.len();
        let formed = Event::Generation {
            generation: Generation::new(generation),
            world_size: WorldSize::new(world as u32).unwrap(),
            members: vec![],
            start: start.cloned(),
            memory: None,
            identity: "cpu".into(),
            fingerprint: "data".into(),
        };
        self.chain.append(Record::new(Epoch::new(1), Generation::new(generation), formed)).await.unwrap();
        let (mut receipts, mut stopped) = (Vec::<Receipt>::new(), Vec::new());
        let (mut losses, mut validation) = (vec![], vec![]);
        while stopped.len() < world {
            let (worker, body) = self.hear().await;
            match body {
                worker_message::Body::State(state) if state.phase() == WorkerPhase::Failed => {
                    return Err(state.failure.unwrap());
                }
                worker_message::Body::State(state) if state.phase() == WorkerPhase::Stopped => stopped.push(state),
                worker_message::Body::Step(step) => {
                    losses.push((step.step, step.loss));
                    validation.extend(step.validation_loss.map(|loss| (step.step, loss)));
                }
                worker_message::Body::Restore(restore) => self.restore(&worker, restore).await,
                worker_message::Body::Captured(captured) => {
                    let slot = std::fs::read(self.slot(&worker, captured.slot)).unwrap();
                    self.held.insert(worker.clone(), (captured.step, slot));
                    if captured.store {
                        receipts.push(self.store(&worker, &captured).await);
                    } else {
                        self.check(&worker, &captured);
                    }
                    self.tell(&worker, agent_command::Body::SlotFree(captured.slot)).await;
                }
                _ => {}
            }
        }
        let step = stopped[0].step.unwrap();
        assert!(stopped.iter().all(|state| state.step == Some(step)), "all stop after the same step");
        receipts.retain(|receipt| receipt.step().get() == step);
        assert_eq!(receipts.len(), world, "every rank captured the last step before it said so");
        let (space, scalar) =
            (checkpoint_store::Space::of_model(&self.spec.model).unwrap(), receipts[0].scalar.clone());
        let manifest = Manifest::assemble(&space, scalar, receipts).unwrap();
        let checkpoint = commit(&mut self.chain, &manifest, Epoch::new(1), uuid::Uuid::new_v4()).await.unwrap();
        for worker in self.workers.clone() {
            self.hold(&worker, generation).await;
        }
        Ok(Outcome { checkpoint, losses, validation })
    }

    /// Breaks a worker off and waits until it is ready.
    pub(crate) async fn hold(&mut self, worker: &str, generation: u64) {
        self.tell(worker, agent_command::Body::Hold(generation)).await;
        while self.state(worker).phase() != WorkerPhase::Ready {
            self.hear().await;
        }
    }

    fn slot(&self, worker: &str, slot: u32) -> PathBuf {
        self.folder.path().join(worker).join(format!("slot-{slot}"))
    }

    /// Fills a slot with the newest snapshot of the same worker.
    async fn restore(&self, worker: &str, restore: wire::Restore) {
        let (step, bytes) = &self.held[worker];
        // The worker has mapped the file: it is written in place.
        let mut file = std::fs::OpenOptions::new().write(true).open(self.slot(worker, restore.slot)).unwrap();
        std::io::Write::write_all(&mut file, bytes).unwrap();
        let (generation, source) = (restore.generation, "memory".into());
        let answer = wire::Restored { generation, step: *step, source, ..Default::default() };
        self.tell(worker, agent_command::Body::Restored(answer)).await;
    }

    /// A snapshot in memory is what its hashes say, whatever training has done since.
    fn check(&self, worker: &str, captured: &wire::Captured) -> ShardSource {
        let path = self.slot(worker, captured.slot);
        let capture = Capture::from_json(&captured.capture).unwrap();
        let block = capture.space.block_elements();
        let source = capture.source(std::fs::read(path).unwrap()).unwrap();
        for state in &source.states {
            assert_eq!(state.hashes.0, hash_blocks(&state.bytes, block, Dtype::F32), "step {}", captured.step);
        }
        source
    }

    async fn store(&self, worker: &str, captured: &wire::Captured) -> Receipt {
        let source = self.check(worker, captured);
        let store = Store::open(&self.spec.checkpoint.store).unwrap();
        upload_shard(&store, &source, uuid::Uuid::new_v4()).await.unwrap()
    }
}

/// Documents of arithmetic sequences: something a small model learns.
fn write_data(prefix: &Path, tokens: usize) {
    let mut writer = IndexedWriter::create(prefix, ElementType::U16).unwrap();
    for document in 0..tokens / 100 {
        let row: Vec<u32> = (0..100).map(|i| ((document * 31 + i * (1 + document % 7)) % 256) as u32).collect();
        writer.push(&row).unwrap();
        writer.end_document();
    }
    writer.finish().unwrap();
}

/// About 250 thousand parameters, so four blocks, and six micro-batches a step.
fn job(folder: &Path) -> JobSpec {
    let text = r#"
        name = "small"
        [model]
        hidden_size = 96
        num_hidden_layers = 2
        num_attention_heads = 4
        num_key_value_heads = 2
        intermediate_size = 256
        vocab_size = 256
        tie_word_embeddings = true
        [data]
        train = "train"
        validation = "held"
        [training]
        steps = 10
        sequence_length = 32
        global_batch = 6
        micro_batch = 1
        validate_every = 5
        validate_sequences = 7
        [optimizer]
        learning_rate = 3e-3
        [schedule]
        warmup_steps = 2
        [checkpoint]
        store = "store"
        every_steps = 4
        [fault]
        heartbeat = 0.1
        suspicion = 0.5
        collective = 10
        hang = 20
        restart = 30
    "#;
    JobSpec::parse("test", text, folder, &std::collections::BTreeMap::new()).unwrap()
}
