//! A simulated worker: the product's session machine and cadence, around a trainer that computes [`super::truth`].
//!
//! It lives as a task on its agent's host and speaks with the agent in the very messages of the socket. One task is the
//! session, one the trainer in a generation, as the product has a session loop and a training thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent::{Commands, Line};
use checkpoint_store::Opener;
use proto::ids::WorkerId;
use proto::spec::JobSpec;
use proto::wire::{self, FailureKind, agent_command, worker_message};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::sleep;
use turmoil::net::TcpListener;
use worker::machine::kept::Steps;
use worker::machine::session::{Action, Identity, Input, Session};

use super::plant::Plant;
use super::slots::Slots;
use super::trainer::{self, Stopped};
use super::truth;
use super::world::{Host, World};

/// News on their way to the session.
const CHANNEL: usize = 64;
/// Reading the spec and the data.
const PREPARING: Duration = Duration::from_millis(300);

/// What the trainer tells the session.
pub(crate) enum News {
    Event(Input),
    Say(worker_message::Body),
}

/// What a worker is started with.
#[derive(Clone)]
pub(crate) struct Start {
    pub(crate) world: World,
    pub(crate) host: Host,
    pub(crate) worker: WorkerId,
    pub(crate) stores: Opener,
    /// Time of a micro-batch.
    pub(crate) pace: Duration,
}

/// Shared by the session and the trainer for the length of one generation.
#[derive(Default)]
pub(crate) struct Control {
    pub(crate) stop: AtomicBool,
    aborted: AtomicBool,
    wake: Notify,
    /// Takes the agent's answer to a request to restore.
    pub(crate) restored: std::sync::Mutex<Option<oneshot::Sender<wire::Restored>>>,
}

impl Control {
    fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    async fn aborted(&self) {
        while !self.aborted.load(Ordering::Relaxed) {
            self.wake.notified().await;
        }
    }
}

/// What a prepared trainer has.
pub(crate) struct Prepared {
    pub(crate) spec: JobSpec,
    pub(crate) listener: TcpListener,
}

struct Server {
    start: Start,
    session: Session,
    line: Line,
    prepared: Option<Arc<Prepared>>,
    slots: Arc<Slots>,
    control: Option<(u64, Arc<Control>)>,
    news: mpsc::Sender<News>,
    /// Tasks of the trainer: they end with the worker.
    tasks: JoinSet<()>,
}

/// Serves the agent until it ends the conversation.
pub(crate) async fn live(start: Start, mut commands: Commands, line: Line) {
    let (news, mut incoming) = mpsc::channel(CHANNEL);
    let (session, slots) = (Session::default(), Arc::default());
    let mut server = Server { start, session, line, prepared: None, slots, control: None, news, tasks: JoinSet::new() };
    server.report().await;
    loop {
        tokio::select! {
            biased;
            command = commands.recv() => match command {
                Some(Ok(wire::AgentCommand { body: Some(body) })) => server.obey(body).await,
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
            Some(news) = incoming.recv() => match news {
                News::Event(event) => server.take(event).await,
                News::Say(body) => drop(server.line.say(body).await),
            },
            // A task that is done has said so; one that broke is a defect of the simulation.
            Some(done) = server.tasks.join_next() => done.expect("the trainer does not panic"),
        }
    }
}

impl Server {
    async fn obey(&mut self, command: agent_command::Body) {
        match command {
            agent_command::Body::Prepare(prepare) => self.take(Input::Prepare(prepare)).await,
            agent_command::Body::Run(run) => self.take(Input::Run(run)).await,
            agent_command::Body::Hold(generation) => self.take(Input::Hold(generation)).await,
            agent_command::Body::SlotFree(slot) => self.slots.free(slot),
            agent_command::Body::Kept(kept) => {
                self.slots.keeps(kept.generation, Steps::of(&kept.complete, &kept.given_up));
            }
            agent_command::Body::Restored(answer) => {
                let control = self.control.as_ref().filter(|(of, _)| *of == answer.generation);
                let waiting = control.and_then(|(_, control)| control.restored.lock().expect("no panic").take());
                if let Some(waiting) = waiting {
                    // A trainer that was broken off does not wait any more.
                    let _ = waiting.send(answer);
                }
            }
            agent_command::Body::Quit(_) => {}
        }
    }

    async fn take(&mut self, input: Input) {
        if let Input::Prepared(_) | Input::Joined { .. } | Input::Failed { .. } = &input {
            self.start.world.note(
                self.start.host,
                "worker",
                format_args!("{} {}", short(self.start.worker), told(&input)),
            );
        }
        for action in self.session.handle(input) {
            match action {
                Action::Prepare(prepare) => self.prepare(prepare).await,
                Action::Start(run) => self.run(run),
                Action::Stop(generation) => {
                    if let Some((_, control)) = self.control.as_ref().filter(|(of, _)| *of == generation) {
                        control.stop.store(true, Ordering::Relaxed);
                    }
                }
                Action::Abort(generation) => self.abort(generation),
                Action::Report => self.report().await,
            }
        }
    }

    /// Reads the spec and opens the ring's port; the trainer is prepared a little later.
    async fn prepare(&mut self, prepare: wire::Prepare) {
        let spec: JobSpec = serde_json::from_slice(&prepare.spec).expect("the coordinator sends a spec");
        let listener = TcpListener::bind("0.0.0.0:0").await.expect("a free port");
        let port = listener.local_addr().expect("a bound listener").port();
        self.slots.place_in(&prepare.slots);
        self.prepared = Some(Arc::new(Prepared { spec, listener }));
        let identity = Identity {
            ring_address: format!("{}:{port}", prepare.ring_host),
            numeric_identity: "simulated".into(),
            data_fingerprint: format!("{} steps", truth::STEPS),
        };
        let news = self.news.clone();
        self.tasks.spawn(async move {
            sleep(PREPARING).await;
            let _ = news.send(News::Event(Input::Prepared(identity))).await;
        });
    }

    fn run(&mut self, run: wire::WorkerRun) {
        let generation = run.announcement.as_ref().map_or(0, |announcement| announcement.generation);
        let stop = run.announcement.as_ref().is_some_and(|announcement| announcement.stop);
        let control = Arc::new(Control::default());
        control.stop.store(stop, Ordering::Relaxed);
        self.control = Some((generation, control.clone()));
        let Some(prepared) = self.prepared.clone() else { return };
        let (start, slots, news) = (self.start.clone(), self.slots.clone(), self.news.clone());
        let deaf = start.world.has(Plant::IgnoresHold);
        self.tasks.spawn(async move {
            let training = trainer::run(&start, &prepared, &run, &control, &slots, &news);
            let ended = tokio::select! {
                biased;
                () = control.aborted(), if !deaf => None,
                ended = training => Some(ended),
            };
            let event = match ended {
                Some(Ok(Stopped { step, loss })) => Input::Stopped { generation, step, loss },
                Some(Err((kind, reason))) => Input::Failed { generation: Some(generation), kind, reason, moved: None },
                None => Input::Left { generation },
            };
            let _ = news.send(News::Event(event)).await;
        });
    }

    fn abort(&mut self, generation: u64) {
        self.start.world.lock().oracle.leaves(generation, self.start.worker);
        if let Some((_, control)) = self.control.as_ref().filter(|(of, _)| *of == generation) {
            control.abort();
        }
    }

    async fn report(&mut self) {
        let state = self.session.state();
        // An agent that is gone ends the conversation, which the loop sees next.
        let _ = self.line.say(worker_message::Body::State(state)).await;
    }
}

/// Enough of a worker's name to tell it by.
pub(crate) fn short(worker: WorkerId) -> String {
    worker.to_string().chars().take(6).collect()
}

fn told(input: &Input) -> String {
    match input {
        Input::Prepared(_) => "is ready".into(),
        Input::Joined { generation, step, source, .. } => {
            format!("joined generation {generation} at {step} ({source})")
        }
        Input::Failed { generation, kind, reason, .. } => {
            let generation = generation.unwrap_or(0);
            format!("failed in generation {generation}: {} {reason}", FailureKind::as_str_name(kind))
        }
        _ => String::new(),
    }
}
