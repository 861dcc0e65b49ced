//! Small real jobs in temporary folders.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::root;

/// A job file in a folder of its own, with its store beside it.
pub struct Job {
    folder: TempDir,
    text: String,
}

impl Default for Job {
    fn default() -> Self {
        Self::new()
    }
}

impl Job {
    /// Steps of the standard test job.
    pub const STEPS: u64 = 30;

    /// The standard test job: 30 steps of 8 micro-batches, a checkpoint every 5.
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// The standard test job with other values for some keys, as `--set` takes them (`fault.hang=60`).
    pub fn with(keys: &[&str]) -> Self {
        let data = root().join("data");
        let mut text = String::new();
        let train = data.join("corpus.train").display().to_string();
        let validation = data.join("corpus.validation").display().to_string();
        let steps = Self::STEPS;
        writeln!(
            text,
            "name = \"t\"\n\
             model = {{ hidden_size = 96, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, \
             intermediate_size = 256, vocab_size = 256, tie_word_embeddings = true }}\n\
             data = {{ train = {train:?}, validation = {validation:?} }}\n\
             training.steps = {steps}\ntraining.sequence_length = 128\ntraining.global_batch = 8\n\
             training.micro_batch = 1\ntraining.seed = 7\ntraining.validate_every = 10\n\
             training.validate_sequences = 8\noptimizer.learning_rate = 3e-3\nschedule.warmup_steps = 5\n\
             checkpoint.every_steps = 5\nresources.device = \"cpu\"\n"
        )
        .expect("writing to a string does not fail");
        for key in keys {
            let (name, value) = key.split_once('=').expect("key=value");
            text = text.lines().filter(|line| !line.starts_with(name)).collect::<Vec<_>>().join("\n");
            write!(text, "\n{name} = {value}\n").expect("writing to a string does not fail");
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let job = Self { folder, text };
        std::fs::write(job.file(), &job.text).expect("the job file is written");
        job
    }

    /// The job file.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("job.toml")
    }

    /// The folder the job file lies in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The store, as a path.
    pub fn store(&self) -> PathBuf {
        self.folder.path().join("cairn-store")
    }

    /// Every file in the store whose name ends so, sorted.
    pub fn stored(&self, ending: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.store(), ending, &mut found);
        found.sort();
        found
    }
}

fn collect(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, ending, found);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
}
