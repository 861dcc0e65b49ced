//! Writing an indexed dataset: streamed into temporary files, which get their names only when whole.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::error::{DataError, Result};
use super::layout::{ElementType, HEADER, MAGIC, VERSION, with_ending};

/// Tokens of one sequence at most; a longer document is several. Lengths are stored as i32.
const LONGEST: u64 = i32::MAX as u64;

/// Writes one dataset. Dropped before [`IndexedWriter::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct IndexedWriter {
    prefix: PathBuf,
    partial: PathBuf,
    tokens: BufWriter<File>,
    element: ElementType,
    /// Tokens of each sequence.
    lengths: Vec<i32>,
    /// Where documents end, in sequences.
    boundaries: Vec<i64>,
    /// Tokens of the document being written that are not in `lengths` yet.
    open: u64,
    total: u64,
    raw: Vec<u8>,
}

impl IndexedWriter {
    /// Starts `<prefix>.bin` and `<prefix>.idx`.
    pub fn create(prefix: &Path, element: ElementType) -> Result<Self> {
        let partial = with_ending(prefix, ".bin.partial");
        let file = File::create(&partial).map_err(|source| DataError::io(&partial, "creating", source))?;
        let tokens = BufWriter::with_capacity(1 << 20, file);
        let (lengths, boundaries, raw) = (Vec::new(), vec![0], Vec::new());
        Ok(Self { prefix: prefix.to_owned(), partial, tokens, element, lengths, boundaries, open: 0, total: 0, raw })
    }

    /// Appends tokens to the current document. Each id must fit the element type.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        self.raw.clear();
        for token in tokens {
            self.element.push(*token, &mut self.raw);
        }
        self.tokens.write_all(&self.raw).map_err(|source| DataError::io(&self.partial, "writing", source))?;
        self.open += tokens.len() as u64;
        self.total += tokens.len() as u64;
        while self.open > LONGEST {
            self.lengths.push(i32::MAX);
            self.open -= LONGEST;
        }
        Ok(())
    }

    /// Ends the current document. One without tokens is left out.
    pub fn end_document(&mut self) {
        if self.open > 0 {
            // `push` keeps what is open within an i32.
            self.lengths.push(self.open as i32);
            self.open = 0;
        }
        if self.boundaries.last() != Some(&(self.lengths.len() as i64)) {
            self.boundaries.push(self.lengths.len() as i64);
        }
    }

    /// Documents ended so far.
    pub fn documents(&self) -> u64 {
        self.boundaries.len() as u64 - 1
    }

    /// Tokens written so far.
    pub fn tokens(&self) -> u64 {
        self.total
    }

    /// Completes both files and gives them their names. A crash at any moment leaves a whole dataset or one that does
    /// not open, never a mixture of an old and a new one: the old index goes first, the new one comes last.
    pub fn finish(mut self) -> Result<()> {
        self.end_document();
        let flushed = self.tokens.flush().and_then(|()| self.tokens.get_ref().sync_all());
        flushed.map_err(|source| DataError::io(&self.partial, "writing", source))?;
        let (index, bin) = (with_ending(&self.prefix, ".idx"), with_ending(&self.prefix, ".bin"));
        let partial = with_ending(&self.prefix, ".idx.partial");
        let written = File::create(&partial).and_then(|mut file| {
            file.write_all(&self.index())?;
            file.sync_all()
        });
        written.map_err(|source| DataError::io(&partial, "writing", source))?;
        match fs::remove_file(&index) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(DataError::io(&index, "replacing", source));
            }
            _ => {}
        }
        fs::rename(&self.partial, &bin).map_err(|source| DataError::io(&bin, "naming", source))?;
        fs::rename(&partial, &index).map_err(|source| DataError::io(&index, "naming", source))
    }

    fn index(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.lengths.len() * 12 + self.boundaries.len() * 8);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(self.element.code());
        out.extend_from_slice(&(self.lengths.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.boundaries.len() as u64).to_le_bytes());
        for length in &self.lengths {
            out.extend_from_slice(&length.to_le_bytes());
        }
        let mut start = 0_i64;
        for length in &self.lengths {
            out.extend_from_slice(&start.to_le_bytes());
            start += i64::from(*length) * self.element.size() as i64;
        }
        for boundary in &self.boundaries {
            out.extend_from_slice(&boundary.to_le_bytes());
        }
        out
    }
}

impl Drop for IndexedWriter {
    fn drop(&mut self) {
        // After `finish` these names are gone already; after an error, nothing half-made stays.
        let _ = fs::remove_file(&self.partial);
        let _ = fs::remove_file(with_ending(&self.prefix, ".idx.partial"));
    }
}
