//! A store in a folder, durable at every success.
//!
//! An object is written to a temporary file in its own folder, synced, and given its name by a hard link: the link
//! either appears whole or fails because the name is taken, which makes create atomic across processes. Then the folder
//! is synced, and so is, once per process, every folder above it up to the store's root: a folder made by a process
//! that crashed before its own sync would otherwise be lost with everything in it.
//!
//! Folders are entered one by one without following symbolic links, so nothing in the store can lead outside its root.
//! A writer holds a lock on its temporary file; one that nobody locks is a crash's leftover.

use std::collections::HashSet;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{Create, Listed};
use crate::error::{Source, StoreError};

/// Temporary files start with this; object paths cannot (their segments never start with a dot).
const TEMPORARY: &str = ".cairn-";
/// The longest one operation on the disk may take before the caller goes on without it; uploads are the long ones.
const DEADLINE: Duration = Duration::from_mins(10);

#[derive(Debug, Clone)]
pub(super) struct FileBackend(Arc<Folder>);

#[derive(Debug)]
struct Folder {
    root: PathBuf,
    /// Folders whose entry in their parent this process has synced.
    synced: Mutex<HashSet<String>>,
}

/// A folder of the store, and the last segment of the path that was asked for.
struct Place<'a> {
    folder: OwnedFd,
    name: &'a str,
}

impl FileBackend {
    /// The folder, made and synced if missing; fails if it cannot be written to.
    pub(super) fn make(root: PathBuf, writer: uuid::Uuid) -> Result<Self, StoreError> {
        let fail = |what: &str, e: std::io::Error| {
            let why = format!("the store's folder {} cannot be {what}: {e}", root.display());
            StoreError::refused(why + "; give a folder this user may write to", e)
        };
        let missing: Vec<_> = root.ancestors().take_while(|p| !p.exists()).map(PathBuf::from).collect();
        std::fs::create_dir_all(&root).map_err(|e| fail("made", e))?;
        for parent in missing.iter().filter_map(|p| p.parent()) {
            File::open(parent).and_then(|f| f.sync_all()).map_err(|e| fail("synced", e))?;
        }
        let store = Self::existing(root.clone())?;
        let probe = store.0.open_root().and_then(|folder| {
            let name = format!("{TEMPORARY}{}.tmp", writer.simple());
            new_file(&folder, &name)?;
            rustix::fs::unlinkat(&folder, &name, AtFlags::empty())
        });
        probe.map_err(|e| fail("written to", e.into()))?;
        Ok(store)
    }

    pub(super) fn existing(root: PathBuf) -> Result<Self, StoreError> {
        if root.is_dir() {
            return Ok(Self(Arc::new(Folder { root, synced: Mutex::default() })));
        }
        Err(StoreError::Input(format!("the store's folder {} does not exist or is not a folder", root.display())))
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
        let work = move |folder: &Folder| match folder.enter(&owned, false) {
            Ok(place) => match rustix::fs::unlinkat(&place.folder, place.name, AtFlags::empty()) {
                Err(Errno::NOENT) => Ok(()),
                other => other,
            },
            Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(e),
        };
        Ok(self.run(format!("deleting {}", self.name(path)), work).await?)
    }

    pub(super) async fn list(
        &self,
        folder: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let (start, after) = (folder.to_owned(), after.map(str::to_owned));
        let work = move |folder: &Folder| {
            let mut found = vec![];
            folder.walk(&start, &mut |path, fd, name| {
                let is_after = after.as_deref().is_none_or(|a| path.as_str() > a);
                if !name.starts_with(TEMPORARY) && is_after {
                    let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW);
                    // A file deleted between the listing and here was not there.
                    if let Ok(stat) = stat {
                        found.push(Listed { path, bytes: stat.st_size as u64 });
                    }
                }
            })?;
            found.sort_by(|a, b| a.path.cmp(&b.path));
            found.truncate(limit);
            Ok(found)
        };
        Ok(self.run(format!("listing {}", self.name(folder)), work).await?)
    }

    pub(super) async fn list_folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let start = folder.to_owned();
        let work = move |folder: &Folder| match folder.entries(&start) {
            Ok((_, mut entries)) => {
                entries.retain(|(kind, name)| *kind == FileType::Directory && !name.starts_with('.'));
                Ok(entries.into_iter().map(|(_, name)| name).collect())
            }
            Err(Errno::NOENT) => Ok(vec![]),
            Err(e) => Err(e),
        };
        Ok(self.run(format!("listing {}", self.name(folder)), work).await?)
    }

    pub(super) async fn clear_leftovers(&self, folder: &str) -> Result<usize, StoreError> {
        let start = folder.to_owned();
        let work = move |folder: &Folder| {
            let mut gone = 0;
            folder.walk(&start, &mut |_, fd, name| {
                if !name.starts_with(TEMPORARY) {
                    return;
                }
                let open =
                    rustix::fs::openat(fd, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
                let dead = open.is_ok_and(|f| rustix::fs::flock(&f, FlockOperation::NonBlockingLockExclusive).is_ok());
                if dead && rustix::fs::unlinkat(fd, name, AtFlags::empty()).is_ok() {
                    gone += 1;
                }
            })?;
            Ok(gone)
        };
        Ok(self.run(format!("clearing {}", self.name(folder)), work).await?)
    }
}

impl Folder {
    fn open_root(&self) -> Result<OwnedFd, Errno> {
        rustix::fs::open(&self.root, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty())
    }

    /// Enters the folder of `path`; with `make`, missing folders are made and every folder's entry is synced.
    fn enter<'a>(&self, path: &'a str, make: bool) -> Result<Place<'a>, Errno> {
        let mut folder = self.open_root()?;
        let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut walked = String::new();
        for segment in folders.split('/').filter(|s| !s.is_empty()) {
            walked = if walked.is_empty() { segment.to_owned() } else { format!("{walked}/{segment}") };
            if make && !self.synced().contains(&walked) {
                match rustix::fs::mkdirat(&folder, segment, Mode::from_raw_mode(0o777)) {
                    Ok(()) | Err(Errno::EXIST) => rustix::fs::fsync(&folder)?,
                    Err(e) => return Err(e),
                }
                self.synced().insert(walked.clone());
            }
            folder = match open_folder(&folder, segment) {
                // Someone removed the folder since it was synced: start again, making it.
                Err(Errno::NOENT) if make && self.synced().remove(&walked) => return self.enter(path, make),
                other => other?,
            };
        }
        Ok(Place { folder, name })
    }

    fn synced(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.synced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create(&self, path: &str, parts: &[Bytes], token: &str) -> Result<Create, Errno> {
        let place = self.enter(path, true)?;
        if rustix::fs::statat(&place.folder, place.name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            // Whoever made it may not have synced the folder yet, and we are about to act on its existence.
            return rustix::fs::fsync(&place.folder).map(|()| Create::AlreadyExists);
        }
        let temporary = format!("{TEMPORARY}{token}.tmp");
        let mut file = new_file(&place.folder, &temporary)?;
        let linked = write_all(&mut file, parts).and_then(|()| {
            rustix::fs::fsync(&file)?;
            give_name(&place.folder, &temporary, place.name)
        });
        let removed = rustix::fs::unlinkat(&place.folder, &temporary, AtFlags::empty());
        match linked {
            // After a rename there is nothing left to remove.
            Ok(()) => removed
                .or_else(|e| if e == Errno::NOENT { Ok(()) } else { Err(e) })
                .and_then(|()| rustix::fs::fsync(&place.folder))
                .map(|()| Create::Created),
            Err(Errno::EXIST) => rustix::fs::fsync(&place.folder).map(|()| Create::AlreadyExists),
            Err(e) => Err(e),
        }
    }

    fn open(&self, path: &str) -> Result<(File, u64), Errno> {
        let place = self.enter(path, false)?;
        // NONBLOCK: opening a pipe that someone put there must not hang.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&place.folder, place.name, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&file)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok((File::from(file), stat.st_size as u64)),
            FileType::Directory => Err(Errno::NOENT),
            _ => Err(Errno::INVAL),
        }
    }

    /// The entries of a folder, by name.
    fn entries(&self, folder: &str) -> Result<(OwnedFd, Vec<(FileType, String)>), Errno> {
        let parent = self.enter(folder, false)?;
        let fd = open_folder(&parent.folder, parent.name)?;
        let mut entries = vec![];
        for entry in rustix::fs::Dir::read_from(&fd)? {
            let entry = entry?;
            // A name that is not UTF-8 is not ours.
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name == "." || name == ".." {
                continue;
            }
            let mut kind = entry.file_type();
            if kind == FileType::Unknown {
                let Ok(stat) = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
                kind = FileType::from_raw_mode(stat.st_mode);
            }
            entries.push((kind, name.to_owned()));
        }
        entries.sort_by(|a, b| a.1.cmp(&b.1));
        Ok((fd, entries))
    }

    /// Visits every file under a folder; a folder that is not there has none.
    fn walk(&self, start: &str, visit: &mut dyn FnMut(String, &OwnedFd, &str)) -> Result<(), Errno> {
        let mut todo = vec![start.to_owned()];
        while let Some(folder) = todo.pop() {
            let (fd, entries) = match self.entries(&folder) {
                Ok(found) => found,
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(e) => return Err(e),
            };
            for (kind, name) in entries {
                let path = format!("{folder}/{name}");
                match kind {
                    FileType::Directory => todo.push(path),
                    FileType::RegularFile => visit(path, &fd, &name),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

fn open_folder(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// A new file with a lock that says its writer is alive.
fn new_file(folder: &OwnedFd, name: &str) -> Result<File, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o666))?;
    // Some network file systems have no locks; there the file is only cleared later than it could be.
    let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
    Ok(File::from(file))
}

/// Gives a file its name unless it is taken: by a hard link, or where there are none by a rename that does not replace.
fn give_name(folder: &OwnedFd, temporary: &str, name: &str) -> Result<(), Errno> {
    match rustix::fs::linkat(folder, temporary, folder, name, AtFlags::empty()) {
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) => {
            rustix::fs::renameat_with(folder, temporary, folder, name, RenameFlags::NOREPLACE)
        }
        other => other,
    }
}

fn write_all(file: &mut File, parts: &[Bytes]) -> Result<(), Errno> {
    let mut slices: Vec<IoSlice<'_>> = parts.iter().filter(|p| !p.is_empty()).map(|p| IoSlice::new(p)).collect();
    let mut left = slices.as_mut_slice();
    while !left.is_empty() {
        match file.write_vectored(&left[..left.len().min(64)]) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => IoSlice::advance_slices(&mut left, n),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(errno(&e)),
        }
    }
    Ok(())
}

/// The bytes of a range that lies within the file; fewer if the file shrank meanwhile.
fn read_up_to(file: &File, range: Range<u64>) -> Result<Bytes, Errno> {
    let mut buffer = vec![0; (range.end - range.start) as usize];
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], range.start + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(errno(&e)),
        }
    }
    buffer.truncate(done);
    Ok(buffer.into())
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
