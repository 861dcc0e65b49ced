//! `cairn data prepare`: text files into indexed datasets.
//!
//! Each input becomes a dataset of its own, `<output>/<name without its ending>.{bin,idx}`. A `.jsonl` file has one
//! document a line, an object whose `text` is the document; any other file is one document. After each document comes
//! the tokenizer's end of text, if it has one. Input is streamed; a dataset gets its name only when it is whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::{DataError, Result};
use super::layout::{ElementType, with_ending};
use super::tokenize::Tokenizer;
use super::writer::IndexedWriter;

/// Bytes read at once.
const PIECE: usize = 1 << 20;
/// The longest run without white space, or line of a `.jsonl`, that is accepted.
const LONGEST: usize = 64 << 20;
/// The longest document a `tokenizer.json` is given: such tokenizers need the whole of it.
const LONGEST_WHOLE: u64 = 256 << 20;

/// What to prepare.
#[derive(Debug)]
pub struct PrepareOptions {
    /// How text becomes token ids.
    pub tokenizer: Tokenizer,
    /// The folder of the datasets; made if it is not there.
    pub output: PathBuf,
    /// The text files.
    pub files: Vec<PathBuf>,
}

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The file being read.
    pub file: &'a Path,
    /// Bytes read of all files.
    pub bytes_done: u64,
    /// Bytes of all files.
    pub bytes_total: u64,
    /// Tokens written of this file.
    pub tokens: u64,
}

/// One dataset that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// The text file.
    pub input: PathBuf,
    /// The dataset, without its endings: what a job file names.
    pub prefix: PathBuf,
    /// Documents in it.
    pub documents: u64,
    /// Tokens in it.
    pub tokens: u64,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The least `model.vocab_size` for these datasets.
    pub vocab_size: u32,
    /// How tokens are stored.
    pub element_type: ElementType,
    /// One dataset per input file, in order.
    pub datasets: Vec<Prepared>,
}

/// Makes the datasets. Everything that can be checked beforehand is, so that a misspelt last file costs no time.
/// `progress` is called about once a mebibyte of input.
pub fn prepare(options: &PrepareOptions, progress: &mut dyn FnMut(&Progress<'_>)) -> Result<Report> {
    let (inputs, bytes_total) = check_inputs(options)?;
    fs::create_dir_all(&options.output)
        .map_err(|source| DataError::io(&options.output, "making the folder", source))?;
    let vocab_size = options.tokenizer.vocab_size();
    let element_type = ElementType::for_vocabulary(vocab_size);
    let mut datasets = Vec::with_capacity(inputs.len());
    let mut bytes_done = 0;
    for (prefix, input) in inputs {
        let writer = IndexedWriter::create(&prefix, element_type)?;
        let mut work = Work { tokenizer: &options.tokenizer, path: input, writer, bytes_done, bytes_total, progress };
        work.read()?;
        bytes_done = work.bytes_done;
        let (documents, tokens) = (work.writer.documents(), work.writer.tokens());
        if tokens == 0 {
            return Err(DataError::input(input, "there is no text in this file"));
        }
        work.writer.finish()?;
        datasets.push(Prepared { input: input.clone(), prefix, documents, tokens });
    }
    Ok(Report { vocab_size, element_type, datasets })
}

/// The outputs with their inputs, in order, and the inputs' bytes together.
fn check_inputs(options: &PrepareOptions) -> Result<(Vec<(PathBuf, &PathBuf)>, u64)> {
    if options.files.is_empty() {
        return Err(DataError::input(&options.output, "no text file was given to prepare"));
    }
    let mut seen: BTreeMap<PathBuf, &PathBuf> = BTreeMap::new();
    let mut out = Vec::with_capacity(options.files.len());
    let mut total = 0;
    for file in &options.files {
        let metadata = fs::metadata(file).map_err(|source| DataError::io(file, "opening the text", source))?;
        if !metadata.is_file() {
            return Err(DataError::input(file, "this is not a file; name the text files one by one"));
        }
        if metadata.len() == 0 {
            return Err(DataError::input(file, "the file is empty"));
        }
        total += metadata.len();
        let Some(stem) = file.file_stem() else {
            return Err(DataError::input(file, "a file without a name"));
        };
        let prefix = options.output.join(stem);
        if let Some(other) = seen.insert(prefix.clone(), file) {
            let problem = format!("{} would become the same dataset {}", other.display(), prefix.display());
            return Err(DataError::input(file, problem));
        }
        out.push((prefix, file));
    }
    check_outputs(&out)?;
    Ok((out, total))
}

/// Refuses an input that is, under whatever name, a file that making the datasets would write over.
fn check_outputs(sets: &[(PathBuf, &PathBuf)]) -> Result<()> {
    let identity = |path: &Path| fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let inputs: BTreeMap<_, _> = sets.iter().filter_map(|(_, file)| Some((identity(file)?, *file))).collect();
    for (prefix, _) in sets {
        for ending in [".bin", ".idx", ".bin.partial", ".idx.partial"] {
            let output = with_ending(prefix, ending);
            if let Some(input) = identity(&output).and_then(|output| inputs.get(&output)) {
                let problem = format!(
                    "this text would be written over as {}, a file of a dataset to be made; give another --output",
                    output.display()
                );
                return Err(DataError::input(input, problem));
            }
        }
    }
    Ok(())
}

/// One line of a `.jsonl` file; what else it says is of no interest here.
#[derive(Deserialize)]
struct Line {
    text: String,
}

struct Work<'a> {
    tokenizer: &'a Tokenizer,
    path: &'a Path,
    writer: IndexedWriter,
    bytes_done: u64,
    bytes_total: u64,
    progress: &'a mut dyn FnMut(&Progress<'_>),
}

impl Work<'_> {
    fn read(&mut self) -> Result<()> {
        let file = File::open(self.path).map_err(|source| DataError::io(self.path, "opening the text", source))?;
        if self.path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("jsonl")) {
            return self.read_lines(BufReader::with_capacity(PIECE, file));
        }
        match self.tokenizer {
            Tokenizer::Bytes => self.read_bytes(file)?,
            Tokenizer::Gpt2(_) => self.read_pieces(file)?,
            Tokenizer::HuggingFace(_) => self.read_whole(file)?,
        }
        self.end_document()
    }

    /// One document a line.
    fn read_lines(&mut self, mut input: impl BufRead) -> Result<()> {
        let mut line = Vec::new();
        let mut reported = self.bytes_done;
        for number in 1_u64.. {
            line.clear();
            let read = input.by_ref().take(LONGEST as u64 + 1).read_until(b'\n', &mut line);
            let count = read.map_err(|source| DataError::io(self.path, "reading the text", source))?;
            let bad = |problem: String| Err(DataError::input(self.path, format!("line {number}: {problem}")));
            if count == 0 {
                break;
            }
            if count > LONGEST {
                return bad(format!("longer than {LONGEST} bytes"));
            }
            self.bytes_done += count as u64;
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<Line>(&line) {
                Ok(Line { text }) => self.encode(&text)?,
                Err(error) => return bad(format!("not an object with a string \"text\": {error}")),
            }
            self.end_document()?;
            if self.bytes_done - reported >= PIECE as u64 {
                reported = self.bytes_done;
                self.report();
            }
        }
        self.report();
        Ok(())
    }

    /// Bytes are tokens as they are, whatever they mean.
    fn read_bytes(&mut self, mut file: File) -> Result<()> {
        let mut piece = vec![0; PIECE];
        let mut tokens = Vec::with_capacity(PIECE);
        loop {
            let count = self.fill(&mut file, &mut piece)?;
            if count == 0 {
                return Ok(());
            }
            tokens.clear();
            tokens.extend(piece[..count].iter().copied().map(u32::from));
            self.writer.push(&tokens)?;
            self.report();
        }
    }

    /// Text of any length, for a tokenizer that never joins white space to what is before it: GPT-2's splits text so
    /// that no piece goes on from a visible character to white space. Cut there, the parts give the whole's tokens.
    fn read_pieces(&mut self, mut file: File) -> Result<()> {
        let mut piece = vec![0; PIECE];
        let mut pending: Vec<u8> = Vec::new();
        let mut done = 0_u64;
        loop {
            let count = self.fill(&mut file, &mut piece)?;
            pending.extend_from_slice(&piece[..count]);
            let text = valid_prefix(&pending, count == 0).map_err(|at| self.not_text(done + at as u64))?;
            let cut = if count == 0 { text.len() } else { last_cut(text) };
            self.encode(&text[..cut])?;
            pending.drain(..cut);
            done += cut as u64;
            self.report();
            if count == 0 {
                return Ok(());
            }
            if pending.len() > LONGEST {
                let problem = format!("{LONGEST} bytes from byte {done} on without white space: this is not text");
                return Err(DataError::input(self.path, problem));
            }
        }
    }

    /// A tokenizer whose rules are not known here gets the whole document.
    fn read_whole(&mut self, file: File) -> Result<()> {
        let mut bytes = Vec::new();
        let read = file.take(LONGEST_WHOLE + 1).read_to_end(&mut bytes);
        self.bytes_done += read.map_err(|source| DataError::io(self.path, "reading the text", source))? as u64;
        if bytes.len() as u64 > LONGEST_WHOLE {
            let problem = format!(
                "a document longer than {LONGEST_WHOLE} bytes; cut it into documents, one a line: \
                 {{\"text\": …}} in a .jsonl file"
            );
            return Err(DataError::input(self.path, problem));
        }
        let text = valid_prefix(&bytes, true).map_err(|at| self.not_text(at as u64))?;
        self.encode(text)?;
        self.report();
        Ok(())
    }

    fn fill(&mut self, file: &mut File, piece: &mut [u8]) -> Result<usize> {
        let read = file.read(piece).map_err(|source| DataError::io(self.path, "reading the text", source));
        self.bytes_done += read.as_ref().map_or(0, |count| *count as u64);
        read
    }

    fn encode(&mut self, text: &str) -> Result<()> {
        self.writer.push(&self.tokenizer.encode(text)?)
    }

    fn end_document(&mut self) -> Result<()> {
        if let Some(token) = self.tokenizer.end_of_text() {
            self.writer.push(&[token])?;
        }
        self.writer.end_document();
        Ok(())
    }

    fn not_text(&self, offset: u64) -> DataError {
        let problem = format!("byte {offset} is not UTF-8; convert the text, or use --tokenizer bytes");
        DataError::input(self.path, problem)
    }

    fn report(&mut self) {
        let (bytes_done, bytes_total, tokens) = (self.bytes_done, self.bytes_total, self.writer.tokens());
        (self.progress)(&Progress { file: self.path, bytes_done, bytes_total, tokens });
    }
}

/// The text in `bytes`, without a character that the end cuts in two unless this `is_all`; or where it is not UTF-8.
fn valid_prefix(bytes: &[u8], is_all: bool) -> std::result::Result<&str, usize> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) if error.error_len().is_none() && !is_all => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).map_err(|error| error.valid_up_to())
        }
        Err(error) => Err(error.valid_up_to()),
    }
}

/// The last place between a visible character and white space; 0 if there is none.
fn last_cut(text: &str) -> usize {
    let mut later_is_space = false;
    for (at, character) in text.char_indices().rev() {
        if later_is_space && !character.is_whitespace() {
            return at + character.len_utf8();
        }
        later_is_space = character.is_whitespace();
    }
    0
}
