//! How the workers of one generation add up and exchange what they computed.
//!
//! A [`Collective`] is one rank's end of the group. Every rank calls the same operations in the same order; an
//! operation returns when this rank's part is done. A failed operation leaves the collective unusable: the generation
//! is over, and the next one forms a new collective.
//!
//! `tcp` is a ring over sockets, for CPUs and for several workers that share a GPU; [`Solo`] is a world of one.

mod abort;
mod solo;
pub mod tcp;

use std::io;
use std::ops::Range;

use proto::ids::{Generation, Rank, WorldSize};

pub use abort::AbortHandle;
pub use solo::Solo;
pub use tcp::{MAX_MESSAGE, Ring, RingListener, RingMembership, RingTimeouts, connect};

/// Why an exchange failed. Whatever it was, the collective is unusable from then on.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// A neighbour's connection ended. It is not necessarily the one that failed first: a rank that gives up closes its
    /// own connections, which is how the news travels around the ring.
    #[error("rank {rank} closed its connection during {operation}")]
    PeerClosed {
        /// The neighbour.
        rank: Rank,
        /// What was being done.
        operation: &'static str,
    },
    /// The operation's deadline passed.
    #[error("{operation} was not done within {seconds} s: a rank is stuck, or the network too slow (fault.collective)")]
    Timeout {
        /// What was being done.
        operation: &'static str,
        /// The deadline's length.
        seconds: f64,
    },
    /// The generation's ring could not be formed in time.
    #[error("generation {generation}'s ring was not formed within {seconds} s: {reason}")]
    Forming {
        /// The generation that was forming.
        generation: Generation,
        /// The deadline's length.
        seconds: f64,
        /// Which connection was missing, and the last thing that was refused.
        reason: String,
    },
    /// The collective was shut down: by its abort handle, or by an earlier failure.
    #[error("the exchange was aborted")]
    Aborted,
    /// The peer said something that does not belong here.
    #[error("the exchange went wrong: {0}")]
    Protocol(String),
    /// The caller's buffer or ranges cannot be exchanged; nothing was sent.
    #[error("the exchange was asked for something impossible: {0}")]
    Request(String),
    /// The operating system refused something.
    #[error("{action} failed: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// Bytes that a rank has exchanged with its neighbours in a generation. What one has given and the next has not had is
/// lost between the two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Given to the next rank.
    pub sent: u64,
    /// Had from the rank before.
    pub received: u64,
}

/// The result of an exchange.
pub type Result<T> = std::result::Result<T, CollectiveError>;

/// One rank's end of a group of workers.
///
/// `ranges` cuts a buffer among the ranks: entry `r` belongs to rank `r`. The ranges ascend, do not overlap, may be
/// unequal and may be empty, and are the same on every rank.
pub trait Collective: Send {
    /// This worker's place.
    fn rank(&self) -> Rank;

    /// How many workers there are.
    fn world_size(&self) -> WorldSize;

    /// The membership this group belongs to.
    fn generation(&self) -> Generation;

    /// Sums `data` over the ranks (wrapping). Afterwards `data[ranges[rank]]` holds this rank's part of the sum; what
    /// is outside it is scratch. Integer addition is associative, so the sum's bits do not depend on the order.
    fn reduce_scatter_i64(&mut self, data: &mut [i64], ranges: &[Range<usize>]) -> Result<()>;

    /// As [`Collective::reduce_scatter_i64`] in 32 bits.
    fn reduce_scatter_i32(&mut self, data: &mut [i32], ranges: &[Range<usize>]) -> Result<()>;

    /// As [`Collective::reduce_scatter_i64`] in float32. The part of rank `r` is added in the order r+1, r+2, …, r
    /// around the ring: the same bits each time for one world size, other bits for another.
    fn reduce_scatter_f32(&mut self, data: &mut [f32], ranges: &[Range<usize>]) -> Result<()>;

    /// Each rank gives `data[ranges[rank]]`; afterwards every rank has all parts.
    fn all_gather_f32(&mut self, data: &mut [f32], ranges: &[Range<usize>]) -> Result<()>;

    /// As [`Collective::all_gather_f32`] for 16-bit values, such as bfloat16.
    fn all_gather_u16(&mut self, data: &mut [u16], ranges: &[Range<usize>]) -> Result<()>;

    /// Each rank gives one small message, at most [`MAX_MESSAGE`] bytes; afterwards every rank has all, in rank order.
    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Returns once every rank has entered the barrier.
    fn barrier(&mut self) -> Result<()>;

    /// How much was exchanged so far, also after a failure.
    fn moved(&self) -> Moved {
        Moved::default()
    }

    /// A handle that ends a blocked operation from another thread.
    fn abort_handle(&self) -> AbortHandle;
}

/// Refuses ranges that are not one ascending range per rank inside the buffer.
fn check_ranges(len: usize, ranges: &[Range<usize>], world: WorldSize) -> Result<()> {
    if ranges.len() != world.count() {
        let problem = format!("{} ranges for {world} ranks; one each is right", ranges.len());
        return Err(CollectiveError::Request(problem));
    }
    let mut end = 0;
    for (rank, range) in ranges.iter().enumerate() {
        if range.start < end || range.end < range.start || range.end > len {
            let problem = format!(
                "the range {}..{} of rank {rank} overlaps one before it, is reversed or leaves the \
                 buffer of {len} elements",
                range.start, range.end
            );
            return Err(CollectiveError::Request(problem));
        }
        end = range.end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_cannot_be_exchanged_are_refused() {
        let two = WorldSize::new(2).expect("two is not zero");
        assert!(check_ranges(10, &[0..4, 4..10], two).is_ok());
        assert!(check_ranges(10, &[0..0, 3..3], two).is_ok(), "empty and with gaps");
        assert!(check_ranges(10, &[0..10, 10..10], two).is_ok());
        assert!(check_ranges(10, &[], two).is_err());
        let reversed = Range { start: 4, end: 2 };
        for bad in
            [vec![0..2, 2..4, 4..6], vec![0..6, 5..10], vec![0..5, 5..11], vec![4..6, 0..2], vec![0..1, reversed]]
        {
            assert!(matches!(check_ranges(10, &bad, two), Err(CollectiveError::Request(_))), "{bad:?}");
        }
    }
}
