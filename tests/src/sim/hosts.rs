//! What runs on each host: the product's coordinator, and the product's agent with simulated workers.
//!
//! A host's software ends when the product's process would; it is then started anew, as an init system does.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent::{Door, Launch, Launched, Surroundings, Witness};
use checkpoint_store::{Limits, Opener, Store};
use coordinator::{CoordinatorError, Scope};
use futures::FutureExt;
use proto::auth::Token;
use proto::ids::{JobName, NodeName, WorkerId};
use proto::tls::Security;
use proto::wire::coordinator_message::Body;
use proto::wire::{self, FailureKind};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use super::bucket::{URL, Way};
use super::network::{COORDINATOR, Net, PORT};
use super::plant::Plant;
use super::truth::Shape;
use super::worker::{self, Start, short};
use super::world::{Host, World};

/// Starting a worker's process.
const SPAWN: Duration = Duration::from_millis(200);

/// What every host of a cluster has.
#[derive(Clone)]
pub(crate) struct Site {
    pub(crate) world: World,
    pub(crate) host: Host,
    pub(crate) token: Token,
    /// For the agents' memory folders.
    pub(crate) folder: PathBuf,
    pub(crate) shape: Shape,
}

impl Site {
    pub(crate) fn security(&self) -> Security {
        Security::Within(Arc::new(Net { world: self.world.clone(), host: self.host }))
    }

    fn stores(&self) -> Opener {
        let (world, host) = (self.world.clone(), self.host);
        let limits = Limits { request_timeout: Duration::from_secs(5), retries: 2, ..Limits::default() };
        Opener::other(move |url| {
            let way = Arc::new(Way { world: world.clone(), host });
            Ok(Store::from_object_store_with(url, way, &limits))
        })
    }

    /// Runs the software of one life, while its clock jumps when it is told.
    async fn live(&self, software: impl Future<Output = String>) {
        let jumps = self.world.begin(self.host);
        let mut software = std::pin::pin!(software);
        let mut jumping = std::pin::pin!(jump(jumps));
        let ended = tokio::select! {
            biased;
            () = &mut jumping => "it has no clock".to_string(),
            ended = &mut software => ended,
        };
        self.world.note(self.host, "end", ended);
    }

    /// A coordinator, for as long as it leads or waits to.
    pub(crate) async fn coordinator(self) {
        let options = coordinator::Options {
            store_url: URL.into(),
            listen: (turmoil::lookup(self.host), PORT).into(),
            token: self.token.clone(),
            security: self.security(),
            host: self.host.into(),
            standby: true,
            scope: Scope::All,
            allow_single_coordinator: false,
            // The exchanges would be most of what is simulated; the machine's own tests have them.
            admission: false,
            metrics: None,
        };
        let software = coordinator::run_with(options, self.stores(), std::future::pending());
        self.live(software.map(|ended| match ended {
            Ok(()) => "gave the leadership back".to_string(),
            Err(CoordinatorError::Fenced(reason)) => format!("fenced: {reason}"),
            Err(error) => error.to_string(),
        }))
        .await;
    }

    /// A node's agent, with its workers.
    pub(crate) async fn agent(self, slots: u32) {
        let ring_host: IpAddr = turmoil::lookup(self.host);
        let options = agent::Options {
            coordinator: format!("{COORDINATOR}:{PORT}"),
            token: self.token.clone(),
            security: self.security(),
            node: NodeName::new(self.host).expect("a host's name is a node's"),
            slots,
            cores: 2,
            memory_dir: self.folder.join(self.host),
            memory_budget: 1 << 30,
            domain: String::new(),
            executable: PathBuf::new(),
            ring_host,
        };
        let pace = Duration::from_millis(self.shape.pace);
        let workers = Workers { world: self.world.clone(), host: self.host, stores: self.stores(), pace };
        let life = format!("{} life {}", self.host, self.world.lives(self.host) + 1);
        let witness = Watch { world: self.world.clone(), host: self.host, life, heard: Mutex::default() };
        let surroundings =
            Surroundings { stores: self.stores(), workers: Some(Box::new(workers)), witness: Some(Arc::new(witness)) };
        let never = || std::future::pending();
        let software = agent::run_in(options, surroundings, never(), never());
        self.live(software.map(|ended| ended.map_or_else(|error| error.to_string(), |()| "told to".into()))).await;
    }
}

/// Jumps of a host's clock: for its processes time was lost, as after a pause of the machine.
async fn jump(mut jumps: mpsc::UnboundedReceiver<Duration>) {
    while let Some(by) = jumps.recv().await {
        tokio::time::advance(by).await;
    }
}

/// Starts simulated workers.
struct Workers {
    world: World,
    host: Host,
    stores: Opener,
    pace: Duration,
}

impl Launch for Workers {
    fn launch(&mut self, _: &JobName, worker: WorkerId, door: Door) -> std::io::Result<Launched> {
        let (kill, killed) = oneshot::channel();
        let (crash, crashed) = oneshot::channel::<()>();
        let mut state = self.world.lock();
        state.note(self.host, "worker", format_args!("{} starts", short(worker)));
        let life = state.hosts.entry(self.host).or_default();
        life.workers.insert(worker.to_string(), crash);
        let (world, stores) = (self.world.clone(), self.stores.clone());
        let start = Start { world, host: self.host, worker, stores, pace: self.pace };
        let ended = async move {
            let (world, host) = (start.world.clone(), start.host);
            sleep(SPAWN).await;
            let Some((commands, line)) = door.attach(worker).await else { return wire::Failure::default() };
            let mut body = tokio::spawn(worker::live(start, commands, line.clone()));
            let signal = tokio::select! {
                biased;
                _ = killed => Some(9),
                _ = crashed => Some(11),
                ended = &mut body => {
                    ended.expect("a worker does not panic");
                    None
                }
            };
            body.abort();
            // Its tasks are gone when this returns.
            let _ = body.await;
            line.end().await;
            world.note(host, "worker", format_args!("{} ends ({signal:?})", short(worker)));
            world.lock().hosts.entry(host).or_default().workers.remove(&worker.to_string());
            let kind = FailureKind::Exit.into();
            wire::Failure { kind, reason: "ended".into(), signal, ..Default::default() }
        };
        Ok(Launched { process: 1, kill, ended: ended.boxed() })
    }
}

/// Tells the oracle what an agent obeys.
struct Watch {
    world: World,
    host: Host,
    life: String,
    heard: Mutex<Heard>,
}

/// What an agent was told last, before any mistake was planted.
#[derive(Default)]
struct Heard {
    /// The epoch in which it was written.
    epoch: u64,
    /// An order of an earlier epoch than the newest, for the mistake of taking it for a new one.
    old: Option<(u64, wire::Desired)>,
    newest: Option<(u64, wire::Desired)>,
}

impl Witness for Watch {
    fn heard(&self, message: &mut wire::CoordinatorMessage) {
        let mut heard = self.heard.lock().expect("no panic");
        heard.epoch = message.epoch;
        self.world.count("order");
        if let Some(Body::Desired(desired)) = &mut message.body {
            let before = heard.newest.take().filter(|(epoch, _)| *epoch < message.epoch);
            // The first order of an epoch is let through, so that the successor is known.
            let fresh = before.is_some();
            if fresh {
                heard.old = before;
            }
            heard.newest = Some((message.epoch, desired.clone()));
            let plants = self.world.has(Plant::OldOrders) && !fresh;
            if let Some((epoch, old)) = heard.old.clone().filter(|_| plants) {
                heard.epoch = epoch;
                *desired = old;
            }
        }
    }

    fn obeyed(&self) {
        let epoch = self.heard.lock().expect("no panic").epoch;
        let mut state = self.world.lock();
        let kept = state.oracle.obeyed(&self.life, epoch);
        state.hold(self.host, kept);
    }
}
