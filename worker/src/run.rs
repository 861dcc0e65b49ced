//! The worker process: a small runtime for the conversation with the agent, one thread that trains.
//!
//! The process lives as long as its agent's socket: when the stream ends, [`run`] returns and the process is to exit at
//! once, whatever its training thread is doing. So no worker outlives its agent (§8 of the design).

use std::path::PathBuf;

use proto::ids::{JobName, WorkerId};

use crate::session;

/// What a worker process is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The agent's Unix socket.
    pub agent_socket: PathBuf,
    /// The identity the agent gave this process.
    pub worker: WorkerId,
    /// The job it works for.
    pub job: JobName,
}

/// Why a worker process ended other than by its agent's wish.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The runtime or the training thread could not be started.
    #[error("the worker cannot start: {0}")]
    Start(#[source] std::io::Error),
    /// The agent's socket cannot be reached.
    #[error("no agent at {socket}: {reason}")]
    NoAgent {
        /// The socket.
        socket: PathBuf,
        /// Why.
        reason: String,
    },
    /// The agent does not know this worker.
    #[error("the agent turned this worker away: {0}")]
    Refused(String),
    /// The device cannot be used by this process any more.
    #[error("the worker ends, so that another takes its place: {0}")]
    DeviceLost(String),
}

impl WorkerError {
    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        3
    }
}

/// Serves the agent until it ends the worker or its socket closes. Returns without waiting for the training thread: the
/// caller must end the process then.
pub fn run(options: Options) -> Result<(), WorkerError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("cairn-session")
        .enable_all()
        .build()
        .map_err(WorkerError::Start)?;
    let result = runtime.block_on(session::serve(&options, runtime.handle().clone()));
    runtime.shutdown_background();
    result
}
