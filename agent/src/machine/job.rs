//! One job on this node: the processes it has, and the ones it should have.
//!
//! A worker goes through *spawned → attached → prepared* and then follows what the coordinator desires. Every command
//! is remembered with the worker it was sent to, so each is sent once however often the desire is repeated. A process
//! that ends while it is wanted is replaced at once by a fresh one (after a wait that doubles, should it keep ending
//! before it is ready), without asking the coordinator first: by the time a new generation forms, the replacement is
//! ready.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{JobName, WorkerId};
use proto::spec::{FaultSpec, JobSpec};
use proto::wire::{self, WorkerPhase};

use super::{Action, Command, Fresh};

/// The wait before the second start in a row that failed; doubles from there.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// The longest wait between two starts.
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// Ended workers kept in the report at most, newest last.
const MOST_EXITED: usize = 16;

/// A live process and what it has been told.
#[derive(Debug)]
struct Worker {
    state: wire::WorkerState,
    attached: bool,
    /// JSON of the spec it was prepared with.
    prepared: Option<Vec<u8>>,
    /// Since when it has been in its phase, as far as this agent has noticed.
    phase_since: Duration,
    /// Generation, and whether to stop, of the last run command.
    ran: Option<(u64, bool)>,
    /// The last generation it was told to break off.
    held: u64,
    /// It was told to end and no longer counts.
    dying: bool,
    /// Its place among this node's workers, of all jobs: nobody else's while it lives.
    place: u32,
}

impl Worker {
    /// The generation it is in, or will be once it has read its commands.
    fn acting(&self) -> Option<u64> {
        let told = self.ran.map(|(generation, _)| generation);
        told.max(self.state.generation).filter(|generation| *generation > self.held)
    }
}

/// Desired and actual state of one job on this node.
#[derive(Debug)]
pub(super) struct Job {
    name: JobName,
    desired: wire::Desired,
    spec: Option<JobSpec>,
    threads: u32,
    /// The highest generation named so far, fenced or live.
    highest: u64,
    live: BTreeMap<WorkerId, Worker>,
    exited: Vec<wire::WorkerState>,
    /// Processes in a row that ended before they were ready.
    failures: u32,
    start_after: Duration,
}

impl Job {
    pub(super) fn new(name: JobName) -> Self {
        Self {
            name,
            desired: wire::Desired::default(),
            spec: None,
            threads: 1,
            highest: 0,
            live: BTreeMap::new(),
            exited: Vec::new(),
            failures: 0,
            start_after: Duration::ZERO,
        }
    }

    pub(super) fn has(&self, worker: WorkerId) -> bool {
        self.live.contains_key(&worker)
    }

    /// A worker's rank in the live generation.
    pub(super) fn rank_of(&self, worker: WorkerId) -> Option<u32> {
        rank_of(&self.desired, worker)
    }

    /// How long it may take to save and leave.
    pub(super) fn grace(&self) -> Duration {
        self.fault(|fault| fault.grace).unwrap_or(Duration::from_secs(30))
    }

    /// How often it wants to hear of this node, if it can be read.
    pub(super) fn heartbeat(&self) -> Option<Duration> {
        self.fault(|fault| fault.heartbeat)
    }

    fn fault(&self, pick: fn(&FaultSpec) -> f64) -> Option<Duration> {
        let seconds = self.spec.as_ref().map(|spec| pick(&spec.fault))?;
        Duration::try_from_secs_f64(seconds).ok()
    }

    /// Nothing is wanted, nothing is left, and what is held may go.
    pub(super) fn is_over(&self) -> bool {
        self.desired.workers == 0 && !self.desired.keep && self.live.is_empty()
    }

    /// Takes the coordinator's desire, or says why not.
    pub(super) fn desire(&mut self, desired: wire::Desired, cores: usize) -> Result<(), String> {
        let live = desired.run.as_ref().map(|run| run.generation);
        let generation = desired.fenced.max(live.unwrap_or(0));
        if generation < self.highest {
            return Err(format!(
                "job {}: orders for generation {generation} refused: generation {} is known",
                self.name, self.highest
            ));
        }
        if let Some(live) = live.filter(|live| *live < desired.fenced) {
            return Err(format!("job {}: run of generation {live} refused: {} is fenced", self.name, desired.fenced));
        }
        // With all its processes told to end, nothing can act in an old generation: the job may come again from the
        // start.
        self.highest = if desired.workers == 0 { 0 } else { generation };
        if desired == self.desired {
            return Ok(());
        }
        // A spec that cannot be read is the worker's to refuse: it says why.
        self.spec = serde_json::from_slice(&desired.spec).ok();
        let asked = self.spec.as_ref().map_or(0, |spec| u32::try_from(spec.resources.threads).unwrap_or(u32::MAX));
        self.threads = if asked > 0 { asked } else { (cores / desired.workers.max(1) as usize).max(1) as u32 };
        // An ended worker stays in the report while the generation it was part of is the live one.
        self.exited.retain(|state| state.generation.is_some() && state.generation == live);
        self.desired = desired;
        Ok(())
    }

    pub(super) fn started(&mut self, worker: WorkerId, process: u32) {
        if let Some(worker) = self.live.get_mut(&worker) {
            worker.state.process = process;
        }
    }

    pub(super) fn attached(&mut self, worker: WorkerId) {
        if let Some(worker) = self.live.get_mut(&worker) {
            worker.attached = true;
        }
    }

    /// Takes a worker's own report; identity stays what the agent knows it to be.
    pub(super) fn reported(&mut self, now: Duration, id: WorkerId, state: wire::WorkerState) {
        let Some(worker) = self.live.get_mut(&id) else { return };
        if state.phase() == WorkerPhase::Ready {
            self.failures = 0;
        }
        // Each step shows that it is not stuck.
        if state.phase != worker.state.phase || state.step != worker.state.step {
            worker.phase_since = now;
        }
        let (job, name, process) = (self.name.to_string(), id.to_string(), worker.state.process);
        worker.state = wire::WorkerState { job, worker: name, process, ..state };
    }

    pub(super) fn exited(&mut self, now: Duration, id: WorkerId, failure: wire::Failure) {
        let Some(worker) = self.live.remove(&id) else { return };
        if worker.dying {
            return;
        }
        let mut state = worker.state;
        // A failure it reported itself is the cause; the exit is only its consequence.
        if state.phase() != WorkerPhase::Failed || state.failure.is_none() {
            state.failure = Some(failure);
        }
        state.generation = state.generation.or(worker.ran.map(|(generation, _)| generation));
        state.set_phase(WorkerPhase::Exited);
        self.exited.push(state);
        if self.exited.len() > MOST_EXITED {
            self.exited.remove(0);
        }
        let wait = match self.failures {
            0 => Duration::ZERO,
            n => FIRST_WAIT.saturating_mul(1 << (n - 1).min(16)).min(LONGEST_WAIT),
        };
        self.failures = self.failures.saturating_add(1);
        self.start_after = now.saturating_add(wait);
    }

    /// Workers the coordinator should know of; those told to end are no longer counted.
    pub(super) fn states(&self) -> impl Iterator<Item = wire::WorkerState> {
        let live = self.live.values().filter(|worker| !worker.dying).map(|worker| &worker.state);
        self.exited.iter().chain(live).cloned()
    }

    /// Closes the gap between what is and what should be.
    /// `places` are those in use on this node, of all jobs.
    pub(super) fn reconcile(
        &mut self,
        now: Duration,
        fresh: Fresh<'_>,
        places: &mut BTreeSet<u32>,
        actions: &mut Vec<Action>,
    ) {
        self.replace(now, actions);
        self.shrink(actions);
        let wanted = self.desired.workers as usize;
        while now >= self.start_after && self.counted() < wanted {
            let worker = fresh();
            let mut state =
                wire::WorkerState { job: self.name.to_string(), worker: worker.to_string(), ..Default::default() };
            state.set_phase(WorkerPhase::Starting);
            // One of so many is free.
            let place = (0..=places.len() as u32).find(|place| !places.contains(place)).unwrap_or_default();
            places.insert(place);
            let entry = Worker {
                state,
                attached: false,
                prepared: None,
                phase_since: now,
                ran: None,
                held: 0,
                dying: false,
                place,
            };
            self.live.insert(worker, entry);
            actions.push(Action::Spawn { job: self.name.clone(), worker });
        }
        for (id, worker) in &mut self.live {
            if worker.attached && !worker.dying {
                steer(*id, worker, &self.desired, self.threads, actions);
            }
        }
    }

    /// Ends workers that no command can help: those prepared for another spec, which would compute something else, and
    /// those that do not obey, because the process is paused or a thread of it is stuck. Fresh ones take their place.
    fn replace(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let (obey, start) = match &self.spec {
            Some(spec) => (spec.fault.collective, spec.fault.restart),
            None => return,
        };
        for (id, worker) in &mut self.live {
            if worker.dying || rank_of(&self.desired, *id).is_some() {
                continue;
            }
            let waited = now.saturating_sub(worker.phase_since).as_secs_f64();
            let stale = worker.prepared.as_ref().is_some_and(|spec| *spec != self.desired.spec);
            let reason = match worker.state.phase() {
                _ if stale && !self.desired.spec.is_empty() => "it was prepared for another specification",
                WorkerPhase::Starting if waited > start => "it does not get ready",
                WorkerPhase::Joining | WorkerPhase::Running | WorkerPhase::Stopped | WorkerPhase::Failed
                    if waited > obey =>
                {
                    "it does not leave a generation that is over"
                }
                _ => continue,
            };
            worker.dying = true;
            actions.push(Action::Kill { worker: *id, reason });
        }
    }

    /// Places of its processes.
    pub(super) fn places(&self) -> impl Iterator<Item = u32> {
        self.live.values().map(|worker| worker.place)
    }

    fn counted(&self) -> usize {
        self.live.values().filter(|worker| !worker.dying).count()
    }

    /// Ends surplus processes, those that do nothing yet first and those with a rank last.
    fn shrink(&mut self, actions: &mut Vec<Action>) {
        let surplus = self.counted().saturating_sub(self.desired.workers as usize);
        if surplus == 0 {
            return;
        }
        let desired = &self.desired;
        let mut order: Vec<_> = self
            .live
            .iter()
            .filter(|(_, worker)| !worker.dying)
            .map(|(id, worker)| {
                (rank_of(desired, *id).is_some(), worker.acting().is_some(), worker.prepared.is_some(), *id)
            })
            .collect();
        order.sort_unstable();
        for (.., id) in order.into_iter().take(surplus) {
            if let Some(worker) = self.live.get_mut(&id) {
                worker.dying = true;
            }
            let reason =
                if self.desired.workers == 0 { "the job has ended on this node" } else { "fewer workers are wanted" };
            actions.push(Action::Kill { worker: id, reason });
        }
    }
}

/// Sends one worker the commands it has not had yet.
fn steer(id: WorkerId, worker: &mut Worker, desired: &wire::Desired, threads: u32, actions: &mut Vec<Action>) {
    let mut send = |command| actions.push(Action::Send { worker: id, command });
    if worker.prepared.is_none() {
        worker.prepared = Some(desired.spec.clone());
        let place = worker.place;
        send(Command::Prepare { spec: desired.spec.clone(), threads, place });
    }
    let placed = desired.run.as_ref().zip(rank_of(desired, id));
    let wanted = placed.map(|(run, _)| run.generation);
    if let Some(acting) = worker.acting().filter(|acting| Some(*acting) != wanted) {
        worker.held = acting;
        send(Command::Hold(acting));
    }
    let Some((run, rank)) = placed else { return };
    let news = match worker.ran {
        None => run.generation > worker.held,
        Some((generation, stop)) => {
            run.generation > generation.max(worker.held) || (run.generation == generation && run.stop && !stop)
        }
    };
    if news {
        worker.ran = Some((run.generation, run.stop));
        send(Command::Run(wire::WorkerRun { rank, announcement: Some(run.clone()) }));
    }
}

fn rank_of(desired: &wire::Desired, worker: WorkerId) -> Option<u32> {
    let name = worker.to_string();
    let run = desired.run.as_ref()?;
    run.placements.iter().find(|placement| placement.worker == name).map(|placement| placement.rank)
}
