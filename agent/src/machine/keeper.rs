//! Which snapshots and parities of a job this node keeps, and when one may go (§8), decided without doing anything.
//!
//! A step is *held* by a node when all its ranks have captured it, and *complete* in the parity group when every member
//! holds it and has made its parity of it. Nothing goes before a newer step is complete on every member of every group:
//! what recovery may choose stays. Once a generation is fenced nothing goes at all until the next one is announced,
//! because the coordinator decides from what it was told then. Everything here is level-triggered: peers say what they
//! hold, again and again.

use std::collections::{BTreeMap, BTreeSet};

/// A generation and a step of it.
pub type StepKey = (u64, u64);

/// What the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// Make this node's parity of a step: every member holds it.
    Encode(StepKey),
    /// What this node holds has changed: tell the members of the group.
    Publish,
    /// A step is complete in the group: tell the node's workers.
    Complete(StepKey),
    /// Nothing needs this step's snapshots and parity any more.
    Release(StepKey),
}

/// A generation, as far as this node's memory is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    /// Its number.
    pub generation: u64,
    /// The ranks of each member of the parity group.
    pub members: Vec<Vec<u32>>,
    /// Which member this node is.
    pub me: usize,
    /// Nodes of the group that may be lost at once.
    pub parities: usize,
    /// Parity groups of the generation.
    pub groups: u32,
    /// The step in memory it starts from.
    pub start: Option<StepKey>,
}

/// What a peer says of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerStep {
    /// The step, which the peer holds.
    pub step: u64,
    /// Its parity of it is made.
    pub encoded: bool,
}

#[derive(Debug, Clone, Default)]
struct Held {
    ranks: BTreeSet<u32>,
    encoding: bool,
    encoded: bool,
}

/// What this node holds of one job.
#[derive(Debug, Default)]
pub struct Keeper {
    membership: Membership,
    fenced: u64,
    held: BTreeMap<StepKey, Held>,
    peers: BTreeMap<usize, Vec<PeerStep>>,
    /// The newest complete step of the group.
    complete: Option<StepKey>,
    /// What the peers were last told.
    told: Vec<PeerStep>,
}

impl Keeper {
    /// A generation was announced. Of earlier ones only the step it starts from is kept.
    pub fn announce(&mut self, membership: Membership) -> Vec<Keep> {
        if membership.generation <= self.membership.generation {
            return vec![];
        }
        self.membership = membership;
        self.peers.clear();
        self.complete = None;
        self.told.clear();
        let (generation, start) = (self.membership.generation, self.membership.start);
        let mut todo = self.release(|key| key.0 < generation && Some(key) != start);
        todo.push(Keep::Publish);
        todo
    }

    /// Generations up to this one are fenced.
    pub fn fence(&mut self, generation: u64) {
        self.fenced = self.fenced.max(generation);
    }

    /// The highest generation of which nothing is taken back any more.
    pub fn fenced(&self) -> u64 {
        self.fenced
    }

    /// A rank of this node captured a step. `false`: it is of a generation that is over, and not to be kept.
    pub fn captured(&mut self, key: StepKey, rank: u32) -> bool {
        if key.0 != self.membership.generation {
            return false;
        }
        self.held.entry(key).or_default().ranks.insert(rank);
        true
    }

    /// A whole snapshot or parity of an earlier life of this agent was found.
    pub fn adopt(&mut self, key: StepKey, rank: Option<u32>) {
        let held = self.held.entry(key).or_default();
        match rank {
            Some(rank) => drop(held.ranks.insert(rank)),
            None => held.encoded = true,
        }
        // What an earlier life has captured belongs to a generation that is over.
        self.fenced = self.fenced.max(key.0);
    }

    /// A peer's whole state in a generation.
    pub fn peer(&mut self, member: usize, generation: u64, steps: Vec<PeerStep>) {
        if generation == self.membership.generation && member != self.membership.me {
            self.peers.insert(member, steps);
        }
    }

    /// This node's parity of a step is made, or could not be (`false`), to be tried again.
    pub fn encoded(&mut self, key: StepKey, done: bool) {
        if let Some(held) = self.held.get_mut(&key) {
            held.encoding = false;
            held.encoded |= done;
        }
    }

    /// A step is complete in every group of the generation.
    pub fn complete_everywhere(&mut self, key: StepKey) -> Vec<Keep> {
        if key.0 != self.membership.generation || self.is_frozen() {
            return vec![];
        }
        self.release(|other| other < key)
    }

    /// What this node holds whole of the present generation, and whether its parity is made.
    pub fn holds(&self) -> impl Iterator<Item = PeerStep> {
        let generation = self.membership.generation;
        let whole = self.held.iter().filter(move |(key, held)| key.0 == generation && self.is_whole(held));
        whole.map(|(key, held)| PeerStep { step: key.1, encoded: held.encoded })
    }

    /// Whether anything keeps a step.
    pub fn keeps(&self, key: StepKey) -> bool {
        self.held.contains_key(&key)
    }

    /// Says what comes next, after any of the above.
    pub fn advance(&mut self) -> Vec<Keep> {
        let mut todo = vec![];
        if self.is_frozen() {
            return todo;
        }
        let generation = self.membership.generation;
        let steps: Vec<StepKey> = self.held.keys().filter(|key| key.0 == generation).copied().collect();
        for key in steps {
            let everywhere =
                self.held.get(&key).is_some_and(|held| self.is_whole(held)) && self.peers_hold(key.1, false);
            let (parities, members) = (self.membership.parities, self.membership.members.len());
            let Some(held) = self.held.get_mut(&key) else { continue };
            if everywhere && !held.encoded && !held.encoding {
                if parities == 0 || members < 2 {
                    held.encoded = true;
                } else {
                    held.encoding = true;
                    todo.push(Keep::Encode(key));
                }
            }
            let encoded = held.encoded;
            if everywhere && encoded && self.peers_hold(key.1, true) && self.complete.is_none_or(|old| old < key) {
                self.complete = Some(key);
                todo.push(Keep::Complete(key));
                if self.membership.groups <= 1 {
                    todo.extend(self.release(|other| other < key));
                }
            }
        }
        let holds: Vec<PeerStep> = self.holds().collect();
        if holds != self.told {
            self.told = holds;
            // First of all: the peers wait for it.
            todo.insert(0, Keep::Publish);
        }
        todo
    }

    /// The newest step complete in the group, of the present generation.
    pub fn complete(&self) -> Option<StepKey> {
        self.complete
    }

    fn is_frozen(&self) -> bool {
        self.membership.generation <= self.fenced
    }

    fn is_whole(&self, held: &Held) -> bool {
        let mine = self.membership.members.get(self.membership.me);
        mine.is_some_and(|ranks| !ranks.is_empty() && ranks.iter().all(|rank| held.ranks.contains(rank)))
    }

    fn peers_hold(&self, step: u64, encoded: bool) -> bool {
        let holds = |member: usize| {
            let steps = self.peers.get(&member);
            steps.is_some_and(|steps| steps.iter().any(|held| held.step == step && (held.encoded || !encoded)))
        };
        (0..self.membership.members.len()).all(|member| member == self.membership.me || holds(member))
    }

    fn release(&mut self, goes: impl Fn(StepKey) -> bool) -> Vec<Keep> {
        let gone: Vec<StepKey> = self.held.keys().copied().filter(|key| goes(*key)).collect();
        for key in &gone {
            self.held.remove(key);
        }
        gone.into_iter().map(Keep::Release).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership(generation: u64, nodes: u32, start: Option<StepKey>) -> Membership {
        let members = (0..nodes).map(|rank| vec![rank]).collect();
        Membership { generation, members, me: 0, parities: 1, groups: 1, start }
    }

    fn peer(step: u64, encoded: bool) -> Vec<PeerStep> {
        vec![PeerStep { step, encoded }]
    }

    #[test]
    fn a_node_alone_is_complete_with_its_own_ranks() {
        let mut keeper = Keeper::default();
        let both = Membership { members: vec![vec![0, 1]], ..membership(1, 1, None) };
        assert_eq!(keeper.announce(both.clone()), [Keep::Publish]);
        assert!(keeper.announce(both).is_empty(), "the same again is no news");
        assert!(keeper.captured((1, 5), 0));
        assert!(keeper.advance().is_empty());
        keeper.captured((1, 5), 1);
        assert_eq!(keeper.advance(), [Keep::Publish, Keep::Complete((1, 5))]);
        assert!(keeper.advance().is_empty());
        keeper.captured((1, 6), 0);
        keeper.captured((1, 6), 1);
        assert_eq!(keeper.advance(), [Keep::Publish, Keep::Complete((1, 6)), Keep::Release((1, 5))]);
        assert!(!keeper.captured((0, 9), 0), "of another generation");
    }

    #[test]
    fn nothing_goes_before_a_newer_step_is_complete_on_every_member() {
        let mut keeper = Keeper::default();
        keeper.announce(membership(1, 2, None));
        for step in [5, 6] {
            keeper.captured((1, step), 0);
            assert_eq!(
                keeper.advance(),
                [Keep::Publish],
                "the peer does not hold it yet, and is told that this node does"
            );
            keeper.peer(1, 1, peer(step, false));
            assert_eq!(keeper.advance(), [Keep::Encode((1, step))]);
            assert!(keeper.advance().is_empty());
            keeper.encoded((1, step), true);
            assert_eq!(keeper.advance(), [Keep::Publish], "the peer's parity is missing");
            keeper.peer(1, 1, peer(step, true));
            let mut expected = vec![Keep::Complete((1, step))];
            expected.extend((step == 6).then_some(Keep::Release((1, 5))));
            if step == 6 {
                expected.insert(0, Keep::Publish);
            }
            assert_eq!(keeper.advance(), expected);
        }
        assert_eq!(keeper.holds().collect::<Vec<_>>(), peer(6, true));
    }

    #[test]
    fn with_several_groups_the_job_must_be_complete() {
        let mut keeper = Keeper::default();
        keeper.announce(Membership { groups: 2, ..membership(1, 1, None) });
        keeper.captured((1, 5), 0);
        keeper.advance();
        keeper.captured((1, 6), 0);
        assert_eq!(keeper.advance(), [Keep::Publish, Keep::Complete((1, 6))]);
        assert_eq!(keeper.complete_everywhere((1, 5)), []);
        assert_eq!(keeper.complete_everywhere((1, 6)), [Keep::Release((1, 5))]);
    }

    #[test]
    fn a_fenced_generation_is_kept_as_it_was_until_the_next_is_announced() {
        let mut keeper = Keeper::default();
        keeper.announce(membership(1, 2, None));
        keeper.captured((1, 5), 0);
        keeper.peer(1, 1, peer(5, true));
        keeper.advance();
        keeper.encoded((1, 5), true);
        keeper.advance();
        keeper.captured((1, 6), 0);
        keeper.peer(1, 1, peer(6, true));
        assert_eq!(keeper.advance(), [Keep::Publish, Keep::Encode((1, 6))]);
        keeper.fence(1);
        keeper.encoded((1, 6), true);
        assert!(keeper.advance().is_empty(), "5 may have been chosen already");
        assert!(keeper.keeps((1, 5)) && keeper.keeps((1, 6)));
        assert_eq!(keeper.announce(membership(2, 1, Some((1, 5)))), [Keep::Release((1, 6)), Keep::Publish]);
        keeper.captured((2, 6), 0);
        assert_eq!(keeper.advance(), [Keep::Publish, Keep::Complete((2, 6)), Keep::Release((1, 5))]);
    }

    #[test]
    fn a_failed_parity_is_tried_again() {
        let mut keeper = Keeper::default();
        keeper.announce(membership(1, 2, None));
        keeper.captured((1, 5), 0);
        keeper.peer(1, 1, peer(5, false));
        assert_eq!(keeper.advance(), [Keep::Publish, Keep::Encode((1, 5))]);
        keeper.encoded((1, 5), false);
        assert_eq!(keeper.advance(), [Keep::Encode((1, 5))]);
    }
}
