//! The agent's folder in memory: the workers' socket and one folder of slot files for each worker.
//!
//! Each life of an agent makes its own sub-folder (mode 0700) and holds a lock on a file in it for as long as it lives.
//! A sub-folder whose lock is free belonged to an agent that is gone. One of this agent's own node is taken over, with
//! the snapshots in it; one of another node waits an hour for its own agent, and is removed then: memory is not leaked
//! by crashes.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::ids::{NodeName, WorkerId};
use rustix::fs::{FlockOperation, flock};

use crate::AgentError;

/// Sub-folders of agents start with this.
const PREFIX: &str = "cairn-agent-";
/// A folder has this name until its lock is held: nobody takes it for a dead agent's.
const STARTING: &str = "cairn-starting-";
/// Folders taken over from earlier lives start with this.
const LEFT: &str = "left-";
/// A Unix socket's path must be shorter than `sun_path`, 108 bytes with its final zero.
const LONGEST_SOCKET: usize = 107;
/// How long the folder of another node's dead agent waits for that node's next one.
const PATIENCE: Duration = Duration::from_hours(1);

/// A locked folder of this life of the agent; removed when dropped.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// Slot folders taken over from an earlier life.
    adopted: BTreeMap<WorkerId, PathBuf>,
    _lock: File,
}

impl Folder {
    /// Makes a folder for this life, named after `incarnation`, in `parent`. With it come the folders that earlier
    /// lives of this node's agent left; they lie in this one now.
    pub(crate) fn create(
        parent: &Path,
        incarnation: &str,
        node: &NodeName,
    ) -> Result<(Self, Vec<PathBuf>), AgentError> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |source| AgentError::Folder { path, source }
        };
        std::fs::create_dir_all(parent).map_err(at(parent))?;
        let parent = std::fs::canonicalize(parent).map_err(at(parent))?;
        let short: String = incarnation.chars().filter(char::is_ascii_hexdigit).take(12).collect();
        let path = parent.join(format!("{PREFIX}{short}"));
        let socket = path.join("socket");
        if socket.as_os_str().len() > LONGEST_SOCKET {
            let text =
                format!("the socket's path would be longer than {LONGEST_SOCKET} bytes; choose a shorter folder");
            return Err(AgentError::Folder { path: socket, source: io::Error::other(text) });
        }
        let starting = parent.join(format!("{STARTING}{short}"));
        let lock = make_locked(&starting, node).map_err(at(&starting))?;
        std::fs::rename(&starting, &path).map_err(at(&path))?;
        let left = take_over(&parent, &path, node).map_err(at(&parent))?;
        Ok((Self { path, adopted: BTreeMap::new(), _lock: lock }, left))
    }

    /// With these slot folders of earlier lives held; what else those left is removed.
    pub(crate) fn with(mut self, adopted: BTreeMap<WorkerId, PathBuf>) -> Self {
        self.adopted = adopted;
        let Ok(entries) = std::fs::read_dir(&self.path) else { return self };
        let left = entries.flatten().map(|entry| entry.path());
        for folder in left.filter(|path| path.is_dir() && file_name(path).starts_with(LEFT)) {
            let Ok(inside) = std::fs::read_dir(&folder) else { continue };
            for path in inside.flatten().map(|entry| entry.path()) {
                if !self.adopted.values().any(|kept| *kept == path) {
                    remove(&path);
                }
            }
        }
        self
    }

    /// The folder itself.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that may be used: as asked, or half of what the file system has.
    pub(crate) fn budget(&self, asked: u64) -> u64 {
        if asked > 0 {
            return asked;
        }
        let size = rustix::fs::statvfs(&self.path).map_or(0, |of| of.f_blocks.saturating_mul(of.f_frsize));
        size / 2
    }

    /// Where the workers' socket lies.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join("socket")
    }

    /// The folder for a worker's slot files.
    pub(crate) fn slots(&self, worker: WorkerId) -> PathBuf {
        self.adopted.get(&worker).cloned().unwrap_or_else(|| self.path.join(worker.to_string()))
    }

    /// Makes the folder for a worker's slot files.
    pub(crate) fn make_slots(&self, worker: WorkerId) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(self.slots(worker))
    }

    /// Removes the slot files of a worker that is gone; mappings of them keep their bytes.
    pub(crate) fn remove_slots(&self, worker: WorkerId) -> io::Result<()> {
        match std::fs::remove_dir_all(self.slots(worker)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Whatever cannot be removed now is removed by the next agent that starts here.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Makes the folder of an agent of `node`; its lock is held as long as the file is open.
fn make_locked(folder: &Path, node: &NodeName) -> io::Result<File> {
    DirBuilder::new().mode(0o700).create(folder)?;
    let lock = OpenOptions::new().create_new(true).write(true).mode(0o600).open(folder.join("lock"))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    std::fs::write(folder.join("node"), node.as_str())?;
    Ok(lock)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn remove(path: &Path) {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "cannot remove what a dead agent left");
    }
}

/// Moves the folders of dead agents of this node into `mine`, and removes those of other nodes that nobody took over.
fn take_over(parent: &Path, mine: &Path, node: &NodeName) -> io::Result<Vec<PathBuf>> {
    let mut left = vec![];
    for entry in std::fs::read_dir(parent)? {
        let path = entry?.path();
        let age = std::fs::metadata(&path).and_then(|of| of.modified()).ok().and_then(|at| at.elapsed().ok());
        if file_name(&path).starts_with(STARTING) && age.is_some_and(|age| age > PATIENCE) {
            // It died at its first breath.
            remove(&path);
        }
        if !file_name(&path).starts_with(PREFIX) || !path.is_dir() || path == mine {
            continue;
        }
        let Ok(lock) = File::open(path.join("lock")) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let of = std::fs::read_to_string(path.join("node")).unwrap_or_default();
        if of == node.as_str() {
            let to = mine.join(format!("{LEFT}{}", left.len()));
            std::fs::rename(&path, &to)?;
            left.push(to);
        } else if of.is_empty() || age.is_some_and(|age| age > PATIENCE) {
            tracing::info!(folder = %path.display(), "removing what a dead agent left");
            remove(&path);
        }
    }
    // A folder taken over may hold ones that the life before had taken over.
    let nested = left.clone();
    for folder in nested {
        let inside = std::fs::read_dir(&folder)?.flatten().map(|entry| entry.path());
        for (number, path) in inside.filter(|path| path.is_dir() && file_name(path).starts_with(LEFT)).enumerate() {
            let to = mine.join(format!("{}-{number}", file_name(&folder)));
            std::fs::rename(&path, &to)?;
            left.push(to);
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeName {
        NodeName::new(name).unwrap()
    }

    fn dead(parent: &Path, name: &str, of: &str, worker: &str) -> PathBuf {
        let folder = parent.join(format!("{PREFIX}{name}"));
        std::fs::create_dir_all(folder.join(worker)).unwrap();
        std::fs::write(folder.join("lock"), "").unwrap();
        std::fs::write(folder.join("node"), of).unwrap();
        std::fs::write(folder.join("parity-x"), "").unwrap();
        folder
    }

    #[test]
    fn the_dead_of_this_node_are_taken_over_and_the_living_are_not() {
        let parent = tempfile::tempdir().unwrap();
        let (living, _) = Folder::create(parent.path(), "aaaa", &node("a")).unwrap();
        let worker = WorkerId::from_uuid(uuid::Uuid::from_u128(1));
        living.make_slots(worker).unwrap();
        let mine = dead(parent.path(), "bbbb", "b", &worker.to_string());
        let others = dead(parent.path(), "dddd", "d", "x");
        let nobodys = dead(parent.path(), "eeee", "", "x");
        std::fs::write(parent.path().join("other"), "").unwrap();
        let (second, left) = Folder::create(parent.path(), "cccc", &node("b")).unwrap();
        assert!(!mine.exists() && !nobodys.exists() && others.exists(), "another node's waits for its own agent");
        assert_eq!(left.len(), 1);
        let slots = left[0].join(worker.to_string());
        let second = second.with(BTreeMap::from([(worker, slots.clone())]));
        assert!(slots.exists() && !left[0].join("parity-x").exists());
        assert_eq!(second.slots(worker), slots);
        assert!(living.slots(worker).exists() && parent.path().join("other").exists());
        // Killed again before it let go: the next life finds it all the same.
        std::mem::forget(second);
        drop(living);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 3);
    }

    #[test]
    fn agents_that_start_at_once_leave_one_another_alone() {
        let parent = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for agent in 0..8 {
                let parent = parent.path();
                scope.spawn(move || {
                    for life in 0..40 {
                        let name = format!("{agent:x}{life:02x}");
                        let (folder, left) = Folder::create(parent, &name, &node(&format!("n{agent}"))).unwrap();
                        assert!(left.is_empty() && folder.path().join("lock").exists());
                    }
                });
            }
        });
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_an_error_at_start() {
        let parent = tempfile::tempdir().unwrap();
        let deep = parent.path().join("x".repeat(120));
        assert!(matches!(Folder::create(&deep, "aa", &node("a")), Err(AgentError::Folder { .. })));
    }
}
