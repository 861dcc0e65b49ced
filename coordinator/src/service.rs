//! The gRPC edge: agents attach, operators ask and watch.
//!
//! Every call needs the token and, with TLS, a certificate for it; an agent attaches under its certificate's name only.
//! Messages are checked here and become events of the driver's one queue; nothing here decides anything. A peer that
//! breaks the rules loses its stream, with the reason.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::Stream;
use proto::ids::NodeName;
use proto::wire::agent_message::Body as FromAgent;
use proto::wire::cluster_server::Cluster;
use proto::wire::coordinator_message::Body as ToAgent;
use proto::wire::jobs_server::Jobs;
use proto::wire::{
    AgentMessage, BUILD, CheckpointChange, CheckpointChanged, CoordinatorMessage, IncidentsReply, JobRequest,
    JobStatus, ListReply, ListRequest, NodeRequest, NodeStatus, NodesReply, NodesRequest, ScaleRequest, SubmitReply,
    SubmitRequest, WatchEvent, WatchRequest,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::check;
use crate::driver::{Input, Outbox};
use crate::machine::{Answer, Ask, Event, Refusal};
use crate::watch::{Hub, Next};

/// An agent says hello within this.
const HELLO: Duration = Duration::from_secs(10);
/// The longest any call waits for its answer; clients set shorter deadlines of their own.
const ANSWER: Duration = Duration::from_hours(1);
/// Messages to one agent that may wait; an agent that reads slower is cut off and attaches again.
const WAITING: usize = 256;

/// Both services, for all connections.
#[derive(Clone)]
pub(crate) struct Edge {
    pub(crate) inputs: mpsc::Sender<Input>,
    pub(crate) hub: Hub,
    pub(crate) epoch: u64,
    /// The token in this leadership's record.
    pub(crate) nonce: String,
    pub(crate) connections: Arc<AtomicU64>,
}

fn stopping<T>(_: T) -> Status {
    Status::unavailable("the coordinator is stopping")
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Cluster for Edge {
    type AttachStream = Boxed<CoordinatorMessage>;

    async fn attach(&self, request: Request<Streaming<AgentMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let identity = proto::tls::peer(&request).cloned();
        let mut stream = request.into_inner();
        let first = timeout(HELLO, stream.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no hello within 10 s"))??;
        let Some(FromAgent::Hello(message)) = first.and_then(|first| first.body) else {
            return Err(Status::invalid_argument("the first message must be hello"));
        };
        let (sender, receiver) = mpsc::channel(WAITING);
        let hello = match check::hello(&message, proto::date::unix_ms())
            .and_then(|hello| check::identity(hello, identity.as_ref()))
        {
            Ok(hello) => hello,
            Err(fault) => {
                let refusal = CoordinatorMessage { epoch: self.epoch, body: Some(ToAgent::Refused(fault)) };
                sender.try_send(Ok(refusal)).map_err(stopping)?;
                return Ok(Response::new(Box::pin(ReceiverStream::new(receiver))));
            }
        };
        let state = check::report(message.report.unwrap_or_default()).map_err(Status::invalid_argument)?;
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let node = hello.node.clone();
        let event = Event::Attached {
            node: hello.node,
            incarnation: hello.incarnation,
            connection,
            slots: hello.slots,
            home: hello.home,
            state,
        };
        let outbox: Outbox = sender;
        let (open, closed) = oneshot::channel();
        let attach = Input::Attach { connection, outbox: outbox.clone(), open, event };
        self.inputs.send(attach).await.map_err(stopping)?;
        tokio::spawn(listen(self.inputs.clone(), node, connection, stream, outbox, closed));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Feeds one agent's messages to the driver until its stream ends or breaks the rules.
async fn listen(
    inputs: mpsc::Sender<Input>,
    node: NodeName,
    connection: u64,
    mut stream: Streaming<AgentMessage>,
    outbox: Outbox,
    mut closed: oneshot::Receiver<()>,
) {
    loop {
        let message = tokio::select! {
            biased;
            () = outbox.closed() => break,
            // The driver has let go of this stream.
            _ = &mut closed => break,
            message = stream.next() => message,
        };
        let Some(Ok(message)) = message else { break };
        match event(&node, connection, message) {
            Ok(event) => {
                if inputs.send(Input::Event(event)).await.is_err() {
                    break;
                }
            }
            Err(fault) => {
                tracing::warn!(%node, "a message was refused, its stream is closed: {fault}");
                let _ = outbox.try_send(Err(Status::invalid_argument(fault)));
                break;
            }
        }
    }
    let _ = inputs.send(Input::Event(Event::Detached { node, connection })).await;
}

pub(crate) fn event(node: &NodeName, connection: u64, message: AgentMessage) -> Result<Event, check::Fault> {
    Ok(match message.body {
        Some(FromAgent::Report(report)) => {
            Event::Report { node: node.clone(), connection, state: check::report(report)? }
        }
        Some(FromAgent::Step(report)) => Event::Stepped { job: check::step(&report)?, report },
        Some(FromAgent::Receipt(receipt)) => {
            let (job, name, entry) = check::receipt(node, receipt)?;
            Event::Receipt { job, name, entry }
        }
        Some(FromAgent::Failed(failed)) => {
            let (job, text) = check::failed(node, &failed)?;
            Event::SaveFailed { job, text }
        }
        Some(FromAgent::Probed(probed)) => {
            let (round, finding) = check::probed(probed)?;
            Event::Probed { node: node.clone(), round, finding }
        }
        Some(FromAgent::Skipped(skipped)) => {
            let (job, name, reason) = check::skipped(&skipped)?;
            Event::Skipped { job, name, reason }
        }
        Some(FromAgent::Hello(_)) => return Err("hello comes once".into()),
        // A kind this version does not know says nothing to it.
        None => Event::Tick,
    })
}

impl Edge {
    async fn ask(&self, ask: Ask) -> Result<Answer, Status> {
        let (reply, answer) = oneshot::channel();
        self.inputs.send(Input::Ask { ask, reply }).await.map_err(stopping)?;
        let answer =
            timeout(ANSWER, answer).await.map_err(|_| Status::deadline_exceeded("no answer within an hour"))?;
        answer.map_err(stopping)?.map_err(refuse)
    }

    async fn ask_status(&self, ask: Ask) -> Result<Response<JobStatus>, Status> {
        match self.ask(ask).await? {
            Answer::Status(status) => Ok(Response::new(*status)),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }
}

impl Edge {
    async fn ask_node(&self, request: &NodeRequest, empty: bool) -> Result<Response<NodeStatus>, Status> {
        let node = NodeName::new(&request.node).map_err(|error| Status::invalid_argument(error.to_string()))?;
        match self.ask(Ask::Drain(node, empty)).await? {
            Answer::Node(status) => Ok(Response::new(*status)),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }
}

fn refuse(refusal: Refusal) -> Status {
    match refusal {
        Refusal::Invalid(text) => Status::invalid_argument(text),
        Refusal::Precondition(text) => Status::failed_precondition(text),
        Refusal::NotFound(text) => Status::not_found(text),
        Refusal::DataLoss(text) => Status::data_loss(text),
        Refusal::Unavailable(text) => Status::unavailable(text),
    }
}

fn job(request: &JobRequest) -> Result<proto::ids::JobName, Status> {
    check::job(&request.job).map_err(Status::invalid_argument)
}

#[tonic::async_trait]
impl Jobs for Edge {
    type WatchStream = Boxed<WatchEvent>;

    async fn submit(&self, request: Request<SubmitRequest>) -> Result<Response<SubmitReply>, Status> {
        let ask = check::submit(request.get_ref()).map_err(Status::invalid_argument)?;
        let Ask::Submit { spec, .. } = &ask else { return Err(Status::internal("not a submission")) };
        let job = spec.name.to_string();
        match self.ask(ask).await? {
            Answer::Submitted { finished } => Ok(Response::new(SubmitReply { job, finished })),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<ListReply>, Status> {
        match self.ask(Ask::List).await? {
            Answer::List(jobs) => Ok(Response::new(ListReply { jobs })),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn status(&self, request: Request<JobRequest>) -> Result<Response<JobStatus>, Status> {
        self.ask_status(Ask::Status(job(request.get_ref())?)).await
    }

    async fn scale(&self, request: Request<ScaleRequest>) -> Result<Response<JobStatus>, Status> {
        let request = request.get_ref();
        let job = check::job(&request.job).map_err(Status::invalid_argument)?;
        self.ask_status(Ask::Scale(job, request.workers)).await
    }

    async fn pause(&self, request: Request<JobRequest>) -> Result<Response<JobStatus>, Status> {
        self.ask_status(Ask::Pause(job(request.get_ref())?)).await
    }

    async fn resume(&self, request: Request<JobRequest>) -> Result<Response<JobStatus>, Status> {
        self.ask_status(Ask::Resume(job(request.get_ref())?)).await
    }

    async fn cancel(&self, request: Request<JobRequest>) -> Result<Response<JobStatus>, Status> {
        self.ask_status(Ask::Cancel(job(request.get_ref())?)).await
    }

    async fn change_checkpoint(
        &self,
        request: Request<CheckpointChange>,
    ) -> Result<Response<CheckpointChanged>, Status> {
        let request = request.into_inner();
        if request.nonce != self.nonce {
            return Err(Status::failed_precondition(
                "the store you read is not led by this coordinator: name the coordinator of that store, or the store \
                 of this coordinator",
            ));
        }
        let (job, change) = check::change(&request).map_err(Status::invalid_argument)?;
        match self.ask(Ask::Change(job, change)).await? {
            Answer::Changed(report) => Ok(Response::new(CheckpointChanged { report })),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn incidents(&self, request: Request<JobRequest>) -> Result<Response<IncidentsReply>, Status> {
        match self.ask(Ask::Incidents(job(request.get_ref())?)).await? {
            Answer::Incidents(reply) => Ok(Response::new(*reply)),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn list_nodes(&self, _: Request<NodesRequest>) -> Result<Response<NodesReply>, Status> {
        match self.ask(Ask::Nodes).await? {
            Answer::Nodes(nodes) => Ok(Response::new(NodesReply { nodes, build: BUILD.into(), epoch: self.epoch })),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn drain(&self, request: Request<NodeRequest>) -> Result<Response<NodeStatus>, Status> {
        self.ask_node(request.get_ref(), true).await
    }

    async fn undrain(&self, request: Request<NodeRequest>) -> Result<Response<NodeStatus>, Status> {
        self.ask_node(request.get_ref(), false).await
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.get_ref();
        let job = check::job(&request.job).map_err(Status::invalid_argument)?;
        let Some((mut after, mut signal)) = self.hub.subscribe(&job, request.epoch, request.after) else {
            return Err(Status::not_found(format!("there is no job {job} in this store; list them: cairn jobs")));
        };
        let (sender, receiver) = mpsc::channel(WAITING);
        let hub = self.hub.clone();
        tokio::spawn(async move {
            loop {
                signal.mark_unchanged();
                match hub.next(&job, after) {
                    Next::Event(event) => {
                        after = event.sequence;
                        if sender.send(Ok(event)).await.is_err() {
                            return;
                        }
                    }
                    Next::End => return,
                    Next::Wait => {
                        tokio::select! {
                            biased;
                            () = sender.closed() => return,
                            changed = signal.changed() => if changed.is_err() { return },
                        }
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
