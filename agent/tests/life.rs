//! An agent's life between a stand-in coordinator and real worker processes: this very binary, started as
//! `life worker …`, which speaks the wire contract but does not train.

mod worker;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use checkpoint_store::{Receipt, Store};
use futures::StreamExt;
use proto::auth::Token;
use proto::ids::NodeName;
use proto::wire::cluster_server::{Cluster, ClusterServer};
use proto::wire::{self, WorkerPhase, agent_message, coordinator_message};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(30);

type Orders = mpsc::Sender<Result<wire::CoordinatorMessage, Status>>;
type Attached = (Orders, Streaming<wire::AgentMessage>);

struct Service(mpsc::Sender<Attached>);

#[tonic::async_trait]
impl Cluster for Service {
    type AttachStream = ReceiverStream<Result<wire::CoordinatorMessage, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<wire::AgentMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (orders, outgoing) = mpsc::channel(16);
        self.0.send((orders, request.into_inner())).await.unwrap();
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// One life of the coordinator.
struct Coordinator {
    address: String,
    orders: Orders,
    messages: Streaming<wire::AgentMessage>,
    server: tokio::task::JoinHandle<()>,
    epoch: u64,
}

impl Coordinator {
    /// Listens and waits for an agent, which must say hello first and is welcomed.
    async fn meet(address: &str, token: &Token, store: &str, epoch: u64, nonce: &str) -> (Self, wire::AgentHello) {
        // The port of a coordinator that has just ended may still be closing.
        let listener = tokio::time::timeout(PATIENCE, async {
            loop {
                match tokio::net::TcpListener::bind(address).await {
                    Ok(listener) => return listener,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        });
        let listener = listener.await.expect("the port in time");
        let address = listener.local_addr().unwrap().to_string();
        let (sender, mut attached) = mpsc::channel(4);
        let token = token.clone();
        let service = ClusterServer::with_interceptor(Service(sender), move |request| token.check(request));
        let server = tonic::transport::Server::builder().add_service(service);
        let server =
            tokio::spawn(async move { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
        let (orders, messages) = tokio::time::timeout(PATIENCE, attached.recv()).await.unwrap().unwrap();
        let mut this = Self { address, orders, messages, server, epoch };
        let agent_message::Body::Hello(hello) = this.hear().await else { panic!("no hello") };
        this.say(coordinator_message::Body::Welcome(wire::Welcome {
            store: store.into(),
            heartbeat_seconds: 0.2,
            suspicion_seconds: 2.0,
            nonce_path: "leader/nonce".into(),
            nonce: nonce.into(),
        }))
        .await;
        (this, hello)
    }

    async fn say(&self, body: coordinator_message::Body) {
        self.orders.send(Ok(wire::CoordinatorMessage { epoch: self.epoch, body: Some(body) })).await.unwrap();
    }

    async fn hear(&mut self) -> agent_message::Body {
        let message = tokio::time::timeout(PATIENCE, self.messages.next()).await.expect("a message in time");
        message.unwrap().unwrap().body.unwrap()
    }

    /// Waits for a report that says what is wanted.
    async fn report(&mut self, wanted: impl Fn(&[wire::WorkerState]) -> bool) -> Vec<wire::WorkerState> {
        loop {
            if let agent_message::Body::Report(report) = self.hear().await
                && wanted(&report.workers)
            {
                return report.workers;
            }
        }
    }

    async fn receipt(&mut self) -> wire::ShardReceipt {
        loop {
            if let agent_message::Body::Receipt(receipt) = self.hear().await {
                return receipt;
            }
        }
    }

    async fn desire(&self, spec: &proto::spec::JobSpec, workers: u32, fenced: u64, run: Option<wire::Announcement>) {
        let (job, spec) = (spec.name.to_string(), serde_json::to_vec(spec).unwrap());
        self.say(coordinator_message::Body::Desired(wire::Desired { job, spec, workers, fenced, run, keep: false }))
            .await;
    }
}

fn spec(name: &str, folder: &Path) -> proto::spec::JobSpec {
    let text = format!(
        "name = \"{name}\"\n[model]\npreset = \"tiny\"\n[data]\ntrain = \"x\"\n[training]\nsteps = 10\n\
         [checkpoint]\nstore = \"store\"\nmemory = false"
    );
    proto::spec::JobSpec::parse("test", &text, folder, &BTreeMap::new()).unwrap()
}

fn options(folder: &Path, coordinator: &str, token: &Token) -> agent::Options {
    agent::Options {
        coordinator: coordinator.into(),
        token: token.clone(),
        security: proto::tls::Security::Loopback,
        node: NodeName::new("one").unwrap(),
        slots: 2,
        cores: 2,
        memory_dir: folder.join("memory"),
        memory_budget: 0,
        domain: String::new(),
        executable: std::env::current_exe().unwrap(),
        ring_host: "127.0.0.1".parse().unwrap(),
    }
}

fn phases(workers: &[wire::WorkerState]) -> Vec<WorkerPhase> {
    workers.iter().map(wire::WorkerState::phase).collect()
}

fn run_of(generation: u64, worker: &str) -> wire::Announcement {
    let placements = vec![wire::Placement { worker: worker.into(), ..Default::default() }];
    wire::Announcement { generation, world_size: 1, placements, ..Default::default() }
}

async fn whole_life() {
    let folder = tempfile::tempdir().unwrap();
    let token = Token::read_or_create(&folder.path().join("token"), [1; 32]).unwrap();
    let job = spec("save", folder.path());
    let url = job.checkpoint.store.clone();
    let store = Store::open(&url).unwrap();
    store.create("leader/nonce", b"stones".as_slice().into()).await.unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(agent::run(options(folder.path(), &free, &token), std::future::pending(), async {
        let _ = stopped.await;
    }));

    // A worker is started, prepared, run; its snapshot reaches the store, and its receipt the coordinator.
    let (mut coordinator, hello) = Coordinator::meet(&free, &token, &url, 1, "stones").await;
    assert_eq!((hello.node.as_str(), hello.slots, hello.build.as_str()), ("one", 2, wire::BUILD));
    coordinator.desire(&job, 1, 0, None).await;
    let ready = coordinator.report(|workers| phases(workers) == [WorkerPhase::Ready]).await;
    let (worker, process) = (ready[0].worker.clone(), ready[0].process);
    coordinator.desire(&job, 1, 1, Some(run_of(1, &worker))).await;
    let receipt = coordinator.receipt().await;
    assert_eq!((receipt.generation, receipt.step, receipt.rank), (1, 4, 0));
    let object = Receipt::from_bytes(&receipt.receipt).unwrap().object.unwrap();
    assert_eq!(store.head(&object.path).await.unwrap(), object.bytes);
    // The worker runs on only once its slot is free.
    coordinator.report(|workers| workers.iter().any(|worker| worker.step == Some(5))).await;

    // The coordinator is lost: the worker stays, and the next one learns everything, receipt included.
    let address = coordinator.address.clone();
    coordinator.server.abort();
    drop(coordinator);
    let (mut coordinator, hello) = Coordinator::meet(&address, &token, &url, 2, "stones").await;
    assert_eq!(hello.report.unwrap().workers[0].process, process, "the same process");
    let again = coordinator.receipt().await;
    assert_eq!(again.receipt, receipt.receipt);
    let settled = wire::ReceiptSettled { job: "save".into(), generation: 1, step: 4, rank: 0, committed: true };
    coordinator.say(coordinator_message::Body::Settled(settled)).await;

    // A killed worker is reported with its generation and replaced without being asked for.
    let pid = rustix::process::Pid::from_raw(process as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let wanted = [WorkerPhase::Exited, WorkerPhase::Ready];
    let workers = coordinator.report(|workers| phases(workers) == wanted).await;
    assert_eq!((workers[0].worker.as_str(), workers[0].generation), (worker.as_str(), Some(1)));
    assert!(workers[0].failure.as_ref().unwrap().reason.contains("signal 9"));
    assert_ne!(workers[1].worker, worker);
    coordinator.desire(&job, 1, 1, None).await;
    coordinator.report(|workers| phases(workers) == [WorkerPhase::Ready]).await;

    // The end of the job, and of the agent.
    coordinator.desire(&job, 0, 1, None).await;
    coordinator.report(<[_]>::is_empty).await;
    stop.send(()).unwrap();
    tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
    assert_eq!(std::fs::read_dir(folder.path().join("memory")).unwrap().count(), 0, "memory is given back");
}

async fn a_worker_that_cannot_start_is_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let token = Token::read_or_create(&folder.path().join("token"), [1; 32]).unwrap();
    let job = spec("die", folder.path());
    let url = job.checkpoint.store.clone();
    Store::open(&url).unwrap().create("leader/nonce", b"stones".as_slice().into()).await.unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let running =
        tokio::spawn(agent::run(options(folder.path(), &free, &token), std::future::pending(), std::future::pending()));
    let (mut coordinator, _) = Coordinator::meet(&free, &token, &url, 1, "stones").await;
    coordinator.desire(&job, 1, 0, None).await;
    let exited = |workers: &[wire::WorkerState]| phases(workers).iter().filter(|p| **p == WorkerPhase::Exited).count();
    let workers = coordinator.report(|workers| exited(workers) >= 3).await;
    assert!(workers[0].failure.as_ref().unwrap().reason.contains("exit code 7"));
    running.abort();
}

async fn another_store_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let token = Token::read_or_create(&folder.path().join("token"), [1; 32]).unwrap();
    let url = spec("save", folder.path()).checkpoint.store;
    Store::open(&url).unwrap().create("leader/nonce", b"pebbles".as_slice().into()).await.unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let running =
        tokio::spawn(agent::run(options(folder.path(), &free, &token), std::future::pending(), std::future::pending()));
    let _coordinator = Coordinator::meet(&free, &token, &url, 1, "stones").await;
    let error = tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, agent::AgentError::ForeignStore(_)), "{error}");
    assert_eq!(error.exit_code(), 2);
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if std::env::args().nth(1).as_deref() == Some("worker") {
        return runtime.block_on(worker::play());
    }
    // The options a test runner passes: list the tests, or run those that are named.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |option: &str| arguments.iter().any(|argument| argument == option);
    for name in ["whole_life", "a_worker_that_cannot_start_is_tried_again", "another_store_is_refused"] {
        let mut filters = arguments.iter().filter(|argument| !argument.starts_with('-')).peekable();
        let chosen = filters.peek().is_none() || filters.any(|filter| name.contains(filter.as_str()));
        if has("--list") {
            if !has("--ignored") {
                println!("{name}: test");
            }
        } else if chosen && !has("--ignored") {
            runtime.block_on(async {
                match name {
                    "whole_life" => whole_life().await,
                    "another_store_is_refused" => another_store_is_refused().await,
                    _ => a_worker_that_cannot_start_is_tried_again().await,
                }
            });
            println!("test {name} ... ok");
        }
    }
}
