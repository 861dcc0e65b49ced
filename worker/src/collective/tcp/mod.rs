//! A ring of TCP connections.
//!
//! Rank r sends to r+1 and receives from r-1. In a reduce-scatter each part of the sum starts one rank after its owner
//! and goes around once, every rank adding its own; in an all-gather each part starts at its owner. Either way every
//! rank sends and receives (n-1)/n of the buffer, which is optimal for bandwidth (Patarasuk and Yuan, 2009).
//!
//! Parts move in segments: one thread sends while the caller's thread receives and adds, and a segment is sent on as
//! soon as it is added, so that the network, the additions and both directions overlap. Sending never waits for
//! receiving: the ring cannot deadlock. A rank that fails shuts both of its connections down, so its neighbours fail at
//! once, and theirs: an error is everywhere within one trip around the ring.

mod forming;
mod frame;
mod handshake;
pub(crate) mod hostile;
mod ring;
mod socket;

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use proto::ids::{Generation, JobName, Rank, WorldSize};

pub use forming::RingListener;
pub use ring::{MAX_MESSAGE, Ring};

use super::{AbortHandle, Collective, CollectiveError, Result, Solo};
use forming::Neighbours;
use handshake::Identity;
use socket::{Connection, Deadline};

pub(super) use ring::too_large;

/// Who belongs to a generation's ring.
#[derive(Clone)]
pub struct RingMembership {
    /// The job; a worker of another one is refused.
    pub job: JobName,
    /// The generation; a worker of another one is refused.
    pub generation: Generation,
    /// This worker's place among the ranks.
    pub rank: Rank,
    /// How many ranks there are.
    pub world: WorldSize,
    /// The [`RingListener`] address of the rank after this one; the last rank's is rank 0's.
    pub next: SocketAddr,
    /// The generation's secret, drawn by the coordinator; never written to disk or log.
    pub key: [u8; 32],
}

impl RingMembership {
    /// All members of a ring of listeners with these addresses, in the order of their ranks.
    pub fn of_ring(addresses: &[SocketAddr], job: &JobName, generation: Generation, key: [u8; 32]) -> Vec<Self> {
        let world = u32::try_from(addresses.len()).ok().and_then(WorldSize::new);
        let ranks = world.into_iter().flat_map(|world| world.ranks().map(move |rank| (world, rank)));
        ranks
            .zip(addresses.iter().cycle().skip(1))
            .map(|((world, rank), next)| Self { job: job.clone(), generation, rank, world, next: *next, key })
            .collect()
    }
}

impl fmt::Debug for RingMembership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingMembership")
            .field("job", &self.job)
            .field("generation", &self.generation)
            .field("rank", &self.rank)
            .field("world", &self.world)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// The longest waits of a ring.
#[derive(Debug, Clone, Copy)]
pub struct RingTimeouts {
    /// To form the ring (`fault.restart`).
    pub connect: Duration,
    /// For one whole operation (`fault.collective`).
    pub operation: Duration,
}

/// Forms the collective of a generation: a [`Ring`], or [`Solo`] for a world of one. `abort` ends the forming as well
/// as everything after it.
pub fn connect(
    listener: &RingListener,
    membership: &RingMembership,
    timeouts: RingTimeouts,
    abort: &AbortHandle,
) -> Result<Box<dyn Collective>> {
    if membership.world == WorldSize::ONE && membership.rank == Rank::ZERO {
        return Ok(Box::new(Solo::with_abort(membership.generation, abort.clone())));
    }
    Ok(Box::new(Ring::connect_with(listener, membership, timeouts, abort)?))
}

impl Ring {
    /// Forms the ring with the other ranks, which call this at about the same time.
    pub fn connect(listener: &RingListener, membership: RingMembership, timeouts: RingTimeouts) -> Result<Self> {
        Self::connect_with(listener, &membership, timeouts, &AbortHandle::new())
    }

    /// As [`Ring::connect`], ended by a handle made before.
    pub fn connect_with(
        listener: &RingListener,
        membership: &RingMembership,
        timeouts: RingTimeouts,
        abort: &AbortHandle,
    ) -> Result<Self> {
        let RingMembership { job, generation, rank, world, next: next_address, key } = membership;
        let (world, count) = (*world, world.get());
        if count < 2 || rank.get() >= count {
            let problem = format!("a ring of {count} workers with rank {rank}; two or more make a ring");
            return Err(CollectiveError::Request(problem));
        }
        let next = Rank::new((rank.get() + 1) % count);
        let previous = Rank::new((rank.get() + count - 1) % count);
        let neighbours = Neighbours { next, next_address: *next_address, previous };
        let identity = Identity::new(job, *generation, *rank, count, *key);
        let deadline = Deadline::after(timeouts.connect, "forming the ring");
        let formed = forming::form(listener, &identity, &neighbours, &deadline, abort);
        let (to_next, from_previous) = formed.map_err(|error| match error {
            CollectiveError::Protocol(reason) => {
                CollectiveError::Forming { generation: *generation, seconds: deadline.seconds(), reason }
            }
            other => other,
        })?;
        let outgoing = Connection::new(to_next, next, abort)?;
        let incoming = Connection::new(from_previous, previous, abort)?;
        outgoing.register()?;
        incoming.register()?;
        Ok(Self::assemble(*rank, world, *generation, timeouts.operation, outgoing, incoming, abort.clone()))
    }
}
