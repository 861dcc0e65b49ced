//! What follows when a store operation has ended.
//!
//! Nothing is announced, published or answered before the record it rests on is stored.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::event::{JobEvent, Tier};
use proto::ids::{NodeName, Rank, Step, WorldSize};
use proto::incident;

use super::action::{Action, Answer, Operation, Outcome, Refusal};
use super::budget::Budget;
use super::commit::Gathering;
use super::context::Context;
use super::incident::Goodput;
use super::job::{Flight, Job, Verdict, Waiting};
use super::ledger::{Checkpoint, End, Entry, Membership};
use super::live::Live;
use super::memory::{self, Group};

/// The longest pause between two tries of a failing operation.
const MOST_BACKOFF: Duration = Duration::from_secs(10);

/// What agents of a generation in progress get beyond the suspicion time to come to a new coordinator. A leader that
/// fell silent may be listened to for a while after another one has taken its place.
const CHANGEOVER: Duration = Duration::from_secs(5);

/// The pause before try number `attempts + 1`: 100 ms, doubled each time.
fn backoff(attempts: u32) -> Duration {
    Duration::from_millis(100 << attempts.min(10)).min(MOST_BACKOFF)
}

impl Job {
    /// The operation under way has ended. `false`: the job never came to be and is to be forgotten.
    pub(super) fn stored(&mut self, cx: &mut Context<'_>, outcome: Outcome) -> bool {
        let Some(flight) = self.flight.take() else { return true };
        match (flight.operation.clone(), outcome) {
            // The name was taken by someone else's job: that is the caller's to know, and no loss of leadership.
            (Operation::Append(Entry::Submitted { .. }), Outcome::Lost(_)) => {
                let text = format!("the store already holds job {}: restart this coordinator to take it up", self.name);
                self.refuse_all(cx, flight.waiting, &Refusal::Precondition(text));
                return false;
            }
            (Operation::Append(Entry::Submitted { .. }), Outcome::Found(ledger)) => {
                let text = format!(
                    "the store already holds job {}: it is taken up; go on with it with --resume, or start over with \
                     --fresh",
                    self.name
                );
                self.refuse_all(cx, flight.waiting, &Refusal::Precondition(text));
                *self = Self::new(self.name.clone(), *ledger, &cx.settings.store);
                self.adopt(cx);
            }
            (_, Outcome::Lost(reason)) => cx.out.push(Action::StepDown { reason }),
            (Operation::Append(entry), Outcome::Done) => {
                self.unsettle();
                self.ledger.apply(&entry);
                self.after(cx, entry, flight.waiting);
            }
            (Operation::Append(Entry::Submitted { .. }), Outcome::Failed(reason) | Outcome::Impossible(reason)) => {
                let refusal = Refusal::Unavailable(format!("the job could not be stored: {reason}"));
                self.refuse_all(cx, flight.waiting, &refusal);
                return false;
            }
            // What this coordinator thinks the chain says is not what it says: another reading of it is needed.
            (Operation::Append(_), Outcome::Impossible(reason)) => {
                let reason = format!("job {}: the chain does not take a record: {reason}", self.name);
                cx.out.push(Action::StepDown { reason });
            }
            (Operation::Append(_), Outcome::Failed(reason)) => {
                cx.log(&self.name, format!("the store does not take a record: {reason}; trying again"));
                self.retry_at = Some(cx.now + backoff(flight.attempts));
                self.flight = Some(Flight { attempts: flight.attempts.saturating_add(1), ..flight });
            }
            (Operation::Commit { step, .. }, Outcome::Committed(checkpoint)) => self.committed(cx, step, *checkpoint),
            (Operation::Commit { step, .. }, Outcome::Impossible(reason)) => {
                cx.log(&self.name, format!("step {step} makes no checkpoint: {reason}"));
                let owed = self.gathering.impossible(step);
                cx.settle(&self.name, owed);
            }
            (Operation::Commit { step, .. }, Outcome::Failed(reason)) => {
                let (_, attempts) = self.commit_after;
                cx.log(&self.name, format!("the checkpoint of step {step} is not committed: {reason}; trying again"));
                self.commit_after = (cx.now + backoff(attempts), attempts.saturating_add(1));
            }
            (Operation::Change(_), outcome) => self.changed(cx, flight.waiting, outcome),
            (Operation::Retain, Outcome::Collected(gone)) => self.ledger.forget(&gone),
            (Operation::Retain, Outcome::Failed(reason) | Outcome::Impossible(reason)) => {
                cx.log(&self.name, format!("retention did not finish: {reason}; the next checkpoint's will"));
            }
            (Operation::Retain | Operation::Commit { .. } | Operation::Append(_), _) => {}
        }
        true
    }

    fn refuse_all(&mut self, cx: &mut Context<'_>, waiting: Option<Waiting>, refusal: &Refusal) {
        let queued = std::mem::take(&mut self.queue).into_iter().filter_map(|(_, waiting)| waiting);
        for waiting in waiting.into_iter().chain(queued) {
            cx.out.push(Action::Reply { request: waiting.request, answer: Err(refusal.clone()) });
        }
    }

    fn committed(&mut self, cx: &mut Context<'_>, step: Step, checkpoint: Checkpoint) {
        // Whoever holds what nobody needs any more is told to forget it.
        self.stale.tell = true;
        let set = self.gathering.receipts(step);
        let longest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let seconds = longest(&mut set.iter().map(|e| e.seconds + cx.now.saturating_sub(e.arrived).as_secs_f64()));
        let event = JobEvent::Checkpoint {
            step: step.get(),
            tier: Tier::Store,
            digest: checkpoint.digest.clone(),
            stall_ms: longest(&mut set.iter().map(|entry| entry.stall)) * 1e3,
            seconds,
            bytes: checkpoint.bytes,
        };
        cx.publish(&self.name, event);
        self.ledger.commit(checkpoint);
        self.budget.progress();
        self.reached = self.reached.max(step);
        self.commit_after = (Duration::ZERO, 0);
        self.retain = true;
        let owed = self.gathering.committed(step);
        cx.settle(&self.name, owed);
    }

    /// What follows from a stored record.
    fn after(&mut self, cx: &mut Context<'_>, entry: Entry, waiting: Option<Waiting>) {
        match entry {
            Entry::Led => self.led = true,
            Entry::Submitted { .. } | Entry::Resumed { .. } | Entry::Restarted { .. } => self.begin(cx),
            Entry::Scaled { workers } => {
                self.asked_to_scale = true;
                cx.log(&self.name, format!("scaled to at most {workers} workers"));
            }
            Entry::Generation(membership) => self.announce(cx, *membership),
            Entry::Yielded { reason, .. } => {
                let owed = self.gathering.end();
                cx.settle(&self.name, owed);
                self.reason = reason;
            }
            Entry::Quarantined { checkpoint, reason } => self.quarantined(cx, &checkpoint, reason),
            Entry::Incident(incident) => self.incident_stored(&incident),
            Entry::Ended(end) => self.rest(cx, end),
        }
        if let Some(Waiting { request, submission }) = waiting {
            let answer = if submission {
                Answer::Submitted { finished: false }
            } else {
                Answer::Status(Box::new(self.status(cx.members, cx.settings)))
            };
            cx.out.push(Action::Reply { request, answer: Ok(answer) });
        }
    }

    /// The job is taken up: everything of an earlier run is forgotten.
    fn begin(&mut self, cx: &mut Context<'_>) {
        self.born = true;
        self.budget = Budget::default();
        self.pausing = false;
        self.cancelling = None;
        self.verdict = None;
        self.suspect = None;
        self.restorable = None;
        self.distrust.clear();
        self.reached = Step::ZERO;
        self.broken = None;
        self.live = None;
        self.halted = false;
        self.incident = None;
        let step = self.ledger.newest().map_or(Step::ZERO, |newest| newest.step);
        self.goodput = Goodput::known(self.ledger.incidents.latest.back(), step);
        self.refused.clear();
        self.since = cx.now;
        self.reason = String::new();
        self.newest = (self.ledger.newest().map_or(Step::ZERO, |newest| newest.step), None);
        let owed = self.gathering.end();
        cx.settle(&self.name, owed);
        self.render_spec(&cx.settings.store);
        cx.out.push(Action::Reopen { job: self.name.clone() });
    }

    fn announce(&mut self, cx: &mut Context<'_>, membership: Membership) {
        let (generation, world_size) = (membership.generation, membership.members.len() as u32);
        let start = membership.start_step();
        if let Some(world) = WorldSize::new(world_size) {
            let owed = self.gathering.begin(generation, world);
            cx.settle(&self.name, owed);
        }
        let from = match (&membership.memory, &membership.start) {
            (Some(memory), _) => format!("step {} in memory", memory.step),
            (None, Some(start)) => format!("the checkpoint of step {}", start.step),
            (None, None) => "the seed".to_string(),
        };
        cx.log(&self.name, format!("generation {generation}: {world_size} workers start from {from}"));
        cx.publish(&self.name, JobEvent::Generation { generation: generation.get(), world_size });
        self.newest = (start, None);
        if membership.memory.is_some() && start > self.reached {
            // It goes on further than any before it: that is progress too.
            self.reached = start;
            self.budget.progress();
        }
        self.halted = false;
        self.excused.clear();
        self.asked_to_scale = false;
        self.reason = String::new();
        let groups = self.parity_groups(cx, &membership);
        let mut live = Live::announced(cx.now, membership);
        live.divide(groups);
        live.restore_from(self.restorable.take());
        self.live = Some(live);
    }

    /// The parity groups of a membership, if the job keeps snapshots in memory.
    fn parity_groups(&self, cx: &Context<'_>, membership: &Membership) -> Vec<Group> {
        let checkpoint = &self.ledger.spec.checkpoint;
        if !checkpoint.memory {
            return vec![];
        }
        let mut nodes: BTreeMap<NodeName, (String, Vec<Rank>)> = BTreeMap::new();
        for (member, rank) in membership.members.iter().zip(0..) {
            let domain = cx.members.get(&member.node).map(|agent| agent.home.domain.clone()).unwrap_or_default();
            nodes.entry(member.node.clone()).or_insert((domain, vec![])).1.push(Rank::new(rank));
        }
        memory::groups(&nodes, checkpoint.parity as usize)
    }

    fn quarantined(&mut self, cx: &mut Context<'_>, checkpoint: &Checkpoint, reason: String) {
        let step = checkpoint.step;
        cx.publish(&self.name, JobEvent::Quarantined { step: step.get(), reason: reason.clone() });
        if let Some(older) = self.ledger.newest() {
            let text = format!("the checkpoint of step {step} is set aside; going on from step {}", older.step);
            cx.log(&self.name, text);
            return;
        }
        let reason = format!(
            "no good checkpoint is left: that of step {step} is damaged ({reason}); start over with --fresh, which \
             keeps what is stored"
        );
        self.verdict = Some(Verdict { reason, code: 4 });
    }

    /// The job has come to rest.
    fn rest(&mut self, cx: &mut Context<'_>, end: End) {
        let owed = self.gathering.end();
        cx.settle(&self.name, owed);
        self.close_incident(cx, incident::Outcome::Ended);
        self.goodput.rest(cx.now);
        self.live = None;
        self.want.clear();
        self.spares.clear();
        self.pausing = false;
        self.verdict = None;
        self.suspect = None;
        if let End::Failed { reason, .. } = &end {
            self.reason.clone_from(reason);
        }
        cx.log(&self.name, format!("the job came to rest: {end:?}"));
        cx.publish(&self.name, last_event(&end));
        // A cancellation that came too late is answered with what the job has become.
        let cancelling = self.cancelling.take().map(|waiting| waiting.request);
        for request in std::mem::take(&mut self.waiters).into_iter().chain(cancelling) {
            let answer = Answer::Status(Box::new(self.status(cx.members, cx.settings)));
            cx.out.push(Action::Reply { request, answer: Ok(answer) });
        }
    }

    /// Takes up a job found in the store: adopts the generation it may still be running.
    pub(super) fn adopt(&mut self, cx: &mut Context<'_>) {
        if let Some(end) = &self.ledger.end {
            if let End::Failed { reason, .. } = end {
                self.reason.clone_from(reason);
            }
            cx.publish(&self.name, last_event(end));
            return;
        }
        cx.out.push(Action::Reopen { job: self.name.clone() });
        self.since = cx.now;
        let Some(membership) = self.ledger.membership.clone() else { return };
        self.reopen_incident(cx.now);
        let generation = membership.generation;
        if let Some(world) = WorldSize::new(membership.members.len() as u32) {
            self.gathering = Gathering::default();
            self.gathering.begin(generation, world);
            for checkpoint in self.ledger.checkpoints.iter().filter(|saved| saved.generation == generation) {
                self.gathering.already(checkpoint.step);
            }
        }
        let until = cx.now + cx.settings.suspicion + CHANGEOVER;
        let groups = self.parity_groups(cx, &membership);
        let mut live = Live::adopted(cx.now, membership, until);
        live.divide(groups);
        self.live = Some(live);
        // The coordinator before may have died between a commit and the collection it made due.
        self.retain = !self.ledger.checkpoints.is_empty();
    }
}

/// The event that ends a job's stream.
fn last_event(end: &End) -> JobEvent {
    match end {
        End::Paused { step, loss, digest } => {
            JobEvent::Paused { step: step.get(), loss: *loss, digest: digest.clone() }
        }
        End::Finished { step, loss, digest } => {
            JobEvent::Finished { step: step.get(), loss: *loss, digest: digest.clone() }
        }
        End::Failed { reason, code } => JobEvent::Failed { reason: reason.clone(), code: *code },
        End::Cancelled => JobEvent::Cancelled {},
    }
}
