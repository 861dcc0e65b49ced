//! What monitoring sees: the jobs' progress, and per rank and stage what the last save and the last load cost.
//!
//! An endpoint in the Prometheus text format (OpenMetrics), at an address of its own, off unless asked for: it tells
//! nothing secret, and asks for no token, as scrapers expect. The numbers are those that the chains and the agents'
//! reports carry anyway; nothing is measured twice. Of saves and loads the newest counts, so series do not grow with a
//! job's length.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use checkpoint_store::Timeline;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use proto::event::JobEvent;
use proto::ids::{JobName, NodeName, Rank};
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

    /// A save was committed.
    pub(crate) fn saved(&self, job: &JobName, timeline: &Timeline) {
        let mut seen = self.lock();
        let of = seen.jobs.entry(job.clone()).or_default();
        of.saves += 1;
        of.save.clone_from(timeline);
    }

    /// A shard could not be stored at a try.
    pub(crate) fn save_failed(&self, job: &JobName) {
        self.lock().jobs.entry(job.clone()).or_default().failed_saves += 1;
    }

    /// A node said how it is.
    pub(crate) fn reported(&self, node: &NodeName, state: &NodeState) {
        let mut seen = self.lock();
        seen.rooms.insert(node.clone(), state.room);
        for worker in state.workers.iter().filter(|worker| worker.phase == WorkerPhase::Running) {
            let Some((_, rank)) = worker.place.filter(|_| !worker.load.is_empty()) else { continue };
            let of = seen.jobs.entry(worker.job.clone()).or_default();
            of.loads.insert(rank, worker.load.clone());
        }
    }

    /// Watchers of a job are told something.
    pub(crate) fn happened(&self, job: &JobName, event: &JobEvent) {
        let mut seen = self.lock();
        let of = seen.jobs.entry(job.clone()).or_default();
        match event {
            JobEvent::Step { step, .. } => of.step = *step,
            JobEvent::Generation { generation, world_size } => {
                of.generation = *generation;
                of.loads.retain(|rank, _| rank.get() < *world_size);
            }
            JobEvent::Skipped { .. } => of.skipped += 1,
            JobEvent::Failure { .. } => of.failures += 1,
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

/// Answers scrapers until it is dropped; without a listener there are none.
pub(crate) async fn serve(listener: Option<TcpListener>, metrics: Metrics) -> Result<(), CoordinatorError> {
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

/// Listens for scrapers.
pub(crate) async fn listen(address: SocketAddr) -> Result<TcpListener, CoordinatorError> {
    TcpListener::bind(address).await.map_err(|source| CoordinatorError::Listen { address, source })
}
