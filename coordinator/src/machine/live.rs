//! A live generation: how far its members are, and what breaks it.
//!
//! One broken worker makes all its peers report a broken exchange, mostly before its own end is known. So a failure of
//! the exchange alone waits a moment for a better explanation; everything else is taken for the cause at once. The job
//! says one cause, not one per rank.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proto::ids::{Generation, JobName, NodeName, Rank, Step, WorkerId};
use proto::incident;
use proto::spec::{FaultSpec, detect};
use proto::wire::{FailureKind, WorkerPhase};

use super::context::Context;
use super::incident::Blame;
use super::ledger::Membership;
use super::links::{self, Lost};
use super::members::Worker;
use super::memory::{Group, Restorable};
use super::ranks::{Groups, Ranks, Sources};

/// How long a broken exchange waits for its cause to be known.
const ATTRIBUTION: Duration = Duration::from_millis(300);
/// The same, while the stream of a member's agent is closed and may open again.
const ATTRIBUTION_DETACHED: Duration = detect::ATTRIBUTION;

/// Why a generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cause {
    /// Whose fault, if one rank's.
    pub rank: Option<Rank>,
    /// What sort.
    pub kind: FailureKind,
    /// In words.
    pub reason: String,
    /// For the account.
    pub blame: Blame,
}

impl Cause {
    /// Lower explains better.
    fn weight(&self) -> u8 {
        match self.kind {
            FailureKind::Fatal | FailureKind::NonFinite => 0,
            FailureKind::Input => 1,
            FailureKind::Corrupt => 2,
            FailureKind::Exit => 3,
            FailureKind::Transient | FailureKind::Unspecified => 4,
            FailureKind::Exchange => 5,
        }
    }
}

/// What is known of one rank in this generation. Nothing here is ever taken back: reports may come late.
#[derive(Debug, Clone, Default)]
struct Seen {
    found: bool,
    joined: bool,
    running: bool,
    stopped: Option<Step>,
    /// The weight of what is wrong with it, if anything is.
    trouble: Option<u8>,
    /// How far its exchange had come when it gave that up.
    moved: Option<links::Moved>,
}

/// How many ranks are how far, so that nobody has to count them.
#[derive(Debug, Default)]
struct Tally {
    found: usize,
    running: usize,
    stopped: BTreeMap<Step, usize>,
    /// Those whose address is known.
    addressed: usize,
}

/// A persisted and announced generation.
#[derive(Debug)]
pub(super) struct Live {
    /// Who is in it and where it starts.
    pub membership: Membership,
    /// From whom the step in memory it starts from can be had; not known to a coordinator that has adopted it.
    pub restorable: Option<Sources>,
    /// Its parity groups; none without the memory tier.
    groups: Groups,
    ranks: Arc<Ranks>,
    /// Told to stop after the step in progress.
    pub stop: bool,
    /// What having the state cost was told.
    pub told_load: bool,
    /// Where the members' state came from.
    pub source: String,
    /// A member's address became known after the generation was.
    pub readdressed: bool,
    /// Who holds the others up, and by what ratio.
    pub slow: BTreeMap<Rank, f64>,
    seen: Vec<Seen>,
    tally: Tally,
    /// What is wrong with which rank, by weight and rank: the first explains best.
    troubles: BTreeMap<(u8, usize), Cause>,
    /// Its nodes whose streams are closed and may open again.
    detached: BTreeSet<NodeName>,
    /// Set after a restart of the coordinator: until then its members may be unheard.
    adopting: Option<Duration>,
    /// The newest step of any rank and when something last moved.
    moved: (Step, Duration),
    /// The first broken exchange, waiting for its cause.
    echo: Option<(Duration, Cause)>,
}

impl Live {
    /// A generation announced now.
    pub(super) fn announced(now: Duration, membership: Membership) -> Self {
        let seen = vec![Seen::default(); membership.members.len()];
        let moved = (membership.start_step(), now);
        let addressed = membership.members.iter().filter(|member| !member.address.is_empty()).count();
        Self {
            ranks: Arc::new(Ranks::new(&membership)),
            membership,
            restorable: None,
            groups: Groups::default(),
            told_load: false,
            stop: false,
            source: String::new(),
            readdressed: false,
            slow: BTreeMap::new(),
            seen,
            tally: Tally { addressed, ..Tally::default() },
            troubles: BTreeMap::new(),
            detached: BTreeSet::new(),
            adopting: None,
            moved,
            echo: None,
        }
    }

    /// A generation an earlier coordinator announced; its members have until `until` to be heard of.
    pub(super) fn adopted(now: Duration, membership: Membership, until: Duration) -> Self {
        Self { adopting: Some(until), ..Self::announced(now, membership) }
    }

    /// Its number.
    pub(super) fn generation(&self) -> Generation {
        self.membership.generation
    }

    /// The step it started from.
    pub(super) fn start(&self) -> Step {
        self.membership.start_step()
    }

    /// Whether it is not yet known if an earlier coordinator's generation is still alive.
    pub(super) fn adopting(&self) -> bool {
        self.adopting.is_some()
    }

    /// Whether every rank has taken up its work.
    pub(super) fn joined(&self) -> bool {
        self.tally.running == self.seen.len()
    }

    /// The step after which all ranks have stopped, once they have.
    pub(super) fn stopped(&self) -> Option<Step> {
        let (step, ranks) = self.tally.stopped.first_key_value()?;
        (*ranks == self.seen.len()).then_some(*step)
    }

    /// How many of its members run on a node.
    pub(super) fn members_on(&self, node: &NodeName) -> u32 {
        self.ranks.on(node).len() as u32
    }

    /// The node of a rank, if there is one.
    pub(super) fn node_of(&self, rank: Rank) -> Option<&NodeName> {
        self.membership.members.get(rank.index()).map(|member| &member.node)
    }

    /// Its ranks on a node, ascending.
    pub(super) fn ranks_on(&self, node: &NodeName) -> &[Rank] {
        self.ranks.on(node)
    }

    /// Its nodes, each with how many of its members run there.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (NodeName, u32)> {
        self.ranks.nodes().map(|(node, ranks)| (node.clone(), ranks.len() as u32))
    }

    /// Takes the nodes' parity groups.
    pub(super) fn divide(&mut self, groups: Vec<Group>) {
        self.groups = Groups::new(groups);
    }

    /// Its parity groups.
    pub(super) fn groups(&self) -> &[Group] {
        self.groups.all()
    }

    /// A node's parity group.
    pub(super) fn group_of(&self, node: &NodeName) -> Option<&Group> {
        self.groups.of(node)
    }

    /// Takes the step in memory it starts from.
    pub(super) fn restore_from(&mut self, from: Option<Restorable>) {
        self.restorable = from.map(Sources::new);
    }

    /// Whether all members' addresses are known.
    pub(super) fn addressed(&self) -> bool {
        self.tally.addressed == self.seen.len()
    }

    /// Whether a worker is one of its ranks.
    pub(super) fn has(&self, worker: WorkerId) -> bool {
        self.ranks.has(worker)
    }

    /// A step is known to be done.
    pub(super) fn progress(&mut self, now: Duration, step: Step) -> bool {
        let newer = step > self.moved.0;
        if newer {
            self.moved = (step, now);
        }
        newer
    }

    /// The newest step any rank has finished; the start, if none has.
    pub(super) fn newest(&self) -> Step {
        self.moved.0
    }

    /// Since when nothing has moved.
    pub(super) fn quiet_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.moved.1)
    }

    /// Compares what the agents report with what should be. `Some`: the generation is over, and why.
    pub(super) fn watch(&mut self, cx: &Context<'_>, job: &JobName, fault: &FaultSpec) -> Option<Cause> {
        let ranks = Arc::clone(&self.ranks);
        if cx.look.all {
            for (node, ranks) in ranks.nodes() {
                self.watch_node(cx, job, node, ranks);
            }
        } else {
            for node in cx.look.touched {
                self.watch_node(cx, job, node, ranks.on(node));
            }
        }
        match self.troubles.first_key_value().map(|(_, cause)| cause.clone()) {
            Some(cause) if cause.kind == FailureKind::Exchange => self.attribute(cx.now, cause),
            Some(cause) => Some(cause),
            None => self.overdue(cx.now, fault),
        }
    }

    /// Looks at the members on one node.
    fn watch_node(&mut self, cx: &Context<'_>, job: &JobName, node: &NodeName, ranks: &[Rank]) {
        if ranks.is_empty() {
            return;
        }
        let agent = cx.members.get(node);
        if agent.is_some_and(|agent| agent.connection.is_none()) {
            self.detached.insert(node.clone());
        } else {
            self.detached.remove(node);
        }
        let workers = agent.into_iter().flat_map(|agent| agent.of(job));
        let reported: BTreeMap<WorkerId, &Worker> = workers.map(|worker| (worker.id, worker)).collect();
        for rank in ranks {
            let index = rank.index();
            let worker = self.membership.members[index].worker;
            let cause = match agent {
                None if self.adopting.is_some() => None,
                None => Some((FailureKind::Exit, cx.members.epitaph(node), lost(node))),
                Some(_) => {
                    let found = reported.get(&worker).copied();
                    let trouble = match found {
                        Some(reported) => self.look(cx.now, index, reported),
                        None => Some((FailureKind::Exit, format!("worker {worker} on {node} is gone"))),
                    };
                    let failure = found.and_then(|reported| reported.failure.as_ref());
                    self.seen[index].moved = failure.and_then(|failure| failure.moved).or(self.seen[index].moved);
                    trouble.map(|(kind, reason)| (kind, reason, Blame::failure(kind, node, failure)))
                }
            };
            let cause = cause.map(|(kind, reason, blame)| Cause { rank: Some(*rank), kind, reason, blame });
            self.note(index, cause);
        }
    }

    /// Notes what is wrong with a rank now.
    fn note(&mut self, index: usize, cause: Option<Cause>) {
        if let Some(weight) = std::mem::replace(&mut self.seen[index].trouble, cause.as_ref().map(Cause::weight)) {
            self.troubles.remove(&(weight, index));
        }
        if let Some(cause) = cause {
            self.troubles.insert((cause.weight(), index), cause);
        }
    }

    /// Takes in one member's report. `Some`: what is wrong with it.
    fn look(&mut self, now: Duration, index: usize, worker: &Worker) -> Option<(FailureKind, String)> {
        let generation = self.membership.generation;
        let address = &mut self.membership.members[index].address;
        if address.is_empty() {
            // An adopted generation's record does not say; the workers still do.
            address.clone_from(&worker.ring_address);
            let known = !address.is_empty();
            self.tally.addressed += usize::from(known);
            self.readdressed |= known && self.adopting.is_none();
        }
        let seen = &mut self.seen[index];
        let here = worker.place.is_some_and(|(at, _)| at == generation);
        let before = worker.place.is_some_and(|(at, _)| at < generation);
        self.tally.found += usize::from(!std::mem::replace(&mut seen.found, true));
        match worker.phase {
            WorkerPhase::Exited if seen.stopped.is_some() => None,
            WorkerPhase::Failed if before => None,
            WorkerPhase::Exited | WorkerPhase::Failed => Some(match &worker.failure {
                Some(failure) => (failure.kind, failure.reason.clone()),
                None => (FailureKind::Exit, "the process ended without saying why".into()),
            }),
            WorkerPhase::Joining | WorkerPhase::Running | WorkerPhase::Stopped if here => {
                if worker.place.is_some_and(|(_, rank)| rank.index() != index) {
                    return Some((FailureKind::Exchange, format!("reports another rank than {index}")));
                }
                let running = worker.phase != WorkerPhase::Joining;
                if !seen.joined || (running && !seen.running) {
                    self.moved.1 = now;
                }
                seen.joined = true;
                self.tally.running += usize::from(running && !seen.running);
                seen.running |= running;
                if let Some(step) = worker.step.filter(|_| worker.phase == WorkerPhase::Stopped) {
                    self.tally.stop(seen.stopped.replace(step), step);
                }
                if running && distance(&worker.source) > distance(&self.source) {
                    self.source.clone_from(&worker.source);
                }
                if let Some(step) = worker.step {
                    self.progress(now, step);
                }
                None
            }
            WorkerPhase::Ready | WorkerPhase::Starting if seen.joined && seen.stopped.is_none() => {
                Some((FailureKind::Exchange, format!("left generation {generation}")))
            }
            _ => None,
        }
    }

    /// Waits a moment for a better explanation of a broken exchange.
    fn attribute(&mut self, now: Duration, cause: Cause) -> Option<Cause> {
        let (since, first) = self.echo.get_or_insert((now, cause)).clone();
        let patience = if self.detached.is_empty() { ATTRIBUTION } else { ATTRIBUTION_DETACHED };
        (now.saturating_sub(since) >= patience).then(|| self.silent(first))
    }

    /// A rank that gives an exchange up says so, and closes its connections, so that all do. If the ranks of one node
    /// alone say nothing, it is they that did not take part. Else it may be that what one gave its neighbour got lost
    /// on the way. Else nobody knows who it was, and nobody is blamed.
    fn silent(&self, first: Cause) -> Cause {
        let says_nothing = |rank: &Rank| self.seen[rank.index()].trouble.is_none();
        let mut silent = self.ranks.nodes().filter(|(_, ranks)| ranks.iter().all(says_nothing));
        let (Some((node, ranks)), None) = (silent.next(), silent.next()) else {
            return self.way(first);
        };
        let reason = format!("node {node} took no part in the exchange ({})", first.reason);
        let blame = Blame { node: Some(node.clone()), ..first.blame };
        Cause { rank: ranks.first().copied(), reason, blame, ..first }
    }

    /// All ranks gave the exchange up: where its bytes were lost, if they say.
    fn way(&self, first: Cause) -> Cause {
        let members = self.membership.members.iter().map(|member| &member.node);
        let ranks: Vec<_> = members.zip(self.seen.iter().map(|seen| seen.moved)).collect();
        let (node, link, what) = match links::broken(&ranks) {
            Some(Lost::Between(one, other)) => {
                let what = format!("nothing gets through between nodes {one} and {other}");
                (None, Some((one, other)), what)
            }
            Some(Lost::Around(node)) => {
                let what = format!("nothing gets through between node {node} and its neighbours");
                (Some(node), None, what)
            }
            None => return Cause { blame: Blame { node: None, ..first.blame }, ..first },
        };
        let rank = node.as_ref().and_then(|node| self.ranks.on(node).first().copied());
        let reason = format!("{what} ({})", first.reason);
        Cause { rank, reason, blame: Blame { node, link, ..first.blame }, ..first }
    }

    /// What takes too long.
    fn overdue(&mut self, now: Duration, fault: &FaultSpec) -> Option<Cause> {
        let generation = self.membership.generation;
        if let Some(until) = self.adopting {
            if self.tally.found == self.seen.len() {
                self.adopting = None;
                self.moved.1 = now;
            } else if now >= until
                && let Some(index) = self.seen.iter().position(|seen| !seen.found)
            {
                let node = &self.membership.members[index].node;
                let reason = format!("node {node} of generation {generation} did not report to the new coordinator");
                let (rank, blame) = (Some(Rank::new(index as u32)), lost(node));
                return Some(Cause { rank, kind: FailureKind::Exit, reason, blame });
            }
            return None;
        }
        let waited = now.saturating_sub(self.moved.1).as_secs_f64();
        let (limit, what) = match self.stopped() {
            // Training is over for this generation; only the upload of its last state is awaited.
            Some(step) => (fault.restart, format!("the checkpoint of step {step} was not stored")),
            None if self.joined() => (fault.hang, format!("no step after {} was finished", self.moved.0)),
            None => (fault.hang, "not every rank started to train".to_string()),
        };
        let reason = format!("{what} within {limit} s");
        let blame = Blame::of(incident::Cause::NoProgress);
        (waited > limit).then_some(Cause { rank: None, kind: FailureKind::Transient, reason, blame })
    }
}

impl Tally {
    /// A rank has stopped after a step, having said another or none before.
    fn stop(&mut self, before: Option<Step>, step: Step) {
        if let Some(ranks) = before.and_then(|before| self.stopped.get_mut(&before)) {
            *ranks -= 1;
        }
        *self.stopped.entry(step).or_default() += 1;
        self.stopped.retain(|_, ranks| *ranks > 0);
    }
}

fn lost(node: &NodeName) -> Blame {
    Blame { node: Some(node.clone()), ..Blame::of(incident::Cause::LostNode) }
}

/// How far away a source of state is: of all ranks' the most distant one is told.
fn distance(source: &str) -> usize {
    ["", "initialised", "memory", "peer", "parity", "store"].iter().position(|name| *name == source).unwrap_or(0)
}
