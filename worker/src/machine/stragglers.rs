//! Stragglers: ranks that are persistently slower than the median.
//!
//! In a synchronous step everybody waits for the slowest, so step times say nothing: what is compared is the time a
//! rank's own micro-batches took it, before the exchange, each counted alike. One slow step is a page fault or a
//! neighbour; so a rank is named when most of its last steps were slow, and only forgotten when hardly any is.

use proto::ids::Rank;

/// Steps looked back on: the bits of a history.
const WINDOW: u32 = u32::BITS;
/// Slow steps of the window from which a rank is a straggler.
const NAMED: u32 = 24;
/// Slow steps of the window up to which it is one no longer.
const FORGOTTEN: u32 = 8;
/// The weight of the newest step in the ratio that is told.
const NEWEST: f32 = 1.0 / 8.0;

/// A rank that holds the others up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Straggler {
    /// Which.
    pub rank: Rank,
    /// Its time for a micro-batch over the median's, smoothed over its last steps.
    pub ratio: f32,
}

#[derive(Debug, Clone, Copy, Default)]
struct History {
    /// Whether each of the last steps was slow, the newest in the lowest bit.
    slow: u32,
    ratio: f32,
    named: bool,
}

/// What is known of all ranks of a generation.
#[derive(Debug)]
pub struct Stragglers {
    /// Above so many times the median a step is slow.
    factor: f32,
    ranks: Vec<History>,
    /// Room for finding the median without allocating.
    sorted: Vec<f32>,
}

impl Stragglers {
    /// Of a generation of `world` ranks that has just begun.
    pub fn new(factor: f64, world: usize) -> Self {
        Self { factor: factor as f32, ranks: vec![History::default(); world], sorted: Vec::with_capacity(world) }
    }

    /// Takes in a step: the seconds that one micro-batch took each rank, in rank order. A time that is none counts as
    /// no time at all, so it slows nobody down.
    pub fn step(&mut self, seconds: impl Iterator<Item = f32> + Clone) {
        if self.ranks.len() < 2 {
            return;
        }
        let usable = |seconds: f32| if seconds.is_finite() && seconds > 0.0 { seconds } else { 0.0 };
        self.sorted.clear();
        self.sorted.extend(seconds.clone().map(usable));
        if self.sorted.len() != self.ranks.len() {
            return;
        }
        // Of an even number the lower: one slow rank of two is then slower than the median.
        let middle = (self.sorted.len() - 1) / 2;
        let (_, median, _) = self.sorted.select_nth_unstable_by(middle, f32::total_cmp);
        let median = *median;
        if median <= 0.0 {
            return;
        }
        for (of, seconds) in self.ranks.iter_mut().zip(seconds.map(usable)) {
            let ratio = seconds / median;
            of.ratio = if of.ratio == 0.0 { ratio } else { of.ratio + NEWEST * (ratio - of.ratio) };
            of.slow = of.slow << 1 | u32::from(ratio > self.factor);
            let slow = of.slow.count_ones();
            of.named = if of.named { slow > FORGOTTEN } else { slow >= NAMED };
        }
    }

    /// Those to be named, in rank order.
    pub fn named(&self) -> impl Iterator<Item = Straggler> {
        let all = self.ranks.iter().zip(0..);
        all.filter(|(of, _)| of.named).map(|(of, rank)| Straggler { rank: Rank::new(rank), ratio: of.ratio })
    }
}

const _: () = assert!(FORGOTTEN < NAMED && NAMED <= WINDOW, "a straggler is forgotten later than named");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn named(of: &Stragglers) -> Vec<u32> {
        of.named().map(|straggler| straggler.rank.get()).collect()
    }

    #[test]
    fn a_slow_rank_is_named_after_a_while_and_forgotten_later() {
        let mut of = Stragglers::new(1.5, 4);
        for step in 1..=NAMED {
            assert!(named(&of).is_empty(), "named before step {step}");
            of.step([0.1, 0.11, 0.2, 0.09].into_iter());
        }
        assert_eq!(named(&of), [2]);
        let ratio = of.named().next().unwrap().ratio;
        assert!((1.7..=2.3).contains(&ratio), "{ratio}");
        let mut steps = 0;
        while !named(&of).is_empty() {
            of.step([0.1; 4].into_iter());
            steps += 1;
        }
        assert!((NAMED - FORGOTTEN..=WINDOW).contains(&steps), "forgotten after {steps} steps");
    }

    #[test]
    fn of_two_the_slow_one_is_named_and_of_one_nobody() {
        let mut two = Stragglers::new(1.5, 2);
        (0..NAMED).for_each(|_| two.step([0.3, 0.1].into_iter()));
        assert_eq!(named(&two), [0]);
        let mut one = Stragglers::new(1.5, 1);
        (0..NAMED).for_each(|_| one.step([0.3].into_iter()));
        assert!(named(&one).is_empty());
    }

    #[test]
    fn what_is_no_time_names_nobody() {
        let mut of = Stragglers::new(1.5, 3);
        (0..WINDOW).for_each(|_| of.step([f32::NAN, 0.0, -1.0].into_iter()));
        (0..WINDOW).for_each(|_| of.step([0.1, f32::INFINITY, 0.1].into_iter()));
        (0..WINDOW).for_each(|_| of.step([9.0, 0.1].into_iter()));
        assert!(named(&of).is_empty());
    }

    proptest! {
        #[test]
        fn now_and_then_slow_is_no_straggler(turns in prop::collection::vec(0usize..6, 200)) {
            // Each step another rank, at random, is ten times slower: nobody is slow in most of the steps.
            let mut of = Stragglers::new(1.5, 6);
            for turn in turns {
                of.step((0..6).map(|rank| if rank == turn { 1.0 } else { 0.1 }));
                prop_assert!(of.named().count() <= 1);
            }
        }
    }
}
