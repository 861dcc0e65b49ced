//! Starts the processes, starts them again when they have died, and makes all quiet at the end.

use std::sync::Arc;
use std::time::Duration;

use checkpoint_store::{Limits, Store};
use proto::ids::Rank;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::actors::{self, Context};
use super::cluster::{Cluster, Formed};
use super::disk::Disk;
use super::net::Net;
use super::oracle::Oracle;
use super::product::Plant;
use super::random::Random;
use super::{Options, Outcome};

/// Readers at work at once.
const READERS: u64 = 2;

/// What a process is for.
#[derive(Debug, Clone, Copy)]
enum Role {
    /// The coordinator, started again whenever it ends.
    Leader,
    /// Another one, of its own accord.
    Rival,
    Worker(Formed, Rank),
    Reader,
}

/// How a process ended.
enum End {
    Died,
    Left(&'static str),
}

struct Supervisor {
    options: Options,
    net: Arc<Net>,
    cluster: Arc<Cluster>,
    random: Random,
    tasks: JoinSet<(Role, End)>,
    started: u64,
}

fn limits() -> Limits {
    // Small parts, so that every shard but the smallest is uploaded in several.
    Limits { request_timeout: Duration::from_secs(5), retries: 2, requests_in_flight: 8, part_bytes: 100 << 10 }
}

/// An empty bucket and its network, which serves until the task is aborted.
pub(crate) fn begin(options: Options) -> (Arc<Net>, JoinHandle<()>) {
    let overwrites = options.plant == Some(Plant::CreateOverwrites);
    let disk = Disk::new(Random::new(options.seed, 1), options.lags, overwrites);
    let oracle = Oracle::new(Store::from_object_store("memory://", Arc::new(disk.memory.clone())));
    let random = Random::new(options.seed, 2);
    let net = Net::new(random, disk, oracle, options.faults, options.operations, options.crash_at);
    let serving = Arc::clone(&net);
    (net, tokio::spawn(async move { serving.serve().await }))
}

/// One run, from an empty bucket to the last check.
pub(super) async fn supervise(options: Options) -> Outcome {
    let (net, serving) = begin(options);
    let (cluster, random) = (Arc::default(), Random::new(options.seed, 3));
    let mut supervisor = Supervisor { options, net, cluster, random, tasks: JoinSet::new(), started: 0 };
    supervisor.storm().await;
    supervisor.tasks.shutdown().await;
    let net = Arc::clone(&supervisor.net);
    if net.violation().is_none() {
        net.calm();
        net.drained().await;
        net.note("all is quiet");
        let (cx, _) = supervisor.context("last", None);
        let ended = match actors::tidy_up(cx).await {
            Ok(()) => net.oracle.lock().await.quiet().await,
            Err(e) => Err(e),
        };
        if let Err(violation) = ended {
            net.fail(violation);
        }
    }
    serving.abort();
    supervisor.outcome().await
}

impl Supervisor {
    async fn storm(&mut self) {
        self.start(Role::Leader);
        for _ in 0..READERS {
            self.start(Role::Reader);
        }
        let (net, cluster) = (Arc::clone(&self.net), Arc::clone(&self.cluster));
        let mut rival = Instant::now() + self.while_until_a_rival();
        loop {
            tokio::select! {
                biased;
                () = net.over() => break,
                ended = self.tasks.join_next() => match ended {
                    Some(Ok((role, end))) => self.ended(role, &end).await,
                    Some(Err(e)) => net.fail(format!("a process panicked: {e}")),
                    None => net.fail("no process is left".into()),
                },
                () = cluster.ordered.notified() => {
                    for formed in cluster.orders() {
                        formed.world.ranks().for_each(|rank| self.start(Role::Worker(formed, rank)));
                    }
                }
                () = tokio::time::sleep_until(rival), if self.options.deaths => {
                    self.start(Role::Rival);
                    rival = Instant::now() + self.while_until_a_rival();
                }
            }
        }
        // Whoever is at work gets as far as its next request: otherwise the end would depend on threads.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    fn while_until_a_rival(&mut self) -> Duration {
        Duration::from_millis(self.random.within(300, 6_000))
    }

    async fn ended(&mut self, role: Role, end: &End) {
        match end {
            End::Died => {
                self.net.note(&format!("{role:?} died"));
                if let Err(violation) = self.net.oracle.lock().await.recovers().await {
                    self.net.fail(violation);
                }
            }
            End::Left(why) => self.net.note(&format!("{role:?} left: {why}")),
        }
        match role {
            Role::Leader | Role::Reader => self.start(role),
            Role::Worker(formed, _) => self.cluster.lost(formed.generation),
            Role::Rival => {}
        }
    }

    /// A process's way to the bucket and what it needs besides; it dies after `fuse` requests.
    fn context(&mut self, name: &str, fuse: Option<u64>) -> (Context, Arc<Notify>) {
        self.started += 1;
        let (faulty, died) = self.net.start(format!("{name}#{}", self.started), fuse);
        let process = faulty.process;
        let store = Store::from_object_store_with("sim://bucket", Arc::new(faulty), &limits());
        let (net, cluster) = (Arc::clone(&self.net), Arc::clone(&self.cluster));
        let random = Random::new(self.options.seed, 1_000 + u64::from(process));
        (Context { store, net, cluster, process, random, plant: self.options.plant }, died)
    }

    fn start(&mut self, role: Role) {
        // Mostly it dies soon, so that the chain's every step is interrupted; sometimes it lives long.
        let fuse = match self.random.below(10) {
            0..5 => Some(self.random.within(1, 30)),
            5..8 => Some(self.random.within(20, 150)),
            _ => None,
        };
        let name = match role {
            Role::Leader => "leader",
            Role::Rival => "rival",
            Role::Worker(..) => "worker",
            Role::Reader => "reader",
        };
        let (cx, died) = self.context(name, fuse.filter(|_| self.options.deaths));
        let delay = Duration::from_millis(self.random.within(1, 200));
        self.tasks.spawn(async move {
            let life = async {
                tokio::time::sleep(delay).await;
                match role {
                    Role::Leader | Role::Rival => actors::lead(cx).await,
                    Role::Worker(formed, rank) => actors::work(cx, formed, rank).await,
                    Role::Reader => actors::read(cx).await,
                }
            };
            let end = tokio::select! {
                biased;
                () = died.notified() => End::Died,
                why = life => End::Left(why),
            };
            (role, end)
        });
    }

    async fn outcome(self) -> Outcome {
        let (operations, tallies, trace) = self.net.totals();
        let oracle = self.net.oracle.lock().await;
        let records = oracle.history().records;
        let history = (records, oracle.commits(), oracle.leaders());
        let checks = oracle.checks.clone();
        Outcome { options: self.options, operations, tallies, checks, history, trace, violation: self.net.violation() }
    }
}
