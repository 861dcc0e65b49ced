//! Reading large ranges: from the page cache if they are there, else past it, into the caller's memory.
//!
//! A look at the first page tells whether the cache has the range; then a plain read is a copy of memory. What is not
//! there comes by direct input, which neither copies the bytes nor drives other programs' pages out: whole pages go
//! where they belong, and of the pages that a range begins and ends within, what is wanted is copied out of a buffer. A
//! disk that has no direct input is read plainly, as is memory that does not lie in its page as the range does. A
//! look costs the read of a page if it is not there, so the first that finds nothing is the last of its load.

use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};

use super::errno;
use crate::aligned::{AlignedBuffer, PAGE};

/// Bytes of a buffer for the pages that a range begins and ends within.
pub(crate) const EDGES: usize = 2 * PAGE;

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

    /// Whether `to` can be filled from `offset` on the fastest way, without a detour through other memory.
    pub(super) fn suits(&self, to: &[u8], offset: u64) -> bool {
        let lies_alike = to.as_ptr().addr() % PAGE == (offset % PAGE as u64) as usize;
        self.direct.is_none() || !self.allowed.load(Ordering::Relaxed) || lies_alike
    }

    /// Fills `to` from `offset` on; fewer bytes if the file ends before. Returns how many. `edges` is a buffer of
    /// [`EDGES`] bytes that begins on a page.
    pub(super) fn read_into(&self, to: &mut [u8], offset: u64, edges: &mut AlignedBuffer) -> Result<usize, Errno> {
        let length = (self.size.saturating_sub(offset)).min(to.len() as u64) as usize;
        let to = &mut to[..length];
        let mut done = 0;
        if let Some(file) = self.direct.as_ref().filter(|_| self.allowed.load(Ordering::Relaxed)) {
            if !self.is_cold.load(Ordering::Relaxed) && !self.is_cached(to, offset) {
                self.is_cold.store(true, Ordering::Relaxed);
            }
            if self.is_cold.load(Ordering::Relaxed) && self.suits(to, offset) {
                done = match read_pages(file, to, offset, edges) {
                    Err(Errno::INVAL) => {
                        self.allowed.store(false, Ordering::Relaxed);
                        0
                    }
                    other => other?,
                };
            }
        }
        Ok(done + fill(&self.file, &mut to[done..], offset + done as u64)?)
    }

    /// Bytes that a read of `length` from `offset` asks the file for: whole pages, where it goes past the cache.
    pub(super) fn asked(&self, length: usize, offset: u64) -> u64 {
        let (start, end) = (offset, offset.saturating_add(length as u64).min(self.size));
        let past_cache = self.allowed.load(Ordering::Relaxed) && self.is_cold.load(Ordering::Relaxed);
        if self.direct.is_none() || !past_cache {
            return end.saturating_sub(start);
        }
        let page = PAGE as u64;
        end.next_multiple_of(page).saturating_sub(start / page * page)
    }

    /// Whether the page cache holds the first page of a range; it is read into `to`.
    fn is_cached(&self, to: &mut [u8], offset: u64) -> bool {
        let page = to.len().min(PAGE);
        let into = &mut [IoSliceMut::new(&mut to[..page])];
        matches!(rustix::io::preadv2(&self.file, into, offset, ReadWriteFlags::NOWAIT), Ok(n) if n == page)
    }
}

/// Reads whole pages in one request: those within the range into `to`, which lies in its page as the range does, the
/// first and last into `edges` if only part of them is wanted. Returns how many bytes of `to` are right.
fn read_pages(file: &File, to: &mut [u8], offset: u64, edges: &mut AlignedBuffer) -> Result<usize, Errno> {
    let (wanted, lead) = (to.len(), (offset % PAGE as u64) as usize);
    let (head, rest) = to.split_at_mut(if lead == 0 { 0 } else { wanted.min(PAGE - lead) });
    let (middle, tail) = rest.split_at_mut(rest.len() / PAGE * PAGE);
    let (first, last) = edges.as_mut_slice().split_at_mut(PAGE);
    let last = &mut last[..PAGE];
    let parts = [(head.is_empty(), &mut *first), (middle.is_empty(), middle), (tail.is_empty(), &mut *last)];
    let parts = parts.into_iter().filter(|(is_empty, _)| !is_empty).map(|(_, part)| IoSliceMut::new(part));
    let mut parts: Vec<IoSliceMut<'_>> = parts.collect();
    if parts.is_empty() {
        return Ok(0);
    }
    let come = rustix::io::preadv(file, &mut parts, offset - lead as u64)?;
    let come = come.saturating_sub(lead).min(wanted);
    let from_first = come.min(head.len());
    head[..from_first].copy_from_slice(&first[lead..lead + from_first]);
    let from_last = come.saturating_sub(wanted - tail.len());
    tail[..from_last].copy_from_slice(&last[..from_last]);
    Ok(come)
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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    use proptest::prelude::*;
    use rustix::fs::OFlags;

    use super::*;

    /// Bytes of the file; not whole pages.
    const SIZE: usize = 10 * PAGE + 123;

    fn byte(at: usize) -> u8 {
        (at.wrapping_mul(0x9e37_79b9) >> 13) as u8
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the range and wherever the memory, past the cache or not: the bytes of the file, up to its end.
        #[test]
        fn any_range_into_any_memory(start in 0..SIZE + 9, length in 0..5 * PAGE, shift in 0..PAGE, alike: bool) {
            let folder = tempfile::tempdir_in(".").unwrap();
            let path = folder.path().join("file");
            std::fs::write(&path, (0..SIZE).map(byte).collect::<Vec<_>>()).unwrap();
            File::open(&path).unwrap().sync_all().unwrap();
            let direct = OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(&path);
            let (allowed, is_cold) = (AtomicBool::new(true), AtomicBool::new(true));
            let opened = Opened::new(File::open(&path).unwrap(), SIZE as u64, direct.ok(), &allowed, &is_cold);
            let shift = if alike { start % PAGE } else { shift };
            let (mut memory, mut edges) = (AlignedBuffer::new(shift + length + 1), AlignedBuffer::new(EDGES));
            memory.as_mut_slice().fill(7);
            let to = &mut memory.as_mut_slice()[shift..shift + length];
            let come = opened.read_into(to, start as u64, &mut edges).unwrap();
            prop_assert_eq!(come, SIZE.saturating_sub(start).min(length));
            let right = |(at, found): (usize, &u8)| *found == if at < come { byte(start + at) } else { 7 };
            prop_assert!(to.iter().enumerate().all(right));
            prop_assert_eq!(memory.as_slice()[shift + length], 7);
        }
    }
}
