//! All keepers of a job, in one parity group or several, whose words are delayed, lost and overtake one another, whose
//! parity fails, and whose captures run out of slots. Whatever happens, a step that anybody takes for complete in all
//! groups can be restored.

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
    /// The workers take a step: each hears what all agents have said of their groups, and tells its own.
    Step,
    /// What a worker tells its agent of all groups arrives.
    Agreed(usize),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        3 => any::<bool>().prop_map(Happens::Capture),
        4 => (0..8usize, prop::bool::weighted(0.6)).prop_map(|(node, done)| Happens::Encoded { node, done }),
        8 => (0..64usize).prop_map(Happens::Arrives),
        1 => (0..64usize).prop_map(Happens::Lost),
        2 => (0..64usize).prop_map(Happens::Answer),
        2 => (0..8u64).prop_map(Happens::Wait),
        2 => Just(Happens::Step),
        2 => (0..8usize).prop_map(Happens::Agreed),
    ]
}

/// A word of a node: from, to, its number, and what it holds.
type Word = (usize, usize, u64, Vec<PeerStep>);

/// A way from one node to another, on which it says, asks and reads.
type Way = (usize, usize);

struct Job {
    keepers: Vec<Keeper>,
    /// Nodes of a group; those of one follow one another.
    size: usize,
    now: Duration,
    step: u64,
    /// What each node holds, and of what its parity is made, whatever it believes.
    truth: Vec<BTreeMap<u64, bool>>,
    encoding: Vec<BTreeSet<u64>>,
    numbers: Vec<u64>,
    said: Vec<Vec<PeerStep>>,
    words: Vec<Word>,
    /// The same, with the steps that the one asked takes for complete.
    answers: Vec<(Word, Vec<u64>)>,
    given_up: u64,
    /// What the workers of a node heard last of its group: complete, and given up.
    workers: Vec<(Vec<u64>, Vec<u64>)>,
    /// What they tell their agent of all groups, in their order.
    agreed: Vec<VecDeque<(u64, Vec<u64>)>>,
}

impl Job {
    fn new(groups: usize, size: usize) -> Self {
        let nodes = groups * size;
        let keeper = |node: usize| {
            let mut keeper = Keeper::default();
            let (first, me) = (node - node % size, node % size);
            let members = (first..first + size).map(|node| vec![node as u32]).collect();
            let groups = groups as u32;
            keeper.announce(Membership { generation: GENERATION, members, me, parities: 1, groups, start: None });
            keeper
        };
        Self {
            keepers: (0..nodes).map(keeper).collect(),
            size,
            now: Duration::ZERO,
            step: 0,
            truth: vec![BTreeMap::new(); nodes],
            encoding: vec![BTreeSet::new(); nodes],
            numbers: vec![0; nodes],
            said: vec![vec![]; nodes],
            words: vec![],
            answers: vec![],
            given_up: 0,
            workers: vec![(vec![], vec![]); nodes],
            agreed: vec![VecDeque::new(); nodes],
        }
    }

    fn nodes(&self) -> usize {
        self.keepers.len()
    }

    /// The other nodes of a node's job.
    fn others(&self, node: usize) -> impl Iterator<Item = usize> + use<> {
        let first = node - node % self.size;
        (first..first + self.size).filter(move |other| *other != node)
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
                self.keepers[to].peer(from % self.size, GENERATION, number, steps);
            }
            Happens::Lost(which) if !self.words.is_empty() => drop(self.words.remove(which % self.words.len())),
            Happens::Answer(which) if !self.answers.is_empty() => {
                let ((from, to, number, steps), complete) = self.answers.remove(which % self.answers.len());
                self.keepers[to].answered(from % self.size, GENERATION, number, &steps, &complete);
            }
            Happens::Wait(seconds) => self.now += Duration::from_secs(seconds),
            Happens::Step => self.take_step(),
            Happens::Agreed(node) => {
                let node = node % self.nodes();
                if let Some((complete, given_up)) = self.agreed[node].pop_front() {
                    if complete > 0 {
                        let todo = self.keepers[node].complete_everywhere((GENERATION, complete));
                        self.carry_out(node, todo);
                    }
                    self.keepers[node].given_up_elsewhere(GENERATION, &given_up);
                }
            }
            Happens::Arrives(_) | Happens::Lost(_) | Happens::Answer(_) => {}
        }
        (0..self.nodes()).for_each(|node| self.advance(node));
    }

    /// All workers hear what each was told by its agent, and conclude the same (`worker::machine::kept`).
    fn take_step(&mut self) {
        if self.nodes() == self.size {
            return;
        }
        let everywhere = |step: &&u64| self.workers.iter().all(|(complete, _)| complete.contains(step));
        let complete = self.workers[0].0.iter().filter(everywhere).max().copied().unwrap_or(0);
        let given_up: BTreeSet<u64> = self.workers.iter().flat_map(|(_, given_up)| given_up).copied().collect();
        let agreed = (complete, given_up.into_iter().filter(|step| *step > complete).collect::<Vec<_>>());
        self.agreed.iter_mut().for_each(|queue| queue.push_back(agreed.clone()));
    }

    fn advance(&mut self, node: usize) {
        let todo = self.keepers[node].advance(self.now);
        self.carry_out(node, todo);
    }

    fn carry_out(&mut self, node: usize, todo: Vec<Keep>) {
        for keep in todo {
            match keep {
                Keep::Encode((_, step)) => drop(self.encoding[node].insert(step)),
                Keep::Release((_, step)) => drop(self.truth[node].remove(&step)),
                Keep::GiveUp(_) | Keep::Complete(_) => {
                    self.given_up += u64::from(matches!(keep, Keep::GiveUp(_)));
                    let keeper = &self.keepers[node];
                    self.workers[node] = (keeper.complete().collect(), keeper.given_up().collect());
                }
                Keep::Publish => {
                    self.numbers[node] += 1;
                    self.said[node] = self.keepers[node].holds().collect();
                    let word = (self.numbers[node], self.said[node].clone());
                    self.words.extend(self.others(node).map(|other| (node, other, word.0, word.1.clone())));
                }
                Keep::Ask => {
                    for other in self.others(node) {
                        let complete = self.keepers[other].complete().collect();
                        let word = (other, node, self.numbers[other], self.said[other].clone());
                        self.answers.push((word, complete));
                    }
                }
            }
        }
    }

    /// The newest step that anybody takes for complete in all groups is held by all, with their parity: recovery would
    /// choose it, or a newer one.
    fn check(&self) -> Result<(), TestCaseError> {
        let Some((_, step)) = self.keepers.iter().filter_map(Keeper::everywhere).max() else { return Ok(()) };
        for (node, held) in self.truth.iter().enumerate() {
            // A group of one node has no parity.
            let whole = held.get(&step).is_some_and(|made| *made || self.size == 1);
            prop_assert!(whole, "node {node} lost step {step}");
        }
        Ok(())
    }

    /// A word that was lost is said again, unless there is a newer one.
    fn say_again(&mut self) {
        self.words.clear();
        for node in 0..self.nodes() {
            let words = self.others(node).map(|other| (node, other, self.numbers[node], self.said[node].clone()));
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
                let reads = self.others(node).all(|other| !cut((node, other)));
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
            self.happens(Happens::Step);
            for node in 0..self.nodes() {
                while !self.agreed[node].is_empty() {
                    self.happens(Happens::Agreed(node));
                }
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
        let mut job = Job::new(1, nodes);
        for event in events {
            job.happens(event);
            job.check()?;
        }
    }

    /// Whatever came before, and whatever word the break swallows: with one member out of reach of the others for good,
    /// captures go on.
    #[test]
    fn a_member_out_of_reach_does_not_hold_the_slots(
        nodes in 2..5usize, member in 0..4usize, events in prop::collection::vec(happens(), 1..60),
    ) {
        let mut job = Job::new(1, nodes);
        for event in events {
            job.happens(event);
        }
        let captured = job.run_with_cut(20, |(_, to)| to == member % nodes);
        prop_assert!(captured >= 4, "{captured} captures, {} given up", job.given_up);
        job.check()?;
    }

    /// The same with two members that cannot reach each other, while a third reaches both.
    #[test]
    fn a_broken_link_does_not_hold_the_slots(
        nodes in 3..5usize, ends in (0..4usize, 1..4usize), events in prop::collection::vec(happens(), 1..60),
    ) {
        let mut job = Job::new(1, nodes);
        for event in events {
            job.happens(event);
        }
        let (one, other) = (ends.0 % nodes, (ends.0 % nodes + 1 + ends.1 % (nodes - 1)) % nodes);
        let captured = job.run_with_cut(20, |(from, to)| (from, to) == (one, other) || (from, to) == (other, one));
        prop_assert!(captured >= 4, "{captured} captures, {} given up", job.given_up);
        job.check()?;
    }

    /// Two nodes, cut just as one of them says that its parity is made: both ways of saying so are tried, that before
    /// and that after the other has made its own.
    #[test]
    fn a_link_that_breaks_as_parity_is_made_holds_no_slot(first in 0..2usize, steps in 1..6u64, which in 0..2usize) {
        let mut job = Job::new(1, 2);
        for _ in 0..steps {
            job.happens(Happens::Capture(false));
            while !job.words.is_empty() {
                job.happens(Happens::Arrives(0));
            }
            for node in [first, 1 - first] {
                // The last step's words are on their way as the link breaks.
                if job.step < steps {
                    job.happens(Happens::Encoded { node, done: true });
                    while !job.words.is_empty() {
                        job.happens(Happens::Arrives(0));
                    }
                }
            }
        }
        for node in [first, 1 - first] {
            job.happens(Happens::Encoded { node, done: true });
        }
        prop_assert_eq!(job.words.len(), 2);
        let swallowed = job.words.remove(which);
        let captured = job.run_with_cut(20, |(_, to)| to == swallowed.1);
        prop_assert!(captured >= 4, "{captured} captures, {} given up", job.given_up);
        job.check()?;
    }
    #[test]
    fn what_is_taken_for_complete_in_all_groups_can_be_restored(
        groups in 2..4usize, size in 1..4usize, events in prop::collection::vec(happens(), 1..250),
    ) {
        let mut job = Job::new(groups, size);
        for event in events {
            job.happens(event);
            job.check()?;
        }
    }

    /// Whatever came before: captures go on if one group cannot complete anything, and if none can.
    #[test]
    fn what_one_group_cannot_complete_holds_no_slots_of_another(
        groups in 2..4usize, size in 2..4usize, all: bool, events in prop::collection::vec(happens(), 1..60),
    ) {
        let mut job = Job::new(groups, size);
        for event in events {
            job.happens(event);
        }
        let captured = job.run_with_cut(20, |(_, to)| if all { to % size == 0 } else { to == 0 });
        prop_assert!(captured >= 4, "{captured} captures, {} given up", job.given_up);
        job.check()?;
    }
}
