//! One job's life.
//!
//! The state is what is persisted (the [`Ledger`]) and what is live. Every event only notes facts; then
//! [`Job::advance`] looks at all of them and decides what comes next. At most one store operation is under way, and
//! what depends on it is decided when it has succeeded: a generation is announced after its record, a job is finished
//! after its last checkpoint's commit.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proto::event::JobEvent;
use proto::ids::{JobName, NodeName, Rank, Step, WorkerId};
use proto::incident::{Incident, Outcome};
use proto::spec::Workers;
use proto::wire::FailureKind;
use proto::wire::StepReport;

use super::action::{Action, Operation, RequestId};
use super::budget::Budget;
use super::changes::Stale;
use super::commit::{Gathering, ReceiptEntry, ReceiptName};
use super::context::Context;
use super::incident::{Blame, Goodput, Opened};
use super::keeping::Losses;
use super::ledger::{Checkpoint, End, Entry, Ledger};
use super::live::{Cause, Live};
use super::loading::loaded;
use super::memory::{MemoryPoint, Restorable};
use super::muster::Muster;
use super::placing::Fit;
use super::schedule::Placement;

/// Generations that a step in memory may fail before an older state is used.
const MOST_FAILURES: u32 = 1;

/// Why the job must fail.
#[derive(Debug, Clone)]
pub(super) struct Verdict {
    pub(super) reason: String,
    pub(super) code: u8,
}

/// A request waiting for an operation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub(super) request: RequestId,
    /// Whether it was a submission, which has its own answer.
    pub(super) submission: bool,
}

/// An operation under way.
#[derive(Debug, Clone)]
pub(super) struct Flight {
    pub(super) operation: Operation,
    pub(super) waiting: Option<Waiting>,
    /// How often it was tried in vain.
    pub(super) attempts: u32,
}

/// One job.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) name: JobName,
    pub(super) ledger: Ledger,
    /// JSON of the specification for agents, its store being the coordinator's.
    pub(super) spec_json: Vec<u8>,
    /// Whether anything of it is stored.
    pub(super) born: bool,
    /// Whether this leader's record is in its chain.
    pub(super) led: bool,
    pub(super) flight: Option<Flight>,
    /// When the operation that failed is tried again.
    pub(super) retry_at: Option<Duration>,
    /// When a failed commit is tried again, and how often it failed.
    pub(super) commit_after: (Duration, u32),
    /// Records operators asked for.
    pub(super) queue: VecDeque<(Entry, Option<Waiting>)>,
    /// Changes of checkpoints somebody asked for.
    pub(super) changes: VecDeque<(Arc<[u8]>, RequestId)>,
    pub(super) losses: Losses,
    pub(super) live: Option<Live>,
    /// Wanted workers by node, as scheduled.
    pub(super) want: Placement,
    /// Prepared workers beyond those, by node.
    pub(super) spares: Placement,
    /// The job for which it has to give slots up.
    pub(super) yields_to: Option<JobName>,
    /// Since when it has waited for slots.
    pub(super) queued: Option<Duration>,
    /// Whether that is so long that no job behind it goes first any more.
    pub(super) overdue: bool,
    /// Whether the last generation stopped as it was told to, its state stored.
    pub(super) halted: bool,
    /// Since when a generation is being formed.
    pub(super) since: Duration,
    pub(super) pausing: bool,
    pub(super) cancelling: Option<Waiting>,
    /// Requests answered when the job has come to rest.
    pub(super) waiters: Vec<RequestId>,
    pub(super) verdict: Option<Verdict>,
    /// A checkpoint to be set aside, and why.
    pub(super) suspect: Option<(Checkpoint, String)>,
    /// From whom the step in memory can be had that the generation about to be stored starts from.
    pub(super) restorable: Option<Restorable>,
    /// How often a generation could not take up its work from a step in memory, though nothing else was wrong.
    pub(super) distrust: BTreeMap<MemoryPoint, u32>,
    /// The newest step a generation has started from.
    pub(super) reached: Step,
    pub(super) gathering: Gathering,
    pub(super) retain: bool,
    pub(super) budget: Budget,
    /// What broke the last generation off, until the next takes steps.
    pub(super) incident: Option<Box<Opened>>,
    /// Incidents that are over and not yet recorded.
    pub(super) due: VecDeque<Box<Incident>>,
    pub(super) goodput: Goodput,
    /// When the failure happened from which the job has not yet recovered.
    pub(super) broken: Option<Duration>,
    pub(super) refused: BTreeMap<NodeName, String>,
    /// Workers whose end needs no further mention, by node.
    pub(super) excused: BTreeMap<NodeName, BTreeSet<WorkerId>>,
    /// Whether an operator has changed the size: growing then waits for no stable membership.
    pub(super) asked_to_scale: bool,
    /// The newest step and its loss.
    pub(super) newest: (Step, Option<f64>),
    pub(super) skipped: u64,
    /// What last changed, for people.
    pub(super) reason: String,
    /// What of it must be worked out anew.
    pub(super) stale: Stale,
    /// Who is missing, as long as it is of interest.
    pub(super) muster: Option<Muster>,
    /// How well the generation fits what it is to have, if that was asked since either changed.
    pub(super) fit: Option<Fit>,
}

impl Job {
    /// A job with this history; nothing is done about it yet.
    pub(super) fn new(name: JobName, ledger: Ledger, store: &str) -> Self {
        let step = ledger.newest().map_or(Step::ZERO, |checkpoint| checkpoint.step);
        let budget = Budget::used(ledger.restarts);
        let goodput = Goodput::known(ledger.incidents.latest.back(), step);
        let mut job = Self {
            name,
            spec_json: Vec::new(),
            ledger,
            born: true,
            led: false,
            flight: None,
            retry_at: None,
            commit_after: (Duration::ZERO, 0),
            queue: VecDeque::new(),
            changes: VecDeque::new(),
            losses: Losses::new(),
            live: None,
            want: Placement::new(),
            spares: Placement::new(),
            yields_to: None,
            queued: None,
            overdue: false,
            halted: false,
            since: Duration::ZERO,
            pausing: false,
            cancelling: None,
            waiters: Vec::new(),
            verdict: None,
            suspect: None,
            restorable: None,
            distrust: BTreeMap::new(),
            reached: step,
            gathering: Gathering::default(),
            retain: false,
            budget,
            incident: None,
            due: VecDeque::new(),
            goodput,
            broken: None,
            refused: BTreeMap::new(),
            excused: BTreeMap::new(),
            asked_to_scale: false,
            newest: (step, None),
            skipped: 0,
            reason: String::new(),
            stale: Stale::ALL,
            muster: None,
            fit: None,
        };
        job.render_spec(store);
        job
    }

    /// Keeps what agents are told of the specification. Resizing a running job does not change it.
    pub(super) fn render_spec(&mut self, store: &str) {
        let mut spec = self.ledger.spec.clone();
        spec.checkpoint.store = store.to_string();
        // The size is the coordinator's business: a job that was resized, or resized and then taken over by another
        // coordinator, must not look like another job to its workers.
        spec.resources.workers = Workers { min: 1, max: 1 };
        (spec.resources.priority, spec.resources.spares) = (0, 0);
        self.spec_json = serde_json::to_vec(&spec).unwrap_or_default();
    }

    /// Whether it wants to run.
    pub(super) fn active(&self) -> bool {
        self.born && self.ledger.end.is_none()
    }

    /// Looks at everything known and starts what comes next.
    pub(super) fn advance(&mut self, cx: &mut Context<'_>) {
        if self.active() && self.led {
            self.supervise(cx);
            self.follow_incident(cx);
        }
        if self.flight.is_some() {
            if self.retry_at.is_some_and(|at| cx.now >= at) {
                self.retry_at = None;
                self.send_flight(cx);
            }
            return;
        }
        if let Some((operation, waiting)) = self.next(cx) {
            self.flight = Some(Flight { operation, waiting, attempts: 0 });
            self.send_flight(cx);
        }
    }

    fn send_flight(&self, cx: &mut Context<'_>) {
        if let Some(flight) = &self.flight {
            cx.out.push(Action::Store { job: self.name.clone(), operation: flight.operation.clone() });
        }
    }

    /// Notices what has become of the workers.
    fn supervise(&mut self, cx: &mut Context<'_>) {
        if cx.look.all {
            (self.muster, self.fit) = (None, None);
        }
        self.inspect(cx);
        self.muster_again(cx);
        let Some(live) = self.live.as_mut() else { return };
        let was_adopting = live.adopting();
        if let Some(cause) = live.watch(cx, &self.name, &self.ledger.spec.fault) {
            self.trouble(cx, cause);
            return;
        }
        if std::mem::take(&mut live.readdressed) || was_adopting != live.adopting() {
            self.stale = Stale::ALL;
        }
        if was_adopting && !live.adopting() {
            let generation = live.generation();
            cx.log(&self.name, format!("generation {generation} is alive: training goes on undisturbed"));
        }
        if live.joined()
            && !std::mem::replace(&mut live.told_load, true)
            && let Some(event) = loaded(live, cx.members)
        {
            cx.publish(&self.name, event);
        }
        if live.joined()
            && let Some(broken) = self.broken.take()
        {
            let event = JobEvent::Recovered {
                generation: live.generation().get(),
                step: live.start().get(),
                seconds: cx.now.saturating_sub(broken).as_secs_f64(),
                source: live.source.clone(),
            };
            cx.publish(&self.name, event);
        }
        if self.pausing && !std::mem::replace(&mut live.stop, true) {
            self.unsettle();
        }
    }

    /// A failure: says its one cause, ends the generation, and decides whether to go on.
    pub(super) fn trouble(&mut self, cx: &mut Context<'_>, cause: Cause) {
        let Cause { rank, kind, reason, blame } = cause;
        let generation = self.ledger.generation.get();
        let event = JobEvent::Failure { generation, rank: rank.map(Rank::get), reason: reason.clone() };
        cx.publish(&self.name, event);
        cx.log(&self.name, format!("generation {generation} failed: {reason}"));
        // Of a broken exchange the rank is the first that spoke: no more than that, if no node is to blame.
        let blamed = rank.filter(|_| kind != FailureKind::Exchange || blame.node.is_some());
        self.open_incident(cx, blame, blamed, &reason);
        let start = self.live.as_ref().and_then(|live| live.membership.start.clone());
        if let Some(point) = self.live.as_ref().filter(|live| !live.joined()).and_then(|live| live.membership.memory)
            && matches!(kind, FailureKind::Transient | FailureKind::Corrupt)
        {
            *self.distrust.entry(point).or_default() += 1;
        }
        self.halted = false;
        if let Some(live) = self.live.take() {
            self.excuse(&live.membership.members);
        }
        self.unsettle();
        self.since = cx.now;
        self.broken.get_or_insert(cx.now);
        self.reason.clone_from(&reason);
        let verdict = match (kind, start) {
            (FailureKind::Fatal | FailureKind::NonFinite, _) => Some(Verdict { reason, code: 3 }),
            (FailureKind::Input, _) => Some(Verdict { reason, code: 2 }),
            (FailureKind::Corrupt, Some(checkpoint)) => {
                self.suspect = Some((checkpoint, reason));
                None
            }
            _ => {
                let allowed = self.ledger.spec.fault.restarts_without_progress;
                self.budget.spend(allowed, &reason).map(|reason| Verdict { reason, code: 3 })
            }
        };
        if self.verdict.is_none() {
            self.verdict = verdict;
        }
        if self.verdict.is_some() {
            self.close_incident(cx, Outcome::Ended);
        }
    }

    /// Whether a step in memory has failed a generation too often to be tried again.
    pub(super) fn distrusted(&self, point: MemoryPoint) -> bool {
        self.distrust.get(&point).is_some_and(|failures| *failures > MOST_FAILURES)
    }

    /// Whether a generation was ever formed since the job last started over.
    pub(super) fn has_run(&self) -> bool {
        self.ledger.identity.is_some()
    }

    /// The next store operation, if one is due.
    fn next(&mut self, cx: &mut Context<'_>) -> Option<(Operation, Option<Waiting>)> {
        let append = |entry| Some((Operation::Append(entry), None));
        let asked = !self.queue.is_empty() || !self.changes.is_empty();
        if self.born && !self.led && (self.active() || asked) {
            return append(Entry::Led);
        }
        if let Some(entry) = self.next_incident(cx.now) {
            return append(entry);
        }
        if let Some((entry, waiting)) = self.queue.pop_front() {
            return Some((Operation::Append(entry), waiting));
        }
        if let Some(change) = self.next_change() {
            return Some(change);
        }
        if self.active() {
            if let Some(waiting) = self.cancelling.take() {
                return Some((Operation::Append(Entry::Ended(End::Cancelled)), Some(waiting)));
            }
            // First of all what is already durable: even a job that fails keeps its last checkpoint.
            if let Some(operation) = self.commit(cx) {
                return Some((operation, None));
            }
            if let Some(Verdict { reason, code }) = self.verdict.take() {
                return append(Entry::Ended(End::Failed { reason, code }));
            }
            if let Some((checkpoint, reason)) = self.suspect.take() {
                return append(Entry::Quarantined { checkpoint, reason });
            }
            // Before the job comes to rest, so that what it leaves behind is tidy.
            if let Some(operation) = self.tidy() {
                return Some((operation, None));
            }
            if let Some(entry) = self.conclude(cx) {
                return append(entry);
            }
            if self.live.is_none() {
                if let Some(entry) = self.stand_back(cx).or_else(|| self.form(cx)) {
                    return append(entry);
                }
            } else {
                self.reshape(cx);
            }
        }
        self.tidy().map(|operation| (operation, None))
    }

    /// Retention, if a commit has made it due.
    fn tidy(&mut self) -> Option<Operation> {
        std::mem::take(&mut self.retain).then_some(Operation::Retain)
    }

    fn commit(&mut self, cx: &mut Context<'_>) -> Option<Operation> {
        if cx.now < self.commit_after.0 {
            return None;
        }
        let (generation, step, set) = self.gathering.complete()?;
        let receipts = set.into_iter().map(|entry| entry.receipt).collect();
        let validation_loss = self.losses.get(&step).copied();
        Some(Operation::Commit { generation, step, receipts, validation_loss })
    }

    /// Ends a generation that has stopped and stored its state; then the job, if it is where it should be.
    fn conclude(&mut self, cx: &mut Context<'_>) -> Option<Entry> {
        let newest = self.ledger.newest().cloned();
        let step = newest.as_ref().map_or(Step::ZERO, |checkpoint| checkpoint.step);
        if let Some(live) = &self.live {
            let stored = |stopped| newest.as_ref().is_some_and(|newest| newest.step == stopped);
            let stopped = live.stopped().filter(|stopped| stored(*stopped))?;
            cx.log(&self.name, format!("generation {} stopped after step {stopped}, stored", live.generation()));
            self.live = None;
            self.unsettle();
            self.halted = true;
            self.since = cx.now;
        }
        let loss = self.newest.1.filter(|_| self.newest.0 == step);
        let digest = newest.map(|newest| newest.digest);
        if step.get() >= self.ledger.spec.training.steps
            && let Some(digest) = digest
        {
            return Some(Entry::Ended(End::Finished { step, loss, digest }));
        }
        let reached = self.ledger.stop_at.is_some_and(|stop_at| step >= stop_at);
        (self.pausing || reached).then_some(Entry::Ended(End::Paused { step, loss, digest }))
    }

    /// A step is done, says rank 0.
    pub(super) fn stepped(&mut self, cx: &mut Context<'_>, report: &StepReport) {
        let step = Step::new(report.step);
        let Some(live) = self.live.as_mut().filter(|live| live.generation().get() == report.generation) else { return };
        live.progress(cx.now, step);
        if step < self.newest.0 || (step == self.newest.0 && self.newest.1.is_some()) {
            // Reported again over a new stream.
            return;
        }
        self.newest = (step, Some(report.loss));
        self.goodput.stepped(cx.now, step, report.seconds);
        let tokens_per_step = self.ledger.spec.training.tokens_per_step();
        let event = JobEvent::Step {
            step: report.step,
            loss: report.loss,
            grad_norm: report.grad_norm,
            tokens: report.step.saturating_mul(tokens_per_step),
            tokens_per_second: if report.seconds > 0.0 { tokens_per_step as f64 / report.seconds } else { 0.0 },
        };
        cx.publish(&self.name, event);
        self.heed_stragglers(cx, report);
        if let Some(loss) = report.validation_loss {
            self.validated(step, loss);
            cx.publish(&self.name, JobEvent::Validation { step: report.step, loss });
        }
    }

    /// A shard is durable.
    pub(super) fn received(&mut self, cx: &mut Context<'_>, name: ReceiptName, mut entry: ReceiptEntry) {
        entry.arrived = cx.now;
        // Before this leader knows the chain's end it owes no answer: the agent asks again.
        if self.active() && !self.led {
            return;
        }
        let owed = self.gathering.receive(name, entry);
        cx.settle(&self.name, owed.into_iter().collect());
    }

    /// A try to store a shard failed; it goes on.
    pub(super) fn save_failed(&mut self, cx: &mut Context<'_>, text: String) {
        cx.log(&self.name, text.clone());
        self.reason = text;
    }

    /// A rank's shard of a step will not be stored.
    pub(super) fn skipped(&mut self, cx: &mut Context<'_>, name: ReceiptName, reason: &str) {
        let Some(owed) = self.gathering.skip(name.generation, name.step) else { return };
        self.skipped += 1;
        if !reason.is_empty() {
            let text = format!("the checkpoint of step {} is lost with rank {}'s part: {reason}", name.step, name.rank);
            cx.log(&self.name, text);
        }
        // Nothing will come of waiting for the last state of a generation that has stopped: it is taken up again.
        if self.live.as_ref().and_then(Live::stopped) == Some(name.step) && !reason.is_empty() {
            let reason = format!("the last state was not stored: {reason}");
            let blame = Blame::of(proto::incident::Cause::Transient);
            self.trouble(cx, Cause { rank: Some(name.rank), kind: FailureKind::Transient, reason, blame });
        }
        cx.publish(&self.name, JobEvent::Skipped { step: name.step.get(), skipped: self.skipped });
        cx.settle(&self.name, owed);
    }
}
