//! The simulated network, as the product's own gRPC uses it: turmoil's TCP between hosts.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use proto::net::{Accept, Connection, Network, Pending};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::{TcpListener, TcpStream};

use super::world::{Host, World};

/// The name that stands for whichever coordinator leads; connections try them in turn, as a load balancer does that
/// does not know which of them is ready.
pub(crate) const COORDINATOR: &str = "coordinator";
/// Where coordinators listen.
pub(crate) const PORT: u16 = 7070;

/// The network as one host sees it.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) world: World,
    pub(crate) host: Host,
}

struct Listener {
    inner: TcpListener,
    address: SocketAddr,
}

impl Network for Net {
    fn bind(&self, address: SocketAddr) -> Pending<'_, Box<dyn Accept>> {
        Box::pin(async move {
            let inner = TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await?;
            let address = SocketAddr::new(address.ip(), inner.local_addr()?.port());
            Ok(Box::new(Listener { inner, address }) as Box<dyn Accept>)
        })
    }

    fn connect(&self, host: String, port: u16) -> Pending<'static, Box<dyn Connection>> {
        let (world, from) = (self.world.clone(), self.host);
        Box::pin(async move {
            world.count("connection");
            if host == COORDINATOR {
                let to = turmoil::lookup(world.next_coordinator(from));
                return Ok(Box::new(TcpStream::connect((to, port)).await?) as Box<dyn Connection>);
            }
            // Only the port for a node's snapshots is reached by an address.
            let to: IpAddr = host.parse().map_err(io::Error::other)?;
            if world.is_shut(to) {
                std::future::pending::<()>().await;
            }
            let stream = TcpStream::connect((to, port)).await?;
            Ok(Box::new(Way { stream, to, world }) as Box<dyn Connection>)
        })
    }
}

/// A connection to a node's port for snapshots, which breaks when that is shut.
struct Way {
    stream: TcpStream,
    to: IpAddr,
    world: World,
}

impl Way {
    fn open(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        if self.world.is_shut(self.to) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(Pin::new(&mut self.stream))
    }
}

impl AsyncRead for Way {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.open()?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Way {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.open()?.poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.open()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Accept for Listener {
    fn accept(&mut self) -> Pending<'_, (Box<dyn Connection>, SocketAddr)> {
        Box::pin(async move {
            let (stream, from) = self.inner.accept().await?;
            Ok((Box::new(stream) as Box<dyn Connection>, from))
        })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

impl World {
    /// Whether the port for snapshots at an address is shut.
    fn is_shut(&self, address: IpAddr) -> bool {
        self.lock().shut == Some(address)
    }

    /// The coordinator that a host tries next.
    fn next_coordinator(&self, from: Host) -> Host {
        let mut state = self.lock();
        let life = state.hosts.entry(from).or_default();
        let turn = life.turns;
        life.turns += 1;
        state.coordinators[turn % state.coordinators.len()]
    }
}
