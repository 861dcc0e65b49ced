//! What operators ask for: submit, scale, pause, resume, cancel.
//!
//! A request that changes a job becomes a record of its chain and is answered when that is stored. A refusal says what
//! would be right.

use proto::ids::{JobName, Step};
use proto::spec::JobSpec;
use proto::wire::SubmitMode;

use super::Cluster;
use super::action::{Action, Answer, Ask, Refusal, RequestId};
use super::job::{Job, Waiting};
use super::ledger::{End, Entry, Ledger};

/// What a request leads to: an answer now, or later.
type Response = Result<Option<Answer>, Refusal>;

impl Cluster {
    /// Takes a request; answers at once what can be.
    pub(super) fn asked(&mut self, request: RequestId, ask: Ask) {
        let response = match ask {
            Ask::Submit { spec, mode, stop_at } => self.submit(request, spec, mode, stop_at),
            Ask::List => Ok(Some(Answer::List(self.order.iter().filter_map(|name| self.view(name)).collect()))),
            Ask::Status(job) => match self.find(&job) {
                Ok(_) => Ok(self.answer(&job)),
                Err(refusal) => Err(refusal),
            },
            Ask::Scale(job, workers) => self.scale(request, &job, workers),
            Ask::Pause(job) => self.pause(request, &job),
            Ask::Resume(job) => self.resume(request, &job),
            Ask::Cancel(job) => self.cancel(request, &job),
            Ask::Change(job, change) => self.change(request, &job, change),
            Ask::Incidents(job) => self.incidents(&job),
            Ask::Nodes => Ok(Some(self.nodes())),
            Ask::Drain(node, empty) => self.drain(request, node, empty),
        };
        let answer = match response {
            Ok(None) => return,
            Ok(Some(answer)) => Ok(answer),
            Err(refusal) => Err(refusal),
        };
        self.out.push(Action::Reply { request, answer });
    }

    pub(super) fn find(&mut self, name: &JobName) -> Result<&mut Job, Refusal> {
        self.readable(name)?;
        let known = self.jobs.get_mut(name).filter(|job| job.born);
        known.ok_or_else(|| Refusal::NotFound(format!("there is no job {name} in this store; list them: cairn jobs")))
    }

    /// A job whose chain is damaged is left alone.
    fn readable(&self, name: &JobName) -> Result<(), Refusal> {
        let damage = self.unreadable.get(name).map(|why| format!("the history of job {name} cannot be read: {why}"));
        damage.map_or(Ok(()), |why| Err(Refusal::DataLoss(why)))
    }

    fn answer(&self, name: &JobName) -> Option<Answer> {
        self.view(name).map(|status| Answer::Status(Box::new(status)))
    }

    fn submit(&mut self, request: RequestId, spec: Box<JobSpec>, mode: SubmitMode, stop_at: Option<Step>) -> Response {
        let waiting = Some(Waiting { request, submission: true });
        // A stop at or beyond the last step is the end of the job.
        let stop_at = stop_at.filter(|stop_at| stop_at.get() < spec.training.steps);
        let name = spec.name.clone();
        let leader = self.settings.leader.clone();
        self.readable(&name)?;
        let Some(job) = self.jobs.get_mut(&name) else {
            let mut job = Job::new(name.clone(), Ledger::new((*spec).clone(), stop_at), &self.settings.store);
            // A new job's first record carries this leader's epoch.
            (job.born, job.led) = (false, true);
            job.queue.push_back((Entry::Submitted { spec, stop_at }, waiting));
            self.jobs.insert(name.clone(), job);
            self.order.push(name);
            return Ok(None);
        };
        job.idle()?;
        let Some(end) = job.ledger.end.clone() else {
            return Err(Refusal::Precondition(format!(
                "job {name} is live under the coordinator at {leader}: watch it with `cairn watch {name}`, \
                 or pause or cancel it first"
            )));
        };
        match mode {
            SubmitMode::New => Err(Refusal::Precondition(format!(
                "the store already holds job {name}: go on with it with --resume, or start over with --fresh"
            ))),
            SubmitMode::Fresh => {
                job.queue.push_back((Entry::Restarted { spec, stop_at }, waiting));
                Ok(None)
            }
            SubmitMode::Resume => {
                let differences = spec.forbidden_changes(&job.ledger.spec);
                if !differences.is_empty() {
                    let listed: Vec<_> = differences.iter().map(ToString::to_string).collect();
                    return Err(Refusal::Invalid(format!(
                        "job {name} cannot be resumed with these changes (only resources, checkpoint, fault and \
                         training.validate_every may differ): {}",
                        listed.join("; ")
                    )));
                }
                if matches!(end, End::Finished { .. }) {
                    return Ok(Some(Answer::Submitted { finished: true }));
                }
                job.take_up(Entry::Resumed { spec, stop_at }, waiting)
            }
        }
    }

    fn scale(&mut self, request: RequestId, name: &JobName, workers: u32) -> Response {
        let job = self.find(name)?;
        job.idle()?;
        let most = job.ledger.spec.training.micro_batches();
        if workers == 0 || workers as usize > most {
            return Err(Refusal::Invalid(format!(
                "{workers} workers: job {name} can use 1 to {most}, the micro-batches of one update \
                 (training.global_batch / training.micro_batch)"
            )));
        }
        if job.ledger.end.is_some() {
            return Err(Refusal::Precondition(format!(
                "job {name} is at rest: resume it with another resources.workers instead"
            )));
        }
        let waiting = Some(Waiting { request, submission: false });
        job.queue.push_back((Entry::Scaled { workers }, waiting));
        Ok(None)
    }

    fn pause(&mut self, request: RequestId, name: &JobName) -> Response {
        let job = self.find(name)?;
        if job.ledger.end.is_some() {
            return Ok(self.answer(name));
        }
        job.pausing = true;
        job.waiters.push(request);
        Ok(None)
    }

    fn resume(&mut self, request: RequestId, name: &JobName) -> Response {
        let job = self.find(name)?;
        job.idle()?;
        match &job.ledger.end {
            None => Ok(self.answer(name)),
            Some(End::Finished { .. }) => {
                Err(Refusal::Precondition(format!("job {name} has finished; start it over with submit --fresh")))
            }
            Some(_) => {
                let spec = Box::new(job.ledger.spec.clone());
                let waiting = Some(Waiting { request, submission: false });
                job.take_up(Entry::Resumed { spec, stop_at: None }, waiting)
            }
        }
    }

    fn cancel(&mut self, request: RequestId, name: &JobName) -> Response {
        let job = self.find(name)?;
        let waiting = Waiting { request, submission: false };
        match &job.ledger.end {
            Some(End::Paused { .. } | End::Failed { .. }) => {
                job.idle()?;
                job.queue.push_back((Entry::Ended(End::Cancelled), Some(waiting)));
                Ok(None)
            }
            Some(_) => Ok(self.answer(name)),
            None if job.cancelling.is_some() => Err(busy(name)),
            None => {
                job.cancelling = Some(waiting);
                Ok(None)
            }
        }
    }
}

fn busy(name: &JobName) -> Refusal {
    Refusal::Unavailable(format!("another change of job {name} is under way; try again"))
}

impl Job {
    /// Refuses a change while another one waits for its record.
    fn idle(&self) -> Result<(), Refusal> {
        let changing = self.flight.as_ref().is_some_and(|flight| flight.waiting.is_some());
        if changing || !self.queue.is_empty() { Err(busy(&self.name)) } else { Ok(()) }
    }

    /// Goes on with a paused or failed job.
    fn take_up(&mut self, entry: Entry, waiting: Option<Waiting>) -> Response {
        let name = &self.name;
        if matches!(self.ledger.end, Some(End::Cancelled)) {
            return Err(Refusal::Precondition(format!(
                "job {name} was cancelled for good; start it over with --fresh"
            )));
        }
        if self.ledger.had_checkpoint && self.ledger.newest().is_none() {
            // Where the job failed for this, its reason names the damage.
            let why = match &self.ledger.end {
                Some(End::Failed { reason, code: 4 }) => format!(": {reason}"),
                _ => "; start over with --fresh".to_string(),
            };
            return Err(Refusal::DataLoss(format!("job {name} has no good checkpoint to resume from{why}")));
        }
        self.queue.push_back((entry, waiting));
        Ok(None)
    }
}
