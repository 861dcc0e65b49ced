//! Messages from outside, checked before they reach the machine.
//!
//! Names become names, counts stay within bounds, and whatever a message leaves open that the machine needs is refused
//! with the reason. Nothing here trusts a peer, though it has shown the token.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use checkpoint_store::parity::MAX_GROUP;
use checkpoint_store::{Change, MAX_STAGES, Receipt, Space};
use proto::ids::{Generation, JobName, NodeName, Rank, Step, WorkerId, WorldSize};
use proto::spec::{JobSpec, SPEC_FORMAT};
use proto::tls::Identity;
use proto::wire::{
    AgentHello, BUILD, CheckpointChange, GroupMember, JobMemory, MOST_STRAGGLERS, NodeReport, ParityGroup, Probed,
    SaveFailed, SaveSkipped, ShardReceipt, StepReport, SubmitMode, SubmitRequest, WorkerPhase, WorkerState,
};

use crate::machine::admission::Finding;
use crate::machine::memory::{Group, Inventory, Room};
use crate::machine::{Ask, Failure, Home, NodeState, ReceiptEntry, ReceiptName, Worker};

/// Workers one node can report.
const MOST_WORKERS: usize = 4096;
/// Bytes of a job's specification.
const MOST_SPEC: usize = 1 << 20;
/// Characters of a text for people.
const MOST_TEXT: usize = 4000;

/// What is wrong with a message.
pub(crate) type Fault = String;

/// A checked hello: node, incarnation, slots, and where and what the node is.
#[derive(Debug)]
pub(crate) struct Hello {
    pub(crate) node: NodeName,
    pub(crate) incarnation: String,
    pub(crate) slots: u32,
    pub(crate) home: Home,
}

/// Checks a hello that came at `now`, in milliseconds of the Unix epoch, if that is known.
pub(crate) fn hello(hello: &AgentHello, now: Option<u64>) -> Result<Hello, Fault> {
    if hello.build != BUILD {
        let theirs: String = hello.build.chars().take(40).collect();
        return Err(format!(
            "this coordinator is cairn {BUILD}, the agent is {theirs:?}: run the same version everywhere"
        ));
    }
    let node = NodeName::new(&hello.node).map_err(|error| error.to_string())?;
    short("incarnation", &hello.incarnation, 64)?;
    if hello.slots == 0 || hello.slots as usize > MOST_WORKERS {
        return Err(format!("{} slots: a node has 1 to {MOST_WORKERS}", hello.slots));
    }
    short("domain", &hello.domain, 64)?;
    let snapshots = hello.snapshots.clone();
    if snapshots.parse::<std::net::SocketAddr>().is_err() {
        return Err(format!("{:?} is no address where snapshots could be read", text(&snapshots)));
    }
    let skew = |(theirs, ours)| i64::try_from(i128::from(theirs) - i128::from(ours)).unwrap_or(i64::MAX);
    let skew_ms = hello.unix_ms.zip(now).map_or(0, skew);
    let home = Home { snapshots, domain: hello.domain.clone(), skew_ms };
    Ok(Hello { node, incarnation: hello.incarnation.clone(), slots: hello.slots, home })
}

/// An agent attaches under the name in its certificate; without TLS there is none.
pub(crate) fn identity(hello: Hello, identity: Option<&Identity>) -> Result<Hello, Fault> {
    match identity.filter(|identity| !identity.may_attach(&hello.node)) {
        None => Ok(hello),
        Some(identity) => Err(format!(
            "the certificate of {identity} does not let it attach as node {}: start it with --node {}, or with a \
             certificate of --role agent --name {}",
            hello.node, identity.name, hello.node
        )),
    }
}

/// A change of a job's checkpoints, well formed; whether it makes sense is for the chain to say.
pub(crate) fn change(request: &CheckpointChange) -> Result<(JobName, Arc<[u8]>), Fault> {
    Change::from_json(&request.change).map_err(|error| error.to_string())?;
    Ok((job(&request.job)?, Arc::from(request.change.as_slice())))
}

pub(crate) fn report(report: NodeReport) -> Result<NodeState, Fault> {
    if report.workers.len() > MOST_WORKERS {
        return Err(format!("a report of {} workers, more than {MOST_WORKERS}", report.workers.len()));
    }
    Ok(NodeState {
        workers: report.workers.into_iter().map(worker).collect::<Result<_, _>>()?,
        epoch: report.epoch,
        draining: report.draining,
        memory: report.memory.into_iter().map(inventory).collect::<Result<_, _>>()?,
        room: Room { budget: report.memory_budget, used: report.memory_used },
    })
}

/// What a node holds of a job.
fn inventory(memory: JobMemory) -> Result<(JobName, Inventory), Fault> {
    if memory.snapshots.len() > MOST_WORKERS || memory.parity.len() > MOST_WORKERS {
        return Err(format!("a report of {} snapshots of one job", memory.snapshots.len()));
    }
    let mut inventory = Inventory { fenced: Generation::new(memory.fenced), ..Inventory::default() };
    inventory.skipped = memory.skipped;
    for held in memory.snapshots {
        let world = WorldSize::new(held.world_size).filter(|world| held.rank < world.get());
        let world = world.ok_or_else(|| format!("a snapshot of rank {} of {} workers", held.rank, held.world_size))?;
        let key = (Generation::new(held.generation), Step::new(held.step));
        let entry = inventory.snapshots.entry(key).or_insert_with(|| (world, BTreeSet::new()));
        if entry.0 != world {
            return Err(format!("snapshots of step {} of two world sizes", held.step));
        }
        entry.1.insert(Rank::new(held.rank));
    }
    for held in memory.parity {
        let key = (Generation::new(held.generation), Step::new(held.step));
        inventory.parity.insert(key, group(held.group.unwrap_or_default())?);
    }
    Ok((job(&memory.job)?, inventory))
}

fn group(group: ParityGroup) -> Result<Group, Fault> {
    if group.members.len() > MAX_GROUP || group.parities as usize >= group.members.len() {
        return Err(format!("a parity group of {} nodes with {} parities", group.members.len(), group.parities));
    }
    let member = |member: GroupMember| {
        if member.ranks.len() > MOST_WORKERS {
            return Err(format!("a member of a parity group with {} ranks", member.ranks.len()));
        }
        let node = NodeName::new(&member.node).map_err(|error| error.to_string())?;
        Ok((node, member.ranks.into_iter().map(Rank::new).collect()))
    };
    let members = group.members.into_iter().map(member).collect::<Result<_, Fault>>()?;
    Ok(Group { members, parities: group.parities as usize })
}

fn worker(state: WorkerState) -> Result<Worker, Fault> {
    let phase = WorkerPhase::try_from(state.phase).unwrap_or_default();
    if phase == WorkerPhase::Unspecified {
        return Err(format!("worker {} has no known phase ({})", text(&state.worker), state.phase));
    }
    let ended = matches!(phase, WorkerPhase::Failed | WorkerPhase::Exited);
    let rank = state.rank.or(ended.then_some(0));
    let place = state.generation.zip(rank).map(|(g, r)| (Generation::new(g), Rank::new(r)));
    let acting = matches!(phase, WorkerPhase::Joining | WorkerPhase::Running | WorkerPhase::Stopped);
    if acting && place.is_none() {
        return Err(format!("worker {} is {phase:?} without generation and rank", text(&state.worker)));
    }
    if phase == WorkerPhase::Ready && state.ring_address.is_empty() {
        return Err(format!("worker {} is ready without a ring address", text(&state.worker)));
    }
    for (what, value, most) in [
        ("ring_address", &state.ring_address, 256),
        ("numeric_identity", &state.numeric_identity, 4096),
        ("data_fingerprint", &state.data_fingerprint, 256),
        ("source", &state.source, 64),
    ] {
        short(what, value, most)?;
    }
    if state.load.len() > MAX_STAGES {
        return Err(format!("a load of {} stages, more than {MAX_STAGES}", state.load.len()));
    }
    for stage in &state.load {
        short("a stage's name", &stage.name, 32)?;
        seconds("a stage", stage.seconds)?;
    }
    let failure = state.failure.map(|failure| Failure {
        kind: failure.kind(),
        reason: text(&failure.reason),
        exit: (failure.exit_code, failure.signal),
        moved: failure.ring_sent.zip(failure.ring_received),
    });
    Ok(Worker {
        job: job(&state.job)?,
        id: state.worker.parse::<WorkerId>().map_err(|_| format!("worker id {:?} is no UUID", text(&state.worker)))?,
        phase,
        place,
        step: state.step.map(Step::new),
        loss: state.loss,
        ring_address: state.ring_address,
        identity: state.numeric_identity,
        fingerprint: state.data_fingerprint,
        failure,
        source: state.source,
        load: state.load,
        process: state.process,
    })
}

pub(crate) fn job(name: &str) -> Result<JobName, Fault> {
    JobName::new(name).map_err(|error| error.to_string())
}

/// A text for people, of bounded length.
fn text(value: &str) -> String {
    value.chars().take(MOST_TEXT).collect()
}

fn short(what: &str, value: &str, most: usize) -> Result<(), Fault> {
    if value.len() <= most { Ok(()) } else { Err(format!("{what} has {} bytes, more than {most}", value.len())) }
}

fn seconds(what: &str, value: f64) -> Result<f64, Fault> {
    if value.is_finite() && value >= 0.0 { Ok(value) } else { Err(format!("{what} of {value} seconds")) }
}

pub(crate) fn step(report: &StepReport) -> Result<JobName, Fault> {
    seconds("a step", report.seconds)?;
    let stragglers = &report.stragglers;
    if stragglers.len() > MOST_STRAGGLERS {
        return Err(format!("{} stragglers of a step, more than {MOST_STRAGGLERS}", stragglers.len()));
    }
    if let Some(of) = stragglers.iter().find(|of| !of.ratio.is_finite() || of.ratio < 0.0) {
        return Err(format!("rank {} is {} times as slow as the median, which is no ratio", of.rank, of.ratio));
    }
    job(&report.job)
}

pub(crate) fn skipped(message: &SaveSkipped) -> Result<(JobName, ReceiptName, String), Fault> {
    let name = ReceiptName {
        generation: Generation::new(message.generation),
        step: Step::new(message.step),
        rank: Rank::new(message.rank),
    };
    Ok((job(&message.job)?, name, text(&message.reason)))
}

/// What two nodes found when they exchanged data.
pub(crate) fn probed(message: Probed) -> Result<(u64, Finding), Fault> {
    let finding = match message.bytes_per_second {
        Some(rate) if rate.is_finite() && rate >= 0.0 => Finding::Rate(rate),
        Some(rate) => return Err(format!("an exchange of {rate} bytes a second")),
        None => Finding::Failed(text(&message.failure)),
    };
    Ok((message.round, finding))
}

/// A failed try to store a shard, in words.
pub(crate) fn failed(node: &NodeName, message: &SaveFailed) -> Result<(JobName, String), Fault> {
    let SaveFailed { step, rank, failures, reason, .. } = message;
    let words = format!(
        "node {node} could not store rank {rank}'s part of step {step} ({failures} times now, it goes on): {}",
        text(reason)
    );
    Ok((job(&message.job)?, words))
}

/// A receipt must say inside what it says outside; whether the set makes a checkpoint is judged at the commit.
pub(crate) fn receipt(node: &NodeName, message: ShardReceipt) -> Result<(JobName, ReceiptName, ReceiptEntry), Fault> {
    let inside = Receipt::from_bytes(&message.receipt).map_err(|error| error.to_string())?;
    let name = ReceiptName {
        generation: Generation::new(message.generation),
        step: Step::new(message.step),
        rank: Rank::new(message.rank),
    };
    let job = job(&message.job)?;
    if (&inside.job, inside.generation, inside.step(), inside.rank) != (&job, name.generation, name.step, name.rank) {
        return Err(format!("a receipt of job {job} that says something else inside than outside"));
    }
    let entry = ReceiptEntry {
        node: node.clone(),
        receipt: Arc::from(message.receipt),
        stall: seconds("a stall", message.stall_seconds)?,
        seconds: seconds("an upload", message.seconds)?,
        arrived: Duration::ZERO,
    };
    Ok((job, name, entry))
}

/// A submission, its specification checked again as a whole.
pub(crate) fn submit(request: &SubmitRequest) -> Result<Ask, Fault> {
    if request.spec.len() > MOST_SPEC {
        return Err(format!("a specification of {} bytes, more than {MOST_SPEC}", request.spec.len()));
    }
    let spec: JobSpec =
        serde_json::from_slice(&request.spec).map_err(|error| format!("the specification cannot be read: {error}"))?;
    if spec.format != SPEC_FORMAT {
        return Err(format!("the specification has format {}, this coordinator reads {SPEC_FORMAT}", spec.format));
    }
    spec.validate_new("job").map_err(|error| error.to_string())?;
    Space::of_model(&spec.model).map_err(|error| format!("job: [model] is too large: {error}"))?;
    let mode =
        SubmitMode::try_from(request.mode).map_err(|_| format!("unknown mode {} of submission", request.mode))?;
    if request.stop_at.is_some_and(|stop_at| stop_at == 0 || stop_at > spec.training.steps) {
        let steps = spec.training.steps;
        return Err(format!("stop_at is {}, but must be 1 to training.steps = {steps}", request.stop_at.unwrap_or(0)));
    }
    Ok(Ask::Submit { spec: Box::new(spec), mode, stop_at: request.stop_at.map(Step::new) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> WorkerState {
        let worker = uuid::Uuid::nil().to_string();
        WorkerState { job: "a".into(), worker, phase: WorkerPhase::Starting.into(), ..Default::default() }
    }

    #[test]
    fn states_that_make_no_sense_are_refused() {
        assert!(worker(state()).is_ok());
        let bad = [
            WorkerState { job: "../a".into(), ..state() },
            WorkerState { worker: "1".into(), ..state() },
            WorkerState { phase: 99, ..state() },
            WorkerState { phase: WorkerPhase::Running.into(), ..state() },
            WorkerState { phase: WorkerPhase::Ready.into(), ..state() },
            WorkerState { numeric_identity: "x".repeat(5000), ..state() },
        ];
        for state in bad {
            assert!(worker(state.clone()).is_err(), "{state:?}");
        }
        let exited = WorkerState { phase: WorkerPhase::Exited.into(), generation: Some(3), ..state() };
        assert_eq!(worker(exited).unwrap().place, Some((Generation::new(3), Rank::new(0))));
    }

    #[test]
    fn inventories_that_make_no_sense_are_refused() {
        let held = proto::wire::HeldSnapshot { generation: 1, step: 2, rank: 0, world_size: 2, hash: vec![] };
        let memory = |snapshots| JobMemory { job: "a".into(), snapshots, ..Default::default() };
        assert_eq!(inventory(memory(vec![held.clone()])).unwrap().1.snapshots.len(), 1);
        let other = proto::wire::HeldSnapshot { rank: 2, ..held.clone() };
        assert!(inventory(memory(vec![other])).is_err());
        let other = proto::wire::HeldSnapshot { world_size: 3, ..held.clone() };
        assert!(inventory(memory(vec![held, other])).is_err());
        let members = vec![GroupMember { node: "a".into(), ..Default::default() }; 9];
        assert!(group(ParityGroup { members: members.clone(), parities: 1 }).is_err());
        assert!(group(ParityGroup { members: members[..2].to_vec(), parities: 2 }).is_err());
        assert!(group(ParityGroup { members: members[..2].to_vec(), parities: 1 }).is_ok());
    }

    #[test]
    fn hostile_requests_are_refused() {
        for spec in [&b"{"[..], b"{}", b"[[[[[[[[", &vec![b' '; MOST_SPEC + 1]] {
            assert!(submit(&SubmitRequest { spec: spec.to_vec(), ..Default::default() }).is_err());
        }
        let job = "name = \"a\"\nmodel = { preset = \"tiny\" }\ndata.train = \"d\"\ntraining.steps = 2\n";
        let mut spec = JobSpec::parse("job", job, std::path::Path::new("/"), &proto::spec::Overrides::new()).unwrap();
        let ask =
            |spec: &JobSpec| submit(&SubmitRequest { spec: serde_json::to_vec(spec).unwrap(), ..Default::default() });
        assert!(ask(&spec).is_ok());
        (spec.model.hidden_size, spec.model.intermediate_size) = (1 << 24, 1 << 24);
        assert!(ask(&spec).unwrap_err().contains("[model] is too large"));
        let snapshots = "127.0.0.1:1".to_string();
        let hello = |build: &str, slots| AgentHello {
            node: "n".into(),
            build: build.into(),
            slots,
            snapshots: snapshots.clone(),
            ..Default::default()
        };
        assert!(super::hello(&AgentHello { snapshots: "x".into(), ..hello(BUILD, 1) }, None).is_err());
        assert!(super::hello(&hello(BUILD, 1), None).is_ok());
        assert!(super::hello(&hello("0.0.0", 1), None).unwrap_err().contains("same version"));
        assert!(super::hello(&hello(BUILD, 0), None).is_err());
        let skew = |theirs| {
            super::hello(&AgentHello { unix_ms: theirs, ..hello(BUILD, 1) }, Some(5_000)).unwrap().home.skew_ms
        };
        assert_eq!((skew(Some(3_000)), skew(None), skew(Some(u64::MAX))), (-2_000, 0, i64::MAX));
    }
}
