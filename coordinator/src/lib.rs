//! The control plane of Cairn: which workers form a job's next generation, what becomes a checkpoint, what a failure
//! leads to.
//!
//! `machine` decides, purely; `driver` performs; `journal` writes the jobs' chains; `lead` holds the leadership of the
//! store; `service` is the gRPC edge, `check` its gate, `watch` what watchers see,
//! `standby` what is said before all that. The coordinator is on no step's
//! path: while it is away training goes on, and its successor learns all it needs from the chains and the reports.

pub mod bench;
mod check;
mod driver;
mod error;
mod journal;
mod lead;
pub mod machine;
mod metrics;
mod service;
mod standby;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use checkpoint_store::error::{Kind, StoreError};
use checkpoint_store::{Create, Leadership, Opener, Store, layout, probe_atomic_create};
use proto::auth::Token;
use proto::ids::JobName;
use proto::net::Listener;
use proto::tls::{Gate, Role, Security};
use proto::wire::MOST_MESSAGE_BYTES;
use proto::wire::cluster_server::ClusterServer;
use proto::wire::jobs_server::JobsServer;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Request;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;

pub use error::CoordinatorError;

use crate::driver::Driver;
use crate::journal::Journal;
use crate::lead::{acquire, hold};
use crate::machine::{Cluster, Settings};
use crate::metrics::Metrics;
use crate::service::Edge;
use crate::watch::Hub;

/// Time between two reports of an agent.
const HEARTBEAT: Duration = proto::spec::detect::IDLE_HEARTBEAT;
/// Silence after which an agent is lost, unless a job asks for less.
const SUSPICION: Duration = Duration::from_secs(5);
/// Events waiting for the driver.
const WAITING: usize = 1024;
/// The longest the leadership's release may take at the end.
const RELEASE: Duration = Duration::from_secs(5);
/// Says that a store has passed the probe.
const PROBED: &str = "probe/passed.json";

/// Which jobs a coordinator leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All the store holds: unfinished ones are carried on with at once.
    All,
    /// One job; others are left as they are.
    Job {
        /// Its name.
        name: JobName,
        /// If it is found unfinished, it is taken for interrupted and waits to be submitted again, instead of being
        /// carried on with.
        held: bool,
    },
}

/// What a coordinator is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The store the jobs live in; also what agents are told.
    pub store_url: String,
    /// Where to listen: a loopback address, unless `security` is for more.
    pub listen: SocketAddr,
    /// The cluster's secret.
    pub token: Token,
    /// How the listener is closed to others.
    pub security: Security,
    /// What tells this boot of this host from any other.
    pub host: String,
    /// Wait while another coordinator leads, instead of refusing to start.
    pub standby: bool,
    /// Which of the store's jobs to lead.
    pub scope: Scope,
    /// Accept a store without atomic create; there must never be a second coordinator then.
    pub allow_single_coordinator: bool,
    /// Give nodes work only after they have shown that they can exchange data with one another.
    pub admission: bool,
    /// Where to answer scrapers of metrics, if at all.
    pub metrics: Option<SocketAddr>,
}

/// Coordinates until `shutdown` completes; then gives the leadership back. Jobs at work go on without it.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), CoordinatorError> {
    run_with(options, Opener::default(), shutdown).await
}

/// As [`run`], with stores opened in a way of one's own.
pub async fn run_with(
    options: Options,
    stores: Opener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), CoordinatorError> {
    check_security(&options)?;
    let listen = |source| CoordinatorError::Listen { address: options.listen, source };
    let bound = options.security.bind(options.listen).await.map_err(listen)?;
    let (listener, waiting) = standby::share(bound).map_err(listen)?;
    let scraped = match options.metrics {
        Some(address) => Some(metrics::listen(address, &options.security).await?),
        None => None,
    };
    let store = stores.open(&options.store_url)?;
    tokio::pin!(shutdown);
    let address = listener.local_addr().map_err(listen)?.to_string();
    let start = async {
        trust(&store, options.allow_single_coordinator).await?;
        acquire(&store, &address, &options.host, options.standby).await
    };
    let mut turning = Task(tokio::spawn(standby::turn_away(waiting, options.security.clone())));
    let leadership = tokio::select! {
        biased;
        leadership = start => leadership?,
        outcome = &mut turning.0 => return flatten("standing by", outcome),
        () = &mut shutdown => return Ok(()),
    };
    drop(turning);
    tracing::info!(epoch = leadership.epoch().get(), %address, store = store.url(), "this coordinator leads");
    let (stop, stopped) = oneshot::channel::<()>();
    let mut holding = Task(tokio::spawn(hold(leadership.clone(), async {
        // A dropped sender asks for the same.
        let _ = stopped.await;
    })));
    let seen = Metrics::default();
    let (mut driver, edge, inputs) = parts(&options, &store, &leadership, &address, &seen);
    tokio::select! {
        biased;
        loaded = driver.load() => loaded?,
        outcome = &mut holding.0 => return flatten("the leadership", outcome),
    }
    let mut server = Task(tokio::spawn(server(listener, edge, options.token.clone(), options.security.clone())));
    let mut scraping = Task(tokio::spawn(metrics::serve(scraped, seen)));
    let outcome = tokio::select! {
        biased;
        outcome = driver.run(inputs, leadership.sure_until()) => outcome,
        outcome = &mut scraping.0 => flatten("the metrics endpoint", outcome),
        outcome = &mut holding.0 => flatten("the leadership", outcome),
        outcome = &mut server.0 => flatten("the server", outcome),
        () = &mut shutdown => Ok(()),
    };
    drop((server, scraping));
    outcome?;
    drop(stop);
    if let Ok(released) = timeout(RELEASE, &mut holding.0).await {
        return flatten("the leadership", released);
    }
    tracing::warn!("the leadership was not given back in time; a successor will wait for it");
    Ok(())
}

/// The driver, the services and the queue between them.
fn parts(
    options: &Options,
    store: &Store,
    leadership: &Leadership,
    address: &str,
    seen: &Metrics,
) -> (Driver, Edge, mpsc::Receiver<driver::Input>) {
    let epoch = leadership.epoch();
    let settings = Settings {
        epoch,
        leader: address.to_string(),
        store: options.store_url.clone(),
        heartbeat: HEARTBEAT,
        suspicion: SUSPICION,
        nonce_path: layout::leader(epoch),
        nonce: leadership.token().to_string(),
        secret: secret(&options.token),
        admission: options.admission,
    };
    let hub = Hub::new(epoch.get());
    let leader = (format!("{address} on {}", options.host), options.scope == Scope::All);
    let journal = Journal::new(store.clone(), epoch, leader, seen.clone());
    let watchers = (hub.clone(), seen.clone());
    let driver = Driver::new(Cluster::new(settings), epoch.get(), journal, watchers, options.scope.clone());
    let (sender, inputs) = mpsc::channel(WAITING);
    let (nonce, connections) = (leadership.token().to_string(), Arc::new(AtomicU64::new(1)));
    let edge = Edge { inputs: sender, hub, epoch: epoch.get(), nonce, connections };
    (driver, edge, inputs)
}

/// Refuses to listen in the open, and with a certificate that no client would take for a coordinator's.
fn check_security(options: &Options) -> Result<(), CoordinatorError> {
    let host = options.listen.ip();
    options.security.may_listen("--listen", host)?;
    let Some(credentials) = options.security.credentials() else { return Ok(()) };
    credentials.check_role(Role::Coordinator)?;
    if let (false, Err(error)) = (host.is_unspecified(), credentials.check_host(&host.to_string())) {
        // It may be reached by a name that the certificate does have.
        tracing::warn!("clients that are given {host} will refuse this coordinator: {error}");
    }
    Ok(())
}

/// Probes a store once; what it found is remembered in the store.
async fn trust(store: &Store, allow_single: bool) -> Result<(), StoreError> {
    // Bound to the URL: a store copied to another server is probed again.
    let passed = format!("{{\"format\":1,\"atomic_create\":{:?}}}", store.url());
    match store.get(PROBED, 4096).await {
        Ok(found) if found == passed.as_bytes() => return Ok(()),
        Ok(_) => {}
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    match probe_atomic_create(store).await {
        Ok(()) => {}
        Err(error) if allow_single && error.kind() == Kind::Input => {
            tracing::warn!("{error}: going on, as asked; a second coordinator would corrupt the jobs");
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    match store.create(PROBED, passed.into_bytes().into()).await? {
        Create::Created | Create::AlreadyExists => Ok(()),
    }
}

async fn server(listener: Listener, edge: Edge, token: Token, security: Security) -> Result<(), CoordinatorError> {
    let for_cluster = Gate::new(token.clone(), &security, &[Role::Coordinator, Role::Agent], "attach a node");
    let for_jobs = Gate::new(token, &security, &[Role::Coordinator, Role::Operator], "command jobs");
    let cluster = ClusterServer::new(edge.clone())
        .max_decoding_message_size(MOST_MESSAGE_BYTES)
        .max_encoding_message_size(MOST_MESSAGE_BYTES);
    let jobs = JobsServer::new(edge)
        .max_decoding_message_size(MOST_MESSAGE_BYTES)
        .max_encoding_message_size(MOST_MESSAGE_BYTES);
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(InterceptedService::new(cluster, move |request| for_cluster.check(request)))
        .add_service(InterceptedService::new(jobs, move |request| for_jobs.check(request)))
        .serve_with_incoming(proto::tls::incoming(listener, &security))
        .await
        .map_err(|error| CoordinatorError::broken("the server", error))
}

/// A task that ends with its owner.
struct Task(JoinHandle<Result<(), CoordinatorError>>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn flatten(
    what: &'static str,
    outcome: Result<Result<(), CoordinatorError>, tokio::task::JoinError>,
) -> Result<(), CoordinatorError> {
    outcome.map_err(|error| CoordinatorError::broken(what, error))?
}

/// What the keys of the workers' data plane are derived from: a function of the cluster's token.
fn secret(token: &Token) -> [u8; 32] {
    let signed = token.sign(Request::new(())).ok();
    let credential = signed.as_ref().and_then(|request| request.metadata().get("authorization"));
    let bytes = credential.map_or(&[][..], |value| value.as_bytes());
    blake3::derive_key("cairn 2026 workers' data plane", bytes)
}
