//! What watchers of a job see: a bounded memory of its events, then the live ones.
//!
//! Each event has an (epoch, sequence) pair, so a watcher whose connection broke can go on where it was. The memory
//! holds the last 8192 events of each job; a watcher slower than that misses the oldest, never holds anybody up. A
//! stream ends after a last event (`finished`, `paused`, …) of a job that has not been taken up again since.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::event::JobEvent;
use proto::ids::JobName;
use proto::wire::WatchEvent;
use tokio::sync::watch;

/// Events remembered for one job.
const REMEMBERED: usize = 8192;

struct Ring {
    events: VecDeque<WatchEvent>,
    /// The sequence number of the newest event ever.
    newest: u64,
    /// Whether the newest event is a last one.
    ended: bool,
    /// Told the newest sequence number on every change.
    signal: watch::Sender<u64>,
}

/// All jobs' events; cheap to clone.
#[derive(Clone)]
pub(crate) struct Hub {
    epoch: u64,
    rings: Arc<Mutex<BTreeMap<JobName, Ring>>>,
}

/// What a watcher gets next.
pub(crate) enum Next {
    /// An event.
    Event(WatchEvent),
    /// Nothing yet.
    Wait,
    /// The job has ended and its last event was given.
    End,
}

impl Hub {
    pub(crate) fn new(epoch: u64) -> Self {
        Self { epoch, rings: Arc::default() }
    }

    fn rings(&self) -> MutexGuard<'_, BTreeMap<JobName, Ring>> {
        // No code panics while it holds the lock, and a ring is never left half changed.
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event of a job.
    pub(crate) fn publish(&self, job: &JobName, event: &JobEvent) {
        let mut rings = self.rings();
        let ring = rings.entry(job.clone()).or_insert_with(Ring::new);
        ring.newest += 1;
        ring.ended = event.is_last();
        ring.events.push_back(WatchEvent { epoch: self.epoch, sequence: ring.newest, json: event.to_json() });
        if ring.events.len() > REMEMBERED {
            ring.events.pop_front();
        }
        ring.signal.send_replace(ring.newest);
    }

    /// A job is taken up (again): what was before is over, and a watcher from now on must not end with it.
    pub(crate) fn reopen(&self, job: &JobName) {
        let mut rings = self.rings();
        let ring = rings.entry(job.clone()).or_insert_with(Ring::new);
        ring.events.clear();
        ring.ended = false;
        ring.signal.send_replace(ring.newest);
    }

    /// Starts watching: the sequence to begin after, and the signal of changes. `None`: no such job.
    pub(crate) fn subscribe(&self, job: &JobName, epoch: u64, after: u64) -> Option<(u64, watch::Receiver<u64>)> {
        let rings = self.rings();
        let ring = rings.get(job)?;
        let after = if epoch == self.epoch { after } else { 0 };
        Some((after, ring.signal.subscribe()))
    }

    /// The first remembered event after `after`.
    pub(crate) fn next(&self, job: &JobName, after: u64) -> Next {
        let rings = self.rings();
        let Some(ring) = rings.get(job) else { return Next::End };
        let first = ring.events.partition_point(|event| event.sequence <= after);
        match ring.events.get(first) {
            Some(event) => Next::Event(event.clone()),
            None if ring.ended => Next::End,
            None => Next::Wait,
        }
    }
}

impl Ring {
    fn new() -> Self {
        Self { events: VecDeque::new(), newest: 0, ended: false, signal: watch::Sender::new(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(hub: &Hub, job: &JobName, mut after: u64) -> (Vec<u64>, bool) {
        let mut seen = Vec::new();
        loop {
            match hub.next(job, after) {
                Next::Event(event) => {
                    after = event.sequence;
                    seen.push(after);
                }
                Next::Wait => return (seen, false),
                Next::End => return (seen, true),
            }
        }
    }

    #[test]
    fn a_watcher_ends_with_the_job_and_a_resumed_job_starts_afresh() {
        let (hub, job) = (Hub::new(3), JobName::new("a").unwrap());
        assert!(hub.subscribe(&job, 0, 0).is_none());
        hub.publish(&job, &JobEvent::Generation { generation: 1, world_size: 1 });
        assert_eq!(drain(&hub, &job, 0), (vec![1], false));
        hub.publish(&job, &JobEvent::Cancelled {});
        assert_eq!(drain(&hub, &job, 1), (vec![2], true));
        hub.reopen(&job);
        assert_eq!(drain(&hub, &job, 0), (vec![], false));
        assert_eq!(hub.subscribe(&job, 3, 7).unwrap().0, 7);
        assert_eq!(hub.subscribe(&job, 2, 7).unwrap().0, 0);
    }

    #[test]
    fn memory_is_bounded() {
        let (hub, job) = (Hub::new(1), JobName::new("a").unwrap());
        for generation in 0..(REMEMBERED as u64 + 5) {
            hub.publish(&job, &JobEvent::Generation { generation, world_size: 1 });
        }
        assert_eq!(drain(&hub, &job, 0).0.len(), REMEMBERED);
    }
}
