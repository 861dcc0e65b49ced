//! Stragglers: ranks that hold the others up, as rank 0 has found by comparing what each says of itself.
//!
//! Whoever is named is named in every report until it keeps up again, so a lost report changes nothing. A generation
//! starts with nobody named. Nothing is decided here: a slow node still does its work, and whether it is to be emptied
//! (`cairn drain`) is for an operator who knows why it is slow.

use std::collections::BTreeMap;

use proto::event::JobEvent;
use proto::ids::{NodeName, Rank};
use proto::wire::{SlowRank, StepReport};

use super::context::Context;
use super::job::Job;

impl Job {
    /// Tells who holds the others up now and did not before, and the other way round.
    pub(super) fn heed_stragglers(&mut self, cx: &mut Context<'_>, report: &StepReport) {
        let Some(live) = self.live.as_mut() else { return };
        let mut now = BTreeMap::new();
        for straggler in &report.stragglers {
            let rank = Rank::new(straggler.rank);
            if live.node_of(rank).is_some() {
                now.insert(rank, straggler.ratio);
            }
        }
        if now.is_empty() && live.slow.is_empty() {
            return;
        }
        let before = std::mem::replace(&mut live.slow, now);
        let come = live.slow.iter().filter(|(rank, _)| !before.contains_key(rank));
        let gone = before.keys().filter(|rank| !live.slow.contains_key(rank));
        let come = come.map(|(rank, ratio)| (*rank, Some(*ratio)));
        let changes: Vec<(Rank, Option<f64>)> = come.chain(gone.map(|rank| (*rank, None))).collect();
        for (rank, ratio) in changes {
            let Some(node) = self.live.as_ref().and_then(|live| live.node_of(rank)).cloned() else { continue };
            cx.log(
                &self.name,
                match ratio {
                    Some(ratio) => format!("rank {rank} on {node} holds the others up: {ratio:.2} times the median"),
                    None => format!("rank {rank} on {node} keeps up again"),
                },
            );
            let event = JobEvent::Straggler { step: report.step, rank: rank.get(), node: node.to_string(), ratio };
            cx.publish(&self.name, event);
        }
    }

    /// Its ranks that hold the others up; on one node, or on all.
    pub(super) fn slow_ranks(&self, on: Option<&NodeName>) -> Vec<SlowRank> {
        let Some(live) = &self.live else { return Vec::new() };
        let slow = live.slow.iter().filter_map(|(rank, ratio)| Some((*rank, *ratio, live.node_of(*rank)?)));
        let slow = slow.filter(|(.., node)| on.is_none_or(|on| on == *node));
        slow.map(|(rank, ratio, node)| SlowRank {
            job: self.name.to_string(),
            rank: rank.get(),
            node: node.to_string(),
            ratio,
        })
        .collect()
    }
}
