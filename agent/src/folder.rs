//! The agent's folder in memory: the workers' socket and one folder of slot files for each worker.
//!
//! Each life of an agent makes its own sub-folder (mode 0700) and holds a lock on a file in it for as long as it lives.
//! A sub-folder whose lock is free belonged to an agent that is gone, and is removed: memory is not leaked by crashes.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use proto::ids::WorkerId;
use rustix::fs::{FlockOperation, flock};

use crate::AgentError;

/// Sub-folders of agents start with this.
const PREFIX: &str = "cairn-agent-";
/// A Unix socket's path must be shorter than `sun_path`, 108 bytes with its final zero.
const LONGEST_SOCKET: usize = 107;

/// A locked folder of this life of the agent; removed when dropped.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Removes what dead agents left in `parent` and makes a folder for this life, named after `incarnation`.
    pub(crate) fn create(parent: &Path, incarnation: &str) -> Result<Self, AgentError> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |source| AgentError::Folder { path, source }
        };
        std::fs::create_dir_all(parent).map_err(at(parent))?;
        let parent = std::fs::canonicalize(parent).map_err(at(parent))?;
        clean(&parent).map_err(at(&parent))?;
        let short: String = incarnation.chars().filter(char::is_ascii_hexdigit).take(12).collect();
        let path = parent.join(format!("{PREFIX}{short}"));
        let socket = path.join("socket");
        if socket.as_os_str().len() > LONGEST_SOCKET {
            let text =
                format!("the socket's path would be longer than {LONGEST_SOCKET} bytes; choose a shorter folder");
            return Err(AgentError::Folder { path: socket, source: io::Error::other(text) });
        }
        DirBuilder::new().mode(0o700).create(&path).map_err(at(&path))?;
        let lock = lock_file(&path).map_err(at(&path))?;
        let taken = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        taken.map_err(|error| at(&path)(error.into()))?;
        Ok(Self { path, _lock: lock })
    }

    /// Where the workers' socket lies.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join("socket")
    }

    /// The folder for a worker's slot files.
    pub(crate) fn slots(&self, worker: WorkerId) -> PathBuf {
        self.path.join(worker.to_string())
    }

    /// Makes the folder for a worker's slot files.
    pub(crate) fn make_slots(&self, worker: WorkerId) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(self.slots(worker))
    }

    /// Removes the slot files of a worker that is gone; mappings of them keep their bytes.
    pub(crate) fn remove_slots(&self, worker: WorkerId) -> io::Result<()> {
        std::fs::remove_dir_all(self.slots(worker))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Whatever cannot be removed now is removed by the next agent that starts here.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn lock_file(folder: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(folder.join("lock"))
}

/// Removes the folders of agents that hold their lock no more.
fn clean(parent: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(parent)? {
        let path = entry?.path();
        let ours = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX));
        if !ours || !path.is_dir() {
            continue;
        }
        // No lock file yet: an agent that is starting this very moment, or one that died doing so; leave it.
        let Ok(lock) = File::open(path.join("lock")) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            tracing::info!(folder = %path.display(), "removing what a dead agent left");
            if let Err(error) = std::fs::remove_dir_all(&path) {
                tracing::warn!(folder = %path.display(), %error, "cannot remove what a dead agent left");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_cleaned_up_and_the_living_are_not() {
        let parent = tempfile::tempdir().unwrap();
        let living = Folder::create(parent.path(), "aaaa").unwrap();
        let worker: WorkerId = uuid::Uuid::from_u128(1).to_string().parse().unwrap();
        living.make_slots(worker).unwrap();
        let dead = parent.path().join(format!("{PREFIX}bbbb"));
        std::fs::create_dir(&dead).unwrap();
        std::fs::write(dead.join("lock"), "").unwrap();
        std::fs::write(parent.path().join("other"), "").unwrap();
        let second = Folder::create(parent.path(), "cccc").unwrap();
        assert!(!dead.exists());
        assert!(living.slots(worker).exists() && parent.path().join("other").exists());
        drop((living, second));
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_an_error_at_start() {
        let parent = tempfile::tempdir().unwrap();
        let deep = parent.path().join("x".repeat(120));
        assert!(matches!(Folder::create(&deep, "aa"), Err(AgentError::Folder { .. })));
    }
}
