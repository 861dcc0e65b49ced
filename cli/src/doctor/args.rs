//! The command line of `cairn doctor`.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::args::{JobFileArgs, ModeArgs, Output, SecurityArgs, key_value};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn doctor
  cairn doctor examples/tiny.toml
  cairn doctor job.toml --nodes 4 --slots 2 --memory-budget 8GiB
  cairn doctor --store s3://bucket/prefix --coordinator 10.0.0.1:7070 --tls certs/operator-me

Exit codes: 0 if nothing failed, 2 if something did.")]
pub(crate) struct DoctorArgs {
    /// A job file: what it needs is held against what is there.
    #[arg(value_name = "JOB.toml")]
    pub(crate) file: Option<PathBuf>,
    /// Override any key of the job file; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value, requires = "file")]
    pub(crate) set: Vec<(String, String)>,
    /// Store URL or path; without it the job's.
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// A coordinator to ask; of several, with commas between them or the flag repeated, each is.
    #[arg(long, value_name = "HOST:PORT,…", value_delimiter = ',')]
    pub(crate) coordinator: Vec<String>,
    /// The coordinator's token file.
    #[arg(long, value_name = "FILE", env = "CAIRN_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    /// Nodes the job is to run on.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) nodes: u32,
    /// Workers this node's agent can run at once, as in `cairn agent`; by default one a core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) slots: Option<u32>,
    /// Folder on a memory file system for snapshots.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub(crate) memory: PathBuf,
    /// Bytes that snapshots and parity may take, such as 8GiB; by default half of the memory file system.
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    pub(crate) memory_budget: Option<u64>,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

impl DoctorArgs {
    /// The job file and what overrides it. The store is checked on its own, so a wrong --store is no fault of the job.
    pub(super) fn job(&self, file: &Path) -> JobFileArgs {
        JobFileArgs {
            file: file.to_path_buf(),
            workers: None,
            store: None,
            steps: None,
            set: self.set.clone(),
            mode: ModeArgs { resume: false, fresh: false },
        }
    }
}
