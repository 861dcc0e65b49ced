//! The Unix socket the node's workers attach to.
//!
//! One gRPC stream each way for every worker process. The folder is of mode 0700, so only the agent's own user reaches
//! it, and only workers the agent has started itself are let in. Reading waits for the driver: a worker that reports
//! faster than the agent can read is slowed down, not buffered without bound.

use futures::Stream;
use proto::ids::WorkerId;
use proto::wire::node_server::{Node, NodeServer};
use proto::wire::{self, worker_message};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::AgentError;
use crate::driver::Input;
use crate::launch::Door;

struct Service {
    door: Door,
}

#[tonic::async_trait]
impl Node for Service {
    type AttachStream = std::pin::Pin<Box<dyn Stream<Item = Result<wire::AgentCommand, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<wire::WorkerMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.body);
        let Some(worker_message::Body::Hello(name)) = first else {
            return Err(Status::invalid_argument("the first message must be the worker's id"));
        };
        let worker: WorkerId = name.parse().map_err(|_| Status::invalid_argument("the worker's id is no UUID"))?;
        let attached = self.door.attach(worker).await;
        let (outgoing, line) = attached.ok_or_else(|| Status::unavailable("the agent is ending"))?;
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                let Some(body) = message.body else { continue };
                if !line.say(body).await {
                    return;
                }
            }
            line.end().await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// Binds the socket and serves it in the background; its failure is reported as [`Input::SocketFailed`].
pub(crate) fn serve(door: Door, inputs: mpsc::Sender<Input>) -> Result<(), AgentError> {
    let path = door.socket();
    let listener =
        UnixListener::bind(path).map_err(|source| AgentError::Folder { path: path.to_path_buf(), source })?;
    let service = NodeServer::new(Service { door })
        .max_decoding_message_size(wire::MOST_MESSAGE_BYTES)
        .max_encoding_message_size(wire::MOST_MESSAGE_BYTES);
    tokio::spawn(async move {
        let server = tonic::transport::Server::builder().add_service(service);
        let ended = server.serve_with_incoming(UnixListenerStream::new(listener)).await;
        let reason = ended.err().map_or_else(|| "it was closed".to_string(), |error| error.to_string());
        let _ = inputs.send(Input::SocketFailed(reason)).await;
    });
    Ok(())
}
