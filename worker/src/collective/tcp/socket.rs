//! One end of a connection with a deadline.
//!
//! The sockets block, with a short receive and send timeout. Between these slices the calls look at one monotonic
//! deadline and at the abort flag, so that every wait ends, and no peer can stretch one by sending a byte now and then.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use proto::ids::Rank;
use socket2::{Domain, Protocol, Socket, Type};

use super::super::{AbortHandle, CollectiveError, Result};

/// Large enough to keep a 10 Gbit/s path with milliseconds of delay full.
const SOCKET_BUFFER: usize = 4 << 20;
/// How long one system call may block before the deadline is looked at.
const SLICE: Duration = Duration::from_millis(100);

/// When an operation must be done; what it is called in errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    end: Instant,
    limit: Duration,
    operation: &'static str,
}

impl Deadline {
    pub(super) fn after(limit: Duration, operation: &'static str) -> Self {
        let now = Instant::now();
        // A limit beyond the clock's range is as good as a year.
        let end = now.checked_add(limit).unwrap_or_else(|| now + Duration::from_hours(24 * 365));
        Self { end, limit, operation }
    }

    /// The same moment or `limit` from now, whichever is sooner.
    pub(super) fn sooner(&self, limit: Duration) -> Self {
        let other = Self::after(limit, self.operation);
        if other.end < self.end { other } else { *self }
    }

    pub(super) fn passed(&self) -> bool {
        Instant::now() >= self.end
    }

    pub(super) fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    pub(super) fn seconds(&self) -> f64 {
        self.limit.as_secs_f64()
    }

    fn check(&self, abort: &AbortHandle) -> Result<()> {
        if abort.is_aborted() {
            return Err(CollectiveError::Aborted);
        }
        if self.passed() {
            return Err(CollectiveError::Timeout { operation: self.operation, seconds: self.seconds() });
        }
        Ok(())
    }
}

/// A socket for the ring, not yet bound or connected. The buffers are set before that: the receive window's scale is
/// agreed on when the connection opens.
pub(super) fn new_socket(address: &SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    Ok(socket)
}

/// A connection to the neighbour `rank`.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    rank: Rank,
    abort: AbortHandle,
    /// Bytes sent and received since the ring was formed.
    pub(super) moved: u64,
}

impl Connection {
    /// Prepares a fresh socket: no coalescing delay, sliced timeouts, and registered for abort.
    pub(super) fn new(stream: TcpStream, rank: Rank, abort: &AbortHandle) -> Result<Self> {
        let prepare = || -> io::Result<TcpStream> {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(SLICE))?;
            stream.set_write_timeout(Some(SLICE))?;
            stream.try_clone()
        };
        prepare().map_err(|source| CollectiveError::Io { action: "preparing a connection", source })?;
        Ok(Self { stream, rank, abort: abort.clone(), moved: 0 })
    }

    /// Lets the abort handle shut this connection down from now on.
    pub(super) fn register(&self) -> Result<()> {
        let copy = self
            .stream
            .try_clone()
            .map_err(|source| CollectiveError::Io { action: "preparing a connection", source })?;
        if self.abort.watch(copy) { Ok(()) } else { Err(CollectiveError::Aborted) }
    }

    /// Fills `buffer`.
    pub(super) fn receive(&mut self, mut buffer: &mut [u8], deadline: &Deadline) -> Result<()> {
        while !buffer.is_empty() {
            deadline.check(&self.abort)?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(self.closed(deadline)),
                Ok(count) => {
                    self.moved += count as u64;
                    buffer = &mut buffer[count..];
                }
                Err(error) => self.survive(error, deadline, "receiving")?,
            }
        }
        Ok(())
    }

    /// Sends `head`, then `body`, as one message.
    pub(super) fn send(&mut self, mut head: &[u8], mut body: &[u8], deadline: &Deadline) -> Result<()> {
        while !(head.is_empty() && body.is_empty()) {
            deadline.check(&self.abort)?;
            let sent = if head.is_empty() {
                self.stream.write(body)
            } else {
                self.stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)])
            };
            match sent {
                Ok(0) => return Err(self.closed(deadline)),
                Ok(count) => {
                    self.moved += count as u64;
                    let of_head = count.min(head.len());
                    head = &head[of_head..];
                    body = &body[count - of_head..];
                }
                Err(error) => self.survive(error, deadline, "sending")?,
            }
        }
        Ok(())
    }

    fn closed(&self, deadline: &Deadline) -> CollectiveError {
        if self.abort.is_aborted() {
            return CollectiveError::Aborted;
        }
        CollectiveError::PeerClosed { rank: self.rank, operation: deadline.operation }
    }

    /// The end of a timeout slice or an interruption is no failure; anything else is.
    fn survive(&self, error: io::Error, deadline: &Deadline, action: &'static str) -> Result<()> {
        use io::ErrorKind as K;
        match error.kind() {
            K::WouldBlock | K::TimedOut | K::Interrupted => Ok(()),
            K::ConnectionReset | K::ConnectionAborted | K::BrokenPipe | K::NotConnected | K::UnexpectedEof => {
                Err(self.closed(deadline))
            }
            _ => Err(CollectiveError::Io { action, source: error }),
        }
    }
}
