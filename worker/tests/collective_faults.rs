//! The ring under failure: peers that die, hang or were never meant to be there. Every case must end, and soon.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use proto::ids::{Generation, JobName, Rank, WorldSize};
use worker::collective::{
    AbortHandle, Collective, CollectiveError, Result, Ring, RingListener, RingMembership, RingTimeouts,
};

const LIMIT: RingTimeouts = RingTimeouts { connect: Duration::from_secs(20), operation: Duration::from_secs(20) };
/// "Soon": far below the deadlines above.
const SOON: Duration = Duration::from_secs(5);

fn listeners(world: u32) -> (Vec<RingListener>, Vec<SocketAddr>) {
    (0..world).map(|_| RingListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap()).unzip()
}

fn member(rank: u32, peers: &[SocketAddr]) -> RingMembership {
    let job = JobName::new("test").unwrap();
    RingMembership::of_ring(peers, &job, Generation::new(5), [9; 32]).swap_remove(rank as usize)
}

/// Forms a ring, each member as `alter` leaves it, and runs `work`; the results in rank order.
fn world<T: Send>(
    count: u32,
    limit: RingTimeouts,
    alter: impl Fn(&mut RingMembership) + Sync,
    work: impl Fn(Result<Ring>) -> T + Sync,
) -> Vec<T> {
    let (listeners, peers) = listeners(count);
    thread::scope(|scope| {
        let start = |(rank, listener)| {
            let (peers, alter, work) = (&peers, &alter, &work);
            scope.spawn(move || {
                let mut membership = member(rank, peers);
                alter(&mut membership);
                work(Ring::connect(listener, membership, limit))
            })
        };
        let threads: Vec<_> = (0..count).zip(&listeners).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn halves(len: usize, count: usize) -> Vec<std::ops::Range<usize>> {
    (0..count).map(|rank| len * rank / count..len * (rank + 1) / count).collect()
}

/// Reduces a large buffer until it fails.
fn reduce_until_failure(ring: &mut Ring) -> CollectiveError {
    let mut data = vec![1_i64; 8 << 20];
    let ranges = halves(data.len(), ring.world_size().count());
    loop {
        if let Err(error) = ring.reduce_scatter_i64(&mut data, &ranges) {
            return error;
        }
    }
}

#[test]
fn a_peer_that_dies_mid_transfer_ends_everyone_soon() {
    let begun = Instant::now();
    let errors = world(
        4,
        LIMIT,
        |_| (),
        |ring| {
            let mut ring = ring.unwrap();
            if ring.rank() == Rank::new(2) {
                // What a killed process's kernel does, in the middle of whatever is going on.
                let handle = ring.abort_handle();
                thread::spawn(move || {
                    thread::sleep(Duration::from_millis(300));
                    handle.abort();
                });
            }
            let error = reduce_until_failure(&mut ring);
            let again = ring.barrier().unwrap_err();
            assert!(matches!(again, CollectiveError::Aborted), "a failed ring stays failed: {again}");
            error
        },
    );
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert!(matches!(errors[2], CollectiveError::Aborted), "{errors:?}");
    let closed = |error: &CollectiveError| matches!(error, CollectiveError::PeerClosed { .. });
    assert!([0, 1, 3].into_iter().all(|rank| closed(&errors[rank])), "{errors:?}");
}

#[test]
fn a_peer_that_leaves_between_operations_is_noticed() {
    let errors = world(
        3,
        LIMIT,
        |_| (),
        |ring| {
            let mut ring = ring.unwrap();
            ring.barrier().unwrap();
            (ring.rank() != Rank::ZERO).then(|| ring.barrier().unwrap_err())
        },
    );
    assert!(errors[1..].iter().all(|error| matches!(error, Some(CollectiveError::PeerClosed { .. }))), "{errors:?}");
}

#[test]
fn an_abort_ends_a_blocked_operation() {
    let begun = Instant::now();
    let errors = world(
        2,
        LIMIT,
        |_| (),
        |ring| {
            let mut ring = ring.unwrap();
            let handle = ring.abort_handle();
            if ring.rank() == Rank::ZERO {
                // Never takes part: rank 1 waits for it.
                thread::sleep(Duration::from_millis(300));
                handle.abort();
                handle.abort();
            }
            ring.barrier().unwrap_err()
        },
    );
    assert!(begun.elapsed() < SOON);
    assert!(matches!(errors[0], CollectiveError::Aborted), "{errors:?}");
    assert!(matches!(errors[1], CollectiveError::PeerClosed { rank: Rank::ZERO, .. }), "{errors:?}");
}

#[test]
fn a_peer_that_hangs_is_a_timeout() {
    let limit = RingTimeouts { operation: Duration::from_millis(500), ..LIMIT };
    let begun = Instant::now();
    let errors = world(
        2,
        limit,
        |_| (),
        |ring| {
            let mut ring = ring.unwrap();
            if ring.rank() == Rank::ZERO {
                thread::sleep(Duration::from_millis(1500));
                return None;
            }
            // Large, so that the sender blocks as well.
            Some(reduce_until_failure(&mut ring))
        },
    );
    assert!(begun.elapsed() < SOON);
    assert!(matches!(errors[1], Some(CollectiveError::Timeout { .. })), "{errors:?}");
}

#[test]
fn a_stranger_to_the_generation_is_refused_with_the_reason() {
    type Alter = fn(&mut RingMembership);
    let cases: [(Alter, &str); 4] = [
        (|m| m.key = [8; 32], "without this generation's key"),
        (|m| m.generation = Generation::new(4), "generation 4 instead of 5"),
        (|m| m.job = JobName::new("other").unwrap(), "another job"),
        (|m| m.world = WorldSize::new(3).unwrap(), "world of"),
    ];
    let limit = RingTimeouts { connect: Duration::from_millis(700), ..LIMIT };
    for (alter, reason) in cases {
        let alter_one = |m: &mut RingMembership| {
            if m.rank == Rank::new(1) {
                alter(m);
            }
        };
        let results = world(2, limit, alter_one, |ring| ring.map(drop));
        let error = results[0].as_ref().expect_err("must not form");
        assert!(matches!(error, CollectiveError::Forming { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error} should say {reason}");
    }
}

#[test]
fn a_wrong_rank_is_refused() {
    let (listeners, peers) = listeners(3);
    let limit = RingTimeouts { connect: Duration::from_millis(700), ..LIMIT };
    // Rank 0 in truth, but the other two are the same rank 1: nobody can be rank 0's previous one.
    let results: Vec<_> = thread::scope(|scope| {
        let start = |(rank, listener)| {
            let membership = member(rank, &peers);
            scope.spawn(move || Ring::connect(listener, membership, limit).map(drop))
        };
        let threads: Vec<_> = [0, 1, 1].into_iter().zip(&listeners).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let error = results[0].as_ref().expect_err("must not form").to_string();
    assert!(error.contains("no connection from rank 2"), "{error}");
}

#[test]
fn garbage_silence_and_stale_workers_do_not_keep_a_ring_from_forming() {
    let (listeners, peers) = listeners(2);
    let first = peers[0];
    let mut silent: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(first).unwrap()).collect();
    let mut garbage = TcpStream::connect(first).unwrap();
    garbage.write_all(&[0xA5; 4096]).unwrap();
    let begun = Instant::now();
    thread::scope(|scope| {
        // A worker of an older generation that still tries to connect, with a listener of its own.
        let (stale_listener, stale_address) = RingListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
        let mut stale = member(1, &[first, stale_address]);
        stale.generation = Generation::new(4);
        let abort = AbortHandle::new();
        let stop = abort.clone();
        let stale_worker = scope.spawn(move || Ring::connect_with(&stale_listener, &stale, LIMIT, &stop).map(drop));
        thread::sleep(Duration::from_millis(200));
        let start = |(rank, listener)| {
            let membership = member(rank, &peers);
            scope.spawn(move || Ring::connect(listener, membership, LIMIT)?.all_gather_bytes(&[rank as u8]))
        };
        let threads: Vec<_> = (0..2).zip(&listeners).map(start).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap().unwrap(), [[0], [1]]);
        }
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        abort.abort();
        assert!(matches!(stale_worker.join().unwrap(), Err(CollectiveError::Aborted)));
    });
    silent.clear();
}

#[test]
fn one_listener_serves_one_generation_after_another() {
    let (listeners, peers) = listeners(3);
    for generation in 1..=5 {
        thread::scope(|scope| {
            for (rank, listener) in (0..3).zip(&listeners) {
                let membership = RingMembership { generation: Generation::new(generation), ..member(rank, &peers) };
                scope.spawn(move || Ring::connect(listener, membership, LIMIT).unwrap().barrier().unwrap());
            }
        });
    }
}
