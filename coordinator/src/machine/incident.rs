//! The account of what broke a generation off: who was to blame, and how long each stage of the way back took.
//!
//! An incident is opened where a generation is given up or told to stop, passes its stages as the job is seen to reach
//! them, and is closed by the first step of the next generation, by another incident, or by the job's coming to rest.
//! It becomes a record as it stands when the next generation's record is stored, while the workers take their state,
//! and another when it is over, which takes its place: so it costs the way back nothing, and a coordinator that takes
//! over brings it to its end. (One that dies before the next generation's record leaves workers behind that have
//! failed, and the next finds the same incident anew.) How long the rest took a successor does not know: its clock is
//! another one.

use std::collections::BTreeSet;
use std::time::Duration;

use proto::event::JobEvent;
use proto::ids::{Generation, JobName, NodeName, Rank, Step};
use proto::incident::{Cause, Incident, Outcome};
use proto::wire::{FailureKind, IncidentCount, IncidentsReply, WorkerPhase};

use super::Cluster;
use super::action::{Answer, Refusal};
use super::context::Context;
use super::job::Job;
use super::ledger::Entry;
use super::members::{Agent, Failure, Worker};
use super::placing::Yield;

/// Characters of a reason that are kept: of four bytes each they are still a note that the chain takes.
const MOST_REASON: usize = 240;

/// Whose doing it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blame {
    /// What happened.
    pub cause: Cause,
    /// Where, if it was one node's.
    pub node: Option<NodeName>,
    /// The two nodes between which nothing gets through, if it was that.
    pub link: Option<(NodeName, NodeName)>,
    /// Exit code and signal of the process that ended.
    pub exit: (Option<i32>, Option<i32>),
}

impl Blame {
    /// Of nobody in particular.
    pub(super) fn of(cause: Cause) -> Self {
        Self { cause, node: None, link: None, exit: (None, None) }
    }

    /// What a worker's failure says.
    pub(super) fn failure(kind: FailureKind, node: &NodeName, failure: Option<&Failure>) -> Self {
        let cause = match kind {
            FailureKind::Exit => Cause::WorkerExit,
            FailureKind::Exchange => Cause::Collective,
            FailureKind::Corrupt => Cause::Checkpoint,
            FailureKind::NonFinite => Cause::NonFinite,
            FailureKind::Fatal => Cause::Defect,
            FailureKind::Input => Cause::Input,
            FailureKind::Transient | FailureKind::Unspecified => Cause::Transient,
        };
        let exit = failure.map_or((None, None), |failure| failure.exit);
        Self { cause, node: Some(node.clone()), link: None, exit }
    }
}

/// An incident under way.
#[derive(Debug)]
pub(super) struct Opened {
    blame: Blame,
    rank: Option<Rank>,
    reason: String,
    generation: Generation,
    step: Step,
    detect: Duration,
    began: Duration,
    aborted: Option<Duration>,
    /// Nodes with workers that have not let go of the generation, once somebody has looked.
    acting: Option<BTreeSet<NodeName>>,
    agreed: Option<(Duration, Generation, Step)>,
    restored: Option<(Duration, String)>,
    /// Whether its record as it stands was asked for, and the number it has there.
    noted: (bool, Option<u64>),
    /// As an earlier coordinator has recorded it.
    found: Option<Box<Incident>>,
}

impl Opened {
    /// One that an earlier coordinator has left open.
    fn found(now: Duration, found: &Incident) -> Self {
        Self {
            blame: Blame { node: found.node.clone(), link: found.link.clone(), ..Blame::of(found.cause) },
            rank: found.rank,
            reason: found.reason.clone(),
            generation: found.generation,
            step: found.step,
            detect: Duration::from_millis(found.detect_ms),
            began: now,
            aborted: Some(now),
            acting: None,
            agreed: None,
            restored: None,
            noted: (true, Some(found.number)),
            found: Some(Box::new(found.clone())),
        }
    }

    /// Whether no worker acts in the generation, or an earlier one, any more.
    fn is_let_go(&mut self, job: &JobName, cx: &Context<'_>) -> bool {
        let generation = self.generation;
        let acts = |worker: &Worker| {
            use WorkerPhase::{Failed, Joining, Running, Stopped};
            let of_it = worker.place.is_some_and(|(at, _)| at <= generation);
            of_it && matches!(worker.phase, Joining | Running | Stopped | Failed)
        };
        let on = |agent: &Agent| agent.of(job).any(&acts);
        match &mut self.acting {
            Some(acting) if !cx.look.all => {
                for node in cx.look.touched {
                    if cx.members.get(node).is_some_and(on) {
                        acting.insert(node.clone());
                    } else {
                        acting.remove(node);
                    }
                }
            }
            unknown => {
                let all = cx.members.iter().filter(|(_, agent)| on(agent));
                *unknown = Some(all.map(|(node, _)| node.clone()).collect());
            }
        }
        self.acting.as_ref().is_some_and(BTreeSet::is_empty)
    }
}

/// How much of its time a job has spent on steps.
#[derive(Debug, Default)]
pub(super) struct Goodput {
    productive: Duration,
    wall: Duration,
    /// Since when the wall time runs on.
    since: Option<Duration>,
    /// The newest step whose time is counted.
    newest: Step,
}

impl Goodput {
    /// As an earlier coordinator left it.
    pub(super) fn known(last: Option<&Incident>, newest: Step) -> Self {
        let millis = |of: fn(&Incident) -> u64| Duration::from_millis(last.map_or(0, of));
        Self { productive: millis(|last| last.productive_ms), wall: millis(|last| last.wall_ms), since: None, newest }
    }

    /// A step is done. One that had to be taken again counts once.
    pub(super) fn stepped(&mut self, now: Duration, step: Step, seconds: f64) {
        let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        self.since.get_or_insert(now.saturating_sub(took));
        if step > self.newest {
            self.newest = step;
            self.productive = self.productive.saturating_add(took);
        }
    }

    /// The job comes to rest.
    pub(super) fn rest(&mut self, now: Duration) {
        self.wall = self.wall(now);
        self.since = None;
    }

    fn wall(&self, now: Duration) -> Duration {
        self.wall.saturating_add(self.since.map_or(Duration::ZERO, |since| now.saturating_sub(since)))
    }
}

fn millis(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}

impl Job {
    /// The present generation is over, or told to stop.
    pub(super) fn open_incident(&mut self, cx: &mut Context<'_>, blame: Blame, rank: Option<Rank>, reason: &str) {
        self.close_incident(cx, Outcome::Interrupted);
        let quiet = self.live.as_ref().map_or(Duration::ZERO, |live| live.quiet_for(cx.now));
        self.incident = Some(Box::new(Opened {
            detect: if blame.cause.is_planned() { Duration::ZERO } else { quiet },
            blame,
            rank,
            reason: reason.chars().take(MOST_REASON).collect(),
            generation: self.ledger.generation,
            step: self.live.as_ref().map_or(self.newest.0, |live| live.newest().max(live.start())),
            began: cx.now,
            aborted: None,
            acting: None,
            agreed: None,
            restored: None,
            noted: (false, None),
            found: None,
        }));
    }

    /// Takes up the incident that an earlier coordinator has left open.
    pub(super) fn reopen_incident(&mut self, now: Duration) {
        let open = self.ledger.incidents.open();
        self.incident = open.map(|found| Box::new(Opened::found(now, found)));
    }

    /// The record of an incident is stored.
    pub(super) fn incident_stored(&mut self, incident: &Incident) {
        if incident.outcome != Outcome::Open {
            self.due.pop_front();
        } else if let Some(opened) = self.incident.as_mut().filter(|opened| opened.generation == incident.generation) {
            opened.noted.1 = Some(incident.number);
        }
    }

    /// The generation is told to stop because somebody wanted it.
    pub(super) fn open_planned(&mut self, cx: &mut Context<'_>, why: Option<&Yield>, reason: &str) {
        let (cause, node) = match why {
            Some(Yield::Shrink { .. }) => (Cause::Scale, None),
            Some(Yield::Preempted(_)) => (Cause::Preempt, None),
            Some(Yield::Leave(node)) => (Cause::Drain, Some(node.clone())),
            None if self.asked_to_scale => (Cause::Scale, None),
            None => (Cause::Grow, None),
        };
        self.open_incident(cx, Blame { node, ..Blame::of(cause) }, None, reason);
    }

    /// Looks how far the way back has come.
    pub(super) fn follow_incident(&mut self, cx: &mut Context<'_>) {
        let Some(opened) = self.incident.as_mut() else { return };
        if opened.aborted.is_none() && self.live.is_none() && opened.is_let_go(&self.name, cx) {
            opened.aborted = Some(cx.now);
        }
        let Some(live) = self.live.as_ref().filter(|live| live.generation() > opened.generation) else { return };
        opened.aborted.get_or_insert(cx.now);
        opened.agreed.get_or_insert((cx.now, live.generation(), live.start()));
        if live.joined() {
            opened.restored.get_or_insert_with(|| (cx.now, live.source.clone()));
            if live.newest() > live.start() {
                self.close_incident(cx, Outcome::Recovered);
            }
        }
    }

    /// The incident under way, if there is one, is over.
    pub(super) fn close_incident(&mut self, cx: &mut Context<'_>, outcome: Outcome) {
        let Some(opened) = self.incident.take() else { return };
        let number = opened.noted.1.unwrap_or_else(|| self.next_number());
        let incident = Box::new(self.account(cx.now, &opened, number, outcome));
        cx.publish(&self.name, JobEvent::Incident(incident.clone()));
        self.due.push_back(incident);
    }

    fn next_number(&self) -> u64 {
        let recorded = self.ledger.incidents.total();
        let more = self.due.iter().filter(|incident| incident.number > recorded).count();
        recorded.saturating_add(more as u64 + 1)
    }

    /// The record of an incident that is over, or that has come as far as the next generation, if this leader may write
    /// it yet.
    pub(super) fn next_incident(&mut self, now: Duration) -> Option<Entry> {
        if !self.born || !self.led {
            return None;
        }
        if let Some(over) = self.due.front() {
            return Some(Entry::Incident(over.clone()));
        }
        let agreed = |opened: &&mut Box<Opened>| opened.agreed.is_some() && !opened.noted.0;
        self.incident.as_mut().filter(agreed)?.noted.0 = true;
        let opened = self.incident.as_ref()?;
        Some(Entry::Incident(Box::new(self.account(now, opened, self.next_number(), Outcome::Open))))
    }

    fn account(&self, now: Duration, opened: &Opened, number: u64, outcome: Outcome) -> Incident {
        let stage = |from: Option<Duration>, to: Option<Duration>| Some(millis(to?.saturating_sub(from?)));
        let agreed = opened.agreed.map(|(at, ..)| at);
        let restored = opened.restored.as_ref().map(|(at, _)| *at);
        let first_step = restored.filter(|_| outcome == Outcome::Recovered).map(|_| now);
        if let Some(found) = &opened.found {
            let source = opened.restored.as_ref().map_or(&found.source, |(_, source)| source).clone();
            let (productive_ms, wall_ms) = (millis(self.goodput.productive), millis(self.goodput.wall(now)));
            return Incident { outcome, source, productive_ms, wall_ms, ..(**found).clone() };
        }
        Incident {
            number,
            cause: opened.blame.cause,
            outcome,
            reason: opened.reason.clone(),
            exit_code: opened.blame.exit.0,
            signal: opened.blame.exit.1,
            node: opened.blame.node.clone(),
            link: opened.blame.link.clone(),
            rank: opened.rank,
            generation: opened.generation,
            next: opened.agreed.map(|(_, generation, _)| generation),
            step: opened.step,
            start: opened.agreed.map(|(.., start)| start),
            source: opened.restored.as_ref().map(|(_, source)| source.clone()).unwrap_or_default(),
            detect_ms: millis(opened.detect),
            abort_ms: stage(Some(opened.began), opened.aborted),
            agree_ms: stage(opened.aborted, agreed),
            restore_ms: stage(agreed, restored),
            first_step_ms: stage(restored, first_step),
            productive_ms: millis(self.goodput.productive),
            wall_ms: millis(self.goodput.wall(now)),
        }
    }
}

impl Cluster {
    /// What went wrong with a job.
    pub(super) fn incidents(&mut self, name: &JobName) -> Result<Option<Answer>, Refusal> {
        let now = self.handled;
        let job = self.find(name)?;
        let mut all = job.ledger.incidents.clone();
        job.due.iter().for_each(|incident| all.add((**incident).clone()));
        let mut incidents: Vec<Incident> = all.latest.into();
        if let Some(opened) = &job.incident {
            let number = opened.noted.1.unwrap_or_else(|| job.next_number());
            incidents.retain(|incident| incident.number != number);
            incidents.push(job.account(now, opened, number, Outcome::Open));
        }
        let json = |incident: &Incident| serde_json::to_string(incident).unwrap_or_default();
        let count = |(cause, count): (&Cause, &u64)| IncidentCount {
            cause: cause.name().into(),
            planned: cause.is_planned(),
            count: *count,
        };
        Ok(Some(Answer::Incidents(Box::new(IncidentsReply {
            incidents: incidents.iter().map(json).collect(),
            counts: all.counts.iter().map(count).collect(),
            productive_ms: millis(job.goodput.productive),
            wall_ms: millis(job.goodput.wall(now)),
        }))))
    }
}
