//! The steps of leaders and nodes, each atomic where the code's is.
//!
//! | Action | stands for |
//! |---|---|
//! | `Lead` | `Leadership::acquire` and `Driver::load`: a new epoch, and the chain as it is read then |
//! | `Append` | `Chain::append` by the journal: create of the next number, lost to whoever was first |
//! | `Resolve` | `Page::resolve`: reading again what an unanswered create has done |
//! | `Announce` | the machine's `Desired` to every node, after the generation's record, and again at any time |
//! | `Deliver` | the agent machine's `desire`: epochs and generations that are too low are refused |
//! | `Step` | a step of the workers: all members act in the same generation, or none gets past the exchange |
//! | `Report` | the agent's report to a leader: receipts, and the epoch it obeys |

use stateright::{Model, Property};

use crate::properties;

/// Nodes, each with one worker.
pub(crate) const NODES: usize = 2;
/// All nodes together, as a set of bits.
const ALL: u8 = (1 << NODES) - 1;

/// A mistake that can be built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Bug {
    /// Records are written without regard to what is there.
    Overwrite,
    /// A leader acts on a job before its `led` record is in the chain.
    NoLed,
    /// A generation is announced before its record is stored.
    AnnounceFirst,
    /// A create without an answer is taken to have worked.
    AssumeLanded,
    /// A leader commits what any generation has saved.
    CommitAny,
    /// A leader forgets what it has committed.
    CommitAgain,
    /// A node obeys whoever speaks.
    ObeyAnyone,
    /// A worker takes part in any generation it is told of.
    JoinLower,
}

/// The bounds of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protocol {
    pub(crate) epochs: u8,
    pub(crate) generations: u8,
    pub(crate) steps: u8,
    /// Creates that go unanswered.
    pub(crate) timeouts: u8,
    pub(crate) bugs: &'static [Bug],
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Event {
    Led,
    Generation { number: u8, members: u8, start: u8 },
    Committed { generation: u8, step: u8 },
}

/// One link of the job's chain; its number is its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Record {
    pub(crate) epoch: u8,
    pub(crate) event: Event,
}

/// One leadership; its epoch is its place in the list, from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Leader {
    /// The chain as this leader knows it: what it has read, and what it has appended since.
    pub(crate) known: Vec<Record>,
    /// An append without an answer.
    pub(crate) unclear: Option<Record>,
    /// It has seen that it leads no longer.
    pub(crate) is_down: bool,
    /// From a node.
    pub(crate) was_told: bool,
    /// Which nodes have said that they stored a step of a generation: (generation, step, nodes).
    pub(crate) receipts: Vec<(u8, u8, u8)>,
}

/// A message to a node: everything desired of it (level-triggered).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Desired {
    pub(crate) epoch: u8,
    pub(crate) generation: u8,
    pub(crate) members: u8,
    pub(crate) start: u8,
}

/// An agent and its worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    /// The highest epoch it has obeyed.
    pub(crate) obeyed: u8,
    /// It has carried out an order of a lower epoch than one before.
    pub(crate) went_back: bool,
    /// The highest generation it was told of.
    pub(crate) highest: u8,
    /// The generation its worker acts in; 0: none.
    pub(crate) acting: u8,
    pub(crate) step: u8,
    /// The newest it has stored: generation and step.
    pub(crate) stored: (u8, u8),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) chain: Vec<Record>,
    pub(crate) leaders: Vec<Leader>,
    pub(crate) nodes: [Node; NODES],
    /// Everything ever sent: each may arrive at any time, again, or never. Sorted.
    pub(crate) sent: Vec<Desired>,
    pub(crate) timeouts: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Lead,
    /// Appends; `lands` and `answered` are the store's doing.
    Append {
        leader: usize,
        record: Record,
        lands: bool,
        answered: bool,
    },
    Resolve(usize),
    Announce {
        leader: usize,
        desired: Desired,
    },
    Deliver {
        node: usize,
        desired: Desired,
    },
    Step(u8),
    Report {
        node: usize,
        leader: usize,
    },
}

impl Protocol {
    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.bugs.contains(&bug)
    }

    /// What a leader may want to append.
    fn wishes(&self, epoch: u8, leader: &Leader) -> Vec<Record> {
        let record = |event| Record { epoch, event };
        let led = leader.known.iter().any(|of| of.epoch == epoch && of.event == Event::Led);
        if !led && !self.has(Bug::NoLed) {
            return vec![record(Event::Led)];
        }
        let (newest, members) = newest(&leader.known);
        let mut wishes = Vec::new();
        if newest < self.generations {
            let start = committed(&leader.known).map(|(_, step)| step).max().unwrap_or(0);
            // Whoever is there: all of them, or one where the other is suspected.
            for members in [ALL, 1] {
                wishes.push(record(Event::Generation { number: newest + 1, members, start }));
            }
        }
        for (generation, step, from) in &leader.receipts {
            let of = if self.has(Bug::CommitAny) { members_of(&leader.known, *generation) } else { members };
            let is_newest = *generation == newest || self.has(Bug::CommitAny);
            let done = committed(&leader.known).any(|of| of == (*generation, *step));
            let done = done && !self.has(Bug::CommitAgain);
            if is_newest && !done && of != 0 && from & of == of {
                wishes.push(record(Event::Committed { generation: *generation, step: *step }));
            }
        }
        wishes
    }

    /// What a leader tells the nodes now.
    fn desires(&self, epoch: u8, leader: &Leader) -> Vec<Desired> {
        let generations = |record: &Record| match record.event {
            Event::Generation { number, members, start } => Some(Desired { epoch, generation: number, members, start }),
            Event::Led | Event::Committed { .. } => None,
        };
        let led = leader.known.iter().any(|of| of.epoch == epoch && of.event == Event::Led);
        let mut desires: Vec<Desired> =
            if led { leader.known.iter().rev().find_map(generations).into_iter().collect() } else { Vec::new() };
        if self.has(Bug::AnnounceFirst) {
            desires.extend(self.wishes(epoch, leader).iter().filter_map(generations));
        }
        desires
    }

    fn append(&self, state: &mut State, leader: usize, record: Record, lands: bool, answered: bool) {
        let place = state.leaders[leader].known.len();
        let is_free = state.chain.len() == place;
        let landed = lands && (is_free || self.has(Bug::Overwrite));
        if landed {
            match state.chain.get_mut(place) {
                Some(there) => *there = record,
                None => state.chain.push(record),
            }
        }
        let of = &mut state.leaders[leader];
        match (answered, landed) {
            (true, true) => of.known.push(record),
            // Somebody else's record is there: this coordinator leads no longer, or must read the job anew.
            (true, false) => of.is_down = true,
            (false, _) => {
                state.timeouts += 1;
                if self.has(Bug::AssumeLanded) {
                    of.known.push(record);
                } else {
                    of.unclear = Some(record);
                }
            }
        }
    }

    fn deliver(&self, node: &mut Node, at: usize, desired: Desired) {
        if desired.epoch < node.obeyed && !self.has(Bug::ObeyAnyone) {
            return;
        }
        node.went_back |= desired.epoch < node.obeyed;
        node.obeyed = node.obeyed.max(desired.epoch);
        if desired.generation < node.highest && !self.has(Bug::JoinLower) {
            return;
        }
        let is_member = desired.members & (1 << at) != 0;
        if desired.generation == node.acting {
            return;
        }
        if desired.generation > node.highest || self.has(Bug::JoinLower) {
            node.highest = node.highest.max(desired.generation);
            (node.acting, node.step) = if is_member { (desired.generation, desired.start) } else { (0, 0) };
        }
    }
}

/// The newest generation and its members.
pub(crate) fn newest(chain: &[Record]) -> (u8, u8) {
    let generation = |record: &Record| match record.event {
        Event::Generation { number, members, .. } => Some((number, members)),
        Event::Led | Event::Committed { .. } => None,
    };
    chain.iter().rev().find_map(generation).unwrap_or((0, 0))
}

fn members_of(chain: &[Record], generation: u8) -> u8 {
    let of = |record: &Record| match record.event {
        Event::Generation { number, members, .. } if number == generation => Some(members),
        _ => None,
    };
    chain.iter().find_map(of).unwrap_or(0)
}

/// All commits: generation and step.
pub(crate) fn committed(chain: &[Record]) -> impl Iterator<Item = (u8, u8)> {
    chain.iter().filter_map(|record| match record.event {
        Event::Committed { generation, step } => Some((generation, step)),
        Event::Led | Event::Generation { .. } => None,
    })
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::default()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        // A lease may run out while its holder only sleeps: anybody may lead at any time.
        if (state.leaders.len() as u8) < self.epochs {
            actions.push(Action::Lead);
        }
        for (at, leader) in state.leaders.iter().enumerate().filter(|(_, leader)| !leader.is_down) {
            let epoch = at as u8 + 1;
            if leader.unclear.is_some() {
                actions.push(Action::Resolve(at));
                continue;
            }
            for record in self.wishes(epoch, leader) {
                actions.push(Action::Append { leader: at, record, lands: true, answered: true });
                if state.timeouts < self.timeouts {
                    for lands in [true, false] {
                        actions.push(Action::Append { leader: at, record, lands, answered: false });
                    }
                }
            }
            let news = self.desires(epoch, leader).into_iter().filter(|desired| !state.sent.contains(desired));
            actions.extend(news.map(|desired| Action::Announce { leader: at, desired }));
            actions.extend((0..NODES).map(|node| Action::Report { node, leader: at }));
        }
        for desired in &state.sent {
            actions.extend((0..NODES).map(|node| Action::Deliver { node, desired: *desired }));
        }
        actions.extend((1..=self.generations).map(Action::Step));
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        match action {
            Action::Lead => {
                let known = state.chain.clone();
                state.leaders.push(Leader { known, ..Leader::default() });
            }
            Action::Append { leader, record, lands, answered } => {
                self.append(&mut state, leader, record, lands, answered);
            }
            Action::Resolve(at) => {
                let of = &mut state.leaders[at];
                let (place, unclear) = (of.known.len(), of.unclear.take()?);
                match state.chain.get(place) {
                    Some(found) if *found == unclear => of.known.push(unclear),
                    Some(_) => of.is_down = true,
                    None => {} // it did not land, and is wanted still
                }
            }
            Action::Announce { desired, .. } => {
                let place = state.sent.binary_search(&desired).err()?;
                state.sent.insert(place, desired);
            }
            Action::Deliver { node, desired } => self.deliver(&mut state.nodes[node], node, desired),
            Action::Step(generation) => {
                let members = members_of(&state.chain, generation);
                let acts = |at: usize| members & (1 << at) == 0 || state.nodes[at].acting == generation;
                let step = (0..NODES).filter(|at| members & (1 << at) != 0).map(|at| state.nodes[at].step).max()?;
                if !(0..NODES).all(acts) || step >= self.steps {
                    return None;
                }
                for at in (0..NODES).filter(|at| members & (1 << at) != 0) {
                    let node = &mut state.nodes[at];
                    (node.step, node.stored) = (step + 1, (generation, step + 1));
                }
            }
            Action::Report { node, leader } => {
                let (from, of) = (state.nodes[node], &mut state.leaders[leader]);
                if from.obeyed > leader as u8 + 1 {
                    (of.is_down, of.was_told) = (true, true);
                } else if from.stored.0 > 0 {
                    let (generation, step) = from.stored;
                    match of.receipts.iter_mut().find(|of| (of.0, of.1) == (generation, step)) {
                        Some(of) => of.2 |= 1 << node,
                        None => of.receipts.push((generation, step, 1 << node)),
                    }
                    of.receipts.sort_unstable();
                }
            }
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
