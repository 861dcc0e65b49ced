//! Block hashes and the digest: what makes two states equal.
//!
//! Each block of each state tensor is hashed with BLAKE3 (O'Connor et al., 2020) over its little-endian bytes, once, by
//! the rank that owns it. The digest of a state is a hash over the scalar state, the tensors' names, types and shapes,
//! and all block hashes in order. Nothing in it says who saved the state or on how many workers: equal digests, equal
//! state.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::scalar::{Encoder, ScalarState};
use crate::space::{Dtype, Space};

/// Separates this hash from every other use of BLAKE3.
const DOMAIN: &[u8] = b"cairn state digest\0";
/// The version of the encoding below; a change of any byte of it is a new version.
const VERSION: u32 = 1;

/// Hashes given to the digest at once.
const HASHES: usize = 8192;

/// Why a text is not a hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a hash: 64 hexadecimal digits, lower case")]
pub struct HexError(String);

macro_rules! hash32 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 32]);

        impl $name {
            /// Wraps 32 bytes.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The BLAKE3 hash of some bytes.
            pub fn of(bytes: &[u8]) -> Self {
                Self(*blake3::hash(bytes).as_bytes())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = HexError;
            fn from_str(text: &str) -> Result<Self, HexError> {
                parse_hex(text.as_bytes()).map(Self).ok_or_else(|| HexError(text.chars().take(80).collect()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = HexError;
            fn try_from(text: String) -> Result<Self, HexError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(hash: $name) -> String {
                hash.to_string()
            }
        }
    };
}

hash32! {
    /// The BLAKE3 hash of one block's bytes, or of a whole small file such as a manifest.
    BlockHash
}
hash32! {
    /// The identity of a whole training state.
    Digest
}

/// Lower-case hex to 32 bytes; upper case is refused so that a hash has one spelling.
pub(crate) fn parse_hex(text: &[u8]) -> Option<[u8; 32]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let text: &[u8; 64] = text.try_into().ok()?;
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

/// A list of block hashes; one string of concatenated hex in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HashList(pub Vec<BlockHash>);

impl TryFrom<String> for HashList {
    type Error = HexError;
    fn try_from(text: String) -> Result<Self, HexError> {
        let bad = |part: &[u8]| HexError(String::from_utf8_lossy(part).into_owned());
        let chunks = text.as_bytes().chunks(64);
        chunks.map(|part| parse_hex(part).map(BlockHash).ok_or_else(|| bad(part))).collect::<Result<_, _>>().map(Self)
    }
}

impl From<HashList> for String {
    fn from(list: HashList) -> String {
        let mut text = String::with_capacity(list.0.len() * 64);
        for hash in list.0 {
            text.push_str(blake3::Hash::from_bytes(hash.0).to_hex().as_str());
        }
        text
    }
}

/// Hashes a run of blocks in parallel. `bytes` are the little-endian elements from the start of a block on; only the
/// last block may be short. `block_elements` counts elements of `dtype`.
pub fn hash_blocks(bytes: &[u8], block_elements: u64, dtype: Dtype) -> Vec<BlockHash> {
    bytes.par_chunks((block_elements * dtype.size()) as usize).map(BlockHash::of).collect()
}

/// A state tensor over the canonical space: `param`, `exp_avg`, `exp_avg_sq`, …
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateDecl {
    /// The name, the first part of its entries' names in objects.
    pub name: String,
    /// The element type it is stored in.
    pub dtype: Dtype,
}

impl StateDecl {
    /// A state stored as 32-bit floats.
    pub fn f32(name: &str) -> Self {
        Self { name: name.to_owned(), dtype: Dtype::F32 }
    }

    /// The three states of AdamW, in the order in which they are declared everywhere.
    pub fn adamw() -> Vec<Self> {
        ["param", "exp_avg", "exp_avg_sq"].map(Self::f32).to_vec()
    }
}

/// The digest of a state: `hashes` has, per state in order, the hashes of all blocks of the space in order.
pub fn state_digest(scalar: &ScalarState, space: &Space, states: &[StateDecl], hashes: &[HashList]) -> Digest {
    let mut out = Encoder::default();
    out.raw(DOMAIN).u32(VERSION).bytes(&scalar.encode());
    out.len(space.tensors().len());
    for tensor in space.tensors() {
        out.text(&tensor.name).text(tensor.dtype.name()).u64s(&tensor.shape);
    }
    out.u64(space.block_elements()).len(states.len());
    let mut hasher = blake3::Hasher::new();
    hasher.update(&out.take());
    for (state, list) in states.iter().zip(hashes) {
        out.text(&state.name).text(state.dtype.name()).len(list.0.len());
        hasher.update(&out.take());
        // In large pieces: a hash at a time would keep BLAKE3 from working on many at once.
        for hashes in list.0.chunks(HASHES) {
            for hash in hashes {
                out.raw(&hash.0);
            }
            hasher.update(out.filled());
            out.clear();
        }
    }
    Digest(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::TensorDecl;

    #[test]
    fn hex_reads_back_and_has_one_spelling() {
        let digest = Digest::of(b"stones");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!(digest.to_string().to_uppercase().parse::<Digest>().is_err());
        for bad in ["", "00", &"g".repeat(64), &"0".repeat(65), "é"] {
            assert!(bad.parse::<Digest>().is_err());
        }
        let list = HashList(vec![BlockHash::of(b"a"), BlockHash::of(b"b")]);
        let json = serde_json::to_string(&list).unwrap();
        assert_eq!(serde_json::from_str::<HashList>(&json).unwrap(), list);
        assert!(serde_json::from_str::<HashList>(&json.replace("\"}", "0\"").replacen('"', "\"0", 1)).is_err());
    }

    #[test]
    fn every_part_of_a_state_counts() {
        let tensor =
            |name: &str, shape: &[u64]| TensorDecl { name: name.into(), shape: shape.into(), dtype: Dtype::F32 };
        let space = |tensors: &[TensorDecl]| Space::new(tensors.to_vec()).unwrap();
        let states = [StateDecl::f32("param")];
        let hashes = |data: &[u8]| [HashList(hash_blocks(data, 65536, Dtype::F32))];
        let scalar = ScalarState::start(7, 100);
        let base = space(&[tensor("a", &[2, 3])]);
        let digest = state_digest(&scalar, &base, &states, &hashes(&[0; 24]));
        let moved = ScalarState { cursor: 1, ..scalar.clone() };
        let others = [
            state_digest(&moved, &base, &states, &hashes(&[0; 24])),
            state_digest(&scalar, &space(&[tensor("a", &[3, 2])]), &states, &hashes(&[0; 24])),
            state_digest(&scalar, &space(&[tensor("b", &[2, 3])]), &states, &hashes(&[0; 24])),
            state_digest(&scalar, &base, &[StateDecl::f32("exp_avg")], &hashes(&[0; 24])),
            state_digest(&scalar, &base, &states, &hashes(&[1; 24])),
        ];
        for other in others {
            assert_ne!(digest, other);
        }
        assert_eq!(digest, state_digest(&scalar, &base, &states, &hashes(&[0; 24])));
    }
}
