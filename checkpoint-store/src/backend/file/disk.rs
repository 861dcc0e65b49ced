//! The operations that change a disk, each in one place, and a witness who may watch them.
//!
//! What a crash leaves behind depends on which of these were done, in which order, and which were synced. So the
//! folder's code calls nothing else to change the disk, and a test that is told of every operation can work out each
//! state that the disk may legally be in after a crash ([`DiskOp`]).

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// One operation that changed the disk, or made changes durable. Paths are below the store's root, which is "".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskOp {
    /// A folder was made.
    MakeFolder {
        /// The folder.
        path: String,
    },
    /// The entries of a folder were synced.
    SyncFolder {
        /// The folder.
        path: String,
    },
    /// An empty file was made.
    NewFile {
        /// The file.
        path: String,
    },
    /// Bytes were written.
    Write {
        /// The file.
        path: String,
        /// Where the bytes begin.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A file was given a length; what it gained is zeros.
    Resize {
        /// The file.
        path: String,
        /// The length.
        length: u64,
    },
    /// The bytes and the length of a file were synced; its name was not.
    SyncFile {
        /// The file.
        path: String,
    },
    /// A file got another name.
    Link {
        /// The name it had.
        from: String,
        /// The name it also has now.
        to: String,
    },
    /// A file's name was changed.
    Rename {
        /// The name it had.
        from: String,
        /// The name it has now.
        to: String,
    },
    /// A name was removed.
    Unlink {
        /// The name.
        path: String,
    },
}

/// Who is told of the operations: called after each one has succeeded.
pub type Witness = Arc<dyn Fn(DiskOp) + Send + Sync>;

/// A folder of the store, open, with its path below the root.
pub(super) struct Dir {
    pub(super) fd: OwnedFd,
    pub(super) path: String,
    witness: Option<Witness>,
}

/// A file that is being written, under the name it was made with.
pub(super) struct NewFile {
    pub(super) file: File,
    path: String,
    witness: Option<Witness>,
}

impl fmt::Debug for Dir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dir({:?})", self.path)
    }
}

/// The path of an entry of a folder.
pub(super) fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

impl Dir {
    /// The store's root.
    pub(super) fn root(path: &std::path::Path, witness: Option<Witness>) -> Result<Self, Errno> {
        let fd = rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty())?;
        Ok(Self { fd, path: String::new(), witness })
    }

    /// A folder in this one; a symbolic link is not followed.
    pub(super) fn open(&self, name: &str) -> Result<Self, Errno> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty())?;
        Ok(Self { fd, path: join(&self.path, name), witness: self.witness.clone() })
    }

    fn tell(&self, op: impl FnOnce() -> DiskOp) {
        if let Some(witness) = &self.witness {
            witness(op());
        }
    }

    pub(super) fn make(&self, name: &str) -> Result<(), Errno> {
        rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o777))?;
        self.tell(|| DiskOp::MakeFolder { path: join(&self.path, name) });
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<(), Errno> {
        rustix::fs::fsync(&self.fd)?;
        self.tell(|| DiskOp::SyncFolder { path: self.path.clone() });
        Ok(())
    }

    /// A new file with a lock that says its writer is alive.
    pub(super) fn new_file(&self, name: &str) -> Result<NewFile, Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(0o666))?;
        // Some network file systems have no locks; there the file is only cleared later than it could be.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        let path = join(&self.path, name);
        self.tell(|| DiskOp::NewFile { path: path.clone() });
        Ok(NewFile { file: File::from(file), path, witness: self.witness.clone() })
    }

    /// Gives a file its name unless it is taken: by a hard link, or where there are none by a rename that does not
    /// replace.
    pub(super) fn give_name(&self, temporary: &str, name: &str) -> Result<(), Errno> {
        let names = || (join(&self.path, temporary), join(&self.path, name));
        match rustix::fs::linkat(&self.fd, temporary, &self.fd, name, AtFlags::empty()) {
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) => {
                rustix::fs::renameat_with(&self.fd, temporary, &self.fd, name, RenameFlags::NOREPLACE)?;
                self.tell(|| {
                    let (from, to) = names();
                    DiskOp::Rename { from, to }
                });
            }
            other => {
                other?;
                self.tell(|| {
                    let (from, to) = names();
                    DiskOp::Link { from, to }
                });
            }
        }
        Ok(())
    }

    pub(super) fn unlink(&self, name: &str) -> Result<(), Errno> {
        rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?;
        self.tell(|| DiskOp::Unlink { path: join(&self.path, name) });
        Ok(())
    }
}

impl NewFile {
    /// Says that bytes were written; the writer calls the system itself, from several threads.
    pub(super) fn wrote(&self, offset: u64, bytes: &[u8]) {
        if let Some(witness) = &self.witness {
            witness(DiskOp::Write { path: self.path.clone(), offset, bytes: bytes.to_vec() });
        }
    }

    /// Sets the room for a file aside, so that a full disk is an error now and its blocks lie together. A file system
    /// that cannot do that writes as it goes.
    pub(super) fn reserve(&self, length: u64) -> Result<(), Errno> {
        match rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(()),
            other => other?,
        }
        self.resized(length);
        Ok(())
    }

    pub(super) fn resize(&self, length: u64) -> Result<(), Errno> {
        rustix::fs::ftruncate(&self.file, length)?;
        self.resized(length);
        Ok(())
    }

    fn resized(&self, length: u64) {
        if let Some(witness) = &self.witness {
            witness(DiskOp::Resize { path: self.path.clone(), length });
        }
    }

    pub(super) fn sync(&self) -> Result<(), Errno> {
        rustix::fs::fsync(self.file.as_fd())?;
        if let Some(witness) = &self.witness {
            witness(DiskOp::SyncFile { path: self.path.clone() });
        }
        Ok(())
    }
}
