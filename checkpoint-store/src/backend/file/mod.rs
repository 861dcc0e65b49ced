//! A store in a folder, durable at every success.
//!
//! An object is written to a temporary file in its own folder, synced, and given its name by a hard link: the link
//! either appears whole or fails because the name is taken, which makes create atomic across processes. Then the folder
//! is synced, and so is, once per process, every folder above it up to the store's root: a folder made by a process
//! that crashed before its own sync would otherwise be lost with everything in it.
//!
//! A writer holds a lock on its temporary file; one that nobody locks is a crash's leftover. This file is the async
//! face; `folder` has the order of operations, `disk` the operations, `write` and `read` the large transfers.

mod disk;
mod folder;
mod read;
mod write;

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::FileType;
use rustix::io::Errno;

pub use self::disk::{DiskOp, Witness};
use self::folder::{Folder, TEMPORARY};
pub(crate) use self::read::EDGES;
use self::read::{Opened, read_up_to};
use super::{Create, Listed};
use crate::aligned::AlignedBuffer;
use crate::error::{Source, StoreError};

/// The longest one operation on the disk may take before the caller goes on without it; uploads are the long ones.
const DEADLINE: Duration = Duration::from_mins(10);

#[derive(Clone)]
pub(crate) struct FileBackend(Arc<Folder>);

impl fmt::Debug for FileBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileBackend({})", self.0.root.display())
    }
}

impl FileBackend {
    /// The folder, made and synced if missing; fails if it cannot be written to. A witness is told of what changes the
    /// disk from then on.
    pub(super) fn make(root: PathBuf, writer: uuid::Uuid, witness: Option<Witness>) -> Result<Self, StoreError> {
        let fail = |what: &str, e: std::io::Error| {
            let why = format!("the store's folder {} cannot be {what}: {e}", root.display());
            StoreError::refused(why + "; give a folder this user may write to", e)
        };
        let missing: Vec<_> = root.ancestors().take_while(|p| !p.exists()).map(PathBuf::from).collect();
        std::fs::create_dir_all(&root).map_err(|e| fail("made", e))?;
        for parent in missing.iter().filter_map(|p| p.parent()) {
            File::open(parent).and_then(|f| f.sync_all()).map_err(|e| fail("synced", e))?;
        }
        if let (true, Some(parent)) = (missing.is_empty(), root.parent()) {
            // Whoever made it may have crashed before the sync; a parent that is not ours to open is not ours to sync.
            let _ = File::open(parent).and_then(|f| f.sync_all());
        }
        let probe = Self::existing(root.clone())?.0.open_root().and_then(|folder| {
            let name = format!("{TEMPORARY}{}.tmp", writer.simple());
            folder.new_file(&name)?;
            folder.unlink(&name)
        });
        probe.map_err(|e| fail("written to", e.into()))?;
        Ok(Self(Arc::new(Folder::new(root, witness))))
    }

    pub(super) fn existing(root: PathBuf) -> Result<Self, StoreError> {
        if root.is_dir() {
            return Ok(Self(Arc::new(Folder::new(root, None))));
        }
        Err(StoreError::Input(format!("the store's folder {} does not exist or is not a folder", root.display())))
    }

    /// Opens a file for large reads, on the calling thread. `is_cold` is shared by one load, and begins as false.
    pub(crate) fn open_large<'a>(
        &'a self,
        path: &str,
        url: &str,
        is_cold: &'a AtomicBool,
    ) -> Result<LargeFile<'a>, StoreError> {
        let what = format!("reading {}", self.name(path));
        match self.0.open_large(path, is_cold) {
            Ok(opened) => Ok(LargeFile { opened, what }),
            Err(errno) => Err(Failure { what, errno: Some(errno), source: None }.not_found(path, url)),
        }
    }

    /// Runs blocking file work off the async threads.
    async fn run<T: Send + 'static>(
        &self,
        what: String,
        work: impl FnOnce(&Folder) -> Result<T, Errno> + Send + 'static,
    ) -> Result<T, Failure> {
        let folder = Arc::clone(&self.0);
        let work = tokio::task::spawn_blocking(move || work(&folder));
        match tokio::time::timeout(DEADLINE, work).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(errno))) => Err(Failure { what, errno: Some(errno), source: None }),
            Ok(Err(e)) => Err(Failure { what, errno: None, source: Some(e.into()) }),
            Err(e) => Err(Failure { what, errno: None, source: Some(e.into()) }),
        }
    }

    fn name(&self, path: &str) -> String {
        format!("{}/{path}", self.0.root.display())
    }

    pub(super) async fn create(&self, path: &str, parts: Vec<Bytes>, token: String) -> Result<Create, StoreError> {
        let owned = path.to_owned();
        let work = move |folder: &Folder| folder.create(&owned, &parts, &token);
        Ok(self.run(format!("writing {}", self.name(path)), work).await?)
    }

    pub(super) async fn get(&self, path: &str, limit: u64, url: &str) -> Result<(u64, Option<Bytes>), StoreError> {
        let owned = path.to_owned();
        let work = move |folder: &Folder| {
            let (file, size) = folder.open(&owned)?;
            if size > limit {
                return Ok((size, None));
            }
            Ok((size, Some(read_up_to(&file, 0..size)?)))
        };
        self.run(format!("reading {}", self.name(path)), work).await.map_err(|e| e.not_found(path, url))
    }

    pub(super) async fn get_range(&self, path: &str, range: Range<u64>, url: &str) -> Result<Bytes, StoreError> {
        let owned = path.to_owned();
        let work = move |folder: &Folder| {
            let (file, size) = folder.open(&owned)?;
            read_up_to(&file, range.start.min(size)..range.end.min(size))
        };
        self.run(format!("reading {}", self.name(path)), work).await.map_err(|e| e.not_found(path, url))
    }

    pub(super) async fn head(&self, path: &str, url: &str) -> Result<u64, StoreError> {
        let owned = path.to_owned();
        let work = move |folder: &Folder| folder.open(&owned).map(|(_, size)| size);
        self.run(format!("reading {}", self.name(path)), work).await.map_err(|e| e.not_found(path, url))
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let owned = path.to_owned();
        let work = move |folder: &Folder| folder.delete(&owned);
        Ok(self.run(format!("deleting {}", self.name(path)), work).await?)
    }

    pub(super) async fn list(
        &self,
        folder: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let (start, after) = (folder.to_owned(), after.map(str::to_owned));
        let work = move |folder: &Folder| folder.list(&start, after.as_deref(), limit);
        Ok(self.run(format!("listing {}", self.name(folder)), work).await?)
    }

    pub(super) async fn list_folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let start = folder.to_owned();
        let work = move |folder: &Folder| match folder.entries(&start) {
            Ok((_, mut entries)) => {
                entries.retain(|(kind, name)| *kind == FileType::Directory && !name.starts_with('.'));
                let mut names: Vec<String> = entries.into_iter().map(|(_, name)| name).collect();
                names.sort_unstable();
                Ok(names)
            }
            Err(Errno::NOENT) => Ok(vec![]),
            Err(e) => Err(e),
        };
        Ok(self.run(format!("listing {}", self.name(folder)), work).await?)
    }

    pub(super) async fn clear_leftovers(&self, folder: &str) -> Result<usize, StoreError> {
        let start = folder.to_owned();
        let work = move |folder: &Folder| folder.clear_leftovers(&start);
        Ok(self.run(format!("clearing {}", self.name(folder)), work).await?)
    }
}

/// A file open for large reads on the calling thread.
pub(crate) struct LargeFile<'a> {
    opened: Opened<'a>,
    what: String,
}

impl LargeFile<'_> {
    /// Whether `to` can be filled from `offset` on the fastest way, without a detour through other memory.
    pub(crate) fn suits(&self, to: &[u8], offset: u64) -> bool {
        self.opened.suits(to, offset)
    }

    /// Bytes that a read of `length` from `offset` asks the file for.
    pub(crate) fn asked(&self, length: usize, offset: u64) -> u64 {
        self.opened.asked(length, offset)
    }

    /// Fills `to` from `offset` on; fewer bytes if the file ends before. Returns how many. `edges` has [`EDGES`] bytes.
    pub(crate) fn read_into(&self, to: &mut [u8], offset: u64, edges: &mut AlignedBuffer) -> Result<usize, StoreError> {
        let failed = |errno| Failure { what: self.what.clone(), errno: Some(errno), source: None };
        Ok(self.opened.read_into(to, offset, edges).map_err(failed)?)
    }
}

fn errno(e: &std::io::Error) -> Errno {
    Errno::from_io_error(e).unwrap_or(Errno::IO)
}

/// A failed piece of file work.
struct Failure {
    what: String,
    errno: Option<Errno>,
    source: Option<Source>,
}

impl Failure {
    fn not_found(self, path: &str, url: &str) -> StoreError {
        if self.errno == Some(Errno::NOENT) {
            return StoreError::NotFound { path: path.to_owned(), url: url.to_owned() };
        }
        self.into()
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        let what = failure.what;
        match (failure.errno, failure.source) {
            (Some(Errno::LOOP | Errno::NOTDIR), _) => StoreError::Input(format!(
                "{what}: a symbolic link or a file stands where the store has a folder or an object; \
                 links are not followed"
            )),
            (Some(e @ (Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::NAMETOOLONG | Errno::NOENT)), _) => {
                Self::refused(what, std::io::Error::from(e))
            }
            // Everything else may pass: a full disk, a network file system that stalls, a limit of the system.
            (Some(e), _) => Self::unavailable(what, std::io::Error::from(e)),
            (None, Some(e)) => Self::unavailable(what, e),
            (None, None) => Self::Bug(what),
        }
    }
}
