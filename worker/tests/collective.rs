//! The ring against a plain sum, at every world size, with unequal and empty parts.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use proto::ids::{Generation, JobName, Rank};
use worker::collective::{
    AbortHandle, Collective, CollectiveError, MAX_MESSAGE, Ring, RingListener, RingMembership, RingTimeouts, connect,
};

const LIMIT: RingTimeouts = RingTimeouts { connect: Duration::from_secs(20), operation: Duration::from_secs(20) };

/// Forms a ring of `world` threads and runs `work` on each; the results in rank order.
fn with_world<T: Send>(world: u32, work: impl Fn(&mut dyn Collective) -> T + Sync) -> Vec<T> {
    let bind = |_| RingListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let (listeners, peers): (Vec<RingListener>, Vec<SocketAddr>) = (0..world).map(bind).unzip();
    let job = JobName::new("test").unwrap();
    let memberships = RingMembership::of_ring(&peers, &job, Generation::new(4), [9; 32]);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..world)
            .zip(&listeners)
            .zip(memberships)
            .map(|((rank, listener), membership)| {
                let work = &work;
                scope.spawn(move || {
                    let mut group = connect(listener, &membership, LIMIT, &AbortHandle::new()).unwrap();
                    assert_eq!((group.rank().get(), group.world_size().get()), (rank, world));
                    assert_eq!(group.generation(), Generation::new(4));
                    work(group.as_mut())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn ranges(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let cut = |length: &usize| {
        let start = end;
        end += length;
        start..end
    };
    lengths.iter().map(cut).collect()
}

/// A value of one rank at one place, with all bits in use.
fn value(rank: usize, place: usize) -> i64 {
    (rank as i64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_u64 as i64).wrapping_add(place as i64 * 0x0123_4567_89AB)
}

fn check_all(lengths: &[usize]) {
    let ranges = ranges(lengths);
    let len = ranges.last().map_or(0, |range| range.end);
    let world = lengths.len();
    with_world(world as u32, |group| {
        let rank = group.rank().index();
        let own = ranges[rank].clone();

        let mut integers: Vec<i64> = (0..len).map(|place| value(rank, place)).collect();
        group.reduce_scatter_i64(&mut integers, &ranges).unwrap();
        for place in own.clone() {
            let sum = (0..world).fold(0_i64, |sum, rank| sum.wrapping_add(value(rank, place)));
            assert_eq!(integers[place], sum, "place {place} of rank {rank}");
        }

        let float = |rank: usize, place: usize| (value(rank, place) % 1000) as f32 * 1.1;
        let mut floats: Vec<f32> = (0..len).map(|place| float(rank, place)).collect();
        group.reduce_scatter_f32(&mut floats, &ranges).unwrap();
        for place in own.clone() {
            // The documented order: the owner's successor first, the owner last.
            let order = (1..=world).map(|ahead| (rank + ahead) % world);
            let sum = order.map(|rank| float(rank, place)).reduce(|sum, next| sum + next).unwrap();
            assert_eq!(floats[place].to_bits(), sum.to_bits());
        }

        let mut parts = vec![-1.0_f32; len];
        own.for_each(|place| parts[place] = float(rank, place));
        group.all_gather_f32(&mut parts, &ranges).unwrap();
        for (owner, range) in ranges.iter().enumerate() {
            assert!(range.clone().all(|place| parts[place] == float(owner, place)));
        }
        group.barrier().unwrap();

        let message = vec![rank as u8; rank * 1000];
        let all = group.all_gather_bytes(&message).unwrap();
        assert!(all.iter().enumerate().all(|(rank, bytes)| *bytes == vec![rank as u8; rank * 1000]));
        assert_eq!(all.len(), world);
    });
}

#[test]
fn every_world_sums_and_gathers_like_one() {
    // Segments are 32 Ki integers or 64 Ki floats: parts around one, several, and none.
    for lengths in [
        vec![70_000],
        vec![100_003, 65_536],
        vec![0, 200_001],
        vec![1, 0, 300_000],
        vec![32_768, 32_769, 32_767, 65_537],
        vec![0, 0, 0, 0],
        vec![5, 0, 131_072, 0, 99_999],
    ] {
        check_all(&lengths);
    }
}

#[test]
fn a_large_message_of_each_rank_cannot_deadlock() {
    let sizes = with_world(3, |group| {
        let all = group.all_gather_bytes(&vec![3; MAX_MESSAGE]).unwrap();
        let error = group.all_gather_bytes(&vec![3; MAX_MESSAGE + 1]).unwrap_err();
        assert!(matches!(error, CollectiveError::Request(_)));
        group.barrier().unwrap();
        all.iter().map(Vec::len).collect::<Vec<_>>()
    });
    assert!(sizes.iter().all(|sizes| *sizes == [MAX_MESSAGE; 3]));
}

#[test]
fn ranks_that_do_different_things_are_told_so() {
    let errors = with_world(2, |group| {
        let mut data = vec![0; 10];
        if group.rank() == Rank::ZERO { group.barrier() } else { group.reduce_scatter_i64(&mut data, &[0..5, 5..10]) }
            .unwrap_err()
    });
    assert!(errors.iter().any(|error| error.to_string().contains("the peer is in")), "{errors:?}");
}

#[test]
fn ranks_that_cut_differently_are_told_so() {
    let errors = with_world(2, |group| {
        let cut = 5 + group.rank().index();
        group.all_gather_f32(&mut [0.0; 10], &[0..cut, cut..10]).unwrap_err()
    });
    assert!(errors.iter().any(|error| error.to_string().contains("chunk length is")), "{errors:?}");
}

#[test]
fn a_ring_is_not_made_of_one() {
    let (listener, address) = RingListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let job = JobName::new("test").unwrap();
    let membership = RingMembership::of_ring(&[address], &job, Generation::new(1), [42; 32]).remove(0);
    assert!(!format!("{membership:?}").contains("42, 42"), "the key must not be printed");
    assert!(matches!(Ring::connect(&listener, membership, LIMIT), Err(CollectiveError::Request(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_cut_sums_and_gathers_right(lengths in prop::collection::vec(0_usize..50_000, 1..6)) {
        check_all(&lengths);
    }
}
