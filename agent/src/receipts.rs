//! What waits for the coordinator: receipts until they are settled, step reports until there is a stream.
//!
//! A receipt says that a shard is durable; losing one would lose a checkpoint, so it is kept and resent until the
//! coordinator answers. Step reports are for people: the newest few thousand are kept, older ones dropped.

use std::collections::{BTreeMap, VecDeque};

use proto::ids::JobName;
use proto::wire;

/// Reports remembered after they were handed to a stream: those of the seconds in which nobody notices that the other
/// end has fallen silent.
const MOST_HANDED: usize = 1024;
/// Step reports kept while there is no coordinator.
const MOST_STEPS: usize = 4096;

/// One rank's save.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SaveKey {
    /// The job.
    pub(crate) job: JobName,
    /// The generation that captured it.
    pub(crate) generation: u64,
    /// The step.
    pub(crate) step: u64,
    /// Whose shard.
    pub(crate) rank: u32,
}

impl SaveKey {
    /// The save a settlement speaks of; `None` if its job's name is none.
    pub(crate) fn of(settled: &wire::ReceiptSettled) -> Option<Self> {
        let job = JobName::new(settled.job.as_str()).ok()?;
        Some(Self { job, generation: settled.generation, step: settled.step, rank: settled.rank })
    }
}

/// Messages that must reach the coordinator, or should.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    receipts: BTreeMap<SaveKey, wire::ShardReceipt>,
    rest: VecDeque<wire::agent_message::Body>,
    /// The newest reports handed to a stream. One that breaks may have lost them.
    handed: VecDeque<wire::agent_message::Body>,
}

impl Waiting {
    /// Keeps a receipt until it is settled.
    pub(crate) fn receipt(&mut self, key: SaveKey, receipt: wire::ShardReceipt) {
        self.receipts.insert(key, receipt);
    }

    /// Keeps a step report, or a skipped save, until it can be sent.
    pub(crate) fn push(&mut self, body: wire::agent_message::Body) {
        if self.rest.len() == MOST_STEPS {
            self.rest.pop_front();
        }
        self.rest.push_back(body);
    }

    /// Forgets a settled receipt, and hands it out if there was one.
    pub(crate) fn settle(&mut self, key: &SaveKey) -> Option<wire::ShardReceipt> {
        self.receipts.remove(key)
    }

    /// Forgets all receipts of a job.
    pub(crate) fn forget(&mut self, job: &JobName) {
        self.receipts.retain(|key, _| key.job != *job);
    }

    /// All receipts not yet settled, for sending again.
    pub(crate) fn receipts(&self) -> impl Iterator<Item = &wire::ShardReceipt> {
        self.receipts.values()
    }

    /// The oldest waiting report.
    pub(crate) fn next(&mut self) -> Option<wire::agent_message::Body> {
        self.rest.pop_front()
    }

    /// Notes that a report was handed to a stream.
    pub(crate) fn handed(&mut self, body: wire::agent_message::Body) {
        if self.handed.len() == MOST_HANDED {
            self.handed.pop_front();
        }
        self.handed.push_back(body);
    }

    /// Takes the newest reports back for a new stream; who has them already drops them by their step.
    pub(crate) fn hand_again(&mut self) {
        while let Some(body) = self.handed.pop_back() {
            self.rest.push_front(body);
        }
    }

    /// Puts back a report that could not be sent.
    pub(crate) fn put_back(&mut self, body: wire::agent_message::Body) {
        self.rest.push_front(body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receipts_wait_for_their_answer_and_steps_are_bounded() {
        let job = JobName::new("tiny").unwrap();
        let key = SaveKey { job: job.clone(), generation: 1, step: 10, rank: 0 };
        let mut waiting = Waiting::default();
        waiting.receipt(key.clone(), wire::ShardReceipt::default());
        assert_eq!(waiting.receipts().count(), 1);
        assert!(waiting.settle(&key).is_some() && waiting.settle(&key).is_none());
        waiting.receipt(key, wire::ShardReceipt::default());
        waiting.forget(&job);
        assert_eq!(waiting.receipts().count(), 0);
        for step in 0..5000 {
            waiting.push(wire::agent_message::Body::Step(wire::StepReport { step, ..Default::default() }));
        }
        let Some(wire::agent_message::Body::Step(first)) = waiting.next() else { panic!("no report") };
        assert_eq!(first.step, 5000 - MOST_STEPS as u64);
    }
}
