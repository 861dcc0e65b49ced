//! The network as the processes of a cluster reach it: the operating system's, or one that is put in its place.
//!
//! All three edges (coordinator, operator, snapshots between agents) bind and connect through
//! [`Security`](crate::tls::Security), which comes here. A [`Network`] of one's own, such as a simulated one, carries
//! the very same gRPC.

use std::fmt::Debug;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tonic::codegen::http::Uri;

/// An answer to come.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'a>>;

/// A connection of a [`Network`].
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// A network in the place of the operating system's.
pub trait Network: Debug + Send + Sync {
    /// Listens at an address; port 0 is any free one.
    fn bind(&self, address: SocketAddr) -> Pending<'_, Box<dyn Accept>>;

    /// Opens a connection.
    fn connect(&self, host: String, port: u16) -> Pending<'static, Box<dyn Connection>>;
}

/// A listener of a [`Network`].
pub trait Accept: Send {
    /// The next connection, and from where.
    fn accept(&mut self) -> Pending<'_, (Box<dyn Connection>, SocketAddr)>;

    /// Where it listens.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

/// A listener.
pub enum Listener {
    /// The operating system's.
    System(TcpListener),
    /// Another network's.
    Other(Box<dyn Accept>),
}

impl Listener {
    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::System(listener) => listener.local_addr(),
            Self::Other(listener) => listener.local_addr(),
        }
    }

    /// The next connection, and from where.
    pub(crate) async fn accept(&mut self) -> io::Result<(Accepted, SocketAddr)> {
        match self {
            Self::System(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Accepted::System(stream), address))
            }
            Self::Other(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Accepted::Other(stream), address))
            }
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::System(listener)
    }
}

/// A connection that was taken in.
pub(crate) enum Accepted {
    System(TcpStream),
    Other(Box<dyn Connection>),
}

/// What tonic opens its connections with, in a network that is not the operating system's.
#[derive(Clone)]
pub(crate) struct Dial(pub(crate) Arc<dyn Network>);

impl tower::Service<Uri> for Dial {
    type Response = TokioIo<Box<dyn Connection>>;
    type Error = io::Error;
    type Future = Pending<'static, Self::Response>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let host = uri.host().unwrap_or_default().to_string();
        let opening = self.0.connect(host, uri.port_u16().unwrap_or(80));
        Box::pin(async move { opening.await.map(TokioIo::new) })
    }
}
