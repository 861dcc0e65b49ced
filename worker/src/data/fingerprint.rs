//! Telling one dataset from another without reading all of it.
//!
//! A resumed job must see the same data, or its weights are no longer a function of its specification (P1). The
//! fingerprint is BLAKE3 (in key-derivation mode, for a domain of its own) over, in this order:
//!
//! 1. the length of `.idx` as u64, little-endian, and its bytes;
//! 2. the length of `.bin` as u64;
//! 3. the bytes of `.bin` if there are at most 4 MiB; otherwise 64 pieces of 64 KiB, piece i starting at
//!    ⌊i · (length - 64 KiB) / 63⌋: the first at the start, the last at the end, the others evenly between.
//!
//! It finds any other dataset, another tokenizer, another order, any change of a document's length; it can miss a
//! change of a few tokens in place in a large file.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::indexed::IndexedDataset;

const PIECES: u128 = 64;
const PIECE: usize = 64 << 10;

/// Identifies a dataset's content; shown as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(blake3::Hash);

impl Fingerprint {
    /// The fingerprint of an open dataset.
    pub fn of(data: &IndexedDataset) -> Self {
        let (index, tokens) = (data.index_bytes(), data.token_bytes());
        let mut hasher = blake3::Hasher::new_derive_key("cairn dataset fingerprint v1");
        hasher.update(&(index.len() as u64).to_le_bytes()).update(index);
        hasher.update(&(tokens.len() as u64).to_le_bytes());
        if tokens.len() <= PIECES as usize * PIECE {
            hasher.update(tokens);
        } else {
            let last = (tokens.len() - PIECE) as u128;
            for piece in 0..PIECES {
                let start = (piece * last / (PIECES - 1)) as usize;
                hasher.update(&tokens[start..start + PIECE]);
            }
        }
        Self(hasher.finalize())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.to_hex().fmt(f)
    }
}

impl FromStr for Fingerprint {
    type Err = blake3::HexError;
    fn from_str(text: &str) -> Result<Self, blake3::HexError> {
        blake3::Hash::from_hex(text).map(Self)
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = blake3::HexError;
    fn try_from(text: String) -> Result<Self, blake3::HexError> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(value: Fingerprint) -> Self {
        value.to_string()
    }
}
