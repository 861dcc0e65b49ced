//! Forming a ring: connecting to the next rank while accepting the previous one.
//!
//! A worker binds its [`RingListener`] before it knows the membership, and tells its address. When the membership is
//! known, every rank connects to the next. Strangers, garbage and workers of other generations may connect at any time;
//! each connection proves itself in a thread of its own, so that none can hold up the right one, and forming goes on
//! until both neighbours are there or the deadline passes.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, Scope};
use std::time::Duration;

use proto::ids::Rank;

use super::super::{AbortHandle, CollectiveError, Result};
use super::handshake::Identity;
use super::socket::{Connection, Deadline, new_socket};

/// The longest one connection may take to prove itself.
const PROOF: Duration = Duration::from_secs(5);
/// Connections that may be proving themselves at the same time.
const STRANGERS: usize = 64;
/// Between two looks at the listener.
const POLL: Duration = Duration::from_millis(2);
/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(50);

/// Where the previous rank will connect: bound before the membership is known, and good for one generation after
/// another.
#[derive(Debug)]
pub struct RingListener {
    listener: TcpListener,
}

impl RingListener {
    /// Listens on a free port of `ip`. Returns the address to announce.
    pub fn bind(ip: IpAddr) -> Result<(Self, SocketAddr)> {
        let bind = || -> io::Result<(Self, SocketAddr)> {
            let address = SocketAddr::new(ip, 0);
            let socket = new_socket(&address)?;
            socket.bind(&address.into())?;
            socket.listen(128)?;
            socket.set_nonblocking(true)?;
            let listener = TcpListener::from(socket);
            let address = listener.local_addr()?;
            Ok((Self { listener }, address))
        };
        bind().map_err(|source| CollectiveError::Io { action: "listening for the previous rank", source })
    }
}

/// The neighbours of one rank.
pub(super) struct Neighbours {
    pub(super) next: Rank,
    pub(super) next_address: SocketAddr,
    pub(super) previous: Rank,
}

/// What the threads of forming report.
enum Event {
    Connected(TcpStream),
    NotConnected(CollectiveError),
    Accepted(TcpStream),
    NotAccepted(CollectiveError),
}

/// Both neighbours' sockets, proven: to the next rank, and from the previous one.
pub(super) fn form(
    listener: &RingListener,
    identity: &Identity,
    neighbours: &Neighbours,
    deadline: &Deadline,
    abort: &AbortHandle,
) -> Result<(TcpStream, TcpStream)> {
    let (events, inbox) = mpsc::channel();
    // Ends the threads below; the sockets that are kept are never registered with it.
    let forming = AbortHandle::new();
    thread::scope(|scope| {
        let (to_next, stop) = (events.clone(), forming.clone());
        let formed = spawn(scope, move || connect(identity, neighbours, deadline, &stop, &to_next)).and_then(|()| {
            let mut state = Forming { next: None, previous: None, why_next: None, why_previous: None, strangers: 0 };
            loop {
                for event in inbox.try_iter() {
                    state.note(event);
                }
                if let (Some(_), Some(_)) = (&state.next, &state.previous) {
                    break Ok(state);
                }
                if abort.is_aborted() {
                    break Err(CollectiveError::Aborted);
                }
                if deadline.passed() {
                    break Err(CollectiveError::Protocol(state.missing(neighbours)));
                }
                while state.strangers < STRANGERS
                    && let Ok((stream, _)) = listener.listener.accept()
                {
                    let (to_accept, stop) = (events.clone(), forming.clone());
                    spawn(scope, move || {
                        let event = admit(identity, stream, neighbours.previous, deadline, &stop);
                        // Nobody listens any more once the ring has formed without this connection.
                        let _ = to_accept.send(event.map_or_else(Event::NotAccepted, Event::Accepted));
                    })?;
                    state.strangers += 1;
                }
                thread::sleep(POLL);
            }
        });
        forming.abort();
        match formed? {
            Forming { next: Some(next), previous: Some(previous), .. } => Ok((next, previous)),
            state => Err(CollectiveError::Protocol(state.missing(neighbours))),
        }
    })
}

fn spawn<'scope>(scope: &'scope Scope<'scope, '_>, work: impl FnOnce() + Send + 'scope) -> Result<()> {
    match thread::Builder::new().name("ring-forming".into()).spawn_scoped(scope, work) {
        Ok(_) => Ok(()),
        Err(source) => Err(CollectiveError::Io { action: "starting a thread", source }),
    }
}

struct Forming {
    next: Option<TcpStream>,
    previous: Option<TcpStream>,
    why_next: Option<CollectiveError>,
    why_previous: Option<CollectiveError>,
    strangers: usize,
}

impl Forming {
    fn note(&mut self, event: Event) {
        match event {
            Event::Connected(stream) => self.next = Some(stream),
            Event::NotConnected(why) => self.why_next = Some(why),
            Event::Accepted(stream) => {
                self.strangers -= 1;
                // If the previous rank gave an attempt up and came again, its last connection is the living one.
                self.previous = Some(stream);
            }
            Event::NotAccepted(why) => {
                self.strangers -= 1;
                self.why_previous = Some(why);
            }
        }
    }

    fn missing(&self, neighbours: &Neighbours) -> String {
        let mut out = Vec::new();
        let because =
            |why: &Option<CollectiveError>| why.as_ref().map_or_else(String::new, |w| format!(" (last: {w})"));
        if self.next.is_none() {
            let Neighbours { next, next_address, .. } = neighbours;
            out.push(format!("no connection to rank {next} at {next_address}{}", because(&self.why_next)));
        }
        if self.previous.is_none() {
            out.push(format!("no connection from rank {}{}", neighbours.previous, because(&self.why_previous)));
        }
        out.join("; ")
    }
}

/// Connects to the next rank, again and again until it is there: it may still be ending an older generation.
fn connect(identity: &Identity, to: &Neighbours, deadline: &Deadline, stop: &AbortHandle, events: &Sender<Event>) {
    while !stop.is_aborted() && !deadline.passed() {
        let attempt = || -> Result<TcpStream> {
            let limit = deadline.left().clamp(Duration::from_millis(1), Duration::from_secs(1));
            let socket = new_socket(&to.next_address)
                .and_then(|socket| socket.connect_timeout(&to.next_address.into(), limit).map(|()| socket))
                .map_err(|source| CollectiveError::Io { action: "connecting", source })?;
            let stream = TcpStream::from(socket);
            let copy = stream.try_clone().map_err(|source| CollectiveError::Io { action: "connecting", source })?;
            let mut connection = Connection::new(copy, to.next, stop)?;
            identity.introduce(&mut connection, to.next, &deadline.sooner(PROOF))?;
            Ok(stream)
        };
        match attempt() {
            Ok(stream) => {
                // Forming has ended without this connection if nobody listens any more.
                let _ = events.send(Event::Connected(stream));
                return;
            }
            Err(why) => {
                let _ = events.send(Event::NotConnected(why));
                thread::sleep(RETRY.min(deadline.left()));
            }
        }
    }
}

/// Lets one connection prove that it is the previous rank.
fn admit(
    identity: &Identity,
    stream: TcpStream,
    from: Rank,
    deadline: &Deadline,
    stop: &AbortHandle,
) -> Result<TcpStream> {
    let copy = stream.try_clone().map_err(|source| CollectiveError::Io { action: "accepting", source })?;
    let mut connection = Connection::new(copy, from, stop)?;
    identity.admit(&mut connection, from, &deadline.sooner(PROOF))?;
    Ok(stream)
}
