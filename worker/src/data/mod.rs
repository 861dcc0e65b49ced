//! From text to batches.
//!
//! [`prepare`](prepare::prepare) tokenizes text into indexed datasets, a `.bin` and an `.idx` file each, in
//! Megatron-LM's layout. Training maps them ([`IndexedDataset`]) and takes its micro-batches from them in an order that
//! is a pure function of the seed and the step ([`Batches`]). A [`Fingerprint`] tells whether a resumed job has the
//! same data.

mod error;
mod fingerprint;
mod indexed;
mod layout;
mod order;
pub mod prepare;
mod tokenize;
mod writer;

pub use error::{DataError, Result};
pub use fingerprint::Fingerprint;
pub use indexed::{IndexedDataset, SCAN_LIMIT};
pub use layout::ElementType;
pub use order::{BatchShape, Batches, Permutation, ValidationBatches};
pub use tokenize::Tokenizer;
pub use writer::IndexedWriter;
