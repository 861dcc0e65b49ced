//! How a node's workers are started, and how each speaks with its agent.
//!
//! In production a worker is a process (`children`) that attaches over the Unix socket (`socket`). Whoever starts
//! workers in another way, as a simulation does, has the same ends: a [`Door`] to attach by, the commands and the
//! [`Line`] it gives, which carry the very messages of the socket, and a future that says how the worker ended.

use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use proto::ids::{JobName, WorkerId};
use proto::wire::{self, worker_message};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::driver::Input;

/// Commands waiting for one worker at most; they are few and read at once.
const COMMANDS: usize = 64;

/// What an agent tells one worker.
pub type Commands = mpsc::Receiver<Result<wire::AgentCommand, Status>>;

/// Starts workers.
pub trait Launch: Send {
    /// Starts one, which is to attach by the door under this identity.
    fn launch(&mut self, job: &JobName, worker: WorkerId, door: Door) -> std::io::Result<Launched>;
}

/// A worker that was started.
pub struct Launched {
    /// Its process id, for people.
    pub process: u32,
    /// Dropped when it is to end at once.
    pub kill: oneshot::Sender<()>,
    /// Ready when it has ended, and how.
    pub ended: BoxFuture<'static, wire::Failure>,
}

/// Where a worker attaches to its agent.
#[derive(Debug, Clone)]
pub struct Door {
    socket: PathBuf,
    inputs: mpsc::Sender<Input>,
}

impl Door {
    pub(crate) fn new(socket: PathBuf, inputs: mpsc::Sender<Input>) -> Self {
        Self { socket, inputs }
    }

    /// The Unix socket, for a worker in a process of its own.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Attaches a worker; `None`: the agent is ending. The commands end when the worker is turned away.
    pub async fn attach(&self, worker: WorkerId) -> Option<(Commands, Line)> {
        let (commands, receiver) = mpsc::channel(COMMANDS);
        self.inputs.send(Input::Attached { worker, commands }).await.ok()?;
        Some((receiver, Line { worker, inputs: self.inputs.clone() }))
    }
}

/// An attached worker's way to its agent.
#[derive(Debug, Clone)]
pub struct Line {
    worker: WorkerId,
    inputs: mpsc::Sender<Input>,
}

impl Line {
    /// Tells the agent, waiting until it can take it in; `false`: it is gone.
    pub async fn say(&self, body: worker_message::Body) -> bool {
        self.inputs.send(Input::Worker { worker: self.worker, body }).await.is_ok()
    }

    /// The conversation is over.
    pub async fn end(self) {
        // An agent that is gone needs no farewell.
        let _ = self.inputs.send(Input::Detached { worker: self.worker }).await;
    }
}
