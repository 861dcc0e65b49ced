//! What agents and the coordinator tell one another, kept outside the bucket: receipts that are resent until they are
//! settled, and the generation that runs. It outlives the processes, as the agents' memory does.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use checkpoint_store::Receipt;
use proto::ids::WorldSize;
use tokio::sync::Notify;

/// A generation whose workers are to be started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Formed {
    pub(crate) generation: u64,
    pub(crate) world: WorldSize,
    /// The step it starts from.
    pub(crate) start: u64,
}

#[derive(Default)]
struct Inner {
    formed: Option<Formed>,
    orders: Vec<Formed>,
    /// A worker of the present generation has gone.
    broken: bool,
    mailbox: BTreeMap<(u64, u64), BTreeMap<u32, Receipt>>,
}

/// The agents of a job.
#[derive(Default)]
pub(crate) struct Cluster {
    inner: Mutex<Inner>,
    pub(crate) ordered: Notify,
}

impl Cluster {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present generation; 0 before the first.
    pub(crate) fn generation(&self) -> u64 {
        self.inner().formed.map_or(0, |formed| formed.generation)
    }

    /// A newer generation is to run.
    pub(crate) fn announce(&self, formed: Formed) {
        let mut inner = self.inner();
        if inner.formed.is_none_or(|before| before.generation < formed.generation) {
            inner.formed = Some(formed);
            inner.broken = false;
            inner.orders.push(formed);
            self.ordered.notify_one();
        }
    }

    /// Generations whose workers were not started yet.
    pub(crate) fn orders(&self) -> Vec<Formed> {
        std::mem::take(&mut self.inner().orders)
    }

    /// A worker of a generation has gone.
    pub(crate) fn lost(&self, generation: u64) {
        let mut inner = self.inner();
        inner.broken |= inner.formed.is_some_and(|formed| formed.generation == generation);
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.inner().broken
    }

    /// A rank reports its shard stored. A later report of the same rank and step takes the place of an earlier one.
    pub(crate) fn report(&self, receipt: Receipt) {
        let key = (receipt.generation.get(), receipt.step().get());
        self.inner().mailbox.entry(key).or_default().insert(receipt.rank.get(), receipt);
    }

    /// The complete sets of a generation, in the order of their steps.
    pub(crate) fn complete(&self, generation: u64) -> Vec<(u64, Vec<Receipt>)> {
        let inner = self.inner();
        let of_it = inner.mailbox.range((generation, 0)..(generation + 1, 0));
        let whole = of_it.filter(|(_, set)| set.values().next().is_some_and(|r| r.world_size.count() == set.len()));
        whole.map(|((_, step), set)| (*step, set.values().cloned().collect())).collect()
    }

    /// Receipts of a step are answered.
    pub(crate) fn settle(&self, generation: u64, step: u64) {
        self.inner().mailbox.remove(&(generation, step));
    }
}
