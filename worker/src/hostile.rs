//! Input from outside, one function for each kind: what the fuzzers and the hostile tests call.
//!
//! As `checkpoint_store::hostile`: each takes bytes that an attacker may choose and returns whether they were accepted.
//! None panics, and none takes more memory than a small multiple of the bytes' number.

use crate::collective::tcp::hostile;
use crate::data::IndexedDataset;

/// Takes bytes from outside; `true` if they were accepted.
pub type Target = fn(&[u8]) -> bool;

/// All kinds by name, which is also the name of the fuzz target and of its folder of seeds.
pub const TARGETS: [(&str, Target); 3] = [("dataset", dataset), ("frame", frame), ("greeting", greeting)];

/// The header of a chunk on the ring.
pub fn frame(bytes: &[u8]) -> bool {
    hostile::frame(bytes)
}

/// What a new connection to the ring says first.
pub fn greeting(bytes: &[u8]) -> bool {
    hostile::greeting(bytes)
}

/// An indexed dataset: four bytes with the length of the index, little-endian, then the index, then the tokens.
pub fn dataset(bytes: &[u8]) -> bool {
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return false };
    let index = (u32::from_le_bytes(*length) as usize).min(rest.len());
    let (index, tokens) = rest.split_at(index);
    let Ok(data) = IndexedDataset::of_memory(index, tokens) else { return false };
    let mut window = [0; 16];
    let reads = data.len().saturating_sub(window.len() as u64);
    for start in [0, reads / 2, reads, reads.saturating_add(1), u64::MAX] {
        let read = data.read(start, 1 << 16, &mut window);
        assert!(read.is_err() || window.iter().all(|token| *token < 1 << 16), "a token outside the vocabulary");
        assert!(read.is_err() || start.saturating_add(16) <= data.len(), "a read past the end");
    }
    if data.check_vocabulary(1 << 16).is_ok() {
        let mut all = vec![0; data.len() as usize];
        assert!(data.read(0, 1 << 16, &mut all).is_ok(), "a token that the scan did not see");
    }
    assert!(data.documents() <= tokens.len() as u64 + index.len() as u64, "more documents than the index has room for");
    true
}
