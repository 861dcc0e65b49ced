//! Who watches: what lands in the store, what agents obey and what workers do is held against what must always be true.
//!
//! The predicates are the product's own where one process can know enough ([`proto::invariant`], the fold of a chain);
//! here they are fed with what only a simulation knows: everything, at the moment it happens. In words:
//!
//! * *one coordinator*: an epoch has one leader, a record lands only in its place and by an author who has not been
//!   superseded, and no agent obeys an order that was written in a lower epoch than one it has obeyed;
//! * *one live generation per rank*: a worker acts only in a generation, and as a rank, that the chain gives it; a rank
//!   of a generation has one worker, ever; and no worker finishes a step of a generation it was told to leave;
//! * *one content*: a step that is committed has the digest of an undisturbed run, however often it is committed, and
//!   no object or record is ever replaced;
//! * *progress*: when the network is quiet and there are nodes, every checkpoint that is due is stored again after a
//!   while, and the job finishes, with the right digest.

use std::collections::BTreeMap;
use std::time::Duration;

use checkpoint_store::{Digest, Event, History, Record, layout};
use proto::ids::{Epoch, Generation, JobName, Rank, Step, WorkerId};
use proto::invariant::{Conduct, same_content};
use worker::machine::cadence::Tier;

use super::truth::Truth;

/// Quiet time after which every checkpoint that is due is stored.
const HEALED: Duration = Duration::from_secs(10);

/// The simulated job.
pub(crate) fn job() -> JobName {
    JobName::new("sim").expect("a name")
}

/// An event's kind, as its record spells it.
fn kind(event: &Event) -> String {
    let json = serde_json::to_value(event).unwrap_or_default();
    json.get("kind").and_then(serde_json::Value::as_str).unwrap_or("?").to_string()
}

/// Folds the chain for itself and remembers what everybody did.
#[derive(Default)]
pub(crate) struct Oracle {
    history: History,
    members: BTreeMap<(Generation, Rank), WorkerId>,
    commits: Vec<(Step, Digest)>,
    /// What the whole cluster's workers do.
    workers: Conduct,
    /// What each life of an agent obeys.
    agents: BTreeMap<String, Conduct>,
    /// How often each invariant was checked.
    pub(crate) checks: BTreeMap<&'static str, u64>,
}

impl Oracle {
    fn check(&mut self, what: &'static str) {
        *self.checks.entry(what).or_default() += 1;
    }

    /// An object has landed, in the place of another one or not. Returns what it means, for the trace.
    pub(crate) fn landed(&mut self, path: &str, bytes: &[u8], replaced: bool) -> Result<Option<String>, String> {
        self.check("one content");
        if replaced {
            return Err(format!("{path} was replaced by another object"));
        }
        if let Some(number) = layout::record_number(&job(), path) {
            return self.record(path, number, bytes).map(Some);
        }
        let epoch = path.strip_prefix("leader/").and_then(|name| name.strip_suffix(".json"));
        if epoch.is_some() {
            self.check("one coordinator");
        }
        Ok(epoch.map(|epoch| format!("epoch {} is taken", epoch.trim_start_matches('0'))))
    }

    fn record(&mut self, path: &str, number: u64, bytes: &[u8]) -> Result<String, String> {
        self.check("one coordinator");
        let record = Record::parse(path, number, bytes).map_err(|error| error.to_string())?;
        if number != self.history.records {
            return Err(format!("record {number} landed where record {} belongs", self.history.records));
        }
        self.history.apply(&record).map_err(|error| format!("record {number}: {error}"))?;
        let (epoch, generation) = (record.epoch, record.generation);
        let what = match &record.event {
            Event::Generation { generation, members, start, memory, .. } => {
                for member in members {
                    self.members.insert((*generation, member.rank), member.worker);
                }
                let from = memory.map(|point| point.step).or(start.as_ref().map(|start| start.step));
                let tier = if memory.is_some() { "memory" } else { "store" };
                format!("generation {generation} of {} from {:?} in {tier}", members.len(), from.map(Step::get))
            }
            Event::Committed(checkpoint) => {
                self.commits(checkpoint.step, checkpoint.digest)?;
                format!("committed step {} of generation {}", checkpoint.step, checkpoint.generation)
            }
            Event::Finished { step, digest, .. } => {
                self.is_true(*step, *digest)?;
                format!("finished at step {step}")
            }
            other => kind(other),
        };
        Ok(format!("{number} by epoch {epoch} at generation {generation}: {what}"))
    }

    fn commits(&mut self, step: Step, digest: Digest) -> Result<(), String> {
        self.check("one content");
        same_content(self.commits.iter().copied(), step, &digest).map_err(|violation| violation.to_string())?;
        self.commits.push((step, digest));
        self.is_true(step, digest)
    }

    fn is_true(&mut self, step: Step, digest: Digest) -> Result<(), String> {
        self.check("one content");
        if Truth::get().digest(step.get()) == Some(digest) {
            return Ok(());
        }
        Err(format!("step {step} was committed with digest {digest}, which is not the state of an undisturbed run"))
    }

    /// An object is gone.
    pub(crate) fn removed(path: &str) -> Result<(), String> {
        match layout::record_number(&job(), path) {
            Some(number) => Err(format!("record {number} was deleted")),
            None => Ok(()),
        }
    }

    /// A life of an agent has obeyed an order that was written in this epoch.
    pub(crate) fn obeyed(&mut self, life: &str, epoch: u64) -> Result<(), String> {
        self.check("one coordinator");
        let conduct = self.agents.entry(life.to_string()).or_default();
        conduct.obeys(Epoch::new(epoch)).map_err(|violation| format!("{life}: {violation}"))
    }

    /// A worker begins to act, or has finished a step.
    pub(crate) fn acts(&mut self, generation: u64, rank: u32, worker: WorkerId) -> Result<(), String> {
        self.check("one live generation");
        let (generation, rank) = (Generation::new(generation), Rank::new(rank));
        let acts = format!("worker {worker} acts as rank {rank} of generation {generation}");
        match self.members.get(&(generation, rank)) {
            None => return Err(format!("{acts} before the chain says so")),
            Some(member) if *member != worker => return Err(format!("{acts}; the chain gives that rank to {member}")),
            Some(_) => {}
        }
        self.workers.acts(&job(), generation, rank, worker).map_err(|violation| violation.to_string())
    }

    /// A worker was told to leave a generation.
    pub(crate) fn leaves(&mut self, generation: u64, worker: WorkerId) {
        self.workers.leaves(&job(), worker, Generation::new(generation));
    }

    /// What a worker has loaded is what an undisturbed run has.
    pub(crate) fn loaded(&mut self, step: u64, right: bool) -> Result<(), String> {
        self.check("one content");
        if right {
            Ok(())
        } else {
            Err(format!("what was loaded of step {step} is not the state of an undisturbed run"))
        }
    }

    /// A capture found no free slot: long after all is well, one for the store must.
    pub(crate) fn skipped(&mut self, step: u64, tier: Tier, quiet: Option<Duration>) -> Result<(), String> {
        self.check("progress");
        if tier == Tier::Memory || quiet.is_none_or(|quiet| quiet < HEALED) {
            return Ok(());
        }
        Err(format!("no progress: long after all is well no slot is free to store step {step}"))
    }

    /// The job has finished, or should have.
    pub(crate) fn progress(&mut self, finished: bool, state: &str) -> Result<(), String> {
        self.check("progress");
        if finished { Ok(()) } else { Err(format!("no progress: after a long quiet time the job is {state}")) }
    }

    /// Records in the chain, generations, commits, epochs.
    pub(crate) fn totals(&self) -> [u64; 4] {
        let (history, commits) = (&self.history, self.commits.len() as u64);
        [history.records, history.generation.get(), commits, history.epoch.get()]
    }
}
