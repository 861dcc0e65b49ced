//! Input from outside, one function for each kind: what the fuzzers and the hostile tests call.
//!
//! As `checkpoint_store::hostile`: each takes bytes that an attacker may choose and returns whether they were accepted.
//! None panics, and none takes more memory than a small multiple of the bytes' number.

use prost::Message;
use proto::wire::{Chunk, GroupState};

use crate::memory::hostile;

/// Takes bytes from outside; `true` if they were accepted.
pub type Target = fn(&[u8]) -> bool;

/// All kinds by name, which is also the name of the fuzz target and of its folder of seeds.
pub const TARGETS: [(&str, Target); 3] = [("group", group), ("note", note), ("parity", parity)];

/// Ranks of the peer whose words are read.
const RANKS: [u32; 4] = [0, 1, 2, 3];

/// What a peer says it holds, its snapshots' descriptions included.
pub fn group(bytes: &[u8]) -> bool {
    let Ok(state) = GroupState::decode(bytes) else { return false };
    hostile::group_state(&state, &RANKS)
}

/// What an earlier agent noted beside its parity.
pub fn note(bytes: &[u8]) -> bool {
    hostile::parity_note(bytes)
}

/// A peer's answer to a read of a snapshot or a parity stripe: a byte with the number of 16 bytes that were asked for,
/// then the messages, each after two bytes with its length.
pub fn parity(bytes: &[u8]) -> bool {
    let Some((asked, mut rest)) = bytes.split_first() else { return false };
    let mut chunks = vec![];
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let Some((message, after)) = after.split_at_checked(u16::from_le_bytes(*length).into()) else { return false };
        let Ok(chunk) = Chunk::decode(message) else { return false };
        chunks.push(chunk);
        rest = after;
    }
    let mut out = vec![0; usize::from(*asked) * 16];
    rest.is_empty() && hostile::chunks(&mut out, &chunks)
}
