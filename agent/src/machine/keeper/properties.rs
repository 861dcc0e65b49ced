//! A whole parity group of keepers, whose words are delayed, lost and overtake one another, whose parity fails, and
//! whose captures run out of slots. Whatever happens, a step that anybody takes for complete can be restored.

use proptest::prelude::*;

use super::*;

/// Slots of a node beside the live one.
const SLOTS: usize = 2;
const GENERATION: u64 = 1;

#[derive(Debug, Clone)]
enum Happens {
    /// All nodes capture, if all have room; else all know that they have not.
    Capture(bool),
    /// A node's parity of what it is at is made, or fails.
    Encoded { node: usize, done: bool },
    /// One of the words on their way arrives, any of them.
    Arrives(usize),
    /// One is lost.
    Lost(usize),
    /// The answer to a question arrives as it was when it was asked.
    Answer(usize),
    /// Time goes by, in seconds.
    Wait(u64),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        3 => any::<bool>().prop_map(Happens::Capture),
        4 => (0..4usize, prop::bool::weighted(0.6)).prop_map(|(node, done)| Happens::Encoded { node, done }),
        8 => (0..64usize).prop_map(Happens::Arrives),
        1 => (0..64usize).prop_map(Happens::Lost),
        2 => (0..64usize).prop_map(Happens::Answer),
        2 => (0..8u64).prop_map(Happens::Wait),
    ]
}

/// A word of a node: from, to, its number, and what it holds.
type Word = (usize, usize, u64, Vec<PeerStep>);

/// A way from one node to another, on which it says, asks and reads.
type Way = (usize, usize);

struct Group {
    keepers: Vec<Keeper>,
    now: Duration,
    step: u64,
    /// What each node holds, and of what its parity is made, whatever it believes.
    truth: Vec<BTreeMap<u64, bool>>,
    encoding: Vec<BTreeSet<u64>>,
    numbers: Vec<u64>,
    said: Vec<Vec<PeerStep>>,
    words: Vec<Word>,
    /// The same, with the newest step that the one asked takes for complete.
    answers: Vec<(Word, u64)>,
    given_up: u64,
}

impl Group {
    fn new(nodes: usize) -> Self {
        let members: Vec<Vec<u32>> = (0..nodes as u32).map(|rank| vec![rank]).collect();
        let keeper = |me| {
            let mut keeper = Keeper::default();
            let members = members.clone();
            keeper.announce(Membership { generation: GENERATION, members, me, parities: 1, groups: 1, start: None });
            keeper
        };
        Self {
            keepers: (0..nodes).map(keeper).collect(),
            now: Duration::ZERO,
            step: 0,
            truth: vec![BTreeMap::new(); nodes],
            encoding: vec![BTreeSet::new(); nodes],
            numbers: vec![0; nodes],
            said: vec![vec![]; nodes],
            words: vec![],
            answers: vec![],
            given_up: 0,
        }
    }

    fn nodes(&self) -> usize {
        self.keepers.len()
    }

    fn happens(&mut self, event: Happens) {
        match event {
            Happens::Capture(stored) if self.truth.iter().any(|held| held.len() >= SLOTS) => {
                let shortage = if stored { Shortage::Store } else { Shortage::Memory };
                self.keepers.iter_mut().for_each(|keeper| keeper.short(shortage));
            }
            Happens::Capture(_) => {
                self.step += 1;
                for node in 0..self.nodes() {
                    self.truth[node].insert(self.step, false);
                    assert!(self.keepers[node].captured((GENERATION, self.step), node as u32));
                }
            }
            Happens::Encoded { node, done } => {
                let node = node % self.nodes();
                if let Some(step) = self.encoding[node].pop_first() {
                    if let Some(made) = self.truth[node].get_mut(&step).filter(|_| done) {
                        *made = true;
                    }
                    self.keepers[node].encoded((GENERATION, step), done);
                }
            }
            Happens::Arrives(which) if !self.words.is_empty() => {
                let (from, to, number, steps) = self.words.remove(which % self.words.len());
                self.keepers[to].peer(from, GENERATION, number, steps);
            }
            Happens::Lost(which) if !self.words.is_empty() => drop(self.words.remove(which % self.words.len())),
            Happens::Answer(which) if !self.answers.is_empty() => {
                let ((from, to, number, steps), complete) = self.answers.remove(which % self.answers.len());
                self.keepers[to].answered(from, GENERATION, number, &steps, complete);
            }
            Happens::Wait(seconds) => self.now += Duration::from_secs(seconds),
            Happens::Arrives(_) | Happens::Lost(_) | Happens::Answer(_) => {}
        }
        (0..self.nodes()).for_each(|node| self.advance(node));
    }

    fn advance(&mut self, node: usize) {
        for keep in self.keepers[node].advance(self.now) {
            match keep {
                Keep::Encode((_, step)) => drop(self.encoding[node].insert(step)),
                Keep::Release((_, step)) => drop(self.truth[node].remove(&step)),
                Keep::GiveUp(_) => self.given_up += 1,
                Keep::Publish => {
                    self.numbers[node] += 1;
                    self.said[node] = self.keepers[node].holds().collect();
                    let others = (0..self.nodes()).filter(|other| *other != node);
                    let word = (self.numbers[node], self.said[node].clone());
                    self.words.extend(others.map(|other| (node, other, word.0, word.1.clone())));
                }
                Keep::Ask => {
                    for other in (0..self.nodes()).filter(|other| *other != node) {
                        let complete = self.keepers[other].complete().map_or(0, |key| key.1);
                        let word = (other, node, self.numbers[other], self.said[other].clone());
                        self.answers.push((word, complete));
                    }
                }
                Keep::Complete(_) => {}
            }
        }
    }

    /// The newest step that anybody takes for complete is held by all, with their parity: recovery would choose it, or
    /// a newer one.
    fn check(&self) -> Result<(), TestCaseError> {
        let Some((_, step)) = self.keepers.iter().filter_map(Keeper::complete).max() else { return Ok(()) };
        for (node, held) in self.truth.iter().enumerate() {
            prop_assert!(held.get(&step) == Some(&true), "node {node} lost step {step}");
        }
        Ok(())
    }

    /// A word that was lost is said again, unless there is a newer one.
    fn say_again(&mut self) {
        self.words.clear();
        for node in 0..self.nodes() {
            let others = (0..self.nodes()).filter(|other| *other != node);
            let words = others.map(|other| (node, other, self.numbers[node], self.said[node].clone()));
            self.words.extend(words);
        }
    }

    /// From now on nothing gets through on some ways, what is on them neither; all else works. How many steps are
    /// captured.
    fn run_with_cut(&mut self, rounds: usize, cut: impl Fn(Way) -> bool) -> u64 {
        let before = self.step;
        self.say_again();
        for _ in 0..rounds {
            self.happens(Happens::Capture(true));
            for node in 0..self.nodes() {
                let reads = (0..self.nodes()).all(|other| other == node || !cut((node, other)));
                while !self.encoding[node].is_empty() {
                    self.happens(Happens::Encoded { node, done: reads });
                    if !reads {
                        break;
                    }
                }
            }
            while !self.words.is_empty() || !self.answers.is_empty() {
                self.words.retain(|(from, to, ..)| !cut((*from, *to)));
                // Whoever is answered has asked.
                self.answers.retain(|((from, to, ..), _)| !cut((*to, *from)));
                self.happens(Happens::Arrives(0));
                self.happens(Happens::Answer(0));
            }
            self.happens(Happens::Wait(3));
        }
        self.step - before
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn what_is_taken_for_complete_can_be_restored(
        nodes in 2..5usize, events in prop::collection::vec(happens(), 1..250),
    ) {
        let mut group = Group::new(nodes);
        for event in events {
            group.happens(event);
            group.check()?;
        }
    }

    /// Whatever came before, and whatever word the break swallows: with one member out of reach of the others for good,
    /// captures go on.
    #[test]
    fn a_member_out_of_reach_does_not_hold_the_slots(
        nodes in 2..5usize, member in 0..4usize, events in prop::collection::vec(happens(), 1..60),
    ) {
        let mut group = Group::new(nodes);
        for event in events {
            group.happens(event);
        }
        let captured = group.run_with_cut(20, |(_, to)| to == member % nodes);
        prop_assert!(captured >= 4, "{captured} captures, {} given up", group.given_up);
        group.check()?;
    }

    /// The same with two members that cannot reach each other, while a third reaches both.
    #[test]
    fn a_broken_link_does_not_hold_the_slots(
        nodes in 3..5usize, ends in (0..4usize, 1..4usize), events in prop::collection::vec(happens(), 1..60),
    ) {
        let mut group = Group::new(nodes);
        for event in events {
            group.happens(event);
        }
        let (one, other) = (ends.0 % nodes, (ends.0 % nodes + 1 + ends.1 % (nodes - 1)) % nodes);
        let captured = group.run_with_cut(20, |(from, to)| (from, to) == (one, other) || (from, to) == (other, one));
        prop_assert!(captured >= 4, "{captured} captures, {} given up", group.given_up);
        group.check()?;
    }

    /// Two nodes, cut just as one of them says that its parity is made: both ways of saying so are tried, that before
    /// and that after the other has made its own.
    #[test]
    fn a_link_that_breaks_as_parity_is_made_holds_no_slot(first in 0..2usize, steps in 1..6u64, which in 0..2usize) {
        let mut group = Group::new(2);
        for _ in 0..steps {
            group.happens(Happens::Capture(false));
            while !group.words.is_empty() {
                group.happens(Happens::Arrives(0));
            }
            for node in [first, 1 - first] {
                // The last step's words are on their way as the link breaks.
                if group.step < steps {
                    group.happens(Happens::Encoded { node, done: true });
                    while !group.words.is_empty() {
                        group.happens(Happens::Arrives(0));
                    }
                }
            }
        }
        for node in [first, 1 - first] {
            group.happens(Happens::Encoded { node, done: true });
        }
        prop_assert_eq!(group.words.len(), 2);
        let swallowed = group.words.remove(which);
        let captured = group.run_with_cut(20, |(_, to)| to == swallowed.1);
        prop_assert!(captured >= 4, "{captured} captures, {} given up", group.given_up);
        group.check()?;
    }
}
