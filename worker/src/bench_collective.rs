//! How fast the workers' exchange is: each operation, by size and world, on loopback.
//!
//! Every rank is a thread with a ring end of its own, as a worker has. A size is run once to warm up and then for at
//! least a tenth of a second, between two barriers; the slowest rank's time counts. *Algorithm bandwidth* is the
//! buffer's bytes over the time; *bus bandwidth* is what each link must carry at the least for the operation, over the
//! time (the terms of NCCL's tests): for all-reduce 2(n−1)/n of the buffer, for reduce-scatter and all-gather (n−1)/n,
//! for broadcast all of it.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use proto::ids::{Generation, JobName};

use crate::bench::BenchError;
use crate::collective::{AbortHandle, Collective, Result, RingListener, RingMembership, RingTimeouts, connect};

/// For the ring to form and for one operation.
const EXCHANGE: Duration = Duration::from_mins(1);
/// Each measurement takes at least so long.
const LEAST: f64 = 0.1;
/// And at most so many turns.
const MOST_TURNS: usize = 10_000;

/// What the ranks do together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// The sum of all ranks' float32 on every rank: a reduce-scatter and an all-gather.
    AllReduce,
    /// The sum of all ranks' float32, a part on each.
    ReduceScatter,
    /// The same in 64-bit integers, which is what an exact step does.
    ReduceScatterI64,
    /// Each rank's part on every rank.
    AllGather,
    /// Rank 0's buffer on every rank.
    Broadcast,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::AllReduce, Self::ReduceScatter, Self::ReduceScatterI64, Self::AllGather, Self::Broadcast];

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::ReduceScatterI64 => "reduce_scatter_i64",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
        }
    }

    /// What a link carries of each byte of the buffer.
    pub fn share(self, world: usize) -> f64 {
        let part = (world.max(1) - 1) as f64 / world.max(1) as f64;
        match self {
            Self::AllReduce => 2.0 * part,
            Self::ReduceScatter | Self::ReduceScatterI64 | Self::AllGather => part,
            Self::Broadcast => 1.0,
        }
    }
}

/// One operation at one size.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Measured {
    /// What was done.
    pub operation: Operation,
    /// Bytes of each rank's buffer.
    pub bytes: usize,
    /// Seconds of one operation.
    pub seconds: f64,
}

/// Measures `operations` at `sizes` (in bytes, of whole 64-bit words) with `world` ranks on loopback.
pub fn bench_collective(
    world: usize,
    sizes: &[usize],
    operations: &[Operation],
) -> std::result::Result<Vec<Measured>, BenchError> {
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let bound: Result<Vec<_>> = (0..world).map(|_| RingListener::bind(host)).collect();
    let (listeners, addresses): (Vec<_>, Vec<_>) = bound?.into_iter().unzip();
    let job = JobName::new("bench").map_err(|error| BenchError::Input(error.to_string()))?;
    let memberships = RingMembership::of_ring(&addresses, &job, Generation::new(1), [7; 32]);
    let start = Barrier::new(world);
    let timings = std::thread::scope(|scope| {
        let start = &start;
        let ranks: Vec<_> = listeners
            .iter()
            .zip(memberships)
            .map(|(listener, membership)| scope.spawn(move || rank(listener, &membership, sizes, operations, start)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or(Err(BenchError::Panic))).collect::<Vec<_>>()
    });
    let mut slowest: Vec<Measured> = Vec::new();
    for of_rank in timings {
        let of_rank = of_rank?;
        if slowest.is_empty() {
            slowest = of_rank;
        } else {
            slowest.iter_mut().zip(of_rank).for_each(|(slowest, of)| slowest.seconds = slowest.seconds.max(of.seconds));
        }
    }
    Ok(slowest)
}

/// One rank's part.
fn rank(
    listener: &RingListener,
    membership: &RingMembership,
    sizes: &[usize],
    operations: &[Operation],
    start: &Barrier,
) -> std::result::Result<Vec<Measured>, BenchError> {
    let timeouts = RingTimeouts { connect: EXCHANGE, operation: EXCHANGE };
    let mut ring = connect(listener, membership, timeouts, &AbortHandle::default())?;
    let most = sizes.iter().copied().max().unwrap_or(0);
    let mut buffers = Buffers { floats: vec![0.0; most / 4], integers: vec![0; most / 8] };
    let mut measured = Vec::new();
    for &operation in operations {
        for &bytes in sizes {
            let seconds = timed(ring.as_mut(), &mut buffers, operation, bytes, start)?;
            measured.push(Measured { operation, bytes, seconds });
        }
    }
    Ok(measured)
}

struct Buffers {
    floats: Vec<f32>,
    integers: Vec<i64>,
}

/// Seconds of one operation; the number of turns is the same on all ranks, because rank 0's first turn decides it.
fn timed(
    ring: &mut dyn Collective,
    buffers: &mut Buffers,
    operation: Operation,
    bytes: usize,
    start: &Barrier,
) -> Result<f64> {
    operate(ring, buffers, operation, bytes)?;
    start.wait();
    let began = Instant::now();
    operate(ring, buffers, operation, bytes)?;
    let once = began.elapsed().as_secs_f64().to_le_bytes();
    let words = ring.all_gather_bytes(&once)?;
    let first = words.first().and_then(|word| word.as_slice().try_into().ok()).map_or(LEAST, f64::from_le_bytes);
    let turns = ((LEAST / first.max(1e-9)).ceil() as usize).clamp(1, MOST_TURNS);
    start.wait();
    let began = Instant::now();
    for _ in 0..turns {
        operate(ring, buffers, operation, bytes)?;
    }
    ring.barrier()?;
    Ok(began.elapsed().as_secs_f64() / turns as f64)
}

fn operate(ring: &mut dyn Collective, buffers: &mut Buffers, operation: Operation, bytes: usize) -> Result<()> {
    let world = ring.world_size().count();
    let (floats, integers) = (&mut buffers.floats[..bytes / 4], &mut buffers.integers[..bytes / 8]);
    match operation {
        Operation::AllReduce => {
            let parts = parts(floats.len(), world);
            ring.reduce_scatter_f32(floats, &parts)?;
            ring.all_gather_f32(floats, &parts)
        }
        Operation::ReduceScatter => ring.reduce_scatter_f32(floats, &parts(floats.len(), world)),
        Operation::ReduceScatterI64 => ring.reduce_scatter_i64(integers, &parts(integers.len(), world)),
        Operation::AllGather => ring.all_gather_f32(floats, &parts(floats.len(), world)),
        Operation::Broadcast => {
            // All of it is rank 0's part: each rank passes on what it gets, piece by piece.
            let all = floats.len();
            let whole: Vec<Range<usize>> = (0..world).map(|rank| if rank == 0 { 0..all } else { all..all }).collect();
            ring.all_gather_f32(floats, &whole)
        }
    }
}

fn parts(len: usize, ranks: usize) -> Vec<Range<usize>> {
    (0..ranks).map(|rank| len * rank / ranks..len * (rank + 1) / ranks).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_measured_at_every_size() {
        let sizes = [64, 4096];
        let measured = bench_collective(3, &sizes, &Operation::ALL).unwrap();
        assert_eq!(measured.len(), sizes.len() * Operation::ALL.len());
        assert!(measured.iter().all(|of| of.seconds > 0.0), "{measured:?}");
        assert_eq!(Operation::AllReduce.share(4), 1.5);
    }
}
