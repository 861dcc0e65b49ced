//! Reading large ranges: from the page cache if they are there, else past it, into the caller's memory.
//!
//! A first try takes what the cache holds without touching the disk. What is not there comes by direct input where
//! offset, memory and length allow it, which neither copies the bytes nor drives other programs' pages out; else by
//! plain reads, which the system reads ahead for.

use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::io::{Errno, ReadWriteFlags};

use super::errno;
use crate::aligned::PAGE;

/// What direct input asks of a memory address on every disk this was tried on; one that asks for more refuses, and is
/// read plainly.
const MEMORY: usize = 512;

/// A file open for large reads.
pub(super) struct Opened<'a> {
    file: File,
    size: u64,
    direct: Option<File>,
    /// Shared with the folder: the first refusal ends direct input.
    allowed: &'a AtomicBool,
}

impl<'a> Opened<'a> {
    pub(super) fn new(file: File, size: u64, direct: Option<File>, allowed: &'a AtomicBool) -> Self {
        Self { file, size, direct, allowed }
    }

    /// Fills `to` from `offset` on; fewer bytes if the file ends before. Returns how many.
    pub(super) fn read_into(&self, to: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let length = (self.size.saturating_sub(offset)).min(to.len() as u64) as usize;
        let to = &mut to[..length];
        let mut done = self.read_cached(to, offset);
        if done < length {
            done += self.read_direct(&mut to[done..], offset + done as u64)?;
        }
        if done < length {
            done += fill(&self.file, &mut to[done..], offset + done as u64)?;
        }
        Ok(done)
    }

    /// What the page cache holds of the range, from its start on.
    fn read_cached(&self, to: &mut [u8], offset: u64) -> usize {
        let mut done = 0;
        while done < to.len() {
            let into = &mut [IoSliceMut::new(&mut to[done..])];
            match rustix::io::preadv2(&self.file, into, offset + done as u64, ReadWriteFlags::NOWAIT) {
                Ok(n) if n > 0 => done += n,
                Err(Errno::INTR) => {}
                // Not there, or a file system that cannot tell; a real failure shows again in the read that follows.
                _ => break,
            }
        }
        done
    }

    fn read_direct(&self, to: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let length = to.len() / PAGE * PAGE;
        let fits = offset.is_multiple_of(PAGE as u64) && to.as_ptr().addr().is_multiple_of(MEMORY) && length > 0;
        let Some(file) = self.direct.as_ref().filter(|_| fits && self.allowed.load(Ordering::Relaxed)) else {
            return Ok(0);
        };
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
