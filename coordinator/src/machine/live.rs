//! A live generation: how far its members are, and what breaks it.
//!
//! One broken worker makes all its peers report a broken exchange, mostly before its own end is known. So a failure of
//! the exchange alone waits a moment for a better explanation; everything else is taken for the cause at once. The job
//! says one cause, not one per rank.

use std::time::Duration;

use proto::ids::{Generation, JobName, NodeName, Rank, Step, WorkerId};
use proto::incident;
use proto::spec::{FaultSpec, detect};
use proto::wire::{FailureKind, WorkerPhase};

use super::incident::Blame;
use super::ledger::Membership;
use super::members::{Members, Worker};
use super::memory::{Group, Restorable};

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
}

/// A persisted and announced generation.
#[derive(Debug)]
pub(super) struct Live {
    /// Who is in it and where it starts.
    pub membership: Membership,
    /// From whom the step in memory it starts from can be had; not known to a coordinator that has adopted it.
    pub restorable: Option<Restorable>,
    /// Its parity groups; none without the memory tier.
    pub groups: Vec<Group>,
    /// Told to stop after the step in progress.
    pub stop: bool,
    /// What having the state cost was told.
    pub told_load: bool,
    /// Where the members' state came from.
    pub source: String,
    seen: Vec<Seen>,
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
        Self {
            membership,
            restorable: None,
            groups: Vec::new(),
            told_load: false,
            stop: false,
            source: String::new(),
            seen,
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
        self.seen.iter().all(|seen| seen.running)
    }

    /// The step after which all ranks have stopped, once they have.
    pub(super) fn stopped(&self) -> Option<Step> {
        let first = self.seen.first()?.stopped?;
        self.seen.iter().all(|seen| seen.stopped == Some(first)).then_some(first)
    }

    /// How many of its members run on a node.
    pub(super) fn members_on(&self, node: &NodeName) -> u32 {
        self.membership.members.iter().filter(|member| member.node == *node).count() as u32
    }

    /// Whether a worker is one of its ranks.
    pub(super) fn has(&self, worker: WorkerId) -> bool {
        self.membership.members.iter().any(|member| member.worker == worker)
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
    pub(super) fn watch(
        &mut self,
        now: Duration,
        job: &JobName,
        members: &Members,
        fault: &FaultSpec,
    ) -> Option<Cause> {
        let mut worst: Option<Cause> = None;
        let mut detached = false;
        for index in 0..self.seen.len() {
            let node = self.membership.members[index].node.clone();
            let worker = self.membership.members[index].worker;
            let cause = match members.get(&node) {
                None if self.adopting.is_some() => None,
                None => Some((FailureKind::Exit, members.epitaph(&node), lost(&node))),
                Some(agent) => {
                    detached |= agent.connection.is_none();
                    let found = agent.of(job).find(|reported| reported.id == worker);
                    let trouble = match found {
                        Some(reported) => self.look(now, index, reported),
                        None => Some((FailureKind::Exit, format!("worker {worker} on {node} is gone"))),
                    };
                    let failure = found.and_then(|reported| reported.failure.as_ref());
                    trouble.map(|(kind, reason)| (kind, reason, Blame::failure(kind, &node, failure)))
                }
            };
            let rank = Some(Rank::new(index as u32));
            let cause = cause.map(|(kind, reason, blame)| Cause { rank, kind, reason, blame });
            let better = |cause: &Cause| worst.as_ref().is_none_or(|worst| cause.weight() < worst.weight());
            if cause.as_ref().is_some_and(better) {
                worst = cause;
            }
        }
        match worst {
            Some(cause) if cause.kind == FailureKind::Exchange => self.attribute(now, cause, detached),
            Some(cause) => Some(cause),
            None => self.overdue(now, fault),
        }
    }

    /// Takes in one member's report. `Some`: what is wrong with it.
    fn look(&mut self, now: Duration, index: usize, worker: &Worker) -> Option<(FailureKind, String)> {
        let generation = self.membership.generation;
        let address = &mut self.membership.members[index].address;
        if address.is_empty() {
            // An adopted generation's record does not say; the workers still do.
            address.clone_from(&worker.ring_address);
        }
        let seen = &mut self.seen[index];
        let here = worker.place.is_some_and(|(at, _)| at == generation);
        let before = worker.place.is_some_and(|(at, _)| at < generation);
        seen.found = true;
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
                seen.running |= running;
                if worker.phase == WorkerPhase::Stopped {
                    seen.stopped = worker.step.or(seen.stopped);
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
    fn attribute(&mut self, now: Duration, cause: Cause, detached: bool) -> Option<Cause> {
        let (since, first) = self.echo.get_or_insert((now, cause)).clone();
        let patience = if detached { ATTRIBUTION_DETACHED } else { ATTRIBUTION };
        (now.saturating_sub(since) >= patience).then_some(first)
    }

    /// What takes too long.
    fn overdue(&mut self, now: Duration, fault: &FaultSpec) -> Option<Cause> {
        let generation = self.membership.generation;
        if let Some(until) = self.adopting {
            let unheard = self.seen.iter().position(|seen| !seen.found);
            match unheard {
                None => {
                    self.adopting = None;
                    self.moved.1 = now;
                }
                Some(index) if now >= until => {
                    let node = &self.membership.members[index].node;
                    let reason =
                        format!("node {node} of generation {generation} did not report to the new coordinator");
                    let (rank, blame) = (Some(Rank::new(index as u32)), lost(node));
                    return Some(Cause { rank, kind: FailureKind::Exit, reason, blame });
                }
                Some(_) => {}
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

fn lost(node: &NodeName) -> Blame {
    Blame { node: Some(node.clone()), ..Blame::of(incident::Cause::LostNode) }
}

/// How far away a source of state is: of all ranks' the most distant one is told.
fn distance(source: &str) -> usize {
    ["", "initialised", "memory", "peer", "parity", "store"].iter().position(|name| *name == source).unwrap_or(0)
}
