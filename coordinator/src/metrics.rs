//! What monitoring sees: the jobs' progress, and per rank and stage what the last save and the last load cost.
//!
//! An endpoint in the Prometheus text format (OpenMetrics), at an address of its own, off unless asked for. It asks for
//! no token, as scrapers expect, but off loopback for a certificate of this cluster, of any role. The numbers are those
//! that the chains and the agents' reports carry anyway; nothing is measured twice. Of saves and loads the newest
//! counts, so series do not grow with a job's length; a job has series from its first generation to its end, and none
//! that an agent merely names.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use axum::serve::Listener;
use checkpoint_store::Timeline;
use futures::StreamExt;
use futures::stream::BoxStream;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use proto::event::JobEvent;
use proto::ids::{Generation, JobName, NodeName, Rank};
use proto::tls::{Security, Socket};
use proto::wire::{LoadStage, WorkerPhase};
use tokio::net::TcpListener;

use crate::error::CoordinatorError;
use crate::machine::NodeState;
use crate::machine::memory::Room;

/// The media type of the answer.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is known of one job.
#[derive(Debug, Default)]
struct OfJob {
    step: u64,
    generation: u64,
    saves: u64,
    skipped: u64,
    failed_saves: u64,
    failures: u64,
    /// The newest committed save.
    save: Timeline,
    /// By rank, the newest load.
    loads: BTreeMap<Rank, Vec<LoadStage>>,
    /// The ranks that hold the others up, with their nodes: times the median.
    slow: BTreeMap<(u32, String), f64>,
}

#[derive(Debug, Default)]
struct Seen {
    jobs: BTreeMap<JobName, OfJob>,
    rooms: BTreeMap<NodeName, Room>,
}

/// The numbers, shared by those who know them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics(Arc<Mutex<Seen>>);

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An unfinished job was found in the store.
    pub(crate) fn adopted(&self, job: &JobName, generation: Generation) {
        self.lock().jobs.entry(job.clone()).or_default().generation = generation.get();
    }

    /// A save was committed.
    pub(crate) fn saved(&self, job: &JobName, timeline: &Timeline) {
        if let Some(of) = self.lock().jobs.get_mut(job) {
            of.saves += 1;
            of.save.clone_from(timeline);
        }
    }

    /// A shard could not be stored at a try.
    pub(crate) fn save_failed(&self, job: &JobName) {
        if let Some(of) = self.lock().jobs.get_mut(job) {
            of.failed_saves += 1;
        }
    }

    /// A node said how it is.
    pub(crate) fn reported(&self, node: &NodeName, state: &NodeState) {
        let mut seen = self.lock();
        seen.rooms.insert(node.clone(), state.room);
        for worker in state.workers.iter().filter(|worker| worker.phase == WorkerPhase::Running) {
            let Some((_, rank)) = worker.place.filter(|_| !worker.load.is_empty()) else { continue };
            let Some(of) = seen.jobs.get_mut(&worker.job) else { continue };
            // Every report repeats it.
            if of.loads.get(&rank) != Some(&worker.load) {
                of.loads.insert(rank, worker.load.clone());
            }
        }
    }

    /// A node's agent is gone.
    pub(crate) fn left(&self, node: &NodeName) {
        self.lock().rooms.remove(node);
    }

    /// Watchers of a job are told something.
    pub(crate) fn happened(&self, job: &JobName, event: &JobEvent) {
        let mut seen = self.lock();
        if let JobEvent::Generation { generation, world_size } = event {
            let of = seen.jobs.entry(job.clone()).or_default();
            of.generation = *generation;
            of.slow.clear();
            of.loads.retain(|rank, _| rank.get() < *world_size);
            return;
        }
        let Some(of) = seen.jobs.get_mut(job) else { return };
        match event {
            JobEvent::Step { step, .. } => of.step = *step,
            JobEvent::Skipped { .. } => of.skipped += 1,
            JobEvent::Failure { .. } => of.failures += 1,
            JobEvent::Straggler { rank, node, ratio, .. } => {
                let key = (*rank, node.clone());
                match ratio {
                    Some(ratio) => drop(of.slow.insert(key, *ratio)),
                    None => drop(of.slow.remove(&key)),
                }
            }
            JobEvent::Finished { .. } | JobEvent::Failed { .. } | JobEvent::Cancelled {} => {
                // Its series end with it.
                seen.jobs.remove(job);
            }
            _ => {}
        }
    }
}

/// Writes one family: its samples are labels and a number.
fn family<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    kind: MetricType,
    samples: impl Iterator<Item = (Vec<(&'static str, String)>, M)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, metric) in samples {
        metric.encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// A family's name, its help, and its number.
type Series<T> = (&'static str, &'static str, fn(&T) -> u64);

type Sample<M> = (Vec<(&'static str, String)>, M);

/// A number of each job.
fn of_jobs<M>(seen: &Seen, number: impl Fn(&OfJob) -> M) -> impl Iterator<Item = Sample<M>> {
    seen.jobs.iter().map(move |(job, of)| (vec![("job", job.to_string())], number(of)))
}

/// A number of each stage of each rank's save; the commit is the coordinator's.
fn of_saves<M>(seen: &Seen, number: impl Fn(u64, u64) -> M) -> Vec<Sample<M>> {
    let mut samples = vec![];
    for (job, of) in &seen.jobs {
        for (rank, stage) in of.save.all() {
            let rank = rank.map_or("coordinator".to_owned(), |rank| rank.to_string());
            let labels = vec![("job", job.to_string()), ("rank", rank), ("stage", stage.name.clone())];
            samples.push((labels, number(stage.micros, stage.bytes)));
        }
    }
    samples
}

/// A number of each stage of each rank's load.
fn of_loads<M>(seen: &Seen, number: impl Fn(&LoadStage) -> M) -> Vec<Sample<M>> {
    let mut samples = vec![];
    for (job, of) in &seen.jobs {
        for (rank, stages) in &of.loads {
            for stage in stages {
                let (rank, stage_name) = (rank.to_string(), stage.name.clone());
                let labels = vec![("job", job.to_string()), ("rank", rank), ("stage", stage_name)];
                samples.push((labels, number(stage)));
            }
        }
    }
    samples
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let seen = self.lock();
        let out = &mut encoder;
        let gauge = |number: u64| ConstGauge::new(number as f64);
        let steps = of_jobs(&seen, |of| gauge(of.step));
        family(out, ("cairn_job_step", "Newest finished step"), MetricType::Gauge, steps)?;
        let generations = of_jobs(&seen, |of| gauge(of.generation));
        family(out, ("cairn_job_generation", "Present generation"), MetricType::Gauge, generations)?;
        let counters: [Series<OfJob>; 4] = [
            ("cairn_saves", "Checkpoints committed", |of| of.saves),
            ("cairn_saves_skipped", "Checkpoints skipped because storage was slower than the cadence", |of| of.skipped),
            ("cairn_save_failures", "Tries to store a shard that failed", |of| of.failed_saves),
            ("cairn_failures", "Failures that ended a generation", |of| of.failures),
        ];
        for (name, help, number) in counters {
            let samples = of_jobs(&seen, |of| ConstCounter::new(number(of)));
            family(out, (name, help), MetricType::Counter, samples)?;
        }
        let seconds = of_saves(&seen, |micros, _| ConstGauge::new(micros as f64 / 1e6));
        let help = "Seconds of each stage of the newest checkpoint";
        family(out, ("cairn_save_stage_seconds", help), MetricType::Gauge, seconds.into_iter())?;
        let bytes = of_saves(&seen, |_, bytes| gauge(bytes));
        let help = "Bytes of each stage of the newest checkpoint";
        family(out, ("cairn_save_stage_bytes", help), MetricType::Gauge, bytes.into_iter())?;
        let seconds = of_loads(&seen, |stage| ConstGauge::new(stage.seconds));
        let help = "Seconds of each stage of the newest load, added up over threads";
        family(out, ("cairn_load_stage_seconds", help), MetricType::Gauge, seconds.into_iter())?;
        let bytes = of_loads(&seen, |stage| gauge(stage.bytes));
        let help = "Bytes of each stage of the newest load";
        family(out, ("cairn_load_stage_bytes", help), MetricType::Gauge, bytes.into_iter())?;
        let slow = seen.jobs.iter().flat_map(|(job, of)| {
            let labels = |rank: &u32, node: &String| {
                vec![("job", job.to_string()), ("rank", rank.to_string()), ("node", node.clone())]
            };
            of.slow.iter().map(move |((rank, node), ratio)| (labels(rank, node), ConstGauge::new(*ratio)))
        });
        let help = "How much longer a straggler's micro-batches took than the median's, when it was named";
        family(out, ("cairn_straggler_ratio", help), MetricType::Gauge, slow)?;
        let rooms: [Series<Room>; 2] = [
            ("cairn_memory_used_bytes", "Bytes of snapshots and parity a node holds", |room| room.used),
            ("cairn_memory_budget_bytes", "Bytes that snapshots and parity may take on a node", |room| room.budget),
        ];
        for (name, help, number) in rooms {
            let samples = seen.rooms.iter().map(|(node, room)| (vec![("node", node.to_string())], gauge(number(room))));
            family(out, (name, help), MetricType::Gauge, samples)?;
        }
        Ok(())
    }
}

/// Scrapers' connections, plain or with a certificate of the cluster.
pub(crate) struct Scrapers {
    address: SocketAddr,
    connections: BoxStream<'static, io::Result<Socket>>,
}

impl Listener for Scrapers {
    type Io = Socket;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Socket, SocketAddr) {
        match self.connections.next().await {
            Some(Ok(socket)) => (socket, self.address),
            // The stream has no end and no errors: what fails is logged there and left out.
            Some(Err(_)) | None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// Answers scrapers until it is dropped; without a listener there are none.
pub(crate) async fn serve(listener: Option<Scrapers>, metrics: Metrics) -> Result<(), CoordinatorError> {
    let Some(listener) = listener else { return std::future::pending().await };
    let mut registry = Registry::default();
    registry.register_collector(Box::new(metrics));
    let registry = Arc::new(registry);
    let answer = move || {
        let registry = Arc::clone(&registry);
        async move {
            let mut body = String::new();
            // Writing to a string fails only where a collector does, and ours does not.
            match text::encode(&mut body, &registry) {
                Ok(()) => Ok(([(CONTENT_TYPE, OPEN_METRICS)], body)),
                Err(fmt::Error) => Err(axum::http::StatusCode::INTERNAL_SERVER_ERROR),
            }
        }
    };
    let router = Router::new().route("/metrics", get(answer));
    axum::serve(listener, router).await.map_err(|error| CoordinatorError::broken("the metrics endpoint", error))
}

/// Listens for scrapers. In the open only with certificates, as everywhere.
pub(crate) async fn listen(address: SocketAddr, security: &Security) -> Result<Scrapers, CoordinatorError> {
    security.may_listen("--metrics", address.ip())?;
    let failed = |source| CoordinatorError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let connections = if address.ip().is_loopback() {
        proto::tls::incoming(listener.into(), &Security::Loopback).boxed()
    } else {
        proto::tls::incoming(listener.into(), security).boxed()
    };
    Ok(Scrapers { address, connections })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_series_from_its_first_generation_to_its_end() {
        let (metrics, job) = (Metrics::default(), JobName::new("tiny").unwrap());
        let jobs = || metrics.lock().jobs.len();
        let step = JobEvent::Step { step: 1, loss: 1.0, grad_norm: 1.0, tokens: 1, tokens_per_second: 1.0 };
        metrics.happened(&job, &step);
        metrics.save_failed(&job);
        assert_eq!(jobs(), 0, "it was never formed here");
        metrics.happened(&job, &JobEvent::Generation { generation: 1, world_size: 1 });
        metrics.happened(&job, &step);
        assert_eq!(metrics.lock().jobs[&job].step, 1);
        metrics.happened(&job, &JobEvent::Cancelled {});
        metrics.happened(&job, &step);
        metrics.save_failed(&job);
        assert_eq!(jobs(), 0, "what comes late does not bring it back");
    }

    #[tokio::test]
    async fn in_the_open_nothing_listens_without_certificates() {
        let refused = listen("0.0.0.0:0".parse().unwrap(), &Security::Loopback).await.err().unwrap();
        assert!(refused.to_string().contains("--metrics 0.0.0.0"), "{refused}");
    }
}
