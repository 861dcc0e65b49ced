//! What peers have said of steps that this node does not hold yet.
//!
//! A peer may be a step ahead. What it says then is kept until this node has captured that step too: parity is made as
//! soon as all members hold a step, and a shard restored from parity is proved by its owner's description, which the
//! owner can no longer give once it is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use checkpoint_store::Capture;
use proto::wire;

use super::vault::Described;
use crate::machine::keeper::{PeerStep, StepKey};

/// By member, its newest words; no more than one message of each.
#[derive(Debug, Default)]
pub(super) struct Heard(BTreeMap<usize, Vec<(StepKey, u32, Described)>>);

impl Heard {
    /// A member said this now; what it said before is outdated.
    pub(super) fn hear(&mut self, member: usize, said: Vec<(StepKey, u32, Described)>) {
        self.0.insert(member, said);
    }

    /// What was said of a step, by rank.
    pub(super) fn take(&mut self, key: StepKey) -> Vec<(u32, Described)> {
        let of_step = |said: &mut Vec<(StepKey, u32, Described)>| {
            said.extract_if(.., |(step, ..)| *step == key).collect::<Vec<_>>()
        };
        self.0.values_mut().flat_map(of_step).map(|(_, rank, described)| (rank, described)).collect()
    }

    /// Another generation begins.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// What a peer with these ranks says, read: the steps it holds whole, and its snapshots' descriptions.
pub(super) fn read_state(state: &wire::GroupState, ranks: &[u32]) -> (Vec<PeerStep>, Vec<(StepKey, u32, Described)>) {
    let (mut steps, mut described) = (vec![], vec![]);
    for held in &state.steps {
        let key = (state.generation, held.step);
        let mut whole = BTreeSet::new();
        for json in &held.captures {
            let Ok(capture) = Capture::from_json(json) else { continue };
            let rank = capture.rank.get();
            if ranks.contains(&rank) {
                whole.insert(rank);
                described.push((key, rank, Described { capture: Arc::new(capture), json: json.clone().into() }));
            }
        }
        if ranks.iter().all(|rank| whole.contains(rank)) {
            steps.push(PeerStep { step: held.step, encoded: held.encoded });
        }
    }
    (steps, described)
}
