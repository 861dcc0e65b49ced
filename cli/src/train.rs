//! `cairn train`: a whole job on one machine.
//!
//! Starts a coordinator and an agent as child processes (the agent starts the workers), submits the job and follows it.
//! Whatever dies below is started again; the job goes on. The first Ctrl-C or SIGTERM saves a checkpoint and stops, the
//! second stops at once.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use proto::auth::Token;
use proto::event::JobEvent;
use proto::spec::{JobSpec, Overrides, Reduction};
use proto::tls::Security;
use proto::wire::{JobRequest, SubmitMode, SubmitRequest};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::{Code, Status};

use crate::args::{JobFileArgs, Output, TrainArgs};
use crate::client::{self, Client, Way};
use crate::failure::{Failure, INTERRUPTED, WRONG_REQUEST, chain};
use crate::render::Renderer;
use crate::supervise::{Part, Refused};

/// The coordinator answers within this, or something is wrong with it.
const START_WITHIN: Duration = Duration::from_secs(60);
/// A coordinator that is away longer than this is not coming back.
const PATIENCE: Duration = Duration::from_secs(120);

/// Reads the job file with everything the command line says about it.
pub(crate) fn read_job(args: &JobFileArgs) -> Result<JobSpec, Failure> {
    let mut overrides: Overrides = args.set.iter().cloned().collect();
    if let Some(workers) = args.workers {
        overrides.insert("resources.workers".into(), workers.to_string());
    }
    if let Some(store) = &args.store {
        let here = std::env::current_dir().map_err(Failure::job)?;
        let url = checkpoint_store::normalize_url(store, &here)
            .map_err(|error| Failure::request(format!("--store: {}", chain(&error))))?;
        overrides.insert("checkpoint.store".into(), format!("{url:?}"));
    }
    let spec = JobSpec::load(&args.file, &overrides)?;
    if args.steps.is_some_and(|steps| steps == 0 || steps > spec.training.steps) {
        return Err(Failure::request(format!(
            "--steps {} must be from 1 to training.steps = {}",
            args.steps.unwrap_or_default(),
            spec.training.steps
        )));
    }
    checkpoint_store::Space::of_model(&spec.model)
        .map_err(|error| Failure::request(format!("{}: [model] is too large: {error}", args.file.display())))?;
    if spec.training.reduction == Reduction::Fast {
        warn(
            "training.reduction is \"fast\": the weights will depend on the number of workers; \"exact\" gives the \
             same bits for any number",
        );
    }
    Ok(spec)
}

/// Says on standard error what the caller should know and may have meant. Nobody may be reading.
fn warn(text: &str) {
    let _ = writeln!(std::io::stderr(), "cairn: {text}");
}

/// What a submission asks for.
pub(crate) fn submit_request(args: &JobFileArgs, spec: &JobSpec) -> Result<SubmitRequest, Failure> {
    let mode = match (args.mode.resume, args.mode.fresh) {
        (true, _) => SubmitMode::Resume,
        (_, true) => SubmitMode::Fresh,
        _ => SubmitMode::New,
    };
    let spec = serde_json::to_vec(spec).map_err(|error| Failure::job(format!("cannot encode the job: {error}")))?;
    Ok(SubmitRequest { spec, mode: mode.into(), stop_at: args.steps })
}

/// Checks the datasets before anything is started; the workers check them again, for they may be elsewhere.
fn check_data(spec: &JobSpec) -> Result<(), Failure> {
    worker::dataset::open(spec).map(drop).map_err(|error| Failure::request(chain(&error)))
}

/// Checks that the store can be used, before any process is started.
fn check_store(spec: &JobSpec) -> Result<(), Failure> {
    let url = &spec.checkpoint.store;
    if url.starts_with("memory:") {
        let message = "checkpoint.store (or --store): memory:// ends with its process; give a path, or file://, s3://, \
                       gs:// or az://";
        return Err(Failure::request(message));
    }
    match checkpoint_store::Store::open(url) {
        Ok(_) => Ok(()),
        Err(error) => {
            let failure = Failure::from(error);
            Err(Failure::new(failure.code(), format!("checkpoint.store (or --store): {failure}")))
        }
    }
}

pub(crate) async fn run(args: TrainArgs) -> Result<u8, Failure> {
    let spec = read_job(&args.job)?;
    tokio::task::block_in_place(|| check_data(&spec))?;
    check_store(&spec)?;
    let mut signals = Signals::new()?;
    let folder = runtime_folder()?;
    let (refused, mut refusals) = mpsc::channel(4);
    let local = Local::start(&spec, &args.memory, folder.path(), refused)?;
    let outcome = tokio::select! {
        outcome = follow(&args, &spec, &local, &mut signals) => outcome,
        Some(Refused { part, code }) = refusals.recv() => {
            // The part has said on standard error what is wrong.
            Err(Failure::new(code.max(WRONG_REQUEST), format!("the {part} process gave up (its reason is above)")))
        }
    };
    local.stop().await;
    outcome
}

/// The parts of a cluster of one machine.
struct Local {
    agent: Part,
    coordinator: Part,
    address: String,
    token: Token,
}

impl Local {
    fn start(spec: &JobSpec, memory: &Path, folder: &Path, refused: mpsc::Sender<Refused>) -> Result<Self, Failure> {
        let token_file = folder.join("token");
        let token = Token::read_or_create(&token_file, random_bytes()).map_err(|error| Failure::job(chain(&error)))?;
        let token_file = token_file.display().to_string();
        let address = format!("127.0.0.1:{}", free_port()?);
        let words = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        let coordinator = Part::start(
            "coordinator",
            words(&[
                "coordinator",
                "--supervised",
                "--store",
                &spec.checkpoint.store,
                "--listen",
                &address,
                "--token-file",
                &token_file,
                "--only",
                spec.name.as_str(),
            ]),
            // What an earlier command left unfinished waits for what this one asks; after that, a coordinator that is
            // started again carries on.
            &["--held"],
            refused.clone(),
        )?;
        // CPU workers are processes that share the cores, so a job may be scaled beyond their number.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u32;
        let slots = spec.resources.workers.max.max(cores).max(8).to_string();
        let agent = Part::start(
            "agent",
            words(&[
                "agent",
                "--supervised",
                "--coordinator",
                &address,
                "--token-file",
                &token_file,
                "--node",
                "local",
                "--slots",
                &slots,
                "--memory",
                &memory.display().to_string(),
            ]),
            &[],
            refused,
        )?;
        Ok(Self { agent, coordinator, address, token })
    }

    async fn stop(self) {
        // The agent first: it reports to a coordinator that still listens.
        self.agent.stop().await;
        self.coordinator.stop().await;
    }
}

async fn follow(args: &TrainArgs, spec: &JobSpec, local: &Local, signals: &mut Signals) -> Result<u8, Failure> {
    let way = Way::new(&local.address, local.token.clone(), Security::Loopback)?;
    let mut client = way.client().await?;
    let last = args.job.steps.unwrap_or(spec.training.steps);
    let mut renderer = Renderer::new(args.output, last, spec.training.tokens_per_step());
    let request = submit_request(&args.job, spec)?;
    let finished = tokio::select! {
        outcome = submit(&mut client, request, START_WITHIN) => outcome?,
        () = signals.next() => return Ok(INTERRUPTED),
    };
    if args.output == Output::Text && !finished {
        renderer.note(&format!(
            "job {}: {} steps of {} tokens, coordinator at {}, store {}",
            spec.name,
            spec.training.steps,
            spec.training.tokens_per_step(),
            local.address,
            spec.checkpoint.store
        ));
    }
    if !finished {
        renderer.detection(&spec.fault.detection());
    }
    renderer.found(newest_checkpoint(&mut client, spec).await);
    let mut events = client::follow(way, spec.name.to_string(), PATIENCE);
    let mut stopping: Option<Instant> = None;
    loop {
        let deadline = stopping.unwrap_or_else(|| Instant::now() + Duration::from_secs(86_400));
        tokio::select! {
            event = events.recv() => {
                let event = event.ok_or_else(|| Failure::job("the stream of events ended early"))??;
                renderer.event(&event);
                match event {
                    JobEvent::Finished { .. } => return Ok(0),
                    JobEvent::Paused { .. } => return Ok(if stopping.is_some() { INTERRUPTED } else { 0 }),
                    JobEvent::Failed { reason, code } => return Err(Failure::new(code, reason)),
                    JobEvent::Cancelled {} => return Err(Failure::cancelled()),
                    _ => {}
                }
            }
            () = signals.next() => {
                if stopping.is_some() {
                    renderer.note("stopping at once");
                    return Ok(INTERRUPTED);
                }
                renderer.note("saving a checkpoint, then stopping; interrupt again to stop at once");
                stopping = Some(Instant::now() + Duration::from_secs_f64(spec.fault.grace));
                let (client, job) = (client.clone(), spec.name.to_string());
                tokio::spawn(pause(client, job, Duration::from_secs_f64(spec.fault.grace)));
            }
            () = sleep_until(deadline) => {
                let grace = spec.fault.grace;
                let message = format!("no checkpoint within fault.grace = {grace} s: stopped without one");
                return Err(Failure::new(INTERRUPTED, message));
            }
        }
    }
}

/// Submits once the coordinator is up; `true` if the job had already finished.
pub(crate) async fn submit(client: &mut Client, request: SubmitRequest, within: Duration) -> Result<bool, Status> {
    let deadline = Instant::now() + within;
    // Set once an answer was lost: the request may have been heard all the same.
    let mut lost = false;
    loop {
        match client.submit(client::timed(request.clone())).await {
            Ok(reply) => return Ok(reply.into_inner().finished),
            Err(status) if client::is_passing(&status) && Instant::now() < deadline => {
                lost |= !client::was_unheard(&status);
                sleep(Duration::from_millis(50)).await;
            }
            Err(status) if lost && status.code() == Code::FailedPrecondition => {
                let job = serde_json::from_slice::<JobSpec>(&request.spec).map(|spec| spec.name.to_string());
                let asked = client.status(client::timed(JobRequest { job: job.unwrap_or_default() })).await;
                let alive = ["submitted", "queued", "forming", "running"];
                return match asked {
                    Ok(reply) if alive.contains(&reply.get_ref().state.as_str()) => Ok(false),
                    _ => Err(status),
                };
            }
            Err(status) => return Err(status),
        }
    }
}

/// The step the job goes on from, for the progress bar; what cannot be had is not worth failing for.
async fn newest_checkpoint(client: &mut Client, spec: &JobSpec) -> Option<u64> {
    let reply = client.status(client::timed(JobRequest { job: spec.name.to_string() })).await;
    reply.ok().and_then(|reply| reply.into_inner().checkpoint_step)
}

/// Asks for a pause until someone hears it; the watch tells when it is done.
async fn pause(mut client: Client, job: String, limit: Duration) {
    let ask = async {
        while let Err(status) = client.pause(client::timed_for(JobRequest { job: job.clone() }, limit)).await {
            if !client::is_passing(&status) {
                tracing::warn!("the pause was refused: {}", status.message());
                return;
            }
            sleep(Duration::from_millis(200)).await;
        }
    };
    if timeout(limit, ask).await.is_err() {
        tracing::warn!("the pause was not answered within {limit:?}");
    }
}

/// Ctrl-C and SIGTERM, which mean the same.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::job(format!("cannot listen for signals: {error}")));
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// A private folder for the token, gone when the command ends.
fn runtime_folder() -> Result<tempfile::TempDir, Failure> {
    tempfile::Builder::new()
        .prefix("cairn-")
        .tempdir()
        .map_err(|error| Failure::job(format!("cannot make a temporary folder: {error}")))
}

/// A port for the coordinator, outside the range the system hands out for outgoing connections, so that it is still
/// free when a coordinator that died is started again.
fn free_port() -> Result<u16, Failure> {
    let bytes = random_bytes();
    let start = u16::from_le_bytes([bytes[0], bytes[1]]) % 12_000;
    for offset in 0..8000 {
        let port = 20_000 + (start + offset) % 12_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    Err(Failure::job("no free port between 20000 and 32000 on 127.0.0.1"))
}

/// 32 random bytes.
pub(crate) fn random_bytes() -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    bytes[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    bytes
}
