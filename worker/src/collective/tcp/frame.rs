//! The header in front of every chunk on the ring.
//!
//! 48 bytes, little-endian: magic, kind, generation, operation number, ring step, payload bytes. The receiver knows
//! each value before it reads, so a header is not parsed so much as compared: ranks that disagree about what they are
//! doing, or belong to different generations, fail with both values named instead of adding up the wrong numbers.

use super::super::{CollectiveError, Result};

/// Bytes of a header.
pub(super) const HEADER: usize = 48;
const MAGIC: u64 = u64::from_le_bytes(*b"CAIRNfrm");

/// The operations that travel on the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Kind {
    ReduceI64 = 1,
    ReduceF32 = 2,
    GatherF32 = 3,
    GatherBytes = 4,
    Barrier = 5,
    ReduceI32 = 6,
    GatherU16 = 7,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ReduceI64 => "reduce-scatter (i64)",
            Self::ReduceF32 => "reduce-scatter (f32)",
            Self::GatherF32 => "all-gather (f32)",
            Self::GatherBytes => "all-gather (bytes)",
            Self::Barrier => "barrier",
            Self::ReduceI32 => "reduce-scatter (i32)",
            Self::GatherU16 => "all-gather (u16)",
        }
    }

    fn name_of(raw: u64) -> String {
        let all = [
            Self::ReduceI64,
            Self::ReduceF32,
            Self::GatherF32,
            Self::GatherBytes,
            Self::Barrier,
            Self::ReduceI32,
            Self::GatherU16,
        ];
        let known = all.into_iter().find(|kind| *kind as u64 == raw);
        known.map_or_else(|| format!("unknown operation {raw}"), |kind| kind.name().to_owned())
    }
}

/// What a chunk is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) generation: u64,
    pub(super) operation: u64,
    pub(super) step: u64,
    pub(super) bytes: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        let words = [MAGIC, self.kind as u64, self.generation, self.operation, self.step, self.bytes];
        for (place, word) in out.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// Compares a received header with what must come, its length aside; returns the length it announces.
    pub(super) fn accept(&self, raw: &[u8; HEADER]) -> Result<u64> {
        let word = |i: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&raw[i * 8..i * 8 + 8]);
            u64::from_le_bytes(bytes)
        };
        if word(0) != MAGIC {
            return Err(CollectiveError::Protocol("a frame does not start with Cairn's magic".into()));
        }
        if word(2) != self.generation {
            return Err(self.mismatch("generation", word(2), self.generation));
        }
        if word(3) != self.operation {
            return Err(self.mismatch("operation number", word(3), self.operation));
        }
        if word(1) != self.kind as u64 {
            let (theirs, ours) = (Kind::name_of(word(1)), self.kind.name());
            return Err(CollectiveError::Protocol(format!(
                "operation {}: the peer is in {theirs}, this rank in {ours}",
                self.operation
            )));
        }
        if word(4) != self.step {
            return Err(self.mismatch("ring step", word(4), self.step));
        }
        Ok(word(5))
    }

    /// As [`Header::accept`], where the length is known as well.
    pub(super) fn accept_exactly(&self, raw: &[u8; HEADER]) -> Result<()> {
        let bytes = self.accept(raw)?;
        if bytes == self.bytes { Ok(()) } else { Err(self.mismatch("chunk length", bytes, self.bytes)) }
    }

    fn mismatch(&self, what: &str, theirs: u64, ours: u64) -> CollectiveError {
        let kind = self.kind.name();
        CollectiveError::Protocol(format!("{kind}: the peer's {what} is {theirs}, this rank's is {ours}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Header = Header { kind: Kind::ReduceI64, generation: 3, operation: 7, step: 1, bytes: 640 };

    #[test]
    fn a_header_survives_the_wire() {
        assert!(OURS.accept_exactly(&OURS.encode()).is_ok());
    }

    #[test]
    fn each_difference_is_named_with_both_values() {
        let cases = [
            (Header { generation: 2, ..OURS }, "generation is 2, this rank's is 3"),
            (Header { operation: 8, ..OURS }, "operation number is 8, this rank's is 7"),
            (Header { kind: Kind::Barrier, ..OURS }, "the peer is in barrier, this rank in reduce-scatter (i64)"),
            (Header { step: 0, ..OURS }, "ring step is 0, this rank's is 1"),
            (Header { bytes: 8, ..OURS }, "chunk length is 8, this rank's is 640"),
        ];
        for (theirs, want) in cases {
            let error = OURS.accept_exactly(&theirs.encode()).expect_err("differs").to_string();
            assert!(error.contains(want), "{error}");
        }
        assert!(OURS.accept(&[7; HEADER]).is_err());
    }
}
