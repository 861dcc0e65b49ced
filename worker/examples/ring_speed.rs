//! Measures the TCP ring on loopback: `cargo run -p worker --example ring_speed [ranks] [MiB]`.
//!
//! Prints bus bandwidth, the bytes a rank sends (which are the bytes it receives) a second: (n-1)/n of the buffer.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use proto::ids::{Generation, JobName, Rank};
use worker::collective::{Collective, Ring, RingListener, RingMembership, RingTimeouts};

const ROUNDS: usize = 10;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let ranks: u32 = arguments.next().map_or(Ok(2), |text| text.parse())?;
    let mebibytes: usize = arguments.next().map_or(Ok(256), |text| text.parse())?;
    let bound: Result<Vec<_>, _> = (0..ranks).map(|_| RingListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))).collect();
    let (listeners, addresses): (Vec<_>, Vec<_>) = bound?.into_iter().unzip();
    let memberships = RingMembership::of_ring(&addresses, &JobName::new("speed")?, Generation::new(1), [7; 32]);
    let start = Barrier::new(ranks as usize);
    std::thread::scope(|scope| {
        let start = &start;
        let spawn = |(listener, membership)| scope.spawn(move || measure(listener, membership, mebibytes << 20, start));
        let workers: Vec<_> = listeners.iter().zip(memberships).map(spawn).collect();
        for worker in workers {
            worker.join().map_err(|_| "a rank panicked")??;
        }
        Ok(())
    })
}

fn measure(listener: &RingListener, membership: RingMembership, bytes: usize, start: &Barrier) -> Result<(), Failure> {
    let limit = Duration::from_mins(1);
    let mut ring = Ring::connect(listener, membership, RingTimeouts { connect: limit, operation: limit })?;
    let mut floats = vec![1.0_f32; bytes / 4];
    let mut integers = vec![1_i64; bytes / 8];
    let of_floats = parts(floats.len(), ring.world_size().count());
    let of_integers = parts(integers.len(), ring.world_size().count());
    let mut report = |name: &str, operation: &mut dyn FnMut(&mut Ring) -> worker::collective::Result<()>| {
        operation(&mut ring)?;
        start.wait();
        let begun = Instant::now();
        for _ in 0..ROUNDS {
            operation(&mut ring)?;
        }
        ring.barrier()?;
        let seconds = begun.elapsed().as_secs_f64();
        let share = (ring.world_size().get() - 1) as f64 / ring.world_size().get() as f64;
        if ring.rank() == Rank::ZERO {
            println!("{name:<20} {:6.2} GB/s", (bytes * ROUNDS) as f64 * share / seconds / 1e9);
        }
        Ok::<_, Failure>(())
    };
    report("reduce-scatter f32", &mut |ring| ring.reduce_scatter_f32(&mut floats, &of_floats))?;
    report("reduce-scatter i64", &mut |ring| ring.reduce_scatter_i64(&mut integers, &of_integers))?;
    report("all-gather f32", &mut |ring| ring.all_gather_f32(&mut floats, &of_floats))
}

fn parts(len: usize, ranks: usize) -> Vec<Range<usize>> {
    (0..ranks).map(|rank| len * rank / ranks..len * (rank + 1) / ranks).collect()
}
