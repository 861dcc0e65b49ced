//! Tokenizers: text to token ids.

use std::fmt;
use std::path::Path;

use tiktoken_rs::CoreBPE;

use super::error::{DataError, Result};

/// GPT-2's vocabulary: 50,000 merges, 256 bytes, and the end of text.
const GPT2_VOCABULARY: u32 = 50_257;
const GPT2_END_OF_TEXT: u32 = 50_256;
/// What vocabularies of Hugging Face tokenizers call the token after each document, by habit.
const END_OF_TEXT: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]"];

/// One way to turn text into token ids.
pub enum Tokenizer {
    /// Each byte is a token: 256 ids, any file, no end of text.
    Bytes,
    /// GPT-2's byte-pair encoding, built in.
    Gpt2(&'static CoreBPE),
    /// A Hugging Face `tokenizer.json`.
    HuggingFace(Box<HuggingFace>),
}

/// A tokenizer read from a `tokenizer.json`.
pub struct HuggingFace {
    path: String,
    tokenizer: tokenizers::Tokenizer,
    vocabulary: u32,
    end_of_text: Option<u32>,
}

impl Tokenizer {
    /// `bytes`, `gpt2`, or the path of a Hugging Face `tokenizer.json`.
    pub fn load(name: &str) -> Result<Self> {
        match name {
            "bytes" => Ok(Self::Bytes),
            "gpt2" => Ok(Self::Gpt2(tiktoken_rs::r50k_base_singleton())),
            _ => HuggingFace::load(name).map(|loaded| Self::HuggingFace(Box::new(loaded))),
        }
    }

    /// What `load` was given.
    pub fn name(&self) -> &str {
        match self {
            Self::Bytes => "bytes",
            Self::Gpt2(_) => "gpt2",
            Self::HuggingFace(loaded) => &loaded.path,
        }
    }

    /// Every id is below this: the least `model.vocab_size` that works.
    pub fn vocab_size(&self) -> u32 {
        match self {
            Self::Bytes => 256,
            Self::Gpt2(_) => GPT2_VOCABULARY,
            Self::HuggingFace(loaded) => loaded.vocabulary,
        }
    }

    /// The token that ends a document, if the vocabulary has one.
    pub fn end_of_text(&self) -> Option<u32> {
        match self {
            Self::Bytes => None,
            Self::Gpt2(_) => Some(GPT2_END_OF_TEXT),
            Self::HuggingFace(loaded) => loaded.end_of_text,
        }
    }

    /// The ids of a text, without special tokens: text that looks like one is text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Gpt2(bpe) => Ok(bpe.encode_ordinary(text)),
            Self::HuggingFace(loaded) => {
                let encoding = loaded.tokenizer.encode_fast(text, false);
                let ids = encoding.map_err(|error| loaded.error(format!("cannot encode: {error}")))?.get_ids().to_vec();
                match ids.iter().find(|id| **id >= loaded.vocabulary) {
                    Some(id) => Err(loaded.error(format!("gave id {id}, beyond its own vocabulary"))),
                    None => Ok(ids),
                }
            }
        }
    }
}

impl HuggingFace {
    fn load(path: &str) -> Result<Self> {
        let error = |problem: String| DataError::Tokenizer { name: path.to_owned(), problem };
        if !Path::new(path).is_file() {
            return Err(error("unknown, and no such file: choose bytes, gpt2 or the path of a tokenizer.json".into()));
        }
        let mut tokenizer = tokenizers::Tokenizer::from_file(path)
            .map_err(|cause| error(format!("not a Hugging Face tokenizer.json: {cause}")))?;
        // A corpus is tokenized whole: what cuts or fills up a model's input has no place here.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|cause| error(format!("cannot be used untruncated: {cause}")))?;
        // Ids may have gaps, so the count of tokens does not bound them.
        let highest = tokenizer.get_vocab(true).into_values().max();
        let vocabulary = highest.and_then(|id| id.checked_add(1)).filter(|size| i32::try_from(*size).is_ok());
        let vocabulary = vocabulary.ok_or_else(|| error("its vocabulary is empty or too large".into()))?;
        let end_of_text = END_OF_TEXT.iter().find_map(|name| tokenizer.token_to_id(name));
        Ok(Self { path: path.to_owned(), tokenizer, vocabulary, end_of_text })
    }

    fn error(&self, problem: String) -> DataError {
        DataError::Tokenizer { name: self.path.clone(), problem }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tokenizer").field(&self.name()).finish()
    }
}
