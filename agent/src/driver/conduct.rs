//! The driver's part that watches the agent itself: what its machine decides is held against the invariants anyway.
//!
//! None of this ever speaks up unless the machine has a defect. Then what would break an invariant is not done, and the
//! log says so: a worker that misses an order is healed by time, two workers in one place are not.

use proto::ids::{Epoch, Generation, Rank, WorkerId};
use proto::invariant::Violation;

use super::Driver;
use crate::machine::Command;

impl Driver {
    /// Orders of this epoch were obeyed.
    pub(super) fn obeyed(&mut self, epoch: Epoch) {
        let kept = self.conduct.obeys(epoch);
        account(kept);
        if let Some(witness) = &self.witness {
            witness.obeyed();
        }
    }

    /// Whether a command may be given.
    pub(super) fn may(&mut self, worker: WorkerId, command: &Command) -> bool {
        let Some(job) = self.machine.job_of(worker) else { return true };
        match command {
            Command::Prepare { .. } => true,
            Command::Run(run) => {
                let generation = run.announcement.as_ref().map_or(0, |announcement| announcement.generation);
                let (generation, rank) = (Generation::new(generation), Rank::new(run.rank));
                let kept = self.conduct.acts(job, generation, rank, worker);
                account(kept)
            }
            Command::Hold(generation) => {
                self.conduct.leaves(job, worker, Generation::new(*generation));
                true
            }
        }
    }
}

/// Logs a broken invariant; whether it holds.
fn account(kept: Result<(), Violation>) -> bool {
    if let Err(violation) = &kept {
        tracing::error!(%violation, "a defect of this agent: an invariant would be broken");
    }
    kept.is_ok()
}
