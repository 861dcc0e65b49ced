//! What this node gives to other agents: its state, descriptions, and bytes.
//!
//! Every call needs the cluster's token and, with TLS, an agent's certificate. Sizes are checked before anything is
//! sent; bytes are slices of mapped memory.

use std::net::SocketAddr;
use std::pin::Pin;

use futures::{Stream, StreamExt};
use proto::ids::JobName;
use proto::tls::{Gate, Role};
use proto::wire::snapshots_server::{Snapshots, SnapshotsServer};
use proto::wire::{
    self, Chunk, GroupHeld, GroupQuery, GroupReply, GroupState, ReadRequest, StepDescription, StepRequest,
};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, Streaming};

use super::probe::MOST_EXCHANGE;
use super::vault::Vault;
use crate::driver::Input;
use crate::{AgentError, Options};

/// Bytes of one message of a read.
const CHUNK: usize = 1 << 20;
/// Most bytes of one read.
const MOST_READ: u64 = 1 << 40;
/// Steps a peer can hold of one generation; three slots hold fewer.
const MOST_STEPS: usize = 8;

struct Service {
    vault: Vault,
    inputs: mpsc::Sender<Input>,
}

fn job_name(name: &str) -> Result<JobName, Status> {
    JobName::new(name).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn ending() -> Status {
    Status::unavailable("the agent is ending")
}

#[tonic::async_trait]
impl Snapshots for Service {
    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;
    type ReadStream = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;

    async fn sync(&self, request: Request<GroupState>) -> Result<Response<GroupReply>, Status> {
        let state = request.into_inner();
        job_name(&state.job)?;
        if state.steps.len() > MOST_STEPS {
            return Err(Status::invalid_argument(format!("{} steps held, more than {MOST_STEPS}", state.steps.len())));
        }
        let (taken, answer) = oneshot::channel();
        self.inputs.send(Input::Peer(state, taken)).await.map_err(|_| ending())?;
        match answer.await {
            Ok(true) => Ok(Response::new(GroupReply {})),
            Ok(false) => Err(Status::failed_precondition("this node is not that far; say it again")),
            Err(_) => Err(ending()),
        }
    }

    async fn ask(&self, request: Request<GroupQuery>) -> Result<Response<GroupHeld>, Status> {
        let query = request.into_inner();
        job_name(&query.job)?;
        let (held, answer) = oneshot::channel();
        self.inputs.send(Input::Asked(query, held)).await.map_err(|_| ending())?;
        let other = || Status::failed_precondition("this node is not in that generation");
        answer.await.map_err(|_| ending())?.map(Response::new).ok_or_else(other)
    }

    async fn exchange(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Self::ExchangeStream>, Status> {
        let mut left = MOST_EXCHANGE;
        let back = request.into_inner().map(move |chunk| {
            let chunk = chunk?;
            let length = chunk.data.len() as u64;
            let rest = left.checked_sub(length);
            left = rest.ok_or_else(|| Status::out_of_range(format!("more than {MOST_EXCHANGE} bytes")))?;
            Ok(chunk)
        });
        Ok(Response::new(Box::pin(back)))
    }

    async fn describe(&self, request: Request<StepRequest>) -> Result<Response<StepDescription>, Status> {
        let request = request.into_inner();
        let captures = self.vault.captures(&job_name(&request.job)?, (request.generation, request.step));
        let captures = captures.into_values().map(|described| described.json.to_vec()).collect();
        Ok(Response::new(StepDescription { captures }))
    }

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let (job, key) = (job_name(&request.job)?, (request.generation, request.step));
        let range = request.start..request.end;
        if range.start > range.end || range.end - range.start > MOST_READ {
            return Err(Status::invalid_argument(format!("bytes {range:?} cannot be read at once")));
        }
        let parts = match request.stripe {
            None => self.vault.payload(&job, key, range),
            Some(stripe) => self.vault.parity(&job, key, stripe as usize, range).map(|bytes| vec![bytes]),
        };
        let parts = parts.ok_or_else(|| {
            Status::not_found(format!("step {} of generation {} is not held here", request.step, request.generation))
        })?;
        let chunks = parts.into_iter().flat_map(|mut part| {
            std::iter::from_fn(move || (!part.is_empty()).then(|| part.split_to(part.len().min(CHUNK))))
        });
        let chunks = futures::stream::iter(chunks).map(|data| Ok(Chunk { data }));
        Ok(Response::new(Box::pin(chunks)))
    }
}

/// Refuses an address that no peer could use, or that others could, and a certificate that peers would not take.
pub(crate) fn check_security(options: &Options) -> Result<(), AgentError> {
    let host = options.ring_host;
    if host.is_unspecified() {
        return Err(AgentError::Anywhere(host));
    }
    options.security.may_listen("--ring-host", host)?;
    if let Some(credentials) = options.security.credentials() {
        credentials.check_role(Role::Agent)?;
        credentials.check_host(&host.to_string())?;
    }
    Ok(())
}

/// Listens on a free port of the node's `ring_host` and serves in the background; its failure is reported as an input.
/// Returns the address for peers.
pub(crate) async fn serve(
    options: &Options,
    vault: Vault,
    inputs: mpsc::Sender<Input>,
) -> Result<SocketAddr, AgentError> {
    let (host, security) = (options.ring_host, options.security.clone());
    let failed = |source| AgentError::Listen { address: SocketAddr::new(host, 0), source };
    let listener = security.bind(SocketAddr::new(host, 0)).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let service = SnapshotsServer::new(Service { vault, inputs: inputs.clone() })
        .max_decoding_message_size(wire::MOST_MESSAGE_BYTES)
        .max_encoding_message_size(wire::MOST_MESSAGE_BYTES);
    let roles = &[Role::Coordinator, Role::Agent];
    let gate = Gate::new(options.token.clone(), &security, roles, "read snapshots");
    let service = tonic::service::interceptor::InterceptedService::new(service, move |request| gate.check(request));
    tokio::spawn(async move {
        let server = tonic::transport::Server::builder().add_service(service);
        let ended = server.serve_with_incoming(proto::tls::incoming(listener, &security)).await;
        let reason = ended.err().map_or_else(|| "it was closed".to_string(), |error| error.to_string());
        let _ = inputs.send(Input::SocketFailed(format!("the snapshots' listener: {reason}"))).await;
    });
    Ok(address)
}
