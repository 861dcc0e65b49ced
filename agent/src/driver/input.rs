//! What the agent's loop takes in, one at a time.

use proto::ids::WorkerId;
use proto::wire::{self, worker_message};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::AgentError;
use crate::link::Outgoing;
use crate::memory::{Encoded, Holds};
use crate::uploads::Finished;

/// The way to one worker.
pub(crate) type Commands = mpsc::Sender<Result<wire::AgentCommand, Status>>;

/// Something happened on the node.
#[derive(Debug)]
pub(crate) enum Input {
    /// A stream to the coordinator is being opened; its first message must be the hello.
    LinkUp(Outgoing),
    /// The stream is gone.
    LinkDown,
    /// There will be no stream.
    LinkFailed(AgentError),
    /// The coordinator spoke.
    Coordinator(wire::CoordinatorMessage),
    /// A worker opened its stream.
    Attached { worker: WorkerId, commands: Commands },
    /// A worker spoke.
    Worker { worker: WorkerId, body: worker_message::Body },
    /// A worker's stream ended.
    Detached { worker: WorkerId },
    /// A worker process ended.
    Exited { worker: WorkerId, failure: wire::Failure },
    /// An upload is over.
    Uploaded(Finished),
    /// A try to upload failed; it goes on.
    SaveFailed(wire::SaveFailed),
    /// Another agent says what it holds, and is told whether that was taken in.
    Peer(wire::GroupState, oneshot::Sender<bool>),
    /// Another agent asks which steps this node holds; `None`: this node is not in its generation.
    Asked(wire::GroupQuery, oneshot::Sender<Option<wire::GroupHeld>>),
    /// Another agent has answered that question.
    Holds(Holds),
    /// Data was exchanged with another node, or could not be.
    Probed(wire::Probed),
    /// Parity is made, or could not be.
    Encoded(Encoded),
    /// A worker's slot is filled, or could not be.
    Restored { worker: WorkerId, answer: wire::Restored },
    /// No worker can attach any more.
    SocketFailed(String),
}
