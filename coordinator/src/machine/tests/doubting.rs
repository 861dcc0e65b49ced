//! Two machines for one: the real one, and one that trusts nothing it has worked out before.
//!
//! For every event of every test both must want the same, word for word. So what is kept up to date by and by (who is
//! touched, who is missing, what agents are told) is what would be computed from scratch.

use std::time::Duration;

use super::super::*;

pub(super) struct Pair {
    cluster: Cluster,
    doubting: Cluster,
}

impl Pair {
    pub(super) fn new(settings: Settings) -> Self {
        Self { cluster: Cluster::new(settings.clone()), doubting: Cluster::new(settings) }
    }

    pub(super) fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        self.doubting.doubt();
        let thorough = self.doubting.handle(now, event.clone());
        let actions = self.cluster.handle(now, event);
        assert_eq!(format!("{actions:?}"), format!("{thorough:?}"), "what was not looked at again had not changed");
        actions
    }
}

impl Cluster {
    /// Forgets that anything is known to be unchanged: the next event is followed by looking at everything.
    fn doubt(&mut self) {
        self.members.doubt();
        self.jobs.values_mut().for_each(Job::unsettle);
    }
}
