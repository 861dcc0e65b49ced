//! What holds of a cluster at every moment, as predicates that production and simulation share.
//!
//! [`Conduct`] is what one agent does, [`same_content`] what a job commits. Agents and coordinators hold themselves to
//! them and refuse what would break them, which is a defect of theirs; a simulation holds the whole cluster to them,
//! with what only it can know: who really wrote an order, and what the chain said when a worker obeyed.

use std::collections::BTreeMap;
use std::fmt::Display;

use crate::ids::{Epoch, Generation, JobName, Rank, Step, WorkerId};

/// An invariant was broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Orders of a coordinator that another has superseded were obeyed.
    #[error("two coordinators obeyed: orders of epoch {found} after those of epoch {obeyed}")]
    TwoCoordinators {
        /// The epoch obeyed before.
        obeyed: Epoch,
        /// The epoch obeyed now.
        found: Epoch,
    },
    /// Two workers act as one rank.
    #[error("two live workers: {second} acts as rank {rank} of generation {generation} of job {job}, as {first} does")]
    TwoWorkers {
        /// The job.
        job: JobName,
        /// Of this generation.
        generation: Generation,
        /// The rank.
        rank: Rank,
        /// Who has it.
        first: WorkerId,
        /// Who takes it.
        second: WorkerId,
    },
    /// A worker acts in a generation that is over for it.
    #[error("a fenced generation lives: worker {worker} acts in generation {found} of job {job} after {left}")]
    Fenced {
        /// The job.
        job: JobName,
        /// The worker.
        worker: WorkerId,
        /// The generation it was to leave, or a newer one it has been in.
        left: Generation,
        /// The generation it acts in.
        found: Generation,
    },
    /// A step has two contents.
    #[error("committed twice: step {step} stands with digest {stands} and is to be committed with digest {found}")]
    TwoContents {
        /// The step.
        step: Step,
        /// The digest that stands.
        stands: String,
        /// The other.
        found: String,
    },
}

/// What one life of an agent has obeyed and let its workers do.
#[derive(Debug, Clone, Default)]
pub struct Conduct {
    epoch: Epoch,
    ranks: BTreeMap<(JobName, Generation, Rank), WorkerId>,
    /// The generation each worker acts in, or that it was told to leave.
    workers: BTreeMap<(JobName, WorkerId), (Generation, bool)>,
}

impl Conduct {
    /// Orders of this epoch are obeyed: never of a lower one than before.
    pub fn obeys(&mut self, epoch: Epoch) -> Result<(), Violation> {
        if epoch < self.epoch {
            return Err(Violation::TwoCoordinators { obeyed: self.epoch, found: epoch });
        }
        self.epoch = epoch;
        Ok(())
    }

    /// A worker acts, or goes on to act, as a rank of a generation: no other worker does, and it has neither left that
    /// generation nor been in a newer one.
    pub fn acts(
        &mut self,
        job: &JobName,
        generation: Generation,
        rank: Rank,
        worker: WorkerId,
    ) -> Result<(), Violation> {
        let place = (job.clone(), generation, rank);
        if let Some(first) = self.ranks.get(&place).filter(|first| **first != worker) {
            let (job, first) = (job.clone(), *first);
            return Err(Violation::TwoWorkers { job, generation, rank, first, second: worker });
        }
        let been = self.workers.get(&(job.clone(), worker)).copied();
        if let Some((left, over)) = been
            && (generation < left || (over && generation == left))
        {
            return Err(Violation::Fenced { job: job.clone(), worker, left, found: generation });
        }
        self.ranks.insert(place, worker);
        self.workers.insert((job.clone(), worker), (generation, false));
        // Of older generations nothing is allowed any more in any case.
        self.ranks.retain(|(of, older, _), _| of != job || older.get() + KEPT > generation.get());
        Ok(())
    }

    /// A worker is to leave this generation and any lower one.
    pub fn leaves(&mut self, job: &JobName, worker: WorkerId, generation: Generation) {
        let been = self.workers.entry((job.clone(), worker)).or_insert((generation, true));
        if generation >= been.0 {
            *been = (generation, true);
        }
    }

    /// A worker has ended.
    pub fn ended(&mut self, worker: WorkerId) {
        self.workers.retain(|(_, other), _| *other != worker);
    }

    /// A job is gone from the node; it may come again from the start.
    pub fn forgets(&mut self, job: &JobName) {
        self.ranks.retain(|(of, ..), _| of != job);
        self.workers.retain(|(of, _), _| of != job);
    }
}

/// Generations whose ranks are remembered.
const KEPT: u64 = 16;

/// A step whose checkpoint stands is not committed with another content.
pub fn same_content<D: PartialEq + Display>(
    stands: impl IntoIterator<Item = (Step, D)>,
    step: Step,
    digest: &D,
) -> Result<(), Violation> {
    let other = stands.into_iter().find(|(other, stands)| *other == step && stands != digest);
    match other {
        None => Ok(()),
        Some((_, stands)) => {
            Err(Violation::TwoContents { step, stands: stands.to_string(), found: digest.to_string() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(n: u128) -> WorkerId {
        WorkerId::from_uuid(uuid::Uuid::from_u128(n))
    }

    #[test]
    fn epochs_only_grow() {
        let mut conduct = Conduct::default();
        for epoch in [1, 1, 3] {
            conduct.obeys(Epoch::new(epoch)).unwrap();
        }
        assert!(matches!(conduct.obeys(Epoch::new(2)), Err(Violation::TwoCoordinators { .. })));
    }

    #[test]
    fn a_rank_has_one_worker_and_a_worker_no_way_back() {
        let job = JobName::new("a").unwrap();
        let mut conduct = Conduct::default();
        let mut acts = |generation, rank, n| {
            let (generation, rank) = (Generation::new(generation), Rank::new(rank));
            conduct.acts(&job, generation, rank, worker(n))
        };
        acts(1, 0, 1).unwrap();
        acts(1, 0, 1).unwrap();
        assert!(matches!(acts(1, 0, 2), Err(Violation::TwoWorkers { .. })));
        acts(1, 1, 2).unwrap();
        acts(2, 0, 2).unwrap();
        assert!(matches!(acts(1, 1, 2), Err(Violation::Fenced { .. })), "older than what it has been in");
        conduct.leaves(&job, worker(2), Generation::new(2));
        let again = conduct.acts(&job, Generation::new(2), Rank::new(0), worker(2));
        assert!(matches!(again, Err(Violation::Fenced { .. })), "it was told to leave");
        conduct.acts(&job, Generation::new(3), Rank::new(0), worker(2)).unwrap();
        conduct.ended(worker(2));
        conduct.forgets(&job);
        conduct.acts(&job, Generation::new(1), Rank::new(0), worker(2)).unwrap();
    }

    #[test]
    fn a_step_has_one_content() {
        let stands = [(Step::new(5), "a"), (Step::new(10), "b")];
        same_content(stands, Step::new(5), &"a").unwrap();
        same_content(stands, Step::new(15), &"c").unwrap();
        assert!(same_content(stands, Step::new(10), &"c").is_err());
    }
}
