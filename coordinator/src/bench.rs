//! A cluster of simulated agents around the real machine, for `cairn bench coordinator`.
//!
//! What the coordinator does with a message from socket to socket is done here as in a running one: the bytes are
//! decoded and checked, the machine handles the event, what it sends is encoded. Left out are the frames of gRPC, TLS,
//! the runtime's tasks and the store, whose operations succeed at once. Agents do what they are told, but only when
//! [`Simulation::obey`] is called, so that making their messages is not taken for the coordinator's work. No clock is
//! read: the caller takes the time of each phase.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use prost::Message;
use proto::ids::{Epoch, NodeName};
use proto::spec::{JobSpec, detect};
use proto::wire::agent_message::Body as FromAgent;
use proto::wire::coordinator_message::Body as ToAgent;
use proto::wire::{
    AgentHello, AgentMessage, Announcement, BUILD, CoordinatorMessage, Desired, HeldParity, HeldSnapshot, JobMemory,
    NodeReport, StepReport, SubmitMode, WorkerPhase, WorkerState,
};
use uuid::Uuid;

use crate::machine::{Action, Ask, Cluster, Connection, Event, Operation, Outcome, Settings};
use crate::metrics::Metrics;
use crate::{HEARTBEAT, SUSPICION, check, service};

/// Ticks in a second.
const TICKS: usize = 10;
/// Ticks within which a node whose stream has closed is given up.
const PATIENCE: usize = 30;
const EPOCH: u64 = 1;

/// What was sent to agents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Messages.
    pub messages: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Those that announce a generation.
    pub announcements: usize,
    /// Bytes of the longest of these, of the announcement alone.
    pub longest: usize,
    /// Members of the newest generation that was announced.
    pub world: u32,
}

struct Agent {
    node: NodeName,
    connection: Connection,
    workers: Vec<WorkerState>,
    memory: JobMemory,
    desired: Option<Desired>,
}

/// See the module header.
pub struct Simulation {
    cluster: Cluster,
    metrics: Metrics,
    now: Duration,
    spec: JobSpec,
    slots: u32,
    agents: Vec<Agent>,
    at: BTreeMap<NodeName, usize>,
    /// Messages on their way to the coordinator: whose, and their bytes.
    inbox: VecDeque<(usize, Vec<u8>)>,
    sent: Sent,
    step: u64,
}

impl Simulation {
    /// So many agents with so many slots each, not attached yet, and a job that takes all they have.
    pub fn new(agents: u32, slots: u32, spec: JobSpec) -> Result<Self, String> {
        let settings = Settings {
            epoch: Epoch::new(EPOCH),
            leader: "127.0.0.1:7070".into(),
            store: "memory://".into(),
            heartbeat: HEARTBEAT,
            suspicion: SUSPICION,
            nonce_path: "leader/nonce".into(),
            nonce: "nonce".into(),
            secret: [7; 32],
            // What nodes exchange is not the coordinator's work.
            admission: false,
        };
        let job = spec.name.to_string();
        let agent = |at: u32| -> Result<Agent, String> {
            let node = NodeName::new(format!("node-{at:05}")).map_err(|error| error.to_string())?;
            let memory = JobMemory { job: job.clone(), ..JobMemory::default() };
            Ok(Agent { node, connection: u64::from(at), workers: Vec::new(), memory, desired: None })
        };
        let agents: Vec<Agent> = (0..agents).map(agent).collect::<Result<_, _>>()?;
        Ok(Self {
            cluster: Cluster::new(settings),
            metrics: Metrics::default(),
            now: Duration::ZERO,
            spec,
            slots,
            at: agents.iter().enumerate().map(|(at, agent)| (agent.node.clone(), at)).collect(),
            agents,
            inbox: VecDeque::new(),
            sent: Sent::default(),
            step: 0,
        })
    }

    /// All agents attach; racks of 64 nodes.
    pub fn attach(&mut self) -> Result<Sent, String> {
        for at in 0..self.agents.len() {
            let agent = &self.agents[at];
            let hello = AgentHello {
                node: agent.node.to_string(),
                incarnation: at.to_string(),
                slots: self.slots,
                build: BUILD.into(),
                report: None,
                snapshots: address(at, 0),
                domain: format!("rack-{:03}", at / 64),
                unix_ms: None,
            };
            let hello = check::hello(&hello, None)?;
            let state = check::report(NodeReport::default())?;
            let (connection, slots) = (agent.connection, hello.slots);
            let (node, incarnation, home) = (hello.node, hello.incarnation, hello.home);
            self.handle(Event::Attached { node, incarnation, connection, slots, home, state })?;
        }
        Ok(std::mem::take(&mut self.sent))
    }

    /// The job is submitted, and all agents are told to prepare workers.
    pub fn submit(&mut self) -> Result<Sent, String> {
        let spec = Box::new(self.spec.clone());
        let ask = Ask::Submit { spec, mode: SubmitMode::New, stop_at: None };
        self.handle(Event::Asked { request: 1, ask })?;
        Ok(std::mem::take(&mut self.sent))
    }

    /// Every agent does what it was told and has a report on its way; returns how many. Those in a generation take a
    /// step, which they then hold in memory beside the one before, with the parity of both.
    pub fn obey(&mut self) -> usize {
        self.step += 1;
        for (at, agent) in self.agents.iter_mut().enumerate() {
            let Some(desired) = agent.desired.clone() else { continue };
            agent.prepare(at, &desired);
            match &desired.run {
                Some(run) => agent.act(run, self.step),
                None => agent.memory.fenced = desired.fenced,
            }
            let report = NodeReport {
                workers: agent.workers.clone(),
                epoch: EPOCH,
                memory: vec![agent.memory.clone()],
                ..NodeReport::default()
            };
            self.inbox.push_back((at, AgentMessage { body: Some(FromAgent::Report(report)) }.encode_to_vec()));
        }
        self.inbox.len()
    }

    /// So many of the messages on their way arrive.
    pub fn deliver(&mut self, messages: usize) -> Result<Sent, String> {
        for (at, bytes) in self.inbox.drain(..messages.min(self.inbox.len())).collect::<Vec<_>>() {
            let message = AgentMessage::decode(bytes.as_slice()).map_err(|error| error.to_string())?;
            let agent = &self.agents[at];
            let event = service::event(&agent.node, agent.connection, message)?;
            if let Event::Report { node, state, .. } = &event {
                self.metrics.reported(node, state);
            }
            self.handle(event)?;
        }
        Ok(std::mem::take(&mut self.sent))
    }

    /// A second passes: all messages on their way arrive, spread over it, and rank 0 reports its step.
    pub fn beat(&mut self) -> Result<Sent, String> {
        let (each, mut sent) = (self.inbox.len().div_ceil(TICKS), Sent::default());
        let run = self.agents.iter().find_map(|agent| agent.desired.as_ref()?.run.as_ref());
        let report = StepReport {
            job: self.spec.name.to_string(),
            generation: run.map_or(0, |run| run.generation),
            step: self.step,
            loss: 1.0,
            grad_norm: 1.0,
            seconds: 1.0,
            ..StepReport::default()
        };
        self.handle(Event::Stepped { job: self.spec.name.clone(), report })?;
        for _ in 0..TICKS {
            sent.add(self.deliver(each)?);
            self.tick()?;
        }
        sent.add(std::mem::take(&mut self.sent));
        Ok(sent)
    }

    /// The last node's agent is gone, and the rest are told so when it does not come back.
    pub fn lose(&mut self) -> Result<Sent, String> {
        let Some(gone) = self.agents.pop() else { return Err("no node is left to be lost".into()) };
        self.handle(Event::Detached { node: gone.node, connection: gone.connection })?;
        for _ in 0..PATIENCE {
            self.tick()?;
            if self.sent.messages >= self.agents.len() {
                break;
            }
        }
        Ok(std::mem::take(&mut self.sent))
    }

    fn tick(&mut self) -> Result<(), String> {
        self.now += detect::TICK;
        self.handle(Event::Tick)
    }

    /// Performs what the machine wants, as the driver does.
    fn handle(&mut self, event: Event) -> Result<(), String> {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.cluster.handle(self.now, event) {
                match action {
                    Action::Send { node, body, .. } => self.send(&node, body),
                    Action::Store { job, operation } => {
                        let outcome = match operation {
                            Operation::Append(_) => Outcome::Done,
                            Operation::Retain => Outcome::Collected(Vec::new()),
                            other => return Err(format!("nobody saves or changes here, but it wants {other:?}")),
                        };
                        events.push_back(Event::Stored { job, outcome });
                    }
                    Action::Reply { answer: Err(refusal), .. } => return Err(format!("it refuses: {refusal:?}")),
                    Action::StepDown { reason } => return Err(reason),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, node: &NodeName, body: ToAgent) {
        let message = CoordinatorMessage { epoch: EPOCH, body: Some(body) };
        self.sent.messages += 1;
        self.sent.bytes += std::hint::black_box(message.encode_to_vec()).len();
        let Some(ToAgent::Desired(desired)) = message.body else { return };
        if let Some(run) = &desired.run {
            self.sent.announcements += 1;
            self.sent.longest = self.sent.longest.max(run.encoded_len());
            self.sent.world = run.world_size;
        }
        if let Some(agent) = self.at.get(node).and_then(|at| self.agents.get_mut(*at)) {
            agent.desired = Some(desired);
        }
    }
}

impl Sent {
    /// Counts what was sent later too.
    pub fn add(&mut self, later: Self) {
        self.messages += later.messages;
        self.bytes += later.bytes;
        self.announcements += later.announcements;
        self.longest = self.longest.max(later.longest);
        self.world = self.world.max(later.world);
    }
}

impl Agent {
    /// Has as many workers as wanted; those in no generation are ready.
    fn prepare(&mut self, at: usize, desired: &Desired) {
        self.workers.truncate(desired.workers as usize);
        for worker in self.workers.iter_mut().filter(|_| desired.run.is_none()) {
            (worker.generation, worker.rank, worker.step) = (None, None, None);
            worker.set_phase(WorkerPhase::Ready);
        }
        for slot in self.workers.len()..desired.workers as usize {
            let id = Uuid::from_u128(((at as u128) << 16) + slot as u128 + 1);
            let mut worker = WorkerState {
                job: desired.job.clone(),
                worker: id.to_string(),
                ring_address: address(at, slot + 1),
                numeric_identity: "cpu x86-64 avx512 fma".into(),
                data_fingerprint: "d1f2e3c4".repeat(8),
                process: 4_000 + slot as u32,
                ..WorkerState::default()
            };
            worker.set_phase(WorkerPhase::Ready);
            self.workers.push(worker);
        }
    }

    /// Takes a step in its generation and keeps it and the one before.
    fn act(&mut self, run: &Announcement, step: u64) {
        for placement in &run.placements {
            let mine = self.workers.iter_mut().find(|worker| worker.worker == placement.worker);
            let Some(worker) = mine else { continue };
            (worker.generation, worker.rank) = (Some(run.generation), Some(placement.rank));
            (worker.step, worker.loss, worker.source) = (Some(step), Some(1.0), "memory".into());
            worker.set_phase(WorkerPhase::Running);
        }
        let held = |step: u64| {
            run.placements.iter().map(move |placement| HeldSnapshot {
                generation: run.generation,
                step,
                rank: placement.rank,
                world_size: run.world_size,
                hash: vec![7; 32],
            })
        };
        let steps = step.saturating_sub(1).max(1)..=step;
        self.memory.snapshots = steps.clone().flat_map(held).collect();
        let parity = |step| HeldParity { generation: run.generation, step, group: run.group.clone() };
        let with_parity = run.group.as_ref().is_some_and(|group| group.parities > 0);
        self.memory.parity = steps.filter(|_| with_parity).map(parity).collect();
        self.memory.fenced = run.generation.saturating_sub(1);
    }
}

/// Where something of a node listens.
fn address(at: usize, port: usize) -> String {
    format!("10.{}.{}.{}:{}", at >> 16 & 255, at >> 8 & 255, at & 255, 40_000 + port)
}

#[cfg(test)]
mod tests {
    use proto::spec::Overrides;

    use super::*;

    fn simulation(agents: u32) -> Simulation {
        let workers = agents * 8;
        let text = format!(
            "name = \"bench\"\nmodel.preset = \"tiny\"\ndata.train = \"synthetic\"\ntraining.steps = 100\n\
             training.global_batch = {workers}\ntraining.micro_batch = 1\n\
             resources.workers = {{ min = 1, max = {workers} }}\n"
        );
        let spec = JobSpec::parse("test", &text, std::path::Path::new("/"), &Overrides::new()).unwrap();
        Simulation::new(agents, 8, spec).unwrap()
    }

    #[test]
    fn nobody_is_told_anything_twice() {
        let mut simulation = simulation(50);
        assert_eq!(simulation.attach().unwrap().messages, 50, "a welcome each");
        assert_eq!(simulation.submit().unwrap().messages, 50, "how many workers to prepare");
        assert_eq!(simulation.obey(), 50);
        assert_eq!(simulation.deliver(49).unwrap(), Sent::default(), "one node's workers are missing");
        let agreed = simulation.deliver(1).unwrap();
        assert_eq!((agreed.messages, agreed.announcements, agreed.world), (50, 50, 400));
        for _ in 0..3 {
            assert_eq!(simulation.obey(), 50);
            assert_eq!(simulation.beat().unwrap(), Sent::default(), "a heartbeat is no reason to say anything");
        }
        let fenced = simulation.lose().unwrap();
        assert_eq!((fenced.messages, fenced.announcements), (49, 0));
        assert_eq!(simulation.obey(), 49);
        assert_eq!(simulation.deliver(48).unwrap(), Sent::default());
        let again = simulation.deliver(1).unwrap();
        assert_eq!((again.messages, again.announcements, again.world), (49, 49, 392));
        assert!(again.longest <= 16 << 10, "{} bytes", again.longest);
    }
}
