//! The one place where names are drawn at random: of workers, incarnations, objects and writers.
//!
//! In production they come from the operating system. A simulation, which runs a whole cluster on one thread, makes
//! that thread's draws follow from its seed.

use std::cell::Cell;

use uuid::{Builder, Uuid};

thread_local! {
    /// The state of this thread's generator; `None`: the operating system's.
    static SEEDED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// A name that nobody else draws.
pub fn uuid() -> Uuid {
    let Some(state) = SEEDED.get() else { return Uuid::new_v4() };
    let (high, state) = mixed(state);
    let (low, state) = mixed(state);
    SEEDED.set(Some(state));
    let bits = u128::from(high) << 64 | u128::from(low);
    Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
}

/// From now on the names drawn on this thread follow from a seed; `None`: they are random again.
pub fn follow(seed: Option<u64>) {
    SEEDED.set(seed);
}

/// The next number of a generator, and its next state (splitmix64).
fn mixed(state: u64) -> (u64, u64) {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31), state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_from_a_seed_on_its_own_thread_only() {
        let draw = |seed| {
            follow(seed);
            [uuid(), uuid()]
        };
        let first = draw(Some(7));
        assert_eq!(first, draw(Some(7)));
        assert_ne!(first[0], first[1]);
        assert_ne!(first, draw(Some(8)));
        assert_eq!(first[0].get_version_num(), 4);
        let elsewhere = std::thread::spawn(|| [uuid(), uuid()]).join().unwrap();
        assert_ne!(elsewhere, draw(Some(8)));
        assert_ne!(draw(None), draw(None));
    }
}
