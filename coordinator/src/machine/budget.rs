//! The restart budget: how often a job may fail without getting anywhere.
//!
//! Every failure counts until a checkpoint is committed, which sets the count back to zero. A job that makes progress
//! may fail for ever; one that does not is given up with its last reason.

/// Counts failures since the last committed checkpoint.
#[derive(Debug, Clone, Default)]
pub(super) struct Budget {
    restarts: u32,
}

impl Budget {
    /// A budget of which `restarts` are already used, as read from a job's history.
    pub(super) fn used(restarts: u32) -> Self {
        Self { restarts }
    }

    /// Counts one failure. `Some` is the reason to give the job up: more than `allowed` failures without a checkpoint.
    pub(super) fn spend(&mut self, allowed: u32, last: &str) -> Option<String> {
        self.restarts = self.restarts.saturating_add(1);
        (self.restarts > allowed).then(|| {
            let count = self.restarts;
            format!(
                "failed {count} times without a new checkpoint (fault.restarts_without_progress = {allowed}); last: \
                 {last}"
            )
        })
    }

    /// A checkpoint is committed: the job makes progress.
    pub(super) fn progress(&mut self) {
        self.restarts = 0;
    }

    /// Failures since the last progress.
    pub(super) fn restarts(&self) -> u32 {
        self.restarts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_without_progress_count() {
        let mut budget = Budget::default();
        assert!(budget.spend(2, "a").is_none());
        assert!(budget.spend(2, "b").is_none());
        budget.progress();
        assert!(budget.spend(2, "c").is_none());
        assert!(budget.spend(2, "d").is_none());
        assert!(budget.spend(2, "the last").unwrap().ends_with("last: the last"));
    }
}
