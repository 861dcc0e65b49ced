//! Reading an indexed dataset, memory-mapped.
//!
//! Everything the index claims is checked when it is opened, so that reading afterwards is arithmetic.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut};
use rayon::prelude::*;

use super::error::{DataError, Result};
use super::layout::{ElementType, HEADER, MAGIC, VERSION, with_ending};

/// Datasets up to this many bytes are worth scanning whole before training starts (about a second of reading).
pub const SCAN_LIMIT: u64 = 1 << 30;

/// A dataset open for reading: one run of tokens, cut into documents.
#[derive(Debug)]
pub struct IndexedDataset {
    index: Mmap,
    index_path: PathBuf,
    tokens: Mmap,
    path: PathBuf,
    element: ElementType,
    sequences: usize,
    documents: usize,
}

impl IndexedDataset {
    /// Opens `<prefix>.idx` and `<prefix>.bin`, and checks one against the other.
    ///
    /// The files must not be changed while they are open: the dataset is a view of them.
    pub fn open(prefix: &Path) -> Result<Self> {
        let (index_path, path) = (with_ending(prefix, ".idx"), with_ending(prefix, ".bin"));
        let index = map(&index_path)?;
        Self::check(index, index_path, path, map)
    }

    /// As [`IndexedDataset::open`], from bytes.
    pub(crate) fn of_memory(index: &[u8], tokens: &[u8]) -> Result<Self> {
        let copy = |bytes: &[u8], path: &Path| {
            // An empty map is an error, as an empty file is.
            let map = MmapMut::map_anon(bytes.len()).and_then(|mut map| {
                map.copy_from_slice(bytes);
                map.make_read_only()
            });
            map.map_err(|source| DataError::io(path, "copying", source))
        };
        let (index_path, path) = (PathBuf::from("memory.idx"), PathBuf::from("memory.bin"));
        Self::check(copy(index, &index_path)?, index_path, path, |path| copy(tokens, path))
    }

    /// Checks the index, then what `tokens` gives against it.
    fn check(
        index: Mmap,
        index_path: PathBuf,
        path: PathBuf,
        tokens: impl FnOnce(&Path) -> Result<Mmap>,
    ) -> Result<Self> {
        let header = Header::read(&index, &index_path)?;
        let tokens = tokens(&path)?;
        let Header { element, sequences, documents } = header;
        let dataset = Self { index, index_path, tokens, path, element, sequences, documents };
        dataset.check_sequences()?;
        dataset.check_documents()?;
        Ok(dataset)
    }

    /// The `.bin` file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tokens of all documents together.
    pub fn len(&self) -> u64 {
        (self.tokens.len() / self.element.size()) as u64
    }

    /// Never true: an empty dataset does not open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many documents there are.
    pub fn documents(&self) -> u64 {
        self.documents as u64
    }

    /// How a token is stored.
    pub fn element_type(&self) -> ElementType {
        self.element
    }

    /// Copies `out.len()` tokens from `start` on, counted over the concatenation of all documents. A token that is not
    /// below `vocabulary` is an error.
    pub fn read(&self, start: u64, vocabulary: u32, out: &mut [u32]) -> Result<()> {
        let range = usize::try_from(start).ok().and_then(|start| {
            let first = start.checked_mul(self.element.size())?;
            Some(first..first.checked_add(out.len().checked_mul(self.element.size())?)?)
        });
        let Some(bytes) = range.and_then(|range| self.tokens.get(range)) else {
            let (count, have) = (out.len(), self.len());
            return Err(DataError::Shape(format!("{count} tokens from {start} on leave the dataset of {have}")));
        };
        for (place, (out, value)) in out.iter_mut().zip(self.element.values(bytes)).enumerate() {
            *out = match u32::try_from(value) {
                Ok(token) if token < vocabulary => token,
                _ => return Err(self.outside(start + place as u64, value, vocabulary)),
            };
        }
        Ok(())
    }

    /// Looks at every token, on all cores, for one that is not below `vocabulary`; the first such is the error.
    pub fn check_vocabulary(&self, vocabulary: u32) -> Result<()> {
        // The type alone can be the proof.
        if self.element == ElementType::U8 && vocabulary >= 256 {
            return Ok(());
        }
        let piece = 1 << 20;
        let found = self.tokens.par_chunks(piece).enumerate().find_map_first(|(number, bytes)| {
            let outside = |value: &i64| !(0..i64::from(vocabulary)).contains(value);
            let (place, value) = self.element.values(bytes).enumerate().find(|(_, value)| outside(value))?;
            Some(((number * piece / self.element.size() + place) as u64, value))
        });
        found.map_or(Ok(()), |(at, value)| Err(self.outside(at, value, vocabulary)))
    }

    /// The bytes of the index, for the fingerprint.
    pub(super) fn index_bytes(&self) -> &[u8] {
        &self.index
    }

    /// The bytes of the tokens, for the fingerprint.
    pub(super) fn token_bytes(&self) -> &[u8] {
        &self.tokens
    }

    fn outside(&self, at: u64, token: i64, vocabulary: u32) -> DataError {
        // The last sequence that starts at or before the token, then the last document that starts at or before it.
        let byte = at as i64 * self.element.size() as i64;
        let sequence = last_at_or_before(self.sequences, |i| self.start(i), byte);
        let document = last_at_or_before(self.documents, |i| self.boundary(i), sequence as i64);
        let first = usize::try_from(self.boundary(document)).map_or(0, |sequence| self.start(sequence));
        let position = (byte - first) as u64 / self.element.size() as u64;
        DataError::Vocabulary { path: self.path.clone(), document: document as u64, position, token, vocabulary }
    }

    fn length(&self, sequence: usize) -> i64 {
        let at = HEADER + sequence * 4;
        i64::from(self.index.get(at..at + 4).map_or(-1, |raw| i32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])))
    }

    fn starts_at(&self) -> usize {
        HEADER + self.sequences * 4
    }

    fn start(&self, sequence: usize) -> i64 {
        i64_at(&self.index, self.starts_at() + sequence * 8)
    }

    fn boundaries_at(&self) -> usize {
        self.starts_at() + self.sequences * 8
    }

    fn boundary(&self, entry: usize) -> i64 {
        i64_at(&self.index, self.boundaries_at() + entry * 8)
    }

    /// Sequences must lie end to end and fill `.bin`.
    fn check_sequences(&self) -> Result<()> {
        let mut end: i64 = 0;
        for sequence in 0..self.sequences {
            let (length, start) = (self.length(sequence), self.start(sequence));
            if length < 0 {
                let problem = format!("sequence {sequence} has {length} tokens");
                return Err(self.index_error(HEADER + sequence * 4, problem));
            }
            if start != end {
                let problem = format!(
                    "sequence {sequence} starts at byte {start} of .bin; {end}, its predecessor's end, is right"
                );
                return Err(self.index_error(self.starts_at() + sequence * 8, problem));
            }
            // Lengths are below 2^31 and there are fewer than 2^60 of them only on paper: .bin bounds the sum.
            end = end.saturating_add(length.saturating_mul(self.element.size() as i64));
            if end as u64 > self.tokens.len() as u64 {
                let problem = format!(
                    "the file ends inside sequence {sequence}, which goes on to byte {end}: it is truncated, or \
                     another dataset's than {}",
                    self.index_path.display()
                );
                return Err(DataError::format(&self.path, self.tokens.len() as u64, problem));
            }
        }
        if end as u64 != self.tokens.len() as u64 {
            let (have, index) = (self.tokens.len(), self.index_path.display());
            let problem =
                format!("the file has {have} bytes, but {index} describes {end}: another dataset's, or incomplete");
            return Err(DataError::format(&self.path, end as u64, problem));
        }
        if end == 0 {
            return Err(DataError::format(&self.path, 0, "the dataset has no tokens"));
        }
        Ok(())
    }

    /// Document boundaries must go from 0 up to the number of sequences.
    fn check_documents(&self) -> Result<()> {
        let mut previous = 0;
        for entry in 0..=self.documents {
            let boundary = self.boundary(entry);
            let right = match entry {
                0 => boundary == 0,
                _ if entry == self.documents => boundary == self.sequences as i64,
                _ => (previous..=self.sequences as i64).contains(&boundary),
            };
            if !right {
                let problem = format!(
                    "document boundary {entry} is {boundary}; boundaries ascend from 0 to the {} sequences",
                    self.sequences
                );
                return Err(self.index_error(self.boundaries_at() + entry * 8, problem));
            }
            previous = boundary;
        }
        Ok(())
    }

    fn index_error(&self, offset: usize, problem: String) -> DataError {
        DataError::format(&self.index_path, offset as u64, problem)
    }
}

struct Header {
    element: ElementType,
    sequences: usize,
    documents: usize,
}

impl Header {
    /// Reads the header and checks that the arrays it announces are exactly the rest of the file.
    fn read(index: &[u8], path: &Path) -> Result<Self> {
        let error = |offset: usize, problem: String| Err(DataError::format(path, offset as u64, problem));
        let have = index.len();
        let shown = have.min(MAGIC.len());
        if index[..shown] != MAGIC[..shown] {
            return error(0, "not an index of an indexed dataset: it does not start with \"MMIDIDX\"".into());
        }
        if have < HEADER {
            return error(have, format!("the file ends inside its header of {HEADER} bytes: it is truncated"));
        }
        let version = i64_at(index, 9) as u64;
        if version != VERSION {
            return error(9, format!("layout version {version}; {VERSION} is the one known"));
        }
        let element = match ElementType::from_code(index[17]) {
            Ok(element) => element,
            Err(problem) => return error(17, problem),
        };
        let (sequences, entries) = (i64_at(index, 18) as u64, i64_at(index, 26) as u64);
        if entries == 0 {
            return error(26, "no document boundaries; there is one more than documents".into());
        }
        let need = HEADER as u128 + u128::from(sequences) * 12 + u128::from(entries) * 8;
        if need != have as u128 {
            let cause = if (have as u128) < need { "it is truncated" } else { "something else follows (multimodal?)" };
            let at = usize::try_from(need).map_or(have, |need| need.min(have));
            return error(
                at,
                format!(
                    "{sequences} sequences and {entries} document boundaries take {need} bytes, the file has \
                     {have}: {cause}"
                ),
            );
        }
        // Both counts are below the file's length by now, so they fit.
        Ok(Self { element, sequences: sequences as usize, documents: entries as usize - 1 })
    }
}

fn i64_at(bytes: &[u8], at: usize) -> i64 {
    let mut raw = [0; 8];
    // The arrays' extent was checked against the file's length; past it, an impossible value is the harmless answer.
    bytes.get(at..at + 8).map_or(-1, |found| {
        raw.copy_from_slice(found);
        i64::from_le_bytes(raw)
    })
}

/// The last of `count` ascending values that is at most `limit`; 0 if none is.
fn last_at_or_before(count: usize, value: impl Fn(usize) -> i64, limit: i64) -> usize {
    let (mut low, mut high) = (0, count);
    while high - low > 1 {
        let middle = usize::midpoint(low, high);
        if value(middle) <= limit {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

fn map(path: &Path) -> Result<Mmap> {
    let hint = "; the two files of a dataset are made with `cairn data prepare` and named without their endings";
    let failed = |action, source| DataError::Io { path: path.to_owned(), action, hint, source };
    let file = File::open(path).map_err(|source| failed("opening", source))?;
    let metadata = file.metadata().map_err(|source| failed("opening", source))?;
    if !metadata.is_file() {
        return Err(DataError::format(path, 0, "this is not a file"));
    }
    if metadata.len() == 0 {
        return Err(DataError::format(path, 0, "the file is empty"));
    }
    // SAFETY: the map is only read. Another process that changed the file would change the values, all of which are
    // valid and checked again where they matter; one that shortened it would end this process by SIGBUS, as with any
    // program that maps its input. `IndexedDataset::open` documents that the files must be left alone.
    unsafe { Mmap::map(&file) }.map_err(|source| failed("mapping", source))
}
