//! A cluster in a test: agents and workers that do as they are told, and a store that takes every record.
//!
//! The rig checks the machine's promises at every action: generations only grow, nothing is announced before its record
//! is stored, no node gets more workers than slots, a job finishes only with its last checkpoint committed.

mod faults;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proto::event::JobEvent;
use proto::ids::{Epoch, Generation, JobName, NodeName, Rank, Step, WorkerId, WorldSize};
use proto::spec::{JobSpec, Overrides};
use proto::wire::coordinator_message::Body;
use proto::wire::{Desired, FailureKind, GroupMember, StepReport, SubmitMode, WorkerPhase};

use super::super::memory::{Group, Inventory};
use super::super::*;
use super::doubting::Pair;

pub(super) const STEPS: u64 = 20;
const TICK: Duration = Duration::from_millis(100);

pub(super) fn node(name: &str) -> NodeName {
    NodeName::new(name).unwrap()
}

pub(super) fn job_name() -> JobName {
    JobName::new("tiny").unwrap()
}

pub(super) fn spec(workers: &str) -> JobSpec {
    let text = format!(
        "name = \"tiny\"\n[model]\npreset = \"tiny\"\n[data]\ntrain = \"t\"\n[training]\nsteps = {STEPS}\n\
         global_batch = 16\nmicro_batch = 2\n[resources]\nworkers = {workers}\n[checkpoint]\nstore = \"s\"\n\
         every_steps = 5\n"
    );
    JobSpec::parse("test", &text, std::path::Path::new("/"), &Overrides::new()).unwrap()
}

pub(super) fn settings() -> Settings {
    Settings {
        epoch: Epoch::new(1),
        leader: "127.0.0.1:1".into(),
        store: "memory://".into(),
        heartbeat: Duration::from_secs(1),
        suspicion: Duration::from_secs(5),
        nonce_path: "leader/nonce".into(),
        nonce: "n".into(),
        secret: [7; 32],
        admission: false,
    }
}

pub(super) struct FakeNode {
    pub(super) connection: Connection,
    incarnation: String,
    pub(super) slots: u32,
    pub(super) workers: Vec<Worker>,
    pub(super) identity: String,
    pub(super) fingerprint: String,
    pub(super) desired: BTreeMap<JobName, Desired>,
    /// What it holds in memory of the one job.
    pub(super) memory: Inventory,
}

pub(super) struct Rig {
    pub(super) cluster: Pair,
    pub(super) now: Duration,
    pub(super) nodes: BTreeMap<NodeName, FakeNode>,
    /// Store operations not yet answered.
    pub(super) pending: VecDeque<(JobName, Operation)>,
    pub(super) records: Vec<Entry>,
    /// What is to be recorded of nodes, not yet answered.
    pub(super) drained: Option<BTreeSet<NodeName>>,
    /// Of the job most tests are about.
    pub(super) ledger: Option<Ledger>,
    /// Of further jobs.
    pub(super) others: BTreeMap<JobName, Option<Ledger>>,
    /// Of the one job.
    pub(super) events: Vec<JobEvent>,
    pub(super) replies: BTreeMap<RequestId, Result<Answer, Refusal>>,
    pub(super) settled: Vec<(u64, u64, u32, bool)>,
    pub(super) fenced: Option<String>,
    ids: u128,
}

impl Rig {
    pub(super) fn new() -> Self {
        Self {
            cluster: Pair::new(settings()),
            now: Duration::ZERO,
            nodes: BTreeMap::new(),
            pending: VecDeque::new(),
            records: Vec::new(),
            drained: None,
            ledger: None,
            others: BTreeMap::new(),
            events: Vec::new(),
            replies: BTreeMap::new(),
            settled: Vec::new(),
            fenced: None,
            ids: 0,
        }
    }

    /// A rig in which the job runs on one node.
    pub(super) fn running(workers: &str, slots: u32) -> Self {
        let mut rig = Self::new();
        rig.attach("a", slots);
        rig.submit(spec(workers), SubmitMode::New, None);
        rig.settle();
        rig
    }

    fn book(&mut self, job: &JobName) -> &mut Option<Ledger> {
        if *job == job_name() { &mut self.ledger } else { self.others.entry(job.clone()).or_default() }
    }

    fn id(&mut self) -> u128 {
        self.ids += 1;
        self.ids
    }

    pub(super) fn handle(&mut self, event: Event) {
        for action in self.cluster.handle(self.now, event) {
            match action {
                Action::Send { node, connection, body } => self.sent(&node, connection, body),
                Action::Store { job, operation } => {
                    assert!(self.pending.iter().all(|(other, _)| *other != job), "one store operation at a time");
                    self.pending.push_back((job, operation));
                }
                Action::RecordNodes { drained } => {
                    assert!(self.drained.replace(drained).is_none(), "one record of nodes at a time");
                }
                Action::Publish { job, event } if job == job_name() => self.published(event),
                Action::Reply { request, answer } => {
                    assert!(self.replies.insert(request, answer).is_none(), "request {request} answered twice");
                }
                Action::StepDown { reason } => self.fenced = Some(reason),
                Action::Publish { .. } | Action::Reopen { .. } | Action::Log { .. } | Action::Close { .. } => {}
            }
        }
    }

    fn published(&mut self, event: JobEvent) {
        if let JobEvent::Finished { step, digest, .. } = &event {
            let newest = self.ledger.as_ref().unwrap().newest().unwrap();
            assert_eq!((newest.step.get(), &newest.digest), (*step, digest), "finished means stored");
        }
        self.events.push(event);
    }

    fn sent(&mut self, name: &NodeName, connection: Connection, body: Body) {
        match body {
            Body::Desired(desired) => {
                let job = JobName::new(desired.job.clone()).unwrap();
                if let (Some(run), Some(ledger)) = (&desired.run, self.book(&job)) {
                    let persisted = ledger.membership.as_ref().expect("announced means persisted");
                    assert_eq!(run.generation, persisted.generation.get(), "only the newest generation is announced");
                    let members = &persisted.members;
                    assert_eq!(run.world_size as usize, members.len());
                    for placement in &run.placements {
                        assert_eq!(placement.next, members[(placement.rank as usize + 1) % members.len()].address);
                    }
                }
                let Some(node) = self.nodes.get_mut(name) else { return };
                assert_eq!(node.connection, connection);
                let before = node.desired.insert(job, desired.clone());
                assert!(before.is_none_or(|before| before.fenced <= desired.fenced), "fences only rise");
                let total: u32 = node.desired.values().map(|desired| desired.workers).sum();
                assert!(total <= node.slots, "{total} workers on {} slots", node.slots);
            }
            Body::Settled(settled) => {
                self.settled.push((settled.generation, settled.step, settled.rank, settled.committed));
            }
            Body::Welcome(_) | Body::Refused(_) | Body::Probe(_) => {}
        }
    }

    pub(super) fn attach(&mut self, name: &str, slots: u32) {
        let connection = self.id() as u64;
        let fake = FakeNode {
            connection,
            incarnation: connection.to_string(),
            slots,
            workers: Vec::new(),
            identity: "x86-64 avx2".into(),
            fingerprint: "f".into(),
            desired: BTreeMap::new(),
            memory: Inventory::default(),
        };
        self.nodes.insert(node(name), fake);
        self.open(name, 1);
    }

    /// The same agent opens another stream; it may serve its snapshots elsewhere now.
    pub(super) fn reattach(&mut self, name: &str, port: u8) {
        let connection = self.id() as u64;
        let Some(fake) = self.nodes.get_mut(&node(name)) else { return };
        fake.desired.clear();
        fake.connection = connection;
        self.open(name, port);
    }

    fn open(&mut self, name: &str, port: u8) {
        let fake = &self.nodes[&node(name)];
        let (connection, incarnation, slots) = (fake.connection, fake.incarnation.clone(), fake.slots);
        let state = NodeState { workers: fake.workers.clone(), ..NodeState::default() };
        let home = Home { snapshots: format!("{name}:{port}"), domain: String::new(), skew_ms: 0 };
        self.handle(Event::Attached { node: node(name), incarnation, connection, slots, home, state });
    }

    /// The agent and its workers are gone.
    pub(super) fn lose(&mut self, name: &str) {
        if let Some(fake) = self.nodes.remove(&node(name)) {
            self.handle(Event::Detached { node: node(name), connection: fake.connection });
        }
    }

    pub(super) fn report(&mut self, name: &NodeName) {
        let Some(fake) = self.nodes.get(name) else { return };
        let (connection, workers) = (fake.connection, fake.workers.clone());
        let memory = fake.desired.iter().map(|(job, desired)| {
            let run = desired.run.as_ref();
            let fenced = run.map_or(desired.fenced, |run| run.generation.saturating_sub(1));
            (job.clone(), Inventory { fenced: Generation::new(fenced), ..fake.memory.clone() })
        });
        let state = NodeState { workers, epoch: 1, memory: memory.collect(), ..NodeState::default() };
        self.handle(Event::Report { node: name.clone(), connection, state });
    }

    /// Answers the oldest store operation with success.
    pub(super) fn store(&mut self) -> bool {
        let Some((job, operation)) = self.pending.pop_front() else { return false };
        let outcome = match operation {
            Operation::Append(entry) => {
                if let Entry::Submitted { spec, stop_at } = &entry {
                    *self.book(&job) = Some(Ledger::new((**spec).clone(), *stop_at));
                }
                let ledger = self.book(&job).as_mut().unwrap();
                if let Entry::Generation(membership) = &entry {
                    assert!(membership.generation > ledger.generation, "generations only grow");
                    let newest = ledger.newest().map(|newest| newest.step);
                    assert_eq!(membership.start.as_ref().map(|start| start.step), newest, "starts from the newest");
                }
                ledger.apply(&entry);
                self.records.push(entry);
                Outcome::Done
            }
            Operation::Commit { generation, step, receipts, .. } => {
                let ledger = self.book(&job).as_mut().unwrap();
                assert_eq!(generation, ledger.generation, "only the newest generation commits");
                let world = ledger.membership.as_ref().map(|membership| membership.members.len());
                assert_eq!(Some(receipts.len()), world);
                let digest = format!("digest-{step}");
                let reference = format!("{step}-{generation}").into_bytes();
                let checkpoint = Checkpoint { step, generation, digest, bytes: 10, reference };
                ledger.commit(checkpoint.clone());
                Outcome::Committed(Box::new(checkpoint))
            }
            Operation::Retain => Outcome::Collected(vec![]),
            Operation::Change(_) => Outcome::Refused("the rig keeps no checkpoints".into()),
        };
        self.handle(Event::Stored { job, outcome });
        true
    }

    /// Every worker does the next thing it was told, once; returns whether any did.
    pub(super) fn obey(&mut self) -> bool {
        let mut changed = false;
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            let mut ids = self.ids;
            let Some(fake) = self.nodes.get_mut(&name) else { continue };
            let before = fake.workers.clone();
            fake.obey(&mut ids);
            let moved = fake.workers != before;
            self.ids = ids;
            if moved {
                changed = true;
                self.report(&name);
            }
        }
        changed
    }

    /// Lets everybody act until nothing changes.
    pub(super) fn settle(&mut self) {
        for _ in 0..200 {
            let stored = self.store() | self.store_nodes().is_some();
            if !self.obey() && !stored {
                return;
            }
        }
        panic!("the cluster does not settle");
    }

    /// Lets time pass, agents beating.
    pub(super) fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now += TICK;
            for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
                self.report(&name);
            }
            self.handle(Event::Tick);
            self.settle();
        }
    }

    /// Every node of the live generation holds a step in memory, its group's parity too.
    pub(super) fn snapshot(&mut self, step: u64) {
        for (name, fake) in &mut self.nodes {
            let Some(run) = fake.desired.get(&job_name()).and_then(|desired| desired.run.clone()) else { continue };
            let key = (Generation::new(run.generation), Step::new(step));
            let ranks = run.placements.iter().map(|placement| Rank::new(placement.rank)).collect();
            fake.memory.snapshots.insert(key, (WorldSize::new(run.world_size).unwrap(), ranks));
            let group = run.group.unwrap();
            let member =
                |member: &GroupMember| (node(&member.node), member.ranks.iter().map(|r| Rank::new(*r)).collect());
            assert!(group.members.iter().any(|member| node(&member.node) == *name), "it is in its own group");
            if group.parities > 0 {
                let members = group.members.iter().map(member).collect();
                fake.memory.parity.insert(key, Group { members, parities: group.parities as usize });
            }
        }
    }

    /// Brings all members of the live generation to a step, stopping there if told; sends receipts for it.
    pub(super) fn train(&mut self, step: u64) {
        self.train_job(&job_name(), step);
    }

    pub(super) fn train_job(&mut self, job: &JobName, step: u64) {
        let Some((generation, world)) = self.live_of(job) else { return };
        let report = StepReport {
            job: job.to_string(),
            generation,
            step,
            loss: 1.0,
            grad_norm: 1.0,
            seconds: 0.1,
            ..Default::default()
        };
        self.handle(Event::Stepped { job: job.clone(), report });
        for fake in self.nodes.values_mut() {
            let run = fake.desired.get(job).and_then(|desired| desired.run.clone());
            let stop = run.is_some_and(|run| run.stop || step >= run.stop_at);
            let acts = |worker: &&mut Worker| worker.job == *job && worker.phase == WorkerPhase::Running;
            for worker in fake.workers.iter_mut().filter(acts) {
                worker.step = Some(Step::new(step));
                if stop {
                    worker.phase = WorkerPhase::Stopped;
                }
            }
        }
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.report(&name);
        }
        (0..world).for_each(|rank| self.receipt_of(job, generation, step, rank));
        self.settle();
    }

    pub(super) fn receipts(&mut self, generation: u64, step: u64, world: u32) {
        for rank in 0..world {
            self.receipt(generation, step, rank);
        }
    }

    pub(super) fn receipt(&mut self, generation: u64, step: u64, rank: u32) {
        self.receipt_of(&job_name(), generation, step, rank);
    }

    fn receipt_of(&mut self, job: &JobName, generation: u64, step: u64, rank: u32) {
        let name =
            ReceiptName { generation: Generation::new(generation), step: Step::new(step), rank: Rank::new(rank) };
        let Some(from) = self.nodes.keys().next().cloned() else { return };
        let receipt: Arc<[u8]> = Arc::from(&b"{}"[..]);
        let entry = ReceiptEntry { node: from, receipt, stall: 0.001, seconds: 0.1, arrived: Duration::ZERO };
        self.handle(Event::Receipt { job: job.clone(), name, entry });
    }

    /// The announced generation and its size.
    pub(super) fn live(&self) -> Option<(u64, u32)> {
        self.live_of(&job_name())
    }

    pub(super) fn live_of(&self, job: &JobName) -> Option<(u64, u32)> {
        let runs = self.nodes.values().filter_map(|fake| fake.desired.get(job)?.run.as_ref());
        runs.map(|run| (run.generation, run.world_size)).max()
    }

    pub(super) fn ask(&mut self, ask: Ask) -> RequestId {
        let request = self.id() as u64;
        self.handle(Event::Asked { request, ask });
        request
    }

    pub(super) fn submit(&mut self, spec: JobSpec, mode: SubmitMode, stop_at: Option<u64>) -> RequestId {
        self.ask(Ask::Submit { spec: Box::new(spec), mode, stop_at: stop_at.map(Step::new) })
    }

    pub(super) fn kinds(&self) -> Vec<&'static str> {
        let kind = |event: &JobEvent| match event {
            JobEvent::Generation { .. } => "generation",
            JobEvent::Step { .. } => "step",
            JobEvent::Checkpoint { .. } => "checkpoint",
            JobEvent::Failure { .. } => "failure",
            JobEvent::Recovered { .. } => "recovered",
            JobEvent::Quarantined { .. } => "quarantined",
            JobEvent::Finished { .. } => "finished",
            JobEvent::Paused { .. } => "paused",
            JobEvent::Failed { .. } => "failed",
            _ => "other",
        };
        let told = self.events.iter().filter(|event| !matches!(event, JobEvent::Incident(_)));
        told.map(kind).filter(|kind| *kind != "step").collect()
    }

    pub(super) fn forget(&mut self) {
        self.events.clear();
        self.records.clear();
        self.settled.clear();
    }

    /// Nodes as (name, workers that live).
    pub(super) fn alive(&self) -> BTreeSet<(NodeName, WorkerId)> {
        let alive = |worker: &&Worker| worker.phase != WorkerPhase::Exited;
        let all = self.nodes.iter();
        all.flat_map(|(name, fake)| fake.workers.iter().filter(alive).map(|w| (name.clone(), w.id))).collect()
    }
}

impl FakeNode {
    fn obey(&mut self, ids: &mut u128) {
        for (job, desired) in self.desired.clone() {
            let run = desired.run.as_ref();
            let placed = |id: WorkerId| run.and_then(|run| run.placements.iter().find(|p| p.worker == id.to_string()));
            let live = run.map(|run| Generation::new(run.generation));
            self.workers.retain(|w| {
                w.job != job || w.phase != WorkerPhase::Exited || (live.is_some() && w.place.map(|p| p.0) == live)
            });
            let alive =
                |workers: &[Worker]| workers.iter().filter(|w| w.job == job && w.phase != WorkerPhase::Exited).count();
            while alive(&self.workers) > desired.workers as usize {
                let surplus = self.workers.iter().rposition(|w| w.job == job && placed(w.id).is_none());
                let Some(surplus) = surplus else { break };
                self.workers.remove(surplus);
            }
            for worker in self.workers.iter_mut().filter(|worker| worker.job == job) {
                let place = placed(worker.id).zip(live).map(|(p, generation)| (generation, Rank::new(p.rank)));
                worker.follow(place);
            }
            while alive(&self.workers) < desired.workers as usize {
                *ids += 1;
                self.workers.push(self.fresh(&job, *ids));
            }
        }
    }

    fn fresh(&self, job: &JobName, id: u128) -> Worker {
        Worker {
            job: job.clone(),
            id: WorkerId::from_uuid(uuid::Uuid::from_u128(id)),
            phase: WorkerPhase::Starting,
            place: None,
            step: None,
            loss: None,
            ring_address: format!("127.0.0.1:{id}"),
            identity: self.identity.clone(),
            fingerprint: self.fingerprint.clone(),
            failure: None,
            source: "store".into(),
            load: vec![],
            process: 1,
        }
    }
}

impl Worker {
    fn follow(&mut self, place: Option<(Generation, Rank)>) {
        match self.phase {
            WorkerPhase::Starting => self.phase = WorkerPhase::Ready,
            WorkerPhase::Exited => {}
            _ if place.is_none() => {
                (self.phase, self.place, self.failure, self.step) = (WorkerPhase::Ready, None, None, None);
            }
            _ if self.place != place => (self.phase, self.place) = (WorkerPhase::Joining, place),
            WorkerPhase::Joining => self.phase = WorkerPhase::Running,
            _ => {}
        }
    }
}
