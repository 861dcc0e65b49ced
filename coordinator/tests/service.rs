//! A coordinator process in a test: a real store on disk, a real gRPC edge, and an agent made by hand.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use checkpoint_store::{Chain, Dtype, HashList, ScalarState, ShardSource, ShardState, Space, StateDecl, Store};
use coordinator::{CoordinatorError, Options, run};
use proto::auth::Token;
use proto::event::JobEvent;
use proto::ids::{Generation, JobName, Rank, Step, WorldSize};
use proto::spec::{JobSpec, Overrides};
use proto::wire::agent_message::Body as Say;
use proto::wire::cluster_client::ClusterClient;
use proto::wire::coordinator_message::Body as Hear;
use proto::wire::jobs_client::JobsClient;
use proto::wire::*;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

const WAIT: Duration = Duration::from_secs(20);

#[derive(Clone)]
struct Sign(Token);

impl tonic::service::Interceptor for Sign {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.0.sign(request)
    }
}

type Jobs = JobsClient<InterceptedService<Channel, Sign>>;

/// A coordinator under test.
struct Rig {
    address: SocketAddr,
    token: Token,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), CoordinatorError>>,
}

fn free_port() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn options(folder: &Path, listen: SocketAddr) -> Options {
    let token = Token::read_or_create(&folder.join("token"), [3; 32]).unwrap();
    Options {
        scope: coordinator::Scope::All,
        store_url: format!("file://{}", folder.join("store").display()),
        listen,
        token,
        security: proto::tls::Security::Loopback,
        host: "host/boot".into(),
        standby: false,
        allow_single_coordinator: false,
        admission: false,
        metrics: None,
    }
}

impl Rig {
    fn start(folder: &Path, address: SocketAddr) -> Self {
        let options = options(folder, address);
        let token = options.token.clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(run(options, async {
            let _ = stopped.await;
        }));
        Self { address, token, stop, task }
    }

    fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    fn jobs(&self) -> Jobs {
        JobsClient::with_interceptor(self.channel(), Sign(self.token.clone()))
    }

    /// Attaches an agent once the coordinator is up.
    async fn agent(&self) -> Agent {
        let mut client = ClusterClient::with_interceptor(self.channel(), Sign(self.token.clone()));
        for _ in 0..200 {
            let (say, said) = mpsc::channel(64);
            let hello = AgentHello {
                snapshots: "127.0.0.1:1".into(),
                domain: String::new(),
                unix_ms: None,
                node: "n".into(),
                incarnation: "i".into(),
                slots: 2,
                build: BUILD.into(),
                report: Some(NodeReport::default()),
            };
            say.send(AgentMessage { body: Some(Say::Hello(hello)) }).await.unwrap();
            if let Ok(stream) = client.attach(ReceiverStream::new(said)).await {
                return Agent {
                    say,
                    hear: stream.into_inner(),
                    epoch: 0,
                    desired: Desired::default(),
                    workers: vec![],
                };
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("the coordinator does not come up");
    }
}

/// An agent whose workers do at once what they are told.
struct Agent {
    say: mpsc::Sender<AgentMessage>,
    hear: Streaming<CoordinatorMessage>,
    epoch: u64,
    desired: Desired,
    workers: Vec<WorkerState>,
}

impl Agent {
    async fn say(&self, body: Say) {
        self.say.send(AgentMessage { body: Some(body) }).await.unwrap();
    }

    async fn report(&self) {
        self.say(Say::Report(NodeReport { workers: self.workers.clone(), epoch: self.epoch, ..Default::default() }))
            .await;
    }

    async fn hear(&mut self) -> Hear {
        let message = timeout(WAIT, self.hear.message()).await.expect("in time").unwrap().expect("an open stream");
        assert!(message.epoch >= self.epoch, "epochs only grow");
        self.epoch = message.epoch;
        message.body.unwrap()
    }

    /// The next desired state that satisfies a condition.
    async fn desired(&mut self, wanted: impl Fn(&Desired) -> bool) -> Desired {
        loop {
            if let Hear::Desired(desired) = self.hear().await {
                self.desired = desired;
                if wanted(&self.desired) {
                    return self.desired.clone();
                }
            }
        }
    }

    fn set(&mut self, phase: WorkerPhase, generation: Option<u64>, step: Option<u64>) {
        for (rank, worker) in self.workers.iter_mut().enumerate() {
            worker.set_phase(phase);
            worker.generation = generation;
            worker.rank = generation.map(|_| rank as u32);
            worker.step = step;
            worker.source = "initialised".into();
        }
    }

    /// Brings up two workers and lets them join the generation that forms.
    async fn join(&mut self) -> Announcement {
        self.desired(|desired| desired.workers == 2).await;
        let worker = |index: u128| WorkerState {
            job: "tiny".into(),
            worker: uuid::Uuid::from_u128(index).to_string(),
            phase: WorkerPhase::Ready.into(),
            ring_address: format!("127.0.0.1:{index}"),
            numeric_identity: "cpu".into(),
            data_fingerprint: "data".into(),
            ..Default::default()
        };
        self.workers = vec![worker(1), worker(2)];
        self.report().await;
        let run = self.desired(|desired| desired.run.is_some()).await.run.unwrap();
        self.set(WorkerPhase::Running, Some(run.generation), None);
        self.report().await;
        run
    }

    /// Stops after a step, stores it and waits until the receipts are settled.
    async fn stop_after(&mut self, store: &Store, run: &Announcement, step: u64) {
        let report =
            StepReport { job: "tiny".into(), generation: run.generation, step, loss: 2.5, ..Default::default() };
        self.say(Say::Step(report)).await;
        for rank in 0..run.world_size {
            let receipt = upload(store, run, step, rank).await;
            let (job, generation) = ("tiny".to_string(), run.generation);
            let receipt = ShardReceipt { job, generation, step, rank, receipt, stall_seconds: 0.001, seconds: 0.1 };
            self.say(Say::Receipt(receipt)).await;
        }
        let mut left = run.world_size;
        while left > 0 {
            if let Hear::Settled(settled) = self.hear().await {
                assert!(settled.committed, "{settled:?}");
                left -= 1;
            }
        }
        self.set(WorkerPhase::Stopped, Some(run.generation), Some(step));
        self.report().await;
    }
}

fn spec() -> JobSpec {
    let text = "name = \"tiny\"\n[model]\npreset = \"tiny\"\n[data]\ntrain = \"t\"\n[training]\nsteps = 20\n\
                [resources]\nworkers = 2\n";
    JobSpec::parse("test", text, Path::new("/"), &Overrides::new()).unwrap()
}

async fn upload(store: &Store, run: &Announcement, step: u64, rank: u32) -> Vec<u8> {
    let space = space();
    let world_size = WorldSize::new(run.world_size).unwrap();
    let shard = space.shard(Rank::new(rank), world_size);
    let bytes = vec![step as u8; (shard.end - shard.start) as usize * 4];
    let hashes = HashList(checkpoint_store::hash_blocks(&bytes, space.block_elements(), Dtype::F32));
    let scalar = ScalarState { step: Step::new(step), ..ScalarState::start(1, 20) };
    let source = ShardSource {
        job: JobName::new("tiny").unwrap(),
        space,
        generation: Generation::new(run.generation),
        rank: Rank::new(rank),
        world_size,
        scalar,
        states: vec![ShardState { decl: StateDecl::f32("param"), bytes: bytes.into(), hashes }],
    };
    checkpoint_store::upload_shard(store, &source, uuid::Uuid::new_v4()).await.unwrap().to_bytes().unwrap()
}

/// The tiny preset's parameters.
fn space() -> Space {
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![256, 128])];
    for layer in 0..4 {
        let parts: [(&str, &[u64]); 9] = [
            ("input_layernorm", &[128]),
            ("self_attn.q_proj", &[128, 128]),
            ("self_attn.k_proj", &[64, 128]),
            ("self_attn.v_proj", &[64, 128]),
            ("self_attn.o_proj", &[128, 128]),
            ("post_attention_layernorm", &[128]),
            ("mlp.gate_proj", &[352, 128]),
            ("mlp.up_proj", &[352, 128]),
            ("mlp.down_proj", &[128, 352]),
        ];
        tensors.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape.to_vec())));
    }
    tensors.push(("model.norm.weight".into(), vec![128]));
    let declare = |(name, shape)| checkpoint_store::TensorDecl { name, shape, dtype: Dtype::F32 };
    Space::new(tensors.into_iter().map(declare).collect()).unwrap()
}

async fn submit(rig: &Rig, mode: SubmitMode, stop_at: Option<u64>) -> Result<SubmitReply, Status> {
    let spec = serde_json::to_vec(&spec()).unwrap();
    let request = SubmitRequest { spec, mode: mode.into(), stop_at };
    rig.jobs().submit(request).await.map(tonic::Response::into_inner)
}

/// All events until the stream ends.
async fn watch(rig: &Rig) -> Vec<JobEvent> {
    let request = WatchRequest { job: "tiny".into(), epoch: 0, after: 0 };
    let mut stream = rig.jobs().watch(request).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Some(event) = timeout(WAIT, stream.message()).await.expect("in time").unwrap() {
        events.push(serde_json::from_str(&event.json).unwrap());
    }
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_runs_pauses_outlives_the_coordinator_and_finishes() {
    let folder = tempfile::tempdir().unwrap();
    let address = free_port();
    let rig = Rig::start(folder.path(), address);
    let store = Store::open(&options(folder.path(), address).store_url).unwrap();
    let mut agent = rig.agent().await;
    let Hear::Welcome(welcome) = agent.hear().await else { panic!("welcome comes first") };
    let nonce = store.get(&welcome.nonce_path, 4096).await.unwrap();
    assert!(String::from_utf8_lossy(&nonce).contains(&welcome.nonce));

    assert!(!submit(&rig, SubmitMode::New, Some(7)).await.unwrap().finished);
    let run = agent.join().await;
    assert_eq!((run.generation, run.world_size, run.stop_at, run.key.len()), (1, 2, 7, 32));
    let next: Vec<&str> = run.placements.iter().map(|placement| placement.next.as_str()).collect();
    assert_eq!(next, ["127.0.0.1:2", "127.0.0.1:1"]);
    agent.stop_after(&store, &run, 7).await;
    let events = watch(&rig).await;
    assert!(matches!(events[0], JobEvent::Generation { generation: 1, world_size: 2 }), "{events:?}");
    assert!(matches!(&events[2], JobEvent::Checkpoint { step: 7, bytes, .. } if *bytes > 0), "{events:?}");
    assert!(matches!(events.last(), Some(JobEvent::Paused { step: 7, .. })), "{events:?}");
    let status = rig.jobs().status(JobRequest { job: "tiny".into() }).await.unwrap().into_inner();
    assert_eq!((status.state.as_str(), status.checkpoint_step), ("paused", Some(7)));

    // The coordinator dies without a word; another takes its place at its address at once.
    rig.task.abort();
    assert!(rig.task.await.unwrap_err().is_cancelled());
    drop(agent);
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        sleep(Duration::from_millis(20)).await;
    }
    let rig = Rig::start(folder.path(), address);
    let mut agent = rig.agent().await;
    assert!(matches!(watch(&rig).await.last(), Some(JobEvent::Paused { step: 7, .. })));
    assert_eq!(submit(&rig, SubmitMode::New, None).await.unwrap_err().code(), Code::FailedPrecondition);
    submit(&rig, SubmitMode::Resume, None).await.unwrap();
    let run = agent.join().await;
    assert_eq!((run.generation, run.stop_at), (2, 20));
    assert!(!run.start.is_empty(), "it goes on from the checkpoint");
    agent.stop_after(&store, &run, 20).await;
    let events = watch(&rig).await;
    let Some(JobEvent::Finished { step: 20, digest, loss: Some(2.5) }) = events.last() else { panic!("{events:?}") };
    agent.desired(|desired| desired.workers == 0).await;
    assert!(submit(&rig, SubmitMode::Resume, None).await.unwrap().finished);

    let chain = Chain::load(&store, &JobName::new("tiny").unwrap()).await.unwrap().unwrap();
    assert_eq!(chain.history().newest_good().unwrap().digest.to_string(), *digest);
    assert_eq!(chain.history().epoch.get(), 2);
    rig.stop.send(()).unwrap();
    rig.task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_edge_refuses_strangers_and_nonsense() {
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::start(folder.path(), free_port());
    let _agent = rig.agent().await;
    let stranger = JobsClient::new(rig.channel()).list(ListRequest {}).await.unwrap_err();
    assert_eq!(stranger.code(), Code::Unauthenticated);
    let mut jobs = rig.jobs();
    let request = SubmitRequest { spec: b"{}".to_vec(), ..Default::default() };
    assert_eq!(jobs.submit(request).await.unwrap_err().code(), Code::InvalidArgument);
    let mut wrong = spec();
    wrong.training.micro_batch = wrong.training.global_batch + 1;
    let request = SubmitRequest { spec: serde_json::to_vec(&wrong).unwrap(), ..Default::default() };
    let refused = jobs.submit(request).await.unwrap_err();
    assert!(refused.message().contains("training.global_batch"), "{}", refused.message());
    let absent = JobRequest { job: "absent".into() };
    assert_eq!(jobs.status(absent.clone()).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(jobs.pause(absent).await.unwrap_err().code(), Code::NotFound);
    let outside = JobRequest { job: "../etc".into() };
    assert_eq!(jobs.status(outside).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_coordinator_and_a_public_address_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::start(folder.path(), free_port());
    let _agent = rig.agent().await;
    let second = run(options(folder.path(), free_port()), std::future::pending()).await.unwrap_err();
    assert_eq!(second.exit_code(), 2);
    assert!(second.to_string().contains(&rig.address.to_string()), "{second}");
    let public = run(options(folder.path(), "0.0.0.0:7070".parse().unwrap()), std::future::pending()).await;
    assert!(matches!(public, Err(CoordinatorError::Tls(_))));
}
