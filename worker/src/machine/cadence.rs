//! When the state is captured, into memory only or for the store too.
//!
//! Every rank must capture the same steps, or no snapshot would ever be whole. So each says in the step's message
//! whether it has a free slot and how often a snapshot is worth its cost to it, and all decide the same from the same
//! messages. With a slot missing anywhere the capture is skipped and counted; training never waits for one (P3).

use proto::spec::CheckpointSpec;

use super::kept::{Agreed, Steps, agree};

/// The share of a step that snapshots in memory may cost, on average.
const SHARE: f64 = 0.02;
/// The share of the threads that steps leave idle which snapshots may take.
const SPARE_SHARE: f64 = 0.5;
/// Steps between a snapshot and the next stored one, at the least: a slot must be free again by then.
const LEAST_GUARD: u32 = 2;
/// The longest interval between two snapshots that a measurement can ask for.
const LONGEST_INTERVAL: u32 = 10_000;

/// How far a capture goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// Kept in the nodes' memory.
    Memory,
    /// Kept in memory and uploaded.
    Store,
}

/// One rank's word on the next capture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wish {
    /// A slot is free to go on in once this one is frozen.
    pub ready: bool,
    /// Steps between two snapshots in memory; 0: none.
    pub interval: u32,
    /// Steps a snapshot needs to become complete.
    pub guard: u32,
    /// What became of earlier captures in its parity group.
    pub steps: Steps,
}

/// What all ranks do after this step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// Capture the state, and how far it goes.
    pub capture: Option<Tier>,
    /// A capture that was due and for which some rank had no slot.
    pub skipped: Option<Tier>,
    /// What became of earlier captures in all groups.
    pub steps: Agreed,
}

/// What a rank has measured of its snapshots.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    /// Seconds of one thread that hashing and parity took.
    pub cost: f64,
    /// Seconds of a step.
    pub step: f64,
    /// Threads that compute steps.
    pub threads: usize,
    /// Threads that steps leave idle.
    pub spare: usize,
}

/// The rhythm of captures in one generation.
#[derive(Debug)]
pub struct Cadence {
    store_every: u64,
    /// `None`: as often as it is cheap; 0: never.
    memory_every: Option<u32>,
    /// The step the generation starts at, the last one decided, and the last one captured.
    start: u64,
    step: u64,
    last: u64,
    /// Steps that a snapshot needs to become complete: what the last one needed, or needs so far if that is more.
    latency: u32,
    /// Whether the last one is complete.
    settled: bool,
}

impl Cadence {
    /// The rhythm a job asks for, from the step the generation starts at.
    pub fn new(spec: &CheckpointSpec, start: u64) -> Self {
        let fixed = u32::try_from(spec.memory_every).unwrap_or(LONGEST_INTERVAL);
        let memory_every = match (spec.memory, fixed) {
            (false, _) => Some(0),
            (true, 0) => None,
            (true, every) => Some(every),
        };
        let store_every = spec.every_steps.max(1);
        Self { store_every, memory_every, start, step: start, last: start, latency: 0, settled: true }
    }

    /// This rank's word. `steps` is what became of this generation's captures in its parity group.
    pub fn wish(&mut self, ready: bool, steps: Steps, measured: Measured) -> Wish {
        self.measure(steps.newest());
        let busy = SHARE * measured.threads.max(1) as f64;
        let budget = measured.step * busy.max(SPARE_SHARE * measured.spare as f64);
        let cheap = if budget > 0.0 { (measured.cost / budget).ceil() } else { 1.0 };
        let interval = self.memory_every.unwrap_or((cheap as u32).clamp(1, LONGEST_INTERVAL));
        let guard = LEAST_GUARD.max(self.latency.saturating_add(1)).min(LONGEST_INTERVAL);
        Wish { ready, interval, guard, steps }
    }

    /// Measures how long the last snapshot takes to become complete. One that is not yet has taken that long already:
    /// the first of a generation, for which connections are made, must not stand in the way of a stored one.
    fn measure(&mut self, complete: u64) {
        if self.settled || self.last <= self.start {
            return;
        }
        let taken = u32::try_from(self.step.saturating_sub(self.last)).unwrap_or(u32::MAX);
        self.settled = complete >= self.last;
        self.latency = if self.settled { taken } else { self.latency.max(taken) };
    }

    /// What all ranks do after `step`, from all their words. The `last` step of a generation is always captured: no
    /// slot is needed to go on in.
    pub fn decide(&mut self, step: u64, last: bool, wishes: &[Wish]) -> Decision {
        let interval = u64::from(wishes.iter().map(|wish| wish.interval).max().unwrap_or(0));
        let guard = u64::from(wishes.iter().map(|wish| wish.guard).max().unwrap_or(0));
        let to_store = self.store_every - step % self.store_every;
        let is_memory_due = interval > 0 && step.saturating_sub(self.last) >= interval && to_store >= guard;
        let due = match () {
            () if last || step.is_multiple_of(self.store_every) => Some(Tier::Store),
            () if is_memory_due => Some(Tier::Memory),
            () => None,
        };
        let can = last || wishes.iter().all(|wish| wish.ready);
        self.step = step;
        if can && due.is_some() {
            (self.last, self.settled) = (step, false);
        }
        let steps = agree(wishes.iter().map(|wish| &wish.steps));
        Decision { capture: due.filter(|_| can), skipped: due.filter(|_| !can), steps }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::spec::{JobSpec, Overrides};

    use super::*;

    fn spec(every: u64, memory: bool, memory_every: u64) -> CheckpointSpec {
        let text = format!(
            "name = \"c\"\n[model]\npreset = \"tiny\"\n[data]\ntrain = \"x\"\n[training]\nsteps = 100\n\
             [checkpoint]\nevery_steps = {every}\nmemory = {memory}\nmemory_every = {memory_every}\n"
        );
        JobSpec::parse("test", &text, std::path::Path::new("/"), &Overrides::new()).unwrap().checkpoint
    }

    fn ready() -> Wish {
        Wish { ready: true, interval: 1, guard: 2, steps: Steps::default() }
    }

    #[test]
    fn stored_steps_come_first_and_memory_keeps_out_of_their_way() {
        let mut cadence = Cadence::new(&spec(5, true, 1), 0);
        let tiers: Vec<_> = (1..=10).map(|step| cadence.decide(step, step == 10, &[ready(); 2]).capture).collect();
        let (m, s) = (Some(Tier::Memory), Some(Tier::Store));
        assert_eq!(tiers, [m, m, m, None, s, m, m, m, None, s]);
    }

    #[test]
    fn one_rank_without_a_slot_skips_for_all_but_never_the_last() {
        let mut cadence = Cadence::new(&spec(2, true, 1), 0);
        let wishes = [ready(), Wish { ready: false, steps: Steps::of(&[7], &[1]), ..ready() }];
        let decided = cadence.decide(2, false, &wishes);
        assert_eq!((decided.capture, decided.skipped), (None, Some(Tier::Store)));
        assert_eq!(decided.steps, Agreed { complete: 0, given_up: vec![1] });
        assert_eq!(cadence.decide(3, true, &wishes).capture, Some(Tier::Store));
        let mut none = Cadence::new(&spec(100, false, 0), 0);
        let wish = none.wish(true, Steps::default(), Measured::default());
        assert_eq!(none.decide(1, false, &[wish]), Decision::default());
    }

    #[test]
    fn snapshots_cost_two_percent_of_a_step() {
        let mut cadence = Cadence::new(&spec(100, true, 0), 0);
        let measured = |cost| Measured { cost, step: 1.0, threads: 2, spare: 0 };
        assert_eq!(cadence.wish(true, Steps::default(), measured(0.03)).interval, 1);
        assert_eq!(cadence.wish(true, Steps::default(), measured(0.1)).interval, 3);
        let spare = Measured { spare: 4, ..measured(1.9) };
        assert_eq!(cadence.wish(true, Steps::default(), spare).interval, 1, "where idle threads hash");
        assert_eq!(cadence.wish(true, Steps::default(), measured(f64::INFINITY)).interval, LONGEST_INTERVAL);
        assert_eq!(Cadence::new(&spec(100, true, 7), 0).wish(true, Steps::default(), measured(9.0)).interval, 7);
    }

    #[test]
    fn what_a_snapshot_needs_keeps_the_next_out_of_the_way_of_a_stored_one() {
        let mut cadence = Cadence::new(&spec(8, true, 3), 16);
        let decide = |cadence: &mut Cadence, step, complete| {
            let wish = cadence.wish(true, Steps::of(&[complete], &[]), Measured::default());
            (wish.guard, cadence.decide(step, false, &[wish]).capture)
        };
        assert_eq!(decide(&mut cadence, 17, 0), (2, None));
        assert_eq!(decide(&mut cadence, 18, 0), (2, None));
        assert_eq!(decide(&mut cadence, 19, 0), (2, Some(Tier::Memory)));
        // It is not complete three steps later: a snapshot of step 22 would hold the slot that step 24 needs.
        assert_eq!(decide(&mut cadence, 20, 0), (2, None));
        assert_eq!(decide(&mut cadence, 21, 0), (2, None));
        assert_eq!(decide(&mut cadence, 22, 0), (3, None));
        assert_eq!(decide(&mut cadence, 23, 19), (4, None));
        assert_eq!(decide(&mut cadence, 24, 19), (4, Some(Tier::Store)));
        assert_eq!(decide(&mut cadence, 25, 24), (2, None), "that one was quick");
        assert_eq!(decide(&mut cadence, 26, 24), (2, None));
        assert_eq!(decide(&mut cadence, 27, 24), (2, Some(Tier::Memory)));
    }

    proptest! {
        /// Whatever single ranks wish, all decide the same, because all decide from the same list; and with every rank
        /// ready no stored step is missed.
        #[test]
        fn no_stored_step_is_missed_while_slots_are_free(
            every in 1u64..12, interval in 0u32..5, guard in 0u32..6, steps in 1u64..60,
        ) {
            let mut cadence = Cadence::new(&spec(every, true, 1), 0);
            for step in 1..=steps {
                let wish = Wish { interval, guard, ..ready() };
                let decided = cadence.decide(step, step == steps, &[wish, ready()]);
                prop_assert_eq!(decided.skipped, None);
                if step % every == 0 || step == steps {
                    prop_assert_eq!(decided.capture, Some(Tier::Store));
                }
            }
        }
    }
}
