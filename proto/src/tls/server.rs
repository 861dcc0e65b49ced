//! Taking connections in, and checking at each call who makes it.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::Error;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use super::words::{of_server, seconds};
use super::{Credentials, Identity, Role, Security};
use crate::auth::Token;
use crate::net::{Accepted, Connection, Listener};

/// A client that has not shown its certificate by then is cut off.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections in their handshake at once; more wait in the listener's queue.
const HANDSHAKES: usize = 512;
/// After the system could not hand over a connection, such as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Whom its certificate names; `None` without TLS.
    pub identity: Option<Identity>,
}

/// A connection, plain or encrypted.
pub enum Socket {
    /// Plain.
    Plain(TcpStream),
    /// With a verified client, and whom its certificate names.
    Tls(Box<TlsStream<TcpStream>>, Identity),
    /// Plain, of a network that is not the operating system's.
    Other(Box<dyn Connection>),
}

/// Connections as they come. One that fails its handshake is logged and is none; nothing ends the stream.
pub fn incoming(listener: Listener, security: &Security) -> impl Stream<Item = io::Result<Socket>> + use<> {
    let credentials = security.credentials().cloned();
    let accepted = futures::stream::unfold(listener, |mut listener| async move {
        loop {
            match listener.accept().await {
                Ok(accepted) => return Some((accepted, listener)),
                Err(error) => {
                    tracing::warn!("a connection could not be taken in: {error}");
                    sleep(PAUSE).await;
                }
            }
        }
    });
    let taken = accepted.map(move |(stream, address)| take_in(stream, address, credentials.clone()));
    taken.buffer_unordered(HANDSHAKES).filter_map(|socket| std::future::ready(socket.map(Ok)))
}

async fn take_in(stream: Accepted, address: SocketAddr, credentials: Option<Credentials>) -> Option<Socket> {
    let stream = match stream {
        Accepted::System(stream) => stream,
        Accepted::Other(stream) => return Some(Socket::Other(stream)),
    };
    // A connection that is gone already shows that at its first use.
    let _ = stream.set_nodelay(true);
    let Some(credentials) = credentials else { return Some(Socket::Plain(stream)) };
    let acceptor = TlsAcceptor::from(credentials.server());
    let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
            match tls.and_then(of_server) {
                Some(reason) => tracing::warn!(%address, reason, "a client was turned away"),
                None => tracing::info!(%address, %error, "a connection without TLS was closed"),
            }
            return None;
        }
        Err(_) => {
            tracing::info!(%address, "no TLS handshake within {}", seconds(HANDSHAKE));
            return None;
        }
    };
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).and_then(Identity::of);
    match shown {
        Some(identity) if identity.cluster == credentials.identity().cluster => {
            Some(Socket::Tls(Box::new(stream), identity))
        }
        other => {
            let shown = other.map_or_else(|| "nobody".to_string(), |identity| identity.to_string());
            tracing::warn!(%address, shown, "a client was turned away: its certificate names no part of this cluster");
            None
        }
    }
}

impl Connected for Socket {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        match self {
            Self::Plain(_) | Self::Other(_) => Peer { identity: None },
            Self::Tls(_, identity) => Peer { identity: Some(identity.clone()) },
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream, _) => Pin::new(stream).poll_read(cx, buffer),
            Self::Other(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream, _) => Pin::new(stream).poll_write(cx, bytes),
            Self::Other(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Self::Tls(stream, _) => Pin::new(stream).poll_write_vectored(cx, parts),
            Self::Other(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream, _) => stream.is_write_vectored(),
            Self::Other(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_flush(cx),
            Self::Other(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Other(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Who makes a call, as far as the connection tells.
pub fn peer<T>(request: &Request<T>) -> Option<&Identity> {
    request.extensions().get::<Peer>().and_then(|peer| peer.identity.as_ref())
}

/// What each call of a service must have: the token and, with TLS, a certificate for one of some roles.
#[derive(Debug, Clone)]
pub struct Gate {
    token: Token,
    /// `None` without TLS.
    roles: Option<&'static [Role]>,
    /// What the service does, for the refusal.
    what: &'static str,
}

impl Gate {
    /// A gate for a service that does `what`.
    pub fn new(token: Token, security: &Security, roles: &'static [Role], what: &'static str) -> Self {
        Self { token, roles: security.credentials().map(|_| roles), what }
    }

    /// Refuses a call that lacks something; a server's interceptor.
    pub fn check(&self, request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(roles) = self.roles {
            // Connections without a certificate do not get this far.
            let identity = peer(&request).ok_or_else(|| Status::unauthenticated("this needs a certificate"))?;
            if !roles.contains(&identity.role) {
                let needed: Vec<_> = roles.iter().rev().map(ToString::to_string).collect();
                return Err(Status::permission_denied(format!(
                    "the certificate of {identity} does not let it {}: use one issued with --role {}",
                    self.what,
                    needed.join(" or ")
                )));
            }
        }
        self.token.check(request)
    }
}
