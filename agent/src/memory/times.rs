//! How long parity took on this node.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use checkpoint_store::Stage;
use proto::ids::JobName;

use crate::machine::keeper::StepKey;

/// Parity times remembered of one job.
const MOST_TIMES: usize = 64;

/// How long parity took, for the timelines of the checkpoints uploaded meanwhile.
#[derive(Debug, Clone, Default)]
pub(crate) struct ParityTimes(Arc<Mutex<BTreeMap<(JobName, StepKey), Stage>>>);

impl ParityTimes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(JobName, StepKey), Stage>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the parity of a step took on this node, if it is made.
    pub(crate) fn of(&self, job: &JobName, key: StepKey) -> Option<Stage> {
        self.lock().get(&(job.clone(), key)).cloned()
    }

    /// Notes how long it took; of each job the newest few are remembered.
    pub(super) fn note(&self, job: &JobName, key: StepKey, stage: Stage) {
        let mut times = self.lock();
        times.insert((job.clone(), key), stage);
        let of: Vec<_> = times.keys().filter(|(other, _)| other == job).cloned().collect();
        of.iter().rev().skip(MOST_TIMES).for_each(|old| drop(times.remove(old)));
    }
}
