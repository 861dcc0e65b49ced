//! The machine's edges: what can happen to it and what it wants done.
//!
//! Events are checked by the services before they get here; actions are performed by the driver in the order given.

use std::collections::BTreeSet;
use std::sync::Arc;

use proto::event::JobEvent;
use proto::ids::{Generation, JobName, NodeName, Step};
use proto::spec::JobSpec;
use proto::wire::coordinator_message::Body;
use proto::wire::{IncidentsReply, JobStatus, NodeStatus, StepReport, SubmitMode};

use super::admission::Finding;
use super::commit::{ReceiptEntry, ReceiptName};
use super::ledger::{Checkpoint, Entry, Ledger};
use super::members::{Connection, Home, NodeState};

/// Names a request of an operator, to be answered once.
pub type RequestId = u64;

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A job was found in the store at start.
    Loaded {
        /// The job.
        job: JobName,
        /// The fold of its chain.
        ledger: Box<Ledger>,
    },
    /// A job was found in the store whose history cannot be read.
    Unreadable {
        /// The job.
        job: JobName,
        /// What is wrong.
        reason: String,
    },
    /// What earlier coordinators have recorded of nodes was found in the store at start.
    NodesLoaded {
        /// Those that are to be empty.
        drained: BTreeSet<NodeName>,
    },
    /// What was to be recorded of nodes is, or is not.
    NodesRecorded {
        /// How.
        outcome: Outcome,
    },
    /// An agent opened a stream.
    Attached {
        /// Its node.
        node: NodeName,
        /// One life of the agent.
        incarnation: String,
        /// The stream.
        connection: Connection,
        /// How many workers it can run.
        slots: u32,
        /// Where and what it is.
        home: Home,
        /// Everything about it.
        state: NodeState,
    },
    /// An agent reported.
    Report {
        /// Its node.
        node: NodeName,
        /// The stream.
        connection: Connection,
        /// Everything about it.
        state: NodeState,
    },
    /// An agent's stream closed.
    Detached {
        /// Its node.
        node: NodeName,
        /// The stream.
        connection: Connection,
    },
    /// A pair of nodes has exchanged data, or could not.
    Probed {
        /// The one that began.
        node: NodeName,
        /// The pairing.
        round: u64,
        /// What came of it.
        finding: Finding,
    },
    /// A step was finished.
    Stepped {
        /// The job.
        job: JobName,
        /// Loss and rate.
        report: StepReport,
    },
    /// A shard is durable; `entry.arrived` is set by the machine.
    Receipt {
        /// The job.
        job: JobName,
        /// Which receipt.
        name: ReceiptName,
        /// Its content.
        entry: ReceiptEntry,
    },
    /// A rank skipped a stored checkpoint.
    Skipped {
        /// The job.
        job: JobName,
        /// Which one.
        name: ReceiptName,
        /// Why; empty: storage is slower than the cadence.
        reason: String,
    },
    /// A try to store a shard failed; it goes on.
    SaveFailed {
        /// The job.
        job: JobName,
        /// What failed, for people.
        text: String,
    },
    /// A store operation ended.
    Stored {
        /// The job.
        job: JobName,
        /// How.
        outcome: Outcome,
    },
    /// An operator asks.
    Asked {
        /// To answer by.
        request: RequestId,
        /// What.
        ask: Ask,
    },
    /// Time passed.
    Tick,
}

/// How a store operation ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The record is in the chain, or the collection is done.
    Done,
    /// The checkpoint is committed.
    Committed(Box<Checkpoint>),
    /// Retention is done: what is gone.
    Collected(Vec<(Step, Generation)>),
    /// A change of the checkpoints is done.
    Changed(Changed),
    /// A change that makes no sense; nothing was done.
    Refused(String),
    /// It did not work but may later.
    Failed(String),
    /// It can never work: these receipts make no checkpoint.
    Impossible(String),
    /// The job that was to be new is in the store already, as a record that landed late may have left it: its ledger.
    Found(Box<Ledger>),
    /// Someone else wrote to the chain: this coordinator no longer leads.
    Lost(String),
}

/// What a change of a job's checkpoints has done.
#[derive(Debug, Clone, Default)]
pub struct Changed {
    /// JSON of the store's report, for who asked.
    pub report: Vec<u8>,
    /// Checkpoints no generation can start from any more.
    pub gone: Vec<(Step, Generation)>,
    /// The one of them that was found damaged, and how.
    pub quarantined: Option<(Step, String)>,
}

/// A request of an operator.
#[derive(Debug, Clone)]
pub enum Ask {
    /// Run a job.
    Submit {
        /// What is asked; valid.
        spec: Box<JobSpec>,
        /// What if the store holds it already.
        mode: SubmitMode,
        /// Pause after this step.
        stop_at: Option<Step>,
    },
    /// All jobs.
    List,
    /// One job.
    Status(JobName),
    /// At most this many workers.
    Scale(JobName, u32),
    /// Save and stop.
    Pause(JobName),
    /// Go on.
    Resume(JobName),
    /// End for good.
    Cancel(JobName),
    /// Change what is known of its checkpoints: JSON of the store's change.
    Change(JobName, Arc<[u8]>),
    /// What went wrong with a job.
    Incidents(JobName),
    /// All nodes.
    Nodes,
    /// Empty a node (`true`), or use it again.
    Drain(NodeName, bool),
}

/// An answer to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The job is taken, or had already finished.
    Submitted {
        /// Nothing was started.
        finished: bool,
    },
    /// One job.
    Status(Box<JobStatus>),
    /// All jobs.
    List(Vec<JobStatus>),
    /// What a change of checkpoints has done: JSON of the store's report.
    Changed(Vec<u8>),
    /// What went wrong with a job.
    Incidents(Box<IncidentsReply>),
    /// One node.
    Node(Box<NodeStatus>),
    /// All nodes.
    Nodes(Vec<NodeStatus>),
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The request is wrong in itself.
    Invalid(String),
    /// The job is not in a state for it.
    Precondition(String),
    /// No such job.
    NotFound(String),
    /// The data it needs is corrupt or missing.
    DataLoss(String),
    /// Try again.
    Unavailable(String),
}

/// An operation on a job's part of the store. At most one per job is under way.
#[derive(Debug, Clone, PartialEq)]
pub enum Operation {
    /// Append a record to the chain.
    Append(Entry),
    /// Write the manifest of this complete set and append its commit record.
    Commit {
        /// The generation that saved it.
        generation: Generation,
        /// The step.
        step: Step,
        /// All ranks' receipts, in rank order.
        receipts: Vec<Arc<[u8]>>,
        /// The loss on the held-out set at this step, if it was measured.
        validation_loss: Option<f64>,
    },
    /// Collect what the job's policy no longer keeps.
    Retain,
    /// Change what is known of the checkpoints: JSON of the store's change.
    Change(Arc<[u8]>),
}

/// Something to be done.
#[derive(Debug)]
pub enum Action {
    /// Close an agent's stream, so that it attaches anew.
    Close {
        /// The stream.
        connection: Connection,
    },
    /// Tell an agent.
    Send {
        /// Its node.
        node: NodeName,
        /// Its stream.
        connection: Connection,
        /// What.
        body: Body,
    },
    /// Work on a job's part of the store and report `Stored`.
    Store {
        /// The job.
        job: JobName,
        /// What.
        operation: Operation,
    },
    /// Record that these nodes are to be empty, and no others, and report `NodesRecorded`. One at a time.
    RecordNodes {
        /// Their names.
        drained: BTreeSet<NodeName>,
    },
    /// Tell the job's watchers.
    Publish {
        /// The job.
        job: JobName,
        /// What.
        event: JobEvent,
    },
    /// Watchers from now on see only what follows.
    Reopen {
        /// The job.
        job: JobName,
    },
    /// Answer an operator.
    Reply {
        /// The request.
        request: RequestId,
        /// The answer.
        answer: Result<Answer, Refusal>,
    },
    /// A decision and its reason.
    Log {
        /// The job, if it is about one.
        job: Option<JobName>,
        /// In words.
        text: String,
    },
    /// Stop acting: another coordinator leads.
    StepDown {
        /// How that is known.
        reason: String,
    },
}
