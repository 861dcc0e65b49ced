//! The simulated network, as the product's own gRPC uses it: turmoil's TCP between hosts.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use proto::net::{Accept, Connection, Network, Pending};
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
            let to: IpAddr = if host == COORDINATOR {
                turmoil::lookup(world.next_coordinator(from))
            } else {
                host.parse().map_err(io::Error::other)?
            };
            let stream = TcpStream::connect((to, port)).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
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
    /// The coordinator that a host tries next.
    fn next_coordinator(&self, from: Host) -> Host {
        let mut state = self.lock();
        let life = state.hosts.entry(from).or_default();
        let turn = life.turns;
        life.turns += 1;
        state.coordinators[turn % state.coordinators.len()]
    }
}
