//! What people ask about a job's checkpoints: pins, verdicts, leases, pruning.
//!
//! The machine does not look into a change. It gives it its turn in the job's one queue of store operations, before
//! commits and collections: a renewed lease is heard of before anything is deleted. Then it takes note of the
//! checkpoints that are gone, and answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use proto::event::JobEvent;
use proto::ids::{JobName, Step};

use super::Cluster;
use super::action::{Action, Answer, Changed, Operation, Outcome, Refusal, RequestId};
use super::context::Context;
use super::job::{Job, Verdict, Waiting};

/// Changes of one job that may wait; whoever comes then is asked to come again.
const MOST_WAITING: usize = 1024;
/// Validation losses remembered until the checkpoint of their step is committed.
const MOST_LOSSES: usize = 64;

impl Cluster {
    /// Takes a change; it is answered when it is done.
    pub(super) fn change(
        &mut self,
        request: RequestId,
        name: &JobName,
        change: Arc<[u8]>,
    ) -> Result<Option<Answer>, Refusal> {
        let job = self.find(name)?;
        if job.changes.len() >= MOST_WAITING {
            return Err(Refusal::Unavailable(format!("{MOST_WAITING} changes of job {name} are waiting; try again")));
        }
        job.changes.push_back((change, request));
        Ok(None)
    }
}

impl Job {
    /// The change whose turn it is.
    pub(super) fn next_change(&mut self) -> Option<(Operation, Option<Waiting>)> {
        let (change, request) = self.changes.pop_front()?;
        Some((Operation::Change(change), Some(Waiting { request, submission: false })))
    }

    /// A change has ended.
    pub(super) fn changed(&mut self, cx: &mut Context<'_>, waiting: Option<Waiting>, outcome: Outcome) {
        let answer = match outcome {
            Outcome::Changed(changed) => {
                self.take_note(cx, &changed);
                Ok(Answer::Changed(changed.report))
            }
            Outcome::Refused(why) => Err(Refusal::Precondition(why)),
            Outcome::Impossible(why) => Err(Refusal::DataLoss(why)),
            Outcome::Failed(why) => Err(Refusal::Unavailable(why)),
            other => Err(Refusal::Unavailable(format!("the change had no clear outcome: {other:?}"))),
        };
        if let Some(Waiting { request, .. }) = waiting {
            cx.out.push(Action::Reply { request, answer });
        }
    }

    fn take_note(&mut self, cx: &mut Context<'_>, changed: &Changed) {
        self.ledger.forget(&changed.gone);
        let Some((step, reason)) = &changed.quarantined else { return };
        cx.publish(&self.name, JobEvent::Quarantined { step: step.get(), reason: reason.clone() });
        // A live generation goes on: what it started from is in its memory, and its next checkpoint is a good one.
        if self.active() && self.live.is_none() && self.ledger.newest().is_none() {
            let reason = format!(
                "no good checkpoint is left: that of step {step} is damaged ({reason}); start over with --fresh, \
                 which keeps what is stored"
            );
            self.verdict.get_or_insert(Verdict { reason, code: 4 });
        }
    }

    /// Remembers a validation loss for the checkpoint of its step.
    pub(super) fn validated(&mut self, step: Step, loss: f64) {
        self.losses.insert(step, loss);
        while self.losses.len() > MOST_LOSSES {
            self.losses.pop_first();
        }
    }
}

/// The validation losses by step.
pub(super) type Losses = BTreeMap<Step, f64>;
