//! What can be wrong with data, said so that it can be put right.

use std::io;
use std::path::{Path, PathBuf};

/// Why data could not be read or prepared.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be opened, read or written.
    #[error("{}: {action} failed: {source}{hint}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What to do about it, or nothing.
        hint: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A file is not half of an indexed dataset, or not a whole one.
    #[error("{}: at byte {offset}: {problem}; make the dataset with `cairn data prepare`", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is there, and what would be right.
        problem: String,
    },
    /// A token id the model has no embedding for.
    #[error(
        "{}: document {document}, token {position}: id {token} is not below the vocabulary's size {vocabulary}; \
         prepare the data with the model's tokenizer, or raise model.vocab_size", path.display()
    )]
    Vocabulary {
        /// The dataset's `.bin` file.
        path: PathBuf,
        /// The document, from 0.
        document: u64,
        /// The token's place in the document, from 0.
        position: u64,
        /// The id as stored.
        token: i64,
        /// Ids must be below this.
        vocabulary: u32,
    },
    /// Too few tokens for a single batch of the kind asked for.
    #[error(
        "{}: {tokens} tokens make {samples} samples of {sequence_length} tokens, {needed} are needed; use more text or \
         a smaller training.sequence_length", path.display()
    )]
    TooSmall {
        /// The dataset's `.bin` file.
        path: PathBuf,
        /// Tokens it has.
        tokens: u64,
        /// Whole samples they make.
        samples: u64,
        /// Tokens of a sample.
        sequence_length: usize,
        /// Samples that are needed.
        needed: u64,
    },
    /// The caller asked for a batch that cannot be.
    #[error("cannot make a batch: {0}")]
    Shape(String),
    /// The tokenizer cannot be had, or cannot tokenize.
    #[error("tokenizer {name:?}: {problem}")]
    Tokenizer {
        /// Its name or file.
        name: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// An input of `cairn data prepare` cannot be used.
    #[error("{}: {problem}", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

/// The result of working with data.
pub type Result<T> = std::result::Result<T, DataError>;

impl DataError {
    pub(super) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), action, hint: "", source }
    }

    pub(super) fn format(path: &Path, offset: u64, problem: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), offset, problem: problem.into() }
    }

    pub(super) fn input(path: &Path, problem: impl Into<String>) -> Self {
        Self::Input { path: path.to_owned(), problem: problem.into() }
    }
}
