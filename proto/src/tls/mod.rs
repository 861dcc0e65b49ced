//! Mutual TLS between coordinator, agents and operators (P6).
//!
//! On loopback the token is the credential. Anywhere else both ends of a connection show a certificate of the cluster's
//! own CA, which says by name who they are: `cairn://<cluster>/<role>/<name>` ([`Identity`]). TLS 1.3 alone is spoken,
//! so that not even the certificates cross in clear, and no session is resumed, so that each connection is checked in
//! full. A folder holds what a process needs ([`Credentials`]), written by the cluster's [`Authority`]; `server` takes
//! connections in and checks who calls ([`Gate`]), `client` opens them and says in words why one was refused
//! ([`Refused`]).

mod authority;
mod client;
mod credentials;
mod error;
mod files;
mod identity;
mod server;
#[cfg(test)]
mod tests;
mod words;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint};

pub use authority::{Authority, Host};
pub use client::{Refused, refused};
pub use credentials::Credentials;
pub use error::TlsError;
pub use identity::{Identity, Role};
pub use server::{Gate, Peer, Socket, incoming, peer};

use crate::net::{Dial, Listener, Network};

/// How a process's connections are kept closed to others.
#[derive(Debug, Clone)]
pub enum Security {
    /// No TLS, and so loopback addresses only.
    Loopback,
    /// Mutual TLS, anywhere.
    Tls(Credentials),
    /// No TLS and any address, which the operator asked for by name.
    Plaintext,
    /// No TLS and any address, within a network that is not the operating system's, such as a simulated one.
    Within(Arc<dyn Network>),
}

impl Security {
    /// What the command line asks for; certificates are read and checked.
    pub fn choose(folder: Option<&Path>, insecure_plaintext: bool) -> Result<Self, TlsError> {
        match (folder, insecure_plaintext) {
            (Some(_), true) => Err(TlsError::Both),
            (Some(folder), false) => Credentials::load(folder).map(Self::Tls),
            (None, true) => {
                tracing::warn!(
                    "--insecure-plaintext: the token, jobs and states cross the network in clear, and whoever reads \
                     the token commands the cluster; use --tls wherever that is not meant"
                );
                Ok(Self::Plaintext)
            }
            (None, false) => Ok(Self::Loopback),
        }
    }

    /// Refuses to listen where others can reach a plain listener. `flag` is how the address was given.
    pub fn may_listen(&self, flag: &'static str, address: IpAddr) -> Result<(), TlsError> {
        if matches!(self, Self::Loopback) && !address.is_loopback() {
            return Err(TlsError::Exposed { what: format!("{flag} {address}") });
        }
        Ok(())
    }

    /// Refuses to send the token to another machine in clear. `address` is `host:port`.
    pub fn may_connect(&self, flag: &'static str, address: &str) -> Result<(), TlsError> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        if matches!(self, Self::Loopback) && !is_loopback(host) {
            return Err(TlsError::Exposed { what: format!("{flag} {address}") });
        }
        Ok(())
    }

    /// The certificates, with TLS.
    pub fn credentials(&self) -> Option<&Credentials> {
        match self {
            Self::Tls(credentials) => Some(credentials),
            Self::Loopback | Self::Plaintext | Self::Within(_) => None,
        }
    }

    /// Listens at an address; port 0 is any free one.
    pub async fn bind(&self, address: SocketAddr) -> io::Result<Listener> {
        match self {
            Self::Within(network) => network.bind(address).await.map(Listener::Other),
            _ => TcpListener::bind(address).await.map(Listener::System),
        }
    }

    /// Opens a connection to a server that plays one of these roles.
    pub async fn connect(
        &self,
        endpoint: &Endpoint,
        roles: &'static [Role],
    ) -> Result<Channel, tonic::transport::Error> {
        match self {
            Self::Tls(credentials) => endpoint.connect_with_connector(credentials.connector(roles)).await,
            Self::Within(network) => endpoint.connect_with_connector(Dial(network.clone())).await,
            Self::Loopback | Self::Plaintext => endpoint.connect().await,
        }
    }

    /// The same on first use, and again after a loss.
    pub fn connect_lazy(&self, endpoint: &Endpoint, roles: &'static [Role]) -> Channel {
        match self {
            Self::Tls(credentials) => endpoint.connect_with_connector_lazy(credentials.connector(roles)),
            Self::Within(network) => endpoint.connect_with_connector_lazy(Dial(network.clone())),
            Self::Loopback | Self::Plaintext => endpoint.connect_lazy(),
        }
    }

    /// What may be behind a connection that broke without a reason, for the end of a sentence; empty with TLS, whose
    /// failures say it themselves.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Tls(_) | Self::Within(_) => "",
            Self::Loopback | Self::Plaintext => "; if it was started with --tls, use --tls here as well",
        }
    }
}

/// Whether a host as written in an address is this machine itself.
fn is_loopback(host: &str) -> bool {
    let bare = bare(host);
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// A host without the brackets of an IPv6 address.
fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

/// A host as certificates name it; `None` if it is neither an address nor a name of the DNS.
pub(crate) fn server_name(host: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(bare(host).to_string()).ok()
}
