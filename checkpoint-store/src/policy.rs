//! Which checkpoints stay: the rules of retention, as one pure function of the history.
//!
//! A checkpoint stays if any rule keeps it; what no rule keeps is condemned. Four rules cannot be turned off: the
//! newest good checkpoint, pinned ones, leased ones, and what the running generation started from. The others are a
//! job's to choose: the last n, every k-th step, the best m by a metric, those within s steps of the newest. There is
//! no age in hours: collection reads no clock.
//!
//! The chosen rules keep good checkpoints. One that was abandoned or quarantined has no place among the steps any more,
//! only one in the chain: it stays, for whoever wants to look at it, until as many good ones as are kept by `last` were
//! committed after it.
//!
//! Asking for more never keeps less, and what stays after a collection stays after the next one (both are tested).

use std::collections::BTreeSet;
use std::fmt;

use proto::spec::{BestOrder, CheckpointSpec};
use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::history::{Checkpoint, History, Status};
use crate::record::CheckpointRef;

/// What a job keeps of its good checkpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// How many of the newest; 0 counts as 1.
    pub last: usize,
    /// Those whose step is a multiple of this; 0 for none.
    pub every: u64,
    /// How many of the best by `metric`.
    pub best: usize,
    /// What the best are best in.
    pub metric: String,
    /// Which end of the metric is best.
    pub order: BestOrder,
    /// Those at most this many steps older than the newest; 0 for none but it.
    pub within_steps: u64,
}

impl Policy {
    /// Only the last `count`.
    pub fn last(count: usize) -> Self {
        let (metric, order) = (String::new(), BestOrder::Lowest);
        Self { last: count, every: 0, best: 0, metric, order, within_steps: 0 }
    }

    /// The rules with some of them replaced.
    pub fn with(&self, keep: &Keep) -> Result<Self, StoreError> {
        let policy = Self {
            last: keep.last.map_or(self.last, |n| usize::try_from(n).unwrap_or(usize::MAX)),
            every: keep.every.unwrap_or(self.every),
            best: keep.best.map_or(self.best, |n| usize::try_from(n).unwrap_or(usize::MAX)),
            metric: keep.metric.clone().unwrap_or_else(|| self.metric.clone()),
            order: keep.order.unwrap_or(self.order),
            within_steps: keep.within_steps.unwrap_or(self.within_steps),
        };
        if policy.best > 0 && policy.metric.is_empty() {
            return Err(StoreError::Input("keeping the best needs the name of a metric".into()));
        }
        Ok(policy)
    }

    /// For each checkpoint of the history, in its order, why it stays; `None` is condemned.
    pub fn judge(&self, history: &History) -> Vec<Option<Why>> {
        let all = &history.checkpoints;
        let mut good: Vec<usize> = (0..all.len()).filter(|&i| all[i].is_good()).collect();
        good.sort_by_key(|&i| std::cmp::Reverse((all[i].checkpoint.step, all[i].record)));
        let last = self.last.max(1);
        let kept_last: BTreeSet<usize> = good.iter().take(last).copied().collect();
        let best = self.best_of(all, &good);
        let newest_step = good.first().map_or(0, |&i| all[i].checkpoint.step.get());
        let start = history.start.as_ref().filter(|_| history.status == Status::Running);
        let mut commits: Vec<u64> = good.iter().map(|&i| all[i].record).collect();
        commits.sort_unstable();
        let later_commits = |c: &Checkpoint| commits.len() - commits.partition_point(|&record| record <= c.record);
        let why = |(i, c): (usize, &Checkpoint)| {
            let step = c.checkpoint.step.get();
            match () {
                () if c.pinned.is_some() => Some(Why::Pinned),
                () if !c.leases.is_empty() => Some(Why::Leased),
                () if good.first() == Some(&i) => Some(Why::Newest),
                () if start == Some(&c.checkpoint) => Some(Why::Start),
                () if !c.is_good() => (later_commits(c) < last).then_some(Why::Recent),
                () if kept_last.contains(&i) => Some(Why::Last),
                () if self.every > 0 && step.is_multiple_of(self.every) => Some(Why::Every),
                () if best.contains(&i) => Some(Why::Best),
                () if self.within_steps > 0 && newest_step.saturating_sub(step) <= self.within_steps => {
                    Some(Why::Within)
                }
                () => None,
            }
        };
        all.iter().enumerate().map(why).collect()
    }

    /// The checkpoints no rule keeps, in the order of their commits.
    pub fn condemned(&self, history: &History) -> Vec<CheckpointRef> {
        let judged = history.checkpoints.iter().zip(self.judge(history));
        judged.filter(|(_, why)| why.is_none()).map(|(c, _)| c.checkpoint.clone()).collect()
    }

    /// The best of the good ones; of equals the newer, which comes first in `good`.
    fn best_of(&self, all: &[Checkpoint], good: &[usize]) -> BTreeSet<usize> {
        let value = |&i: &usize| all[i].metrics.get(&self.metric).map(|value| (i, *value));
        let mut measured: Vec<(usize, f64)> = good.iter().filter_map(value).collect();
        measured.sort_by(|a, b| match self.order {
            BestOrder::Lowest => a.1.total_cmp(&b.1),
            BestOrder::Highest => b.1.total_cmp(&a.1),
        });
        measured.into_iter().take(self.best).map(|(i, _)| i).collect()
    }
}

impl From<&CheckpointSpec> for Policy {
    fn from(spec: &CheckpointSpec) -> Self {
        Self {
            last: spec.keep_last,
            every: spec.keep_every,
            best: spec.keep_best,
            metric: spec.keep_best_metric.clone(),
            order: spec.keep_best_order,
            within_steps: spec.keep_within_steps,
        }
    }
}

/// Rules to use in place of a job's own, for one pruning.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keep {
    /// In place of [`Policy::last`].
    pub last: Option<u64>,
    /// In place of [`Policy::every`].
    pub every: Option<u64>,
    /// In place of [`Policy::best`].
    pub best: Option<u64>,
    /// In place of [`Policy::metric`].
    pub metric: Option<String>,
    /// In place of [`Policy::order`].
    pub order: Option<BestOrder>,
    /// In place of [`Policy::within_steps`].
    pub within_steps: Option<u64>,
}

/// Why a checkpoint stays. Of several reasons the first of this list is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It is pinned.
    Pinned,
    /// Somebody reads it.
    Leased,
    /// A resume would start from it.
    Newest,
    /// The running generation started from it.
    Start,
    /// Set aside too recently to go.
    Recent,
    /// Among the last n.
    Last,
    /// Its step is a multiple of k.
    Every,
    /// Among the best.
    Best,
    /// Within so many steps of the newest.
    Within,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pinned => "pinned",
            Self::Leased => "leased",
            Self::Newest => "newest",
            Self::Start => "start of the running generation",
            Self::Recent => "set aside recently",
            Self::Last => "keep_last",
            Self::Every => "keep_every",
            Self::Best => "keep_best",
            Self::Within => "keep_within_steps",
        })
    }
}
