//! Which snapshots and parities of a job this node keeps, and when one may go (§8), decided without doing anything.
//!
//! A step is *held* by a node when all its ranks have captured it, and *complete* in the parity group when every member
//! holds it and has made its parity of it. Nothing goes before a newer step is complete on every member of every group:
//! what recovery may choose stays. Once a generation is fenced nothing goes at all until the next one is announced,
//! because the coordinator decides from what it was told then. Everything here is level-triggered: peers say what they
//! hold, again and again.
//!
//! A step that does not become complete would hold its slots for ever, and with them the training's next snapshots, the
//! stored ones too: one member that the others cannot read from is enough. So a node may **give a step up**, under two
//! rules that keep a step that anybody takes for complete restorable. (1) A node that has not made its parity of the
//! step gives it up once it has waited in vain for long and a capture found no slot: nobody can take the step for
//! complete without this node's word that its parity is made, which will never come. (2) A node that has made it gives
//! it up only when a member that had the step says that it has it no more: that member has given it up by rule 1, or a
//! newer step is complete. Words that overtake one another are told apart by their number.
//!
//! A node that has made its parity of a step and waits in vain for the others' asks them. An answer repeats what its
//! member has said, since a link may break just as that is said: that it has the step no more, or that its parity is
//! made. It also says which step the member takes for complete, so that what one member cannot tell another goes by
//! way of a third. Only if all ways to all members break just then does the node keep that step and the one before.
//!
//! A job of many nodes has several parity groups, which need not agree on which steps they can complete. There only a
//! step that is complete in all of them lets older ones go, and one that is complete in this group may still lapse. The
//! ranks' words at each step carry from group to group which steps are complete in each and which a node has given up;
//! for rule 2 that counts like a member's word: by rule 1 some group will never have that step.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// Vain waiting after which a step is given up if a capture found no slot: longer than any deadline between agents.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same if it was a stored checkpoint that found none, or if a step had to be given up before.
const SHORT_PATIENCE: Duration = Duration::from_secs(2);
/// Members hash their shards side by side, so one may be late by some of the time that this node's took.
const HASHING: u32 = 4;
/// Between two questions what the members hold.
const ASK: Duration = Duration::from_secs(2);
/// Steps of a generation that a node can hold at once: one slot is the live state's. Of what is told to the workers and
/// by them, no more need be remembered: nobody captures another step before all have room for it.
const MOST_OPEN: usize = 2;

/// A generation and a step of it.
pub type StepKey = (u64, u64);

/// What the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// Make this node's parity of a step: every member holds it.
    Encode(StepKey),
    /// What this node holds has changed: tell the members of the group.
    Publish,
    /// A step is complete in the group: tell the node's workers what is.
    Complete(StepKey),
    /// Nothing needs this step's snapshots and parity any more.
    Release(StepKey),
    /// This step will never be complete: tell the node's workers. A [`Keep::Release`] follows.
    GiveUp(StepKey),
    /// Ask the members which steps they hold: a word of theirs may not have got through.
    Ask,
}

/// A capture that found no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shortage {
    /// One for the nodes' memory alone.
    Memory,
    /// One that was to be stored.
    Store,
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
    /// A member takes it for complete in the group: it has heard what this node may not have.
    attested: bool,
    /// It is complete in the group.
    complete: bool,
    /// The last try to make its parity failed.
    failed: bool,
    /// Since when nothing has come of waiting: for members to hold it, or for its parity after a try that failed; once
    /// it is made, for theirs.
    waits: Option<Duration>,
}

/// What a member has said.
#[derive(Debug, Clone, Default)]
struct Heard {
    /// The number of its newest word.
    sequence: u64,
    steps: Vec<PeerStep>,
}

/// What this node holds of one job.
#[derive(Debug, Default)]
pub struct Keeper {
    membership: Membership,
    fenced: u64,
    held: BTreeMap<StepKey, Held>,
    peers: BTreeMap<usize, Heard>,
    /// Steps of the generation that a member had and has no more, or that a node of another group has given up.
    lapsed: BTreeSet<u64>,
    /// The newest step that is complete in every group.
    everywhere: Option<StepKey>,
    /// The steps of the generation that this node gave up last.
    given_up: VecDeque<u64>,
    /// What the peers were last told.
    told: Vec<PeerStep>,
    /// A capture found no slot since one was last given back.
    shortage: Option<Shortage>,
    /// The longest time from a capture to the word of it.
    hashing: Duration,
    /// A step was given up, and none has become complete since.
    wary: bool,
    /// When the members were last asked.
    asked: Option<Duration>,
}

impl Keeper {
    /// A generation was announced. Of earlier ones only the step it starts from is kept.
    pub fn announce(&mut self, membership: Membership) -> Vec<Keep> {
        if membership.generation <= self.membership.generation {
            return vec![];
        }
        self.membership = membership;
        self.peers.clear();
        self.lapsed.clear();
        self.everywhere = None;
        self.given_up.clear();
        self.told.clear();
        (self.shortage, self.wary, self.asked) = (None, false, None);
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

    /// A peer's whole state in a generation, and the number of this word among its own. `false`: it is outdated.
    pub fn peer(&mut self, member: usize, generation: u64, sequence: u64, steps: Vec<PeerStep>) -> bool {
        if generation != self.membership.generation || member == self.membership.me {
            return false;
        }
        let heard = self.peers.entry(member).or_default();
        if sequence < heard.sequence {
            return false;
        }
        let had = std::mem::replace(&mut heard.steps, steps);
        heard.sequence = sequence;
        let has = |step: u64| heard.steps.iter().any(|held| held.step == step);
        self.lapsed.extend(had.iter().map(|held| held.step).filter(|step| !has(*step)));
        true
    }

    /// A peer's answer to the question which steps it holds, and which of them it takes for complete in the group. It
    /// says nothing of what the peer has captured since its last whole word: that comes with the descriptions.
    pub fn answered(&mut self, member: usize, generation: u64, sequence: u64, steps: &[PeerStep], complete: &[u64]) {
        if generation != self.membership.generation || member == self.membership.me {
            return;
        }
        for step in complete {
            if let Some(held) = self.held.get_mut(&(generation, *step)) {
                held.attested = true;
            }
        }
        let Some(heard) = self.peers.get(&member) else { return };
        let still = |held: &PeerStep| steps.iter().find(|step| step.step == held.step).copied();
        let still = heard.steps.iter().filter_map(still).collect();
        self.peer(member, generation, sequence, still);
    }

    /// A capture found no slot.
    pub fn short(&mut self, of: Shortage) {
        self.shortage = self.shortage.max(Some(of));
    }

    /// So long after its capture a snapshot of this node was heard of.
    pub fn hashed(&mut self, took: Duration) {
        self.hashing = self.hashing.max(took);
    }

    /// This node's parity of a step is made, or could not be (`false`), to be tried again.
    pub fn encoded(&mut self, key: StepKey, done: bool) {
        if let Some(held) = self.held.get_mut(&key) {
            held.encoding = false;
            held.failed = !done;
            if done {
                (held.encoded, held.waits) = (true, None);
            }
        }
    }

    /// A step is complete in every group of the generation.
    pub fn complete_everywhere(&mut self, key: StepKey) -> Vec<Keep> {
        if key.0 != self.membership.generation || self.is_frozen() {
            return vec![];
        }
        self.everywhere = self.everywhere.max(Some(key));
        self.lapsed.retain(|step| *step > key.1);
        self.release(|other| other < key)
    }

    /// Nodes of the job, of whatever group, have given these steps up.
    pub fn given_up_elsewhere(&mut self, generation: u64, steps: &[u64]) {
        if generation == self.membership.generation {
            let newest = self.everywhere.map_or(0, |key| key.1);
            self.lapsed.extend(steps.iter().filter(|step| **step > newest));
        }
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

    /// Says what comes next, after any of the above and as time goes by. `now` must not go back.
    pub fn advance(&mut self, now: Duration) -> Vec<Keep> {
        if self.is_frozen() {
            return vec![];
        }
        let mut todo = self.give_up(now);
        let generation = self.membership.generation;
        let steps: Vec<StepKey> = self.held.keys().filter(|key| key.0 == generation).copied().collect();
        for key in steps {
            self.pursue(now, key, &mut todo);
        }
        let holds: Vec<PeerStep> = self.holds().collect();
        if holds != self.told {
            self.told = holds;
            // First of all: the peers wait for it.
            todo.insert(0, Keep::Publish);
        }
        if self.must_ask(now) {
            self.asked = Some(now);
            todo.push(Keep::Ask);
        }
        todo
    }

    /// Does what can be done for a step to become complete.
    fn pursue(&mut self, now: Duration, key: StepKey, todo: &mut Vec<Keep>) {
        let Some(whole) = self.held.get(&key).map(|held| self.is_whole(held)) else { return };
        let everywhere = whole && self.peers_hold(key.1, false);
        let (parities, members) = (self.membership.parities, self.membership.members.len());
        let Some(held) = self.held.get_mut(&key) else { return };
        if everywhere && !held.encoded && !held.encoding {
            if parities == 0 || members < 2 {
                held.encoded = true;
            } else {
                held.encoding = true;
                todo.push(Keep::Encode(key));
            }
        }
        if whole && (held.encoded || held.failed || !everywhere) {
            held.waits.get_or_insert(now);
        } else {
            held.waits = None;
        }
        let encoded = held.encoded;
        let attested = held.attested;
        if !everywhere || !encoded || held.complete || !(attested || self.peers_hold(key.1, true)) {
            return;
        }
        if let Some(held) = self.held.get_mut(&key) {
            held.complete = true;
        }
        self.wary = false;
        todo.push(Keep::Complete(key));
        if self.membership.groups <= 1 {
            todo.extend(self.complete_everywhere(key));
        }
    }

    /// Gives steps up that will not become complete; see the module's header for the rules.
    fn give_up(&mut self, now: Duration) -> Vec<Keep> {
        let short = self.wary || self.shortage == Some(Shortage::Store);
        let patience = if short { SHORT_PATIENCE } else { PATIENCE } + self.hashing * HASHING;
        let open = |key: &StepKey| self.is_open(*key);
        let late = |held: &Held| held.waits.is_some_and(|since| now.saturating_sub(since) >= patience);
        let mut gone: Vec<StepKey> =
            self.held.keys().filter(|key| open(key) && self.lapsed.contains(&key.1)).copied().collect();
        let mut vain = self.held.iter().filter(|(key, held)| open(key) && !held.encoded && late(held));
        // One at a time, the oldest: a newer one is worth more.
        if let Some((key, _)) = vain.next().filter(|_| self.shortage.is_some() || self.wary)
            && !gone.contains(key)
        {
            gone.push(*key);
            self.wary = true;
        }
        self.given_up.extend(gone.iter().map(|key| key.1));
        self.given_up.drain(..self.given_up.len().saturating_sub(MOST_OPEN));
        let mut todo: Vec<Keep> = gone.iter().map(|key| Keep::GiveUp(*key)).collect();
        todo.extend(self.release(|key| gone.contains(&key)));
        todo
    }

    /// Whether a step whose parity this node has made waits in vain, while its slot is needed.
    fn must_ask(&self, now: Duration) -> bool {
        let since = |at: Duration| now.saturating_sub(at);
        let waits = |held: &Held| held.waits.is_some_and(|at| since(at) >= SHORT_PATIENCE);
        let vain = |held: &Held| held.encoded && !held.complete && waits(held);
        (self.shortage.is_some() || self.wary)
            && self.held.iter().any(|(key, held)| self.is_open(*key) && vain(held))
            && self.asked.is_none_or(|at| since(at) >= ASK)
    }

    /// The newest steps of the present generation that are complete in the group and still held, ascending.
    pub fn complete(&self) -> impl Iterator<Item = u64> {
        let generation = self.membership.generation;
        let complete = self.held.iter().filter(move |(key, held)| key.0 == generation && held.complete);
        let steps: Vec<u64> = complete.map(|(key, _)| key.1).collect();
        let older = steps.len().saturating_sub(MOST_OPEN);
        steps.into_iter().skip(older)
    }

    /// The newest step complete in every group, of the present generation.
    pub fn everywhere(&self) -> Option<StepKey> {
        self.everywhere
    }

    /// The steps of the present generation that this node gave up last.
    pub fn given_up(&self) -> impl Iterator<Item = u64> {
        self.given_up.iter().copied()
    }

    /// Whether a step of the present generation may still become complete in every group, or not.
    fn is_open(&self, key: StepKey) -> bool {
        key.0 == self.membership.generation && self.everywhere.is_none_or(|complete| complete < key)
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
            let heard = self.peers.get(&member);
            heard.is_some_and(|heard| heard.steps.iter().any(|held| held.step == step && (held.encoded || !encoded)))
        };
        (0..self.membership.members.len()).all(|member| member == self.membership.me || holds(member))
    }

    fn release(&mut self, goes: impl Fn(StepKey) -> bool) -> Vec<Keep> {
        let gone: Vec<StepKey> = self.held.keys().copied().filter(|key| goes(*key)).collect();
        for key in &gone {
            self.held.remove(key);
        }
        if !gone.is_empty() {
            self.shortage = None;
        }
        gone.into_iter().map(Keep::Release).collect()
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
