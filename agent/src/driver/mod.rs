//! Performs what the machine decides: the one loop of the agent.
//!
//! Everything that happens on the node arrives here as an [`Input`], one at a time: worker messages, ended processes,
//! orders of the coordinator, finished uploads, the clock. The machine says what to do, and it is done at once; nothing
//! in the loop waits for storage or for a peer.

mod conduct;
mod holding;
mod input;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use proto::ids::{Epoch, JobName, WorkerId};
use proto::invariant::Conduct;
use proto::wire::{self, agent_command, agent_message, coordinator_message, worker_message};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::children::{Children, Processes};
use crate::folder::Folder;
use crate::launch::Door;
use crate::link::{self, Outgoing};
use crate::machine::{Action, Command, Event, Machine};
use crate::memory::{self, Memory, Peers};
use crate::receipts::{SaveKey, Waiting};
use crate::socket;
use crate::uploads::Uploads;
use crate::{AgentError, Options, Surroundings, Witness};

pub(crate) use self::input::{Commands, Input};

/// Inputs waiting for the loop at most; senders wait beyond it.
const INPUTS: usize = 1024;
/// The machine's clock.
const TICK: Duration = Duration::from_millis(100);
/// Between two sendings of an unsettled receipt.
const RESEND: Duration = Duration::from_secs(5);
/// Between two reports, until the coordinator says otherwise.
const HEARTBEAT: Duration = proto::spec::detect::IDLE_HEARTBEAT;
/// For killed workers to be gone at the end.
const ENDING: Duration = Duration::from_secs(5);

/// A worker's stream and process end apart from one another; it is gone when both have.
#[derive(Debug, Default)]
struct Presence {
    commands: Option<Commands>,
    exited: Option<wire::Failure>,
}

struct Driver {
    options: Options,
    incarnation: String,
    machine: Machine,
    began: Instant,
    folder: Folder,
    children: Children,
    present: BTreeMap<WorkerId, Presence>,
    link: Option<Outgoing>,
    welcomed: bool,
    waiting: Waiting,
    witness: Option<Arc<dyn Witness>>,
    /// What this life has done, held against what an agent may do.
    conduct: Conduct,
    uploads: Uploads,
    memory: Memory,
    /// Where other agents read this node's snapshots.
    snapshots: String,
    heartbeat: Duration,
    reported: Instant,
    resent: Instant,
}

/// Makes the node's folder, takes over what an earlier life left, and opens the ways to coordinator, peers and workers.
async fn begin(
    options: Options,
    surroundings: Surroundings,
    sender: mpsc::Sender<Input>,
) -> Result<(Driver, JoinHandle<()>), AgentError> {
    let way = link::way(&options.coordinator, options.token.clone(), options.security.clone())?;
    memory::check_security(&options)?;
    let Surroundings { stores, workers, witness } = surroundings;
    let incarnation = proto::chance::uuid().to_string();
    let (folder, left) = Folder::create(&options.memory_dir, &incarnation, &options.node)?;
    let door = Door::new(folder.socket(), sender.clone());
    let workers = match workers {
        Some(workers) => workers,
        None => {
            socket::serve(door.clone(), sender.clone())?;
            Box::new(Processes::of(options.executable.clone()))
        }
    };
    let budget = folder.budget(options.memory_budget);
    let peers = Peers::new(options.token.clone(), options.security.clone());
    let node = options.node.to_string();
    let mut memory = Memory::new(node, peers, stores.clone(), folder.path().into(), budget, sender.clone());
    let adopted = memory.adopt(&left);
    let snapshots = memory::serve(&options, memory.vault.clone(), sender.clone()).await?.to_string();
    let link = tokio::spawn(link::run(way, stores.clone(), sender.clone()));
    let now = Instant::now();
    let driver = Driver {
        machine: Machine::new(options.cores),
        children: Children::new(workers, door, sender.clone()),
        uploads: Uploads::new(sender, stores, memory.times.clone()),
        memory,
        snapshots,
        options,
        incarnation,
        began: now,
        folder: folder.with(adopted),
        present: BTreeMap::new(),
        link: None,
        welcomed: false,
        waiting: Waiting::default(),
        witness,
        conduct: Conduct::default(),
        heartbeat: HEARTBEAT,
        reported: now,
        resent: now,
    };
    Ok((driver, link))
}

/// Runs the agent; see [`crate::run`].
pub(crate) async fn run(
    options: Options,
    surroundings: Surroundings,
    drain: impl Future<Output = ()> + Send,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), AgentError> {
    let (sender, mut inputs) = mpsc::channel(INPUTS);
    let (mut driver, link) = begin(options, surroundings, sender).await?;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut drain, mut stop) = (std::pin::pin!(drain), std::pin::pin!(stop));
    // Once it drains: when it leaves even if a job is still here.
    let mut leaving: Option<Instant> = None;
    let result = loop {
        tokio::select! {
            // Ticks before inputs: a node under load reports all the same.
            biased;
            () = &mut stop => break Ok(()),
            () = &mut drain, if leaving.is_none() => leaving = Some(driver.drain()),
            _ = tick.tick() => {
                driver.tick();
                if leaving.is_some_and(|at| driver.machine.is_idle() || Instant::now() >= at) {
                    break Ok(());
                }
            }
            input = inputs.recv() => match input {
                None => break Ok(()),
                Some(Input::LinkFailed(error)) => break Err(error),
                Some(Input::SocketFailed(reason)) => break Err(AgentError::Socket(reason)),
                Some(input) => driver.take(input),
            },
        }
    };
    link.abort();
    driver.end(&mut inputs).await;
    result
}

impl Driver {
    /// Tells the coordinator that the node is leaving; until when it waits to be freed of its jobs.
    fn drain(&mut self) -> Instant {
        let grace = self.machine.drain().unwrap_or_default();
        tracing::info!(grace = grace.as_secs_f64(), "leaving; a second signal leaves at once");
        self.event(Event::Tick);
        Instant::now() + grace
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::LinkUp(link) => self.link_up(link),
            Input::LinkDown => {
                self.link = None;
                self.welcomed = false;
            }
            Input::Coordinator(message) => self.order(message),
            Input::Attached { worker, commands } => self.attach(worker, commands),
            Input::Worker { worker, body } => self.hear(worker, body),
            Input::Detached { worker } => {
                if let Some(presence) = self.present.get_mut(&worker) {
                    presence.commands = None;
                }
                // A worker without its agent exits by itself; one that does not is ended.
                self.children.kill(worker);
                self.gone(worker);
            }
            Input::Exited { worker, failure } => {
                self.children.ended(worker);
                self.present.entry(worker).or_default().exited = Some(failure);
                self.gone(worker);
            }
            Input::Uploaded(finished) => self.uploaded(finished),
            Input::SaveFailed(failed) => {
                self.uploads.failed(&failed);
                self.waiting.push(agent_message::Body::Failed(failed));
                self.flush();
            }
            Input::Peer(state, taken) => {
                // The peer may have given up waiting.
                let _ = taken.send(self.memory.peer(&state));
                self.keep(JobName::new(state.job).ok());
            }
            Input::Asked(query, held) => drop(held.send(self.memory.asked(&query))),
            Input::Holds(holds) => {
                let job = self.memory.answered(holds);
                self.keep(Some(job));
            }
            // Without a stream nobody waits for it any more.
            Input::Probed(probed) => drop(self.send(agent_message::Body::Probed(probed))),
            Input::Encoded(encoded) => {
                let job = encoded.job.clone();
                self.memory.encoded(encoded);
                self.keep(Some(job));
            }
            Input::Restored { worker, answer } => self.tell(worker, agent_command::Body::Restored(answer)),
            Input::LinkFailed(_) | Input::SocketFailed(_) => {} // the loop has ended
        }
    }

    fn tick(&mut self) {
        self.event(Event::Tick);
        for job in self.memory.jobs() {
            self.keep(Some(job));
        }
        let now = Instant::now();
        let heartbeat = self.machine.heartbeat().unwrap_or(self.heartbeat).max(TICK);
        if now - self.reported >= heartbeat {
            self.report();
        }
        if now - self.resent >= RESEND {
            self.resend();
        }
        self.flush();
    }

    /// Takes an event and does what follows; `false`: it was refused.
    fn event(&mut self, event: Event) -> bool {
        let mut fresh = || WorkerId::from_uuid(proto::chance::uuid());
        let actions = self.machine.handle(self.began.elapsed(), event, &mut fresh);
        let mut taken = true;
        for action in actions {
            taken &= !matches!(action, Action::Refused(_));
            self.perform(action);
        }
        taken
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Spawn { job, worker } => {
                let made = self.folder.make_slots(worker).and_then(|()| self.children.spawn(&job, worker));
                match made {
                    Ok(process) => {
                        tracing::info!(%job, %worker, process, "worker started");
                        self.event(Event::Started { worker, process });
                    }
                    Err(error) => {
                        let reason = format!("the worker could not be started: {error}");
                        let kind = wire::FailureKind::Exit.into();
                        let failure = wire::Failure { kind, reason, ..Default::default() };
                        self.present.entry(worker).or_default().exited = Some(failure);
                        self.gone(worker);
                    }
                }
            }
            Action::Kill { worker, reason } => {
                tracing::info!(%worker, reason, "ending a worker");
                self.children.kill(worker);
            }
            Action::Send { worker, command } => {
                if self.may(worker, &command) {
                    self.command(worker, command);
                }
            }
            Action::Report => self.report(),
            Action::Fence { job, fenced, live } => self.uploads.fence(&job, fenced, live),
            Action::Forget(job) => {
                self.conduct.forgets(&job);
                self.uploads.forget(&job);
                self.waiting.forget(&job);
                let effects = self.memory.forget(&job);
                self.follow(effects);
            }
            Action::Refused(reason) => tracing::warn!(reason, "an order was refused"),
        }
    }

    fn command(&mut self, worker: WorkerId, command: Command) {
        let body = match command {
            Command::Prepare { spec, threads, place } => agent_command::Body::Prepare(wire::Prepare {
                spec,
                threads,
                place,
                slots: self.folder.slots(worker).display().to_string(),
                ring_host: self.options.ring_host.to_string(),
                slot_budget: self.memory.budget() / u64::from(self.options.slots.max(1)),
            }),
            Command::Run(run) => agent_command::Body::Run(run),
            Command::Hold(generation) => agent_command::Body::Hold(generation),
        };
        self.tell(worker, body);
    }

    fn tell(&mut self, worker: WorkerId, body: agent_command::Body) {
        let Some(commands) = self.present.get(&worker).and_then(|presence| presence.commands.as_ref()) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = commands.try_send(Ok(wire::AgentCommand { body: Some(body) }))
        {
            tracing::warn!(%worker, "a worker that does not read its commands is ended");
            self.children.kill(worker);
        }
    }

    fn attach(&mut self, worker: WorkerId, commands: Commands) {
        // Dropping the commands ends the stream of one that was not started here, or is gone already.
        let exited = self.present.get(&worker).is_some_and(|presence| presence.exited.is_some());
        if self.machine.job_of(worker).is_none() || exited {
            return tracing::warn!(%worker, "an unknown worker was turned away");
        }
        self.present.entry(worker).or_default().commands = Some(commands);
        self.event(Event::Attached(worker));
    }

    fn hear(&mut self, worker: WorkerId, body: worker_message::Body) {
        let Some(job) = self.machine.job_of(worker).cloned() else { return };
        match body {
            worker_message::Body::Hello(_) => {}
            worker_message::Body::State(state) => {
                if let Some(failure) = &state.failure {
                    tracing::warn!(%job, %worker, rank = state.rank, reason = failure.reason, "a worker failed");
                }
                self.event(Event::State { worker, state });
            }
            worker_message::Body::Step(step) => {
                self.waiting.push(agent_message::Body::Step(wire::StepReport { job: job.to_string(), ..step }));
                self.flush();
            }
            worker_message::Body::Skipped(skipped) => self.short(&job, skipped),
            worker_message::Body::Captured(captured) => self.captured(&job, worker, &captured),
            worker_message::Body::Restore(restore) => {
                let slot = self.folder.slots(worker).join(format!("slot-{}", restore.slot));
                // One that is in no live generation is about to be told so.
                if let Some(rank) = self.machine.rank_of(worker) {
                    self.memory.restore(&job, worker, rank, slot, restore.generation);
                }
            }
            worker_message::Body::Kept(kept) => {
                let effects = self.memory.kept_everywhere(&job, &kept);
                self.follow(effects);
                self.keep(Some(job));
            }
        }
    }

    /// Tells the machine of a worker's end once its last words have been read, and gives its memory back.
    fn gone(&mut self, worker: WorkerId) {
        let over = self.present.get(&worker).is_some_and(|p| p.commands.is_none() && p.exited.is_some());
        if !over {
            return;
        }
        let failure = self.present.remove(&worker).and_then(|presence| presence.exited).unwrap_or_default();
        tracing::info!(%worker, reason = failure.reason, "a worker is gone");
        self.clear(worker);
        self.conduct.ended(worker);
        self.event(Event::Exited { worker, failure });
    }

    fn link_up(&mut self, link: Outgoing) {
        let hello = wire::AgentHello {
            node: self.options.node.to_string(),
            incarnation: self.incarnation.clone(),
            slots: self.options.slots,
            build: wire::BUILD.into(),
            report: Some(self.full_report()),
            snapshots: self.snapshots.clone(),
            domain: self.options.domain.clone(),
            unix_ms: proto::date::unix_ms(),
        };
        self.welcomed = false;
        self.link = Some(link);
        self.send(agent_message::Body::Hello(hello));
    }

    fn order(&mut self, mut message: wire::CoordinatorMessage) {
        if let Some(witness) = &self.witness {
            witness.heard(&mut message);
        }
        let epoch = Epoch::new(message.epoch);
        match message.body {
            Some(coordinator_message::Body::Welcome(welcome)) => {
                if let Ok(heartbeat) = Duration::try_from_secs_f64(welcome.heartbeat_seconds) {
                    self.heartbeat = heartbeat.max(TICK);
                }
                self.welcomed = true;
                self.event(Event::Welcomed(epoch));
                self.report();
                self.resend();
                self.waiting.hand_again();
                self.flush();
            }
            Some(coordinator_message::Body::Desired(desired)) => {
                self.learn(epoch, &desired);
                if self.event(Event::Desired { epoch, desired }) {
                    self.obeyed(epoch);
                }
            }
            Some(coordinator_message::Body::Settled(settled)) => {
                // One of a coordinator that has been superseded says nothing.
                if let Some(key) = SaveKey::of(&settled).filter(|_| epoch >= self.machine.epoch()) {
                    let receipt = self.waiting.settle(&key);
                    self.uploads.settled(&key, settled.committed, receipt);
                }
            }
            Some(coordinator_message::Body::Probe(probe)) => self.memory.probe(probe),
            Some(coordinator_message::Body::Refused(_)) | None => {} // the link ends the agent
        }
    }

    fn report(&mut self) {
        self.reported = Instant::now();
        let report = self.full_report();
        self.send(agent_message::Body::Report(report));
    }

    fn resend(&mut self) {
        self.resent = Instant::now();
        if self.welcomed {
            let receipts: Vec<_> = self.waiting.receipts().cloned().collect();
            for receipt in receipts {
                self.send(agent_message::Body::Receipt(receipt));
            }
        }
    }

    /// Sends what waited for a coordinator.
    fn flush(&mut self) {
        while self.welcomed {
            let Some(body) = self.waiting.next() else { return };
            if let Some(back) = self.send(body.clone()) {
                return self.waiting.put_back(back);
            }
            self.waiting.handed(body);
        }
    }

    /// Sends if there is a stream with room; gives the message back if not. What is lost is sent again in time.
    fn send(&mut self, body: agent_message::Body) -> Option<agent_message::Body> {
        let Some(link) = &self.link else { return Some(body) };
        let failed = link.try_send(wire::AgentMessage { body: Some(body) }).err()?;
        failed.into_inner().body
    }

    /// Ends all workers and waits until they are gone.
    async fn end(mut self, inputs: &mut mpsc::Receiver<Input>) {
        let mut left = self.children.kill_all();
        let deadline = Instant::now() + ENDING;
        while left > 0 {
            match tokio::time::timeout_at(deadline, inputs.recv()).await {
                Ok(Some(Input::Exited { .. })) => left -= 1,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return tracing::warn!(left, "workers did not end in time"),
            }
        }
    }
}
