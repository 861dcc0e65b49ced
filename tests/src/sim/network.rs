//! The simulated network, as the product's own gRPC and the workers' ring use it: turmoil's TCP between hosts.
//!
//! When a host falls its connections break in the order in which they were made. Left to itself the runtime drops its
//! tasks, and the connections in them, in an order that follows from the numbers of all tasks of this process; each
//! break is a message whose time under way is drawn, so whatever ran before would have a say in what happens.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    world: World,
    host: Host,
}

/// A connection's stream, which is taken away where its host falls.
type Shared = Arc<Mutex<Option<TcpStream>>>;

fn lock(stream: &Shared) -> MutexGuard<'_, Option<TcpStream>> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connections of a host.
#[derive(Debug, Default)]
pub(crate) struct Wires {
    made: u64,
    open: BTreeMap<u64, Shared>,
    /// All of the host's software is about to be dropped.
    falling: bool,
}

impl Network for Net {
    fn bind(&self, address: SocketAddr) -> Pending<'_, Box<dyn Accept>> {
        Box::pin(async move {
            let inner = TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await?;
            let address = SocketAddr::new(address.ip(), inner.local_addr()?.port());
            let (world, host) = (self.world.clone(), self.host);
            Ok(Box::new(Listener { inner, address, world, host }) as Box<dyn Accept>)
        })
    }

    fn connect(&self, host: String, port: u16) -> Pending<'static, Box<dyn Connection>> {
        let (world, from) = (self.world.clone(), self.host);
        Box::pin(async move {
            world.count("connection");
            if host == COORDINATOR {
                let to = turmoil::lookup(world.next_coordinator(from));
                let stream = TcpStream::connect((to, port)).await?;
                return Ok(Box::new(Wire::new(&world, from, stream)) as Box<dyn Connection>);
            }
            // Only the port for a node's snapshots is reached by an address.
            let to: IpAddr = host.parse().map_err(io::Error::other)?;
            if world.is_shut(to) {
                std::future::pending::<()>().await;
            }
            let stream = TcpStream::connect((to, port)).await?;
            let mut wire = Wire::new(&world, from, stream);
            wire.to = Some(to);
            Ok(Box::new(wire) as Box<dyn Connection>)
        })
    }
}

/// A host's end of a connection.
pub(crate) struct Wire {
    stream: Shared,
    number: u64,
    world: World,
    host: Host,
    /// The node whose port for snapshots it leads to: it breaks when that is shut.
    to: Option<IpAddr>,
}

impl Wire {
    pub(crate) fn new(world: &World, host: Host, stream: TcpStream) -> Self {
        let stream = Arc::new(Mutex::new(Some(stream)));
        let mut state = world.lock();
        let wires = &mut state.hosts.entry(host).or_default().wires;
        wires.made += 1;
        wires.open.insert(wires.made, stream.clone());
        Self { stream, number: wires.made, world: world.clone(), host, to: None }
    }

    /// Does something with the stream, unless it is broken.
    fn with<T>(&self, act: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let shut = self.to.is_some_and(|to| self.world.is_shut(to));
        match lock(&self.stream).as_mut().filter(|_| !shut) {
            Some(stream) => act(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let ended = {
            let mut state = self.world.lock();
            let wires = &mut state.hosts.entry(self.host).or_default().wires;
            if wires.falling {
                std::mem::take(&mut wires.open)
            } else {
                wires.open.remove(&self.number).map(|stream| (self.number, stream)).into_iter().collect()
            }
        };
        // Outside the lock, in the order of their numbers.
        for stream in ended.into_values() {
            drop(lock(&stream).take());
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match lock(&self.stream).as_mut() {
            Some(stream) => Pin::new(stream).poll_shutdown(cx),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl Accept for Listener {
    fn accept(&mut self) -> Pending<'_, (Box<dyn Connection>, SocketAddr)> {
        Box::pin(async move {
            let (stream, from) = self.inner.accept().await?;
            Ok((Box::new(Wire::new(&self.world, self.host, stream)) as Box<dyn Connection>, from))
        })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

impl World {
    /// Does what drops all of a host's software.
    pub(crate) fn felling<T>(&self, host: Host, act: impl FnOnce() -> T) -> T {
        let falling = |falls| self.lock().hosts.entry(host).or_default().wires.falling = falls;
        falling(true);
        let done = act();
        falling(false);
        done
    }

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
