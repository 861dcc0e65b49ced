//! The driver: one task that owns the machine and performs what it decides.
//!
//! Everything that happens (messages, requests, finished store operations, time) reaches the machine through one queue,
//! in one order. Store operations run in tasks of their own, at most one for a job and one for the nodes; if one
//! breaks, the driver ends with its error rather than going on without it.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::wire::CoordinatorMessage;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tonic::Status;

use crate::Scope;
use crate::error::CoordinatorError;
use crate::journal::Journal;
use crate::machine::{Action, Answer, Ask, Cluster, Connection, Event, Refusal, RequestId};
use crate::metrics::Metrics;
use crate::watch::Hub;

/// Between two ticks of the machine.
const TICK: Duration = proto::spec::detect::TICK;

/// The way to an agent.
pub(crate) type Outbox = mpsc::Sender<Result<CoordinatorMessage, Status>>;

/// What the services hand to the driver.
pub(crate) enum Input {
    /// An agent's stream opened.
    Attach { connection: Connection, outbox: Outbox, open: oneshot::Sender<()>, event: Event },
    /// Something happened.
    Event(Event),
    /// An operator asks.
    Ask { ask: Ask, reply: oneshot::Sender<Result<Answer, Refusal>> },
}

/// What the loop has waited for.
enum Happened {
    Input(Input),
    Stored(Event),
    Tick,
}

/// See the module header.
pub(crate) struct Driver {
    cluster: Cluster,
    epoch: u64,
    journal: Journal,
    hub: Hub,
    metrics: Metrics,
    scope: Scope,
    began: Instant,
    /// The ways to the agents; dropping the second half of one closes its stream.
    outboxes: BTreeMap<Connection, (Outbox, oneshot::Sender<()>)>,
    replies: BTreeMap<RequestId, oneshot::Sender<Result<Answer, Refusal>>>,
    asked: RequestId,
    /// Each ends with the event that says what came of it.
    operations: JoinSet<Event>,
}

impl Driver {
    pub(crate) fn new(
        cluster: Cluster,
        epoch: u64,
        journal: Journal,
        (hub, metrics): (Hub, Metrics),
        scope: Scope,
    ) -> Self {
        Self {
            cluster,
            epoch,
            journal,
            hub,
            metrics,
            scope,
            began: Instant::now(),
            outboxes: BTreeMap::new(),
            replies: BTreeMap::new(),
            asked: 0,
            operations: JoinSet::new(),
        }
    }

    /// Reads the nodes and jobs in the store. Nothing may be asked before: an unread job would seem not to exist.
    pub(crate) async fn load(&mut self) -> Result<(), CoordinatorError> {
        let drained = self.journal.load_nodes().await?;
        self.handle(Event::NodesLoaded { drained })?;
        let (only, held) = match &self.scope {
            Scope::All => (None, false),
            Scope::Job { name, held } => (Some(name), *held),
        };
        for (job, mut found) in self.journal.load(only).await? {
            if let (true, Ok(ledger)) = (held, &mut found) {
                ledger.interrupt();
            }
            self.handle(match found {
                Ok(ledger) => Event::Loaded { job, ledger: Box::new(ledger) },
                Err(reason) => Event::Unreadable { job, reason },
            })?;
        }
        Ok(())
    }

    /// Works until the leadership is lost or something breaks.
    ///
    /// While it is not `sure` that it still leads, everything waits: whoever was asleep or cut off from the store would
    /// else break off what a successor goes on with. To the machine that is a pause of the process.
    pub(crate) async fn run(
        mut self,
        mut inputs: mpsc::Receiver<Input>,
        mut sure: watch::Receiver<Instant>,
    ) -> Result<(), CoordinatorError> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let happened = tokio::select! {
                // In this order, for there are few ticks and few operations: no flood of messages holds them up.
                biased;
                _ = ticks.tick() => Happened::Tick,
                Some(done) = self.operations.join_next() => {
                    Happened::Stored(done.map_err(|error| CoordinatorError::broken("a store operation", error))?)
                }
                input = inputs.recv() => match input {
                    Some(input) => Happened::Input(input),
                    None => return Err(CoordinatorError::broken("the services", "all of them ended")),
                },
            };
            while Instant::now() >= *sure.borrow_and_update() {
                sure.changed().await.map_err(|error| CoordinatorError::broken("the leadership", error))?;
            }
            match happened {
                Happened::Input(input) => self.take(input)?,
                Happened::Stored(event) => self.handle(event)?,
                Happened::Tick => self.handle(Event::Tick)?,
            }
        }
    }

    fn take(&mut self, input: Input) -> Result<(), CoordinatorError> {
        match input {
            Input::Attach { connection, outbox, open, event } => {
                self.outboxes.insert(connection, (outbox, open));
                self.handle(event)
            }
            Input::Event(event) => {
                if let Event::Detached { connection, .. } = &event {
                    self.outboxes.remove(connection);
                }
                self.handle(event)
            }
            Input::Ask { ask, reply } => {
                self.asked += 1;
                self.replies.insert(self.asked, reply);
                self.handle(Event::Asked { request: self.asked, ask })
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), CoordinatorError> {
        match &event {
            Event::Attached { node, state, .. } | Event::Report { node, state, .. } => {
                self.metrics.reported(node, state);
            }
            Event::Detached { node, .. } => self.metrics.left(node),
            Event::Loaded { job, ledger } if ledger.end.is_none() => self.metrics.adopted(job, ledger.generation),
            Event::SaveFailed { job, .. } => self.metrics.save_failed(job),
            _ => {}
        }
        for action in self.cluster.handle(self.began.elapsed(), event) {
            match action {
                Action::Send { node, connection, body } => {
                    let message = CoordinatorMessage { epoch: self.epoch, body: Some(body) };
                    let Some((outbox, _)) = self.outboxes.get(&connection) else { continue };
                    if outbox.try_send(Ok(message)).is_err() {
                        // Its next stream is told everything anew.
                        tracing::warn!(%node, "the agent has gone or does not keep up; its stream is closed");
                        self.outboxes.remove(&connection);
                    }
                }
                Action::Close { connection } => drop(self.outboxes.remove(&connection)),
                Action::Store { job, operation } => {
                    let work = self.journal.clone().perform(job.clone(), operation);
                    self.operations.spawn(async move { Event::Stored { job, outcome: work.await } });
                }
                Action::RecordNodes { drained } => {
                    let work = self.journal.clone().record_nodes(drained);
                    self.operations.spawn(async move { Event::NodesRecorded { outcome: work.await } });
                }
                Action::Publish { job, event } => {
                    self.metrics.happened(&job, &event);
                    self.hub.publish(&job, &event);
                }
                Action::Reopen { job } => self.hub.reopen(&job),
                Action::Reply { request, answer } => {
                    if let Some(reply) = self.replies.remove(&request) {
                        // A caller that has gone away needs no answer.
                        let _ = reply.send(answer);
                    }
                }
                Action::Log { job: Some(job), text } => tracing::info!(%job, "{text}"),
                Action::Log { job: None, text } => tracing::info!("{text}"),
                Action::StepDown { reason } => return Err(CoordinatorError::Fenced(reason)),
            }
        }
        Ok(())
    }
}
