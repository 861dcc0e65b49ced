//! The layout of an indexed dataset, as Megatron-LM defines it (`megatron/core/datasets/indexed_dataset.py`).
//!
//! `.bin` is the tokens of all sequences, end to end. `.idx` is, little-endian and unpadded:
//!
//! ```text
//! 0   magic "MMIDIDX\0\0"          9 bytes
//! 9   version                      u64 = 1
//! 17  element type                 u8
//! 18  number of sequences S        u64
//! 26  number of document entries D u64, one more than there are documents
//! 34  length of each sequence      S × i32, in tokens
//!     start of each sequence       S × i64, in bytes of .bin
//!     document boundaries          D × i64, in sequences: 0, …, S
//! ```
//!
//! A document is a run of sequences. Sequences lie in `.bin` in order and without gaps, as every Megatron writer leaves
//! them; so the dataset is one run of tokens, and that is how it is read.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The first bytes of every `.idx`.
pub(super) const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
/// The only version there is.
pub(super) const VERSION: u64 = 1;
/// Bytes before the arrays.
pub(super) const HEADER: usize = 34;

/// How a token id is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// One byte, 0 to 255.
    U8,
    /// One byte; only ids from 0 to 127 are valid.
    I8,
    /// Two bytes; only ids from 0 are valid.
    I16,
    /// Four bytes; only ids from 0 are valid.
    I32,
    /// Eight bytes; only ids from 0 are valid.
    I64,
    /// Two bytes, 0 to 65535.
    U16,
}

impl ElementType {
    /// The smallest type of Megatron's choice for a vocabulary: as there, 65,500 and more ids take four bytes.
    pub fn for_vocabulary(size: u32) -> Self {
        match size {
            0..=256 => Self::U8,
            257..65_500 => Self::U16,
            _ => Self::I32,
        }
    }

    /// Bytes of one token.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::I16 | Self::U16 => 2,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    /// The layout's code.
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::U8 => 1,
            Self::I8 => 2,
            Self::I16 => 3,
            Self::I32 => 4,
            Self::I64 => 5,
            Self::U16 => 8,
        }
    }

    /// The type of a code; otherwise why there is none.
    pub(super) fn from_code(code: u8) -> Result<Self, String> {
        match code {
            1 => Ok(Self::U8),
            2 => Ok(Self::I8),
            3 => Ok(Self::I16),
            4 => Ok(Self::I32),
            5 => Ok(Self::I64),
            8 => Ok(Self::U16),
            6 | 7 => Err(format!("element type {code} is floating point; token ids are integers (1-5 or 8)")),
            _ => Err(format!("unknown element type {code}; token ids have type 1-5 or 8")),
        }
    }

    /// Reads tokens one after another. `bytes` must be whole elements; what is over is left out.
    pub(super) fn values(self, bytes: &[u8]) -> impl Iterator<Item = i64> + '_ {
        bytes.chunks_exact(self.size()).map(move |raw| match (self, raw) {
            (Self::U8, &[a]) => i64::from(a),
            (Self::I8, &[a]) => i64::from(a as i8),
            (Self::U16, &[a, b]) => i64::from(u16::from_le_bytes([a, b])),
            (Self::I16, &[a, b]) => i64::from(i16::from_le_bytes([a, b])),
            (Self::I32, &[a, b, c, d]) => i64::from(i32::from_le_bytes([a, b, c, d])),
            (Self::I64, &[a, b, c, d, e, f, g, h]) => i64::from_le_bytes([a, b, c, d, e, f, g, h]),
            // `chunks_exact` gives slices of the type's size only; an invalid id is the harmless answer.
            _ => -1,
        })
    }

    /// Appends a token to `out`. The id must fit, which [`ElementType::for_vocabulary`] ensures.
    pub(super) fn push(self, token: u32, out: &mut Vec<u8>) {
        match self {
            Self::U8 | Self::I8 => out.push(token as u8),
            Self::U16 | Self::I16 => out.extend_from_slice(&(token as u16).to_le_bytes()),
            Self::I32 => out.extend_from_slice(&token.to_le_bytes()),
            Self::I64 => out.extend_from_slice(&i64::from(token).to_le_bytes()),
        }
    }
}

/// The path of one of a dataset's two files. Appended, not replaced: a name may have dots of its own.
pub(super) fn with_ending(prefix: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(prefix);
    name.push(ending);
    PathBuf::from(name)
}
