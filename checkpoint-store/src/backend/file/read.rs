//! Reading large ranges: from the page cache if they are there, else past it, into the caller's memory.
//!
//! A look at the first page tells whether the cache has the range; then a plain read is a copy of memory. What is not
//! there comes by direct input where offset, memory and length allow it, which neither copies the bytes nor drives
//! other programs' pages out; else by plain reads. A look costs the read of a page if it is not there, so the first
//! that finds nothing is the last of its load.

use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};

use super::errno;
use crate::aligned::PAGE;

/// What direct input asks of a memory address on every disk this was tried on; one that asks for more refuses, and is
/// read plainly.
pub(super) const MEMORY: usize = 512;

/// A file open for large reads.
pub(super) struct Opened<'a> {
    file: File,
    size: u64,
    direct: Option<File>,
    /// Shared with the folder: the first refusal ends direct input.
    allowed: &'a AtomicBool,
    /// Shared by a load: a look found that the cache does not have it, so there are no more looks.
    is_cold: &'a AtomicBool,
}

impl<'a> Opened<'a> {
    pub(super) fn new(
        file: File,
        size: u64,
        direct: Option<File>,
        allowed: &'a AtomicBool,
        is_cold: &'a AtomicBool,
    ) -> Self {
        // Requests are large and come in no order: the system is to fetch what is asked for, at once, and no more. One
        // that does not know the advice reads all the same.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Random);
        Self { file, size, direct, allowed, is_cold }
    }

    /// Whether reads of whole pages into aligned memory are the fast ones.
    pub(super) fn wants_pages(&self) -> bool {
        self.direct.is_some() && self.allowed.load(Ordering::Relaxed)
    }

    /// Fills `to` from `offset` on; fewer bytes if the file ends before. Returns how many.
    pub(super) fn read_into(&self, to: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let length = (self.size.saturating_sub(offset)).min(to.len() as u64) as usize;
        let to = &mut to[..length];
        let mut done = 0;
        if self.wants_pages() {
            if !self.is_cold.load(Ordering::Relaxed) && !self.is_cached(to, offset) {
                self.is_cold.store(true, Ordering::Relaxed);
            }
            if self.is_cold.load(Ordering::Relaxed) {
                done = self.read_direct(to, offset)?;
            }
        }
        Ok(done + fill(&self.file, &mut to[done..], offset + done as u64)?)
    }

    /// Whether the page cache holds the first page of a range; it is read into `to`.
    fn is_cached(&self, to: &mut [u8], offset: u64) -> bool {
        let page = to.len().min(PAGE);
        let into = &mut [IoSliceMut::new(&mut to[..page])];
        matches!(rustix::io::preadv2(&self.file, into, offset, ReadWriteFlags::NOWAIT), Ok(n) if n == page)
    }

    fn read_direct(&self, to: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let length = to.len() / PAGE * PAGE;
        let fits = offset.is_multiple_of(PAGE as u64) && to.as_ptr().addr().is_multiple_of(MEMORY) && length > 0;
        let Some(file) = self.direct.as_ref().filter(|_| fits) else { return Ok(0) };
        match fill(file, &mut to[..length], offset) {
            Err(Errno::INVAL) => {
                self.allowed.store(false, Ordering::Relaxed);
                Ok(0)
            }
            other => other,
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &File, to: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while done < to.len() {
        match file.read_at(&mut to[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(errno(&e)),
        }
    }
    Ok(done)
}

/// The bytes of a range that lies within the file; fewer if the file shrank meanwhile.
pub(super) fn read_up_to(file: &File, range: Range<u64>) -> Result<Bytes, Errno> {
    let mut buffer = vec![0; (range.end - range.start) as usize];
    let done = fill(file, &mut buffer, range.start)?;
    buffer.truncate(done);
    Ok(buffer.into())
}
