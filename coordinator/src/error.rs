//! Why a coordinator ends, and the exit code that says so.

use std::net::SocketAddr;

use checkpoint_store::error::{Kind, StoreError};
use proto::tls::TlsError;

/// Why the coordinator did not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// It would listen in the open, or its certificates will not do.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; end the process that does, or choose another --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another coordinator leads the store.
    #[error(
        "the store {store} is led by the coordinator at {address} on host {host} (epoch {epoch}), which is alive: use \
         that one, stop it first, or start this one with --standby to take over when it ends"
    )]
    Led {
        /// The store.
        store: String,
        /// Where the leader listens.
        address: String,
        /// Its host.
        host: String,
        /// Its epoch.
        epoch: u64,
    },
    /// This coordinator no longer leads.
    #[error("fenced: {0}; this coordinator stops, the jobs go on under the other one")]
    Fenced(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server or one of its tasks failed.
    #[error("{what}: {source}")]
    Broken {
        /// Which part.
        what: &'static str,
        /// How.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl CoordinatorError {
    /// 2: the request is wrong; 3: it failed; 4: the store's data are damaged.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Tls(_) | Self::Listen { .. } | Self::Led { .. } => 2,
            Self::Fenced(_) | Self::Broken { .. } => 3,
            Self::Store(error) => match error.kind() {
                Kind::Corrupt => 4,
                Kind::Input => 2,
                Kind::Retry | Kind::Fenced | Kind::Bug => 3,
            },
        }
    }

    pub(crate) fn broken(what: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Broken { what, source: source.into() }
    }
}
