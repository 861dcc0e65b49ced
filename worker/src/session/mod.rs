//! The conversation with the agent.
//!
//! One stream over the agent's Unix socket. The session machine decides, this loop performs: it hands orders to the
//! training thread, passes its news on to the agent, and ends when the agent's stream does. The training thread never
//! waits for this loop for longer than a full channel, and the loop never waits for the training thread.

mod control;
mod thread;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use proto::wire::node_client::NodeClient;
use proto::wire::{self, agent_command, worker_message};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

pub use control::Control;
pub use thread::{News, Order};

use crate::machine::kept::Steps;
use crate::machine::session::{Action, Input, Session};
use crate::run::{Options, WorkerError};
use crate::slots::{Kept, Slots};

/// For the agent to take the worker in.
const ATTACH: Duration = Duration::from_secs(20);
/// Messages on their way to the agent, and news on their way to the session.
const CHANNEL: usize = 256;

struct Server<'a> {
    options: &'a Options,
    session: Session,
    outgoing: mpsc::Sender<wire::WorkerMessage>,
    orders: std::sync::mpsc::Sender<Order>,
    /// The generation the training thread is in.
    control: Option<(u64, Arc<Control>)>,
    slots: Arc<Slots>,
}

/// Serves the agent until its stream ends; see [`crate::run::run`].
pub(crate) async fn serve(options: &Options, handle: Handle) -> Result<(), WorkerError> {
    let no_agent = |reason| WorkerError::NoAgent { socket: options.agent_socket.clone(), reason };
    let (outgoing, messages) = mpsc::channel(CHANNEL);
    let hello = worker_message::Body::Hello(options.worker.to_string());
    outgoing.try_send(wire::WorkerMessage { body: Some(hello) }).map_err(|error| no_agent(error.to_string()))?;
    let attaching = async {
        let channel = connect(&options.agent_socket).await.map_err(|error| no_agent(error.to_string()))?;
        let mut client = NodeClient::new(channel)
            .max_decoding_message_size(wire::MOST_MESSAGE_BYTES)
            .max_encoding_message_size(wire::MOST_MESSAGE_BYTES);
        let attached = client.attach(ReceiverStream::new(messages)).await;
        attached.map_err(|status| WorkerError::Refused(status.message().to_string()))
    };
    let late = |_| no_agent(format!("it did not answer within {} s", ATTACH.as_secs()));
    let mut commands = tokio::time::timeout(ATTACH, attaching).await.map_err(late)??.into_inner();

    let (news, mut incoming) = mpsc::channel(CHANNEL);
    let slots = Arc::new(Slots::default());
    let orders = thread::start(options, news, slots.clone(), handle).map_err(WorkerError::Start)?;
    let mut server = Server { options, session: Session::default(), outgoing, orders, control: None, slots };
    server.report().await;
    loop {
        tokio::select! {
            // An error of the stream is the agent's end, like its orderly close.
            command = commands.message() => match command {
                Ok(Some(wire::AgentCommand { body: Some(agent_command::Body::Quit(_)) }) | None) | Err(_) => break,
                Ok(Some(command)) => server.obey(command).await,
            },
            Some(news) = incoming.recv() => match news {
                News::Lost(reason) => return Err(WorkerError::DeviceLost(reason)),
                news => server.hear(news).await,
            },
        }
    }
    if let Some((_, control)) = &server.control {
        control.abort();
    }
    Ok(())
}

async fn connect(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = socket.to_path_buf();
    // The URI is only a form the library asks for; the connector goes to the socket.
    Endpoint::from_static("http://agent.invalid")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
}

impl Server<'_> {
    async fn obey(&mut self, command: wire::AgentCommand) {
        match command.body {
            Some(agent_command::Body::Prepare(prepare)) => self.take(Input::Prepare(prepare)).await,
            Some(agent_command::Body::Run(run)) => self.take(Input::Run(run)).await,
            Some(agent_command::Body::Hold(generation)) => self.take(Input::Hold(generation)).await,
            Some(agent_command::Body::SlotFree(slot)) => self.slots.free(slot),
            Some(agent_command::Body::Kept(kept)) => {
                let steps = Steps::of(&kept.complete, &kept.given_up);
                self.slots.keeps(Kept { generation: kept.generation, steps, seconds: kept.seconds });
            }
            Some(agent_command::Body::Restored(answer)) => {
                if let Some(control) = self.control_of(answer.generation) {
                    control.restored(answer);
                }
            }
            Some(agent_command::Body::Quit(_)) | None => {}
        }
    }

    async fn hear(&mut self, news: News) {
        match news {
            News::Event(event) => self.take(event).await,
            News::Step(step) => {
                // For people only: dropped when the agent does not keep up.
                let _ = self.outgoing.try_send(wire::WorkerMessage { body: Some(worker_message::Body::Step(step)) });
            }
            News::Captured(captured) => self.send(worker_message::Body::Captured(captured)).await,
            News::Skipped(skipped) => self.send(worker_message::Body::Skipped(skipped)).await,
            News::Restore(restore) => self.send(worker_message::Body::Restore(restore)).await,
            News::Kept(kept) => self.send(worker_message::Body::Kept(kept)).await,
            // The loop ends on it.
            News::Lost(_) => {}
        }
    }

    async fn take(&mut self, input: Input) {
        for action in self.session.handle(input) {
            match action {
                Action::Prepare(prepare) => self.order(Order::Prepare(prepare)),
                Action::Start(run) => {
                    let (generation, stop) = run.announcement.as_ref().map_or((0, false), |a| (a.generation, a.stop));
                    let control = Arc::new(Control::new(stop));
                    self.control = Some((generation, control.clone()));
                    self.order(Order::Run(run, control));
                }
                Action::Stop(generation) => {
                    if let Some(control) = self.control_of(generation) {
                        control.stop();
                    }
                }
                Action::Abort(generation) => {
                    if let Some(control) = self.control_of(generation) {
                        control.abort();
                    }
                }
                Action::Report => self.report().await,
            }
        }
    }

    fn control_of(&self, generation: u64) -> Option<&Control> {
        self.control.as_ref().filter(|(of, _)| *of == generation).map(|(_, control)| control.as_ref())
    }

    fn order(&self, order: Order) {
        if self.orders.send(order).is_err() {
            tracing::error!("the training thread is gone");
        }
    }

    async fn report(&self) {
        let mut state = self.session.state();
        state.job = self.options.job.to_string();
        state.worker = self.options.worker.to_string();
        state.process = std::process::id();
        self.send(worker_message::Body::State(state)).await;
    }

    async fn send(&self, body: worker_message::Body) {
        // A closed channel is the end of the agent's stream, which the loop sees next.
        let _ = self.outgoing.send(wire::WorkerMessage { body: Some(body) }).await;
    }
}
