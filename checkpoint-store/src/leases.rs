//! How long leases last: the leader's own monotonic time, kept in memory.
//!
//! A lease is a record and holds until a `released` record. Its reader renews it by telling the leader, which appends
//! nothing for that. The leader counts from the last time it heard of a lease, and releases one that was not renewed
//! for the seconds it asked for. Nobody compares clocks: a leader measures only how long it has itself waited.
//!
//! **At takeover** a lease starts anew: the new leader has heard nothing yet, so it gives every lease it finds in the
//! chain its full time again. That is too long, never too short. A store without a leader releases nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::history::History;

/// What one leader knows of one job's leases.
#[derive(Debug, Default)]
pub struct LeaseClock {
    /// By lease: how long it lasts, and when it ends.
    ends: BTreeMap<String, (Duration, Duration)>,
}

impl LeaseClock {
    /// Compares with the chain: leases not heard of before begin now, those no longer there are forgotten. `now` is the
    /// leader's monotonic time and never goes back.
    pub fn observe(&mut self, now: Duration, history: &History) {
        let mut before = std::mem::take(&mut self.ends);
        for (_, lease) in history.leases() {
            let lasts = Duration::from_secs(lease.seconds.into());
            let ends = before.remove(&lease.id).unwrap_or((lasts, now.saturating_add(lasts)));
            self.ends.insert(lease.id.clone(), ends);
        }
    }

    /// A reader says that it still needs its lease. `false`: there is none of that name.
    pub fn renew(&mut self, now: Duration, lease: &str) -> bool {
        let known = self.ends.get_mut(lease);
        known.map(|(lasts, ends)| *ends = now.saturating_add(*lasts)).is_some()
    }

    /// The leases that were not renewed in time.
    pub fn expired(&self, now: Duration) -> Vec<String> {
        self.ends.iter().filter(|(_, (_, ends))| *ends <= now).map(|(lease, _)| lease.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::{Epoch, Generation, WorldSize};

    use super::*;
    use crate::digest::{BlockHash, Digest};
    use crate::record::{CheckpointRef, Event, Record};

    fn history() -> History {
        let (epoch, generation) = (Epoch::new(1), Generation::new(1));
        let hash = BlockHash::of(b"x");
        let checkpoint = CheckpointRef {
            step: proto::ids::Step::new(1),
            generation,
            manifest: "m".into(),
            hash,
            digest: Digest::of(b"x"),
            bytes: 1,
        };
        let formed = Event::Generation {
            generation,
            world_size: WorldSize::ONE,
            members: vec![],
            start: None,
            memory: None,
            identity: String::new(),
            fingerprint: String::new(),
        };
        let leased = |name: &str| Event::Leased {
            manifest: "m".into(),
            lease: name.into(),
            holder: "a reader".into(),
            seconds: 60,
        };
        let mut history = History::default();
        let submitted = Event::Submitted { spec_hash: hash, stop_at: None };
        history.apply(&Record::new(epoch, Generation::ZERO, submitted)).unwrap();
        for event in [formed, Event::Committed(checkpoint), leased("a"), leased("b")] {
            history.apply(&Record::new(epoch, generation, event)).unwrap();
        }
        history
    }

    #[test]
    fn a_lease_lasts_while_it_is_renewed_and_starts_anew_with_a_new_leader() {
        let seconds = Duration::from_secs;
        let mut history = history();
        let mut clock = LeaseClock::default();
        clock.observe(seconds(100), &history);
        assert!(clock.expired(seconds(159)).is_empty());
        assert!(clock.renew(seconds(159), "a"));
        assert!(!clock.renew(seconds(159), "c"));
        clock.observe(seconds(160), &history);
        assert_eq!(clock.expired(seconds(160)), ["b"], "observing again renews nothing");
        assert_eq!(clock.expired(seconds(219)), ["a", "b"]);
        // A successor whose clock started later waits the whole time again.
        let mut next = LeaseClock::default();
        next.observe(seconds(5), &history);
        assert!(next.expired(seconds(64)).is_empty());
        let released = Event::Released { lease: "b".into(), reason: "not renewed".into() };
        history.apply(&Record::new(Epoch::new(1), Generation::new(1), released)).unwrap();
        clock.observe(seconds(220), &history);
        assert_eq!(clock.expired(seconds(1000)), ["a"]);
        assert_eq!(history.leased("a").unwrap().leases.len(), 1);
    }
}
