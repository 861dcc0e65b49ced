//! This module's readers of what comes from outside, for [`crate::hostile`].

use proto::wire::{Chunk, GroupState};

use super::peers::Filling;
use super::{adopt, heard};

/// Whether a peer's words are all of steps it holds whole, each described.
pub(crate) fn group_state(state: &GroupState, ranks: &[u32]) -> bool {
    let (steps, described) = heard::read_state(state, ranks);
    assert!(steps.len() <= state.steps.len(), "more steps than were said");
    assert!(described.iter().all(|(_, rank, _)| ranks.contains(rank)), "a rank of another");
    !state.steps.is_empty() && steps.len() == state.steps.len()
}

/// Whether a note on parity is one.
pub(crate) fn parity_note(bytes: &[u8]) -> bool {
    adopt::parity_note(bytes).is_some()
}

/// Whether chunks fill what was asked for.
pub(crate) fn chunks(out: &mut [u8], chunks: &[Chunk]) -> bool {
    let mut filling = Filling { out, at: 0 };
    chunks.iter().all(|chunk| filling.take(chunk).is_ok()) && filling.done().is_ok()
}
