//! The operator's commands: `submit`, `jobs`, `status`, `watch`, `scale`, `pause`, `resume`, `cancel`.

use std::time::Duration;

use proto::event::JobEvent;
use proto::spec::JobSpec;
use proto::wire::{JobRequest, JobStatus, ListRequest, ScaleRequest, WorkerPhase};
use serde_json::json;

use crate::args::{JobArgs, OperatorArgs, Output, ScaleArgs, SubmitArgs};
use crate::client::{self, Way};
use crate::failure::Failure;
use crate::render::Renderer;
use crate::size;
use crate::table::{self, say};
use crate::train;

/// A checkpoint of a large job may take this long before a pause is complete.
const PAUSE: Duration = Duration::from_secs(600);
/// A coordinator that is just being started is waited for this long.
const SUBMIT: Duration = Duration::from_secs(10);
/// A watcher waits this long for a coordinator that is away.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) async fn submit(args: SubmitArgs) -> Result<u8, Failure> {
    let spec = train::read_job(&args.job)?;
    let request = train::submit_request(&args.job, &spec)?;
    let way = client::way(&args.operator).await?;
    let mut client = way.client().await?;
    let address = &args.operator.coordinator;
    let finished = train::submit(&mut client, request, SUBMIT).await.map_err(|s| client::explain(s, address))?;
    if finished {
        return show_finish(way, &args, &spec).await;
    }
    let name = &spec.name;
    match args.operator.output {
        Output::Json => {
            let detection = spec.fault.detection();
            say!("{}", json!({"event": "submitted", "job": name, "finished": false, "detection": detection}));
        }
        Output::Text => {
            say!("job {name} submitted; follow it with: cairn watch {name}");
            say!("{}", spec.fault.detection());
        }
    }
    Ok(0)
}

/// Shows the event a finished job ended with, and none of those before it.
async fn show_finish(way: Way, args: &SubmitArgs, spec: &JobSpec) -> Result<u8, Failure> {
    let mut renderer = Renderer::new(args.operator.output, spec.training.steps, spec.training.tokens_per_step());
    renderer.note(&format!("job {} had already finished; nothing was started", spec.name));
    let mut events = client::follow(way, spec.name.to_string(), SUBMIT);
    while let Some(event) = events.recv().await {
        let event = event?;
        if matches!(event, JobEvent::Finished { .. }) {
            renderer.event(&event);
            return Ok(0);
        }
    }
    Err(Failure::job("the stream of events ended early"))
}

pub(crate) async fn list(args: OperatorArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args).await?;
    let reply = client.list(client::timed(ListRequest {})).await;
    let jobs = reply.map_err(|status| client::explain(status, &args.coordinator))?.into_inner().jobs;
    if args.output == Output::Json {
        for job in &jobs {
            say!("{}", status_json(job));
        }
        return Ok(0);
    }
    if jobs.is_empty() {
        say!("no jobs; hand one in with: cairn submit JOB.toml");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = jobs
        .iter()
        .map(|job| {
            vec![
                job.job.clone(),
                job.state.clone(),
                format!("{}/{}", job.step, job.steps),
                job.world_size.to_string(),
                job.generation.to_string(),
                job.checkpoint_step.map_or("-".into(), |step| step.to_string()),
                job.reason.clone(),
            ]
        })
        .collect();
    table::print(&["JOB", "STATE", "STEP", "WORKERS", "GENERATION", "CHECKPOINT", "REASON"], &rows);
    Ok(0)
}

pub(crate) async fn status(args: JobArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args.operator).await?;
    let reply = client.status(client::timed(JobRequest { job: args.name.to_string() })).await;
    show(&args.operator, reply)
}

pub(crate) async fn scale(args: ScaleArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args.operator).await?;
    let request = ScaleRequest { job: args.name.to_string(), workers: args.workers };
    let reply = client.scale(client::timed(request)).await;
    show(&args.operator, reply)
}

pub(crate) async fn pause(args: JobArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args.operator).await?;
    let reply = client.pause(client::timed_for(JobRequest { job: args.name.to_string() }, PAUSE)).await;
    show(&args.operator, reply)
}

pub(crate) async fn resume(args: JobArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args.operator).await?;
    let reply = client.resume(client::timed(JobRequest { job: args.name.to_string() })).await;
    show(&args.operator, reply)
}

pub(crate) async fn cancel(args: JobArgs) -> Result<u8, Failure> {
    let mut client = client::operator(&args.operator).await?;
    let reply = client.cancel(client::timed(JobRequest { job: args.name.to_string() })).await;
    show(&args.operator, reply)
}

pub(crate) async fn watch(args: JobArgs) -> Result<u8, Failure> {
    let way = client::way(&args.operator).await?;
    let address = &args.operator.coordinator;
    let status = way
        .client()
        .await?
        .status(client::timed(JobRequest { job: args.name.to_string() }))
        .await
        .map_err(|status| client::explain(status, address))?
        .into_inner();
    let mut renderer = Renderer::new(args.operator.output, status.steps, status.tokens_per_step);
    renderer.found(status.checkpoint_step);
    let mut events = client::follow(way, args.name.to_string(), PATIENCE);
    while let Some(event) = events.recv().await {
        let event = event?;
        renderer.event(&event);
        match event {
            JobEvent::Failed { reason, code } => return Err(Failure::new(code, reason)),
            JobEvent::Cancelled {} => return Err(Failure::cancelled()),
            event if event.is_last() => return Ok(0),
            _ => {}
        }
    }
    Err(Failure::job("the stream of events ended early"))
}

/// Prints a job's status, whichever call answered with it.
fn show(operator: &OperatorArgs, reply: Result<tonic::Response<JobStatus>, tonic::Status>) -> Result<u8, Failure> {
    let job = reply.map_err(|status| client::explain(status, &operator.coordinator))?.into_inner();
    if operator.output == Output::Json {
        say!("{}", status_json(&job));
        return Ok(0);
    }
    say!("job         {}", job.job);
    let reason = if job.reason.is_empty() { String::new() } else { format!(" ({})", job.reason) };
    say!("state       {}{reason}", job.state);
    say!("step        {} of {}", job.step, job.steps);
    if let Some(loss) = job.loss {
        say!("loss        {loss:.4}");
    }
    say!(
        "generation  {}, {} workers (from {} to {})",
        job.generation,
        job.world_size,
        job.min_workers,
        job.max_workers
    );
    if let Some(step) = job.checkpoint_step {
        say!("checkpoint  step {step}, digest {}", job.digest);
    }
    if !job.memory.is_empty() {
        let newest = job.memory_step.map_or("nothing yet".into(), |step| format!("step {step}"));
        say!("memory      {newest}; {}; {} snapshots skipped", job.memory, job.memory_skipped);
    }
    for node in &job.rooms {
        say!("            {}: {} of {} used", node.node, size::show(node.used), size::show(node.budget));
    }
    for of in &job.stragglers {
        say!("straggler   rank {} on {}: {:.2} times the median", of.rank, of.node, of.ratio);
    }
    say!("restarts    {} without progress", job.restarts_without_progress);
    if !job.workers.is_empty() {
        say!();
        let rows: Vec<Vec<String>> = job.workers.iter().zip(&job.nodes).map(|(w, node)| worker_row(w, node)).collect();
        table::print(&["RANK", "NODE", "PROCESS", "PHASE", "STEP"], &rows);
    }
    Ok(0)
}

fn worker_row(worker: &proto::wire::WorkerState, node: &str) -> Vec<String> {
    let dash = || "-".to_string();
    vec![
        worker.rank.map_or_else(dash, |rank| rank.to_string()),
        node.to_string(),
        worker.process.to_string(),
        phase(worker.phase()).to_string(),
        worker.step.map_or_else(dash, |step| step.to_string()),
    ]
}

fn phase(phase: WorkerPhase) -> &'static str {
    match phase {
        WorkerPhase::Unspecified => "unknown",
        WorkerPhase::Starting => "starting",
        WorkerPhase::Ready => "ready",
        WorkerPhase::Joining => "joining",
        WorkerPhase::Running => "running",
        WorkerPhase::Stopped => "stopped",
        WorkerPhase::Failed => "failed",
        WorkerPhase::Exited => "exited",
    }
}

fn status_json(job: &JobStatus) -> serde_json::Value {
    let workers: Vec<_> = job
        .workers
        .iter()
        .zip(&job.nodes)
        .map(|(worker, node)| {
            json!({"rank": worker.rank, "node": node, "process": worker.process,
                   "phase": phase(worker.phase()), "step": worker.step})
        })
        .collect();
    json!({
        "event": "job", "job": job.job, "state": job.state, "reason": job.reason, "generation": job.generation,
        "world_size": job.world_size, "step": job.step, "steps": job.steps, "loss": job.loss,
        "checkpoint_step": job.checkpoint_step, "digest": job.digest,
        "restarts_without_progress": job.restarts_without_progress, "min_workers": job.min_workers,
        "max_workers": job.max_workers, "workers": workers, "epoch": job.epoch,
        "memory_step": job.memory_step, "memory": job.memory, "memory_skipped": job.memory_skipped,
        "rooms": job.rooms.iter().map(|room| json!({"node": room.node, "budget": room.budget, "used": room.used}))
            .collect::<Vec<_>>(),
        "stragglers": job.stragglers.iter().map(|of| json!({"rank": of.rank, "node": of.node, "ratio": of.ratio}))
            .collect::<Vec<_>>(),
    })
}
