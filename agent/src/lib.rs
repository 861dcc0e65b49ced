//! The node agent: one process per machine.
//!
//! It launches the node's workers, keeps their snapshots in a memory file system, uploads them to the store, and
//! speaks for the node to the coordinator. `machine` decides (pure), `driver` performs; `launch` is how workers are
//! started, `children` those that are processes, `socket` the Unix socket they attach to, `link` the stream to the
//! coordinator, `uploads` the way of a snapshot into the store, `memory` what is held and shared with other agents,
//! `folder` the place in memory, `hostile` what comes from outside.
//!
//! Losing the coordinator stops nothing here: workers go on, receipts and step reports wait, and the link is tried
//! again for ever (P4). Losing the agent ends its workers: their socket closes.

mod children;
mod driver;
mod folder;
pub mod hostile;
mod launch;
mod link;
pub mod machine;
mod memory;
mod receipts;
mod socket;
mod uploads;

use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use checkpoint_store::Opener;
use proto::auth::Token;
use proto::ids::NodeName;
use proto::tls::{Refused, Security, TlsError};
use proto::wire;

pub use launch::{Commands, Door, Launch, Launched, Line};

/// What an agent is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Host and port of the coordinator; of several, separated by commas, whichever leads.
    pub coordinator: String,
    /// The credential the coordinator asks for.
    pub token: Token,
    /// How the way to the coordinator and those between agents are closed to others.
    pub security: Security,
    /// This node's name, unique in the cluster.
    pub node: NodeName,
    /// How many workers the node can run at once.
    pub slots: u32,
    /// CPU cores to share out among the workers of a job that does not fix its threads.
    pub cores: usize,
    /// A folder on a memory file system, for snapshots and the workers' socket. Agents of one machine may share it.
    pub memory_dir: PathBuf,
    /// Bytes that snapshots and parity may take; 0: half of what the file system of `memory_dir` has.
    pub memory_budget: u64,
    /// What this node may fail together with (a rack, a power feed); empty: only itself.
    pub domain: String,
    /// The `cairn` binary, started as `cairn worker …`.
    pub executable: PathBuf,
    /// The interface the workers' ring and this node's snapshots listen on.
    pub ring_host: IpAddr,
}

/// Watches what an agent is told and what it does of it.
pub trait Witness: Send + Sync {
    /// The coordinator spoke; the agent has not heard it yet.
    fn heard(&self, message: &mut wire::CoordinatorMessage);

    /// The agent obeyed what was heard last.
    fn obeyed(&self);
}

/// What lies around an agent. The default is the machine it runs on; a simulation puts its own in the place of each.
#[derive(Default)]
pub struct Surroundings {
    /// How stores are opened.
    pub stores: Opener,
    /// How workers are started; `None`: as processes of [`Options::executable`].
    pub workers: Option<Box<dyn Launch>>,
    /// Who watches, if anyone does.
    pub witness: Option<Arc<dyn Witness>>,
}

/// Why an agent ended on its own.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The folder for snapshots cannot be used.
    #[error("memory folder {path}: {source}; give a writable folder on a memory file system with --memory")]
    Folder {
        /// The folder, or the file in it.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The coordinator's address cannot be used.
    #[error("coordinator address {address:?}: {reason}; give host:port")]
    Address {
        /// As given.
        address: String,
        /// Why.
        reason: String,
    },
    /// An address is in the open, or the certificates will not do.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Certificates disagree.
    #[error("the coordinator cannot be used: {0}")]
    Handshake(Refused),
    /// The coordinator will not have this agent.
    #[error("the coordinator refused this agent: {0}")]
    Refused(String),
    /// This node does not see the coordinator's store.
    #[error("{0}")]
    ForeignStore(String),
    /// Other agents cannot reach this node's snapshots.
    #[error("cannot listen on {address} for other agents: {source}; give an address of this machine with --ring-host")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Peers would be told an address that is none.
    #[error("--ring-host {0} stands for any address: give the one that other nodes reach this machine by")]
    Anywhere(IpAddr),
    /// The workers' socket failed.
    #[error("the workers' socket failed: {0}")]
    Socket(String),
}

impl AgentError {
    /// The exit code of the process: 2 where the user must change something, 3 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Folder { .. }
            | Self::Address { .. }
            | Self::Tls(_)
            | Self::Anywhere(_)
            | Self::Handshake(_)
            | Self::Refused(_)
            | Self::ForeignStore(_)
            | Self::Listen { .. } => 2,
            Self::Socket(_) => 3,
        }
    }
}

/// Runs the node's agent until it is told to stop or cannot go on; ends its workers before it returns.
///
/// When `drain` is ready the node leaves in order: its jobs save and go elsewhere, within their `fault.grace`. When
/// `stop` is ready it leaves at once. Needs a tokio runtime with I/O and time.
pub async fn run(
    options: Options,
    drain: impl Future<Output = ()> + Send,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), AgentError> {
    run_in(options, Surroundings::default(), drain, stop).await
}

/// As [`run`], with surroundings of one's own.
pub async fn run_in(
    options: Options,
    surroundings: Surroundings,
    drain: impl Future<Output = ()> + Send,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), AgentError> {
    driver::run(options, surroundings, drain, stop).await
}
