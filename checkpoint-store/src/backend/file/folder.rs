//! The folder of a store: entering, creating, opening and listing, in the order that makes each success durable.
//!
//! Folders are entered one by one without following symbolic links, so nothing in the store can lead outside its root.
//! Everything here blocks; the backend calls it off the async threads.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::disk::{Dir, Witness, join};
use super::read::Opened;
use super::write;
use crate::backend::{Create, Listed};

/// Temporary files start with this; object paths cannot (their segments never start with a dot).
pub(super) const TEMPORARY: &str = ".cairn-";
/// How often a path is entered again, one lost folder at a time; paths are far less deep.
const REENTRIES: u32 = 32;

pub(super) struct Folder {
    pub(super) root: PathBuf,
    /// Folders whose entry in their parent this process has synced.
    synced: Mutex<HashSet<String>>,
    /// Whether this disk is still believed to take direct input and output; the first refusal ends it.
    direct: AtomicBool,
    witness: Option<Witness>,
}

/// A folder of the store, and the last segment of the path that was asked for.
pub(super) struct Place<'a> {
    pub(super) folder: Dir,
    pub(super) name: &'a str,
}

impl Folder {
    pub(super) fn new(root: PathBuf, witness: Option<Witness>) -> Self {
        Self { root, synced: Mutex::default(), direct: AtomicBool::new(true), witness }
    }

    pub(super) fn open_root(&self) -> Result<Dir, Errno> {
        Dir::root(&self.root, self.witness.clone())
    }

    /// Enters the folder of `path`; with `make`, missing folders are made and every folder's entry is synced.
    pub(super) fn enter<'a>(&self, path: &'a str, make: bool) -> Result<Place<'a>, Errno> {
        self.enter_within(path, make, REENTRIES)
    }

    fn enter_within<'a>(&self, path: &'a str, make: bool, left: u32) -> Result<Place<'a>, Errno> {
        let mut folder = self.open_root()?;
        let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
        for segment in folders.split('/').filter(|s| !s.is_empty()) {
            let walked = join(&folder.path, segment);
            if make && !self.synced().contains(&walked) {
                match folder.make(segment) {
                    Ok(()) | Err(Errno::EXIST) => folder.sync()?,
                    Err(e) => return Err(e),
                }
                self.synced().insert(walked.clone());
            }
            folder = match folder.open(segment) {
                // Someone removed the folder since it was synced: start again, making it. Others may do the same.
                Err(Errno::NOENT) if make && left > 0 => {
                    self.synced().remove(&walked);
                    return self.enter_within(path, make, left - 1);
                }
                other => other?,
            };
        }
        Ok(Place { folder, name })
    }

    fn synced(&self) -> MutexGuard<'_, HashSet<String>> {
        self.synced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn create(&self, path: &str, parts: &[Bytes], token: &str) -> Result<Create, Errno> {
        let Place { folder, name } = self.enter(path, true)?;
        if rustix::fs::statat(&folder.fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            // Whoever made it may not have synced the folder yet, and we are about to act on its existence.
            return folder.sync().map(|()| Create::AlreadyExists);
        }
        let temporary = format!("{TEMPORARY}{token}.tmp");
        let file = folder.new_file(&temporary)?;
        let linked = write::write(&file, parts, &self.direct).and_then(|()| {
            file.sync()?;
            folder.give_name(&temporary, name)
        });
        let removed = folder.unlink(&temporary);
        match linked {
            // After a rename there is nothing left to remove.
            Ok(()) => removed
                .or_else(|e| if e == Errno::NOENT { Ok(()) } else { Err(e) })
                .and_then(|()| folder.sync())
                .map(|()| Create::Created),
            Err(Errno::EXIST) => folder.sync().map(|()| Create::AlreadyExists),
            Err(e) => Err(e),
        }
    }

    pub(super) fn delete(&self, path: &str) -> Result<(), Errno> {
        match self.enter(path, false).and_then(|place| place.folder.unlink(place.name)) {
            Err(Errno::NOENT) => Ok(()),
            other => other,
        }
    }

    pub(super) fn open(&self, path: &str) -> Result<(File, u64), Errno> {
        let place = self.enter(path, false)?;
        open_regular(&place, OFlags::empty())
    }

    /// Opens a file to read much of it: also for direct input where the disk takes it. The files of one load share what
    /// a look into the page cache found.
    pub(super) fn open_large<'a>(&'a self, path: &str, is_cold: &'a AtomicBool) -> Result<Opened<'a>, Errno> {
        let place = self.enter(path, false)?;
        let (file, size) = open_regular(&place, OFlags::empty())?;
        let wanted = self.direct.load(Ordering::Relaxed);
        let direct = wanted.then(|| open_regular(&place, OFlags::DIRECT)).and_then(Result::ok).map(|(file, _)| file);
        Ok(Opened::new(file, size, direct, &self.direct, is_cold))
    }

    /// The entries of a folder, in no order.
    pub(super) fn entries(&self, folder: &str) -> Result<(Dir, Vec<(FileType, String)>), Errno> {
        let parent = self.enter(folder, false)?;
        let dir = parent.folder.open(parent.name)?;
        let mut entries = vec![];
        for entry in rustix::fs::Dir::read_from(&dir.fd)? {
            let entry = entry?;
            // A name that is not UTF-8 is not ours.
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name == "." || name == ".." {
                continue;
            }
            let mut kind = entry.file_type();
            if kind == FileType::Unknown {
                let Ok(stat) = rustix::fs::statat(&dir.fd, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
                kind = FileType::from_raw_mode(stat.st_mode);
            }
            entries.push((kind, name.to_owned()));
        }
        Ok((dir, entries))
    }

    /// Visits every folder under a folder with its files' names, in no order; a folder that is not there has none.
    fn walk(&self, start: &str, visit: &mut dyn FnMut(&Dir, Vec<String>)) -> Result<(), Errno> {
        let mut waiting = vec![start.to_owned()];
        while let Some(folder) = waiting.pop() {
            let (dir, entries) = match self.entries(&folder) {
                Ok(found) => found,
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(e) => return Err(e),
            };
            let mut files = vec![];
            for (kind, name) in entries {
                match kind {
                    FileType::Directory => waiting.push(join(&folder, &name)),
                    FileType::RegularFile => files.push(name),
                    _ => {}
                }
            }
            visit(&dir, files);
        }
        Ok(())
    }

    pub(super) fn list(&self, start: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, Errno> {
        let mut found = vec![];
        self.walk(start, &mut |dir, files| {
            let prefix = format!("{}/", dir.path);
            let is_after = |name: &str| match after.map(|after| (after, after.strip_prefix(&prefix))) {
                None => true,
                Some((_, Some(rest))) => name > rest,
                Some((after, None)) => prefix.as_str() > after,
            };
            let wanted = files.into_iter().filter(|name| !name.starts_with(TEMPORARY) && is_after(name)).map(Reverse);
            // The first names of a long folder are found without putting all of it in order or looking at each file.
            let (mut wanted, mut taken) = (wanted.collect::<BinaryHeap<_>>(), 0);
            while taken < limit
                && let Some(Reverse(name)) = wanted.pop()
            {
                // A file deleted between the listing and here was not there.
                let Ok(stat) = rustix::fs::statat(&dir.fd, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
                found.push(Listed { path: join(&dir.path, &name), bytes: stat.st_size as u64 });
                taken += 1;
            }
        })?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found.truncate(limit);
        Ok(found)
    }

    pub(super) fn clear_leftovers(&self, start: &str) -> Result<usize, Errno> {
        let mut gone = 0;
        self.walk(start, &mut |dir, files| {
            for name in files.iter().filter(|name| name.starts_with(TEMPORARY)) {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let open = rustix::fs::openat(&dir.fd, name, flags, Mode::empty());
                let dead = open.is_ok_and(|f| rustix::fs::flock(&f, FlockOperation::NonBlockingLockExclusive).is_ok());
                if dead && dir.unlink(name).is_ok() {
                    gone += 1;
                }
            }
        })?;
        Ok(gone)
    }
}

/// Opens a file for reading, if it is one.
fn open_regular(place: &Place<'_>, more: OFlags) -> Result<(File, u64), Errno> {
    // NONBLOCK: opening a pipe that someone put there must not hang.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
    let file: OwnedFd = rustix::fs::openat(&place.folder.fd, place.name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok((File::from(file), stat.st_size as u64)),
        FileType::Directory => Err(Errno::NOENT),
        _ => Err(Errno::INVAL),
    }
}
