//! The binary form of manifests and receipts: a mark, a format number, and a body of plain fields.
//!
//! ```text
//! 8 bytes   the mark, which says what it is
//! 4 bytes   the format, little-endian
//! the rest  the body: numbers in LEB128, texts and lists preceded by their length, hashes as their 32 bytes
//! ```
//!
//! Both sides stream: a writer goes straight into the compressor, a reader takes what the decompressor gives, so
//! nothing is held twice. A reader has a budget of bytes, and every length is held against a bound before memory is
//! taken for it: a body that unpacks to far more than it is runs into one or the other.

use std::io::{self, Read, Write};

use crate::digest::BlockHash;
use crate::error::{StoreError, check_format};

/// Bytes before the body.
pub(crate) const HEAD: usize = 12;
/// Hashes read at once.
const HASHES: usize = 2048;

/// The bytes before a body.
pub(crate) fn head(mark: [u8; 8], format: u32) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&mark);
    head[8..].copy_from_slice(&format.to_le_bytes());
    head
}

/// The body of what carries the mark, if its format is one of `first..=known`; `path` is for messages.
pub(crate) fn body<'a>(
    path: &str,
    bytes: &'a [u8],
    mark: [u8; 8],
    first: u32,
    known: u32,
) -> Result<&'a [u8], StoreError> {
    let rest = bytes.strip_prefix(&mark[..]).and_then(<[u8]>::split_first_chunk::<4>);
    let Some((format, body)) = rest else {
        return Err(StoreError::Corrupt(format!("{path} is not valid: it begins as nothing this build writes")));
    };
    let format = u32::from_le_bytes(*format);
    check_format(path, format, known)?;
    if format < first {
        return Err(StoreError::Corrupt(format!("{path} is not valid: format {format} was never binary")));
    }
    Ok(body)
}

/// Writes the fields of a body.
pub(crate) struct Writer<W>(pub(crate) W);

impl<W: Write> Writer<W> {
    pub(crate) fn number(&mut self, mut value: u64) -> io::Result<()> {
        let (mut bytes, mut length) = ([0; 10], 0);
        loop {
            bytes[length] = value as u8 & 0x7f;
            value >>= 7;
            if value == 0 {
                break;
            }
            bytes[length] |= 0x80;
            length += 1;
        }
        self.0.write_all(&bytes[..=length])
    }

    /// A number that may be negative: small ones of either sign are short.
    pub(crate) fn signed(&mut self, value: i64) -> io::Result<()> {
        self.number(((value << 1) ^ (value >> 63)) as u64)
    }

    pub(crate) fn length(&mut self, length: usize) -> io::Result<()> {
        self.number(length as u64)
    }

    pub(crate) fn text(&mut self, text: &str) -> io::Result<()> {
        self.length(text.len())?;
        self.0.write_all(text.as_bytes())
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    pub(crate) fn hashes(&mut self, hashes: &[BlockHash]) -> io::Result<()> {
        hashes.iter().try_for_each(|hash| self.0.write_all(hash.as_bytes()))
    }
}

/// What is wrong with a body.
pub(crate) type Wrong = String;

/// Reads the fields of a body, and no more bytes than its budget.
pub(crate) struct Reader<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(inner: R, budget: u64) -> Self {
        Self { inner, left: budget }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Wrong> {
        let left = self.left.checked_sub(bytes.len() as u64);
        self.left = left.ok_or("it unpacks to more than it may")?;
        self.inner.read_exact(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => "it ends too early".to_owned(),
            _ => format!("it cannot be unpacked: {e}"),
        })
    }

    pub(crate) fn raw<const N: usize>(&mut self) -> Result<[u8; N], Wrong> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn number(&mut self) -> Result<u64, Wrong> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.raw()?;
            let part = u64::from(byte & 0x7f);
            if part << shift >> shift != part {
                break;
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("it holds a number of more than 64 bits".into())
    }

    pub(crate) fn signed(&mut self) -> Result<i64, Wrong> {
        let value = self.number()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A number that is at most `most`.
    pub(crate) fn up_to(&mut self, what: &str, most: u64) -> Result<u64, Wrong> {
        let value = self.number()?;
        if value <= most { Ok(value) } else { Err(format!("it has {value} {what}; there are at most {most}")) }
    }

    /// A length of a list of at most `most` entries.
    pub(crate) fn length(&mut self, what: &str, most: usize) -> Result<usize, Wrong> {
        self.up_to(what, most as u64).map(|length| length as usize)
    }

    pub(crate) fn text(&mut self, what: &str, most: usize) -> Result<String, Wrong> {
        let mut bytes = vec![0; self.length(&format!("bytes in {what}"), most)?];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))
    }

    /// That many hashes. Memory is taken as they arrive, not as they are promised.
    pub(crate) fn hashes(&mut self, count: usize) -> Result<Vec<BlockHash>, Wrong> {
        let mut hashes = Vec::new();
        let mut buffer = vec![0; count.min(HASHES) * 32];
        while hashes.len() < count {
            let part = (count - hashes.len()).min(HASHES);
            self.fill(&mut buffer[..part * 32])?;
            if hashes.is_empty() {
                // The first ones are there, and the caller's bound on the count is one on memory too.
                hashes.reserve_exact(count);
            }
            let (chunks, _) = buffer[..part * 32].as_chunks::<32>();
            hashes.extend(chunks.iter().copied().map(BlockHash::from_bytes));
        }
        Ok(hashes)
    }

    /// Nothing may follow.
    pub(crate) fn end(mut self) -> Result<(), Wrong> {
        match self.inner.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err("bytes follow its end".into()),
            Err(e) => Err(format!("it cannot be unpacked: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fields_read_back(numbers in proptest::collection::vec(any::<u64>(), 0..20), signed: i64, text in ".{0,40}") {
            let mut writer = Writer(vec![]);
            numbers.iter().try_for_each(|n| writer.number(*n)).unwrap();
            writer.signed(signed).unwrap();
            writer.text(&text).unwrap();
            let mut reader = Reader::new(&writer.0[..], 1 << 20);
            for number in numbers {
                prop_assert_eq!(reader.number(), Ok(number));
            }
            prop_assert_eq!(reader.signed(), Ok(signed));
            prop_assert_eq!(reader.text("a text", 200), Ok(text));
            prop_assert!(reader.end().is_ok());
        }

        #[test]
        fn noise_is_an_error_and_no_panic(noise in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut reader = Reader::new(&noise[..], 48);
            while reader.number().is_ok() && reader.text("a text", 16).is_ok() {}
            prop_assert!(Reader::new(&noise[..], 1 << 30).hashes(3).is_err());
        }
    }

    #[test]
    fn bounds_hold_before_memory_is_taken() {
        let eleven = [0xff; 11];
        assert!(Reader::new(&eleven[..], 100).number().unwrap_err().contains("64 bits"));
        let huge = [0xff, 0xff, 0xff, 0xff, 0x7f];
        assert!(Reader::new(&huge[..], 100).text("a name", 256).unwrap_err().contains("at most 256"));
        assert!(Reader::new(io::repeat(7), 1 << 16).hashes(1 << 19).unwrap_err().contains("more than it may"));
        assert_eq!(Reader::new(&[1, 2][..], 100).end(), Err("bytes follow its end".into()));
    }

    #[test]
    fn a_head_says_what_it_is() {
        let mut bytes = head(*b"cairn/x\n", 2).to_vec();
        bytes.push(9);
        assert_eq!(body("x", &bytes, *b"cairn/x\n", 2, 2).unwrap(), [9]);
        let newer = body("x", &bytes, *b"cairn/x\n", 1, 1).unwrap_err().to_string();
        assert!(newer.contains("format 2") && newer.contains("1 to 1"), "{newer}");
        assert!(body("x", &bytes, *b"cairn/y\n", 2, 2).is_err());
        assert!(body("x", &bytes, *b"cairn/x\n", 3, 3).is_err());
        assert!(body("x", &bytes[..11], *b"cairn/x\n", 2, 2).is_err());
    }
}
