//! Writing a large file at the disk's rate: straight from the caller's memory, past the page cache.
//!
//! Direct output needs file offset, memory address and length on page boundaries. A shard's memory is a mapped slot,
//! page-aligned, and an object's header is padded to a page, so all of a shard but a few edges goes to the disk as it
//! lies. The edges, and memory that is not aligned, go through a buffer of one chunk. The last page is written whole
//! and the file cut to its length. Several threads keep the disk's queue filled. A disk that refuses direct output gets
//! plain writes.

use std::io::{IoSlice, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::disk::NewFile;
use super::errno;
use crate::aligned::{AlignedBuffer, PAGE};

/// The bytes of one write.
pub(super) const CHUNK: usize = 4 << 20;
/// Writes in flight of one file.
const STREAMS: usize = 2;
/// Files smaller than this are written plainly: the cache costs them less than the set-up.
const DIRECT_FROM: u64 = 1 << 20;

/// One write of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    /// From the memory of a part as it lies.
    Straight { at: u64, part: usize, bytes: Range<usize> },
    /// Gathered from wherever the bytes lie; past the end of the file it is zeros.
    Gathered { at: u64, length: usize },
}

/// Writes the parts in order into an empty file. `direct` remembers whether the disk takes direct output.
pub(super) fn write(file: &NewFile, parts: &[Bytes], direct: &AtomicBool) -> Result<(), Errno> {
    let total: u64 = parts.iter().map(|p| p.len() as u64).sum();
    if total < DIRECT_FROM {
        return write_plainly(file, parts);
    }
    if direct.load(Ordering::Relaxed) {
        let set = rustix::fs::fcntl_getfl(&file.file)
            .and_then(|flags| rustix::fs::fcntl_setfl(&file.file, flags | OFlags::DIRECT));
        if set.is_ok() {
            file.reserve(total.next_multiple_of(PAGE as u64))?;
            match write_directly(file, parts, total) {
                // The disk took the flag and refuses what it means.
                Err(Errno::INVAL) => {
                    let flags = rustix::fs::fcntl_getfl(&file.file)?;
                    rustix::fs::fcntl_setfl(&file.file, flags - OFlags::DIRECT)?;
                    file.resize(0)?;
                }
                other => return other,
            }
        }
        direct.store(false, Ordering::Relaxed);
    }
    file.reserve(total)?;
    write_plainly(file, parts)
}

fn write_directly(file: &NewFile, parts: &[Bytes], total: u64) -> Result<(), Errno> {
    let starts = starts(parts);
    let addresses: Vec<_> = parts.iter().map(|p| (p.as_ptr().addr(), p.len())).collect();
    let pieces = cut(&addresses);
    let next = AtomicUsize::new(0);
    let stream = || -> Result<(), Errno> {
        let mut gathered: Option<AlignedBuffer> = None;
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (at, bytes) = match piece {
                Piece::Straight { at, part, bytes } => (*at, &parts[*part][bytes.clone()]),
                Piece::Gathered { at, length } => {
                    let buffer = gathered.get_or_insert_with(|| AlignedBuffer::new(CHUNK));
                    let buffer = &mut buffer.as_mut_slice()[..*length];
                    gather(parts, &starts, *at, buffer);
                    (*at, &*buffer)
                }
            };
            if let Err(e) = file.file.write_all_at(bytes, at) {
                next.store(pieces.len(), Ordering::Relaxed);
                return Err(errno(&e));
            }
            file.wrote(at, bytes);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..STREAMS.min(pieces.len())).map(|_| scope.spawn(stream)).collect();
        let mut result = stream();
        for other in others {
            result = result.and(other.join().unwrap_or(Err(Errno::IO)));
        }
        result
    })?;
    if total.is_multiple_of(PAGE as u64) { Ok(()) } else { file.resize(total) }
}

/// Where each part begins in the file.
fn starts(parts: &[Bytes]) -> Vec<u64> {
    let start = |at: &mut u64, part: &Bytes| {
        let start = *at;
        *at += part.len() as u64;
        Some(start)
    };
    parts.iter().scan(0, start).collect()
}

/// Cuts a file into writes, from the address and length of each part. Every write begins and ends on a page.
fn cut(parts: &[(usize, usize)]) -> Vec<Piece> {
    let total: usize = parts.iter().map(|p| p.1).sum();
    let (mut pieces, mut at, mut part, mut start) = (vec![], 0, 0, 0);
    while at < total {
        while at >= start + parts[part].1 {
            start += parts[part].1;
            part += 1;
        }
        let (address, length) = parts[part];
        let (from, left) = (at - start, length - (at - start));
        let is_aligned = (address + from).is_multiple_of(PAGE);
        if is_aligned && left >= PAGE {
            let take = left.min(CHUNK) / PAGE * PAGE;
            pieces.push(Piece::Straight { at: at as u64, part, bytes: from..from + take });
            at += take;
        } else {
            let take = if is_aligned { PAGE } else { left.min(CHUNK).next_multiple_of(PAGE) };
            pieces.push(Piece::Gathered { at: at as u64, length: take });
            at += take;
        }
    }
    pieces
}

/// Copies the bytes of the file from `at` on together; past its end they are zeros.
fn gather(parts: &[Bytes], starts: &[u64], at: u64, buffer: &mut [u8]) {
    let mut done = 0;
    let first = starts.partition_point(|&s| s <= at).saturating_sub(1);
    for (part, start) in parts.iter().zip(starts).skip(first) {
        let from = ((at + done as u64).saturating_sub(*start) as usize).min(part.len());
        let take = (part.len() - from).min(buffer.len() - done);
        buffer[done..done + take].copy_from_slice(&part[from..from + take]);
        done += take;
    }
    buffer[done..].fill(0);
}

fn write_plainly(new: &NewFile, parts: &[Bytes]) -> Result<(), Errno> {
    let mut file = &new.file;
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
    for (part, at) in parts.iter().zip(starts(parts)) {
        new.wrote(at, part);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Parts whose memory is aligned or not, as windows into one aligned buffer.
    fn parts(windows: &[(usize, usize)]) -> Vec<Bytes> {
        let mut memory = AlignedBuffer::new(9 << 20);
        for (i, byte) in memory.as_mut_slice().iter_mut().enumerate() {
            *byte = (i.wrapping_mul(0x9e37_79b9) >> 16) as u8;
        }
        let memory = Bytes::from_owner(memory);
        windows.iter().map(|&(from, length)| memory.slice(from..from + length)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
        #[test]
        fn every_byte_is_written_once_and_every_write_is_on_pages(
            windows in proptest::collection::vec(
                (prop_oneof![Just(0usize), Just(PAGE), 0usize..20_000], prop_oneof![0usize..9_000, 0usize..9_000_000]),
                1..6,
            )
        ) {
            let parts = parts(&windows);
            let whole = parts.concat();
            let addresses: Vec<_> = parts.iter().map(|p| (p.as_ptr().addr(), p.len())).collect();
            let mut at = 0u64;
            for piece in cut(&addresses) {
                let (begins, bytes) = match piece {
                    Piece::Straight { at, part, bytes } => {
                        let bytes = &parts[part][bytes];
                        prop_assert!(bytes.as_ptr().addr().is_multiple_of(PAGE));
                        (at, bytes.to_vec())
                    }
                    Piece::Gathered { at, length } => {
                        let mut buffer = vec![7; length];
                        gather(&parts, &starts(&parts), at, &mut buffer);
                        (at, buffer)
                    }
                };
                prop_assert_eq!(begins, at);
                prop_assert!(!bytes.is_empty() && bytes.len() <= CHUNK && bytes.len().is_multiple_of(PAGE));
                let end = whole.len().min(at as usize + bytes.len());
                let (data, padding) = bytes.split_at(end - at as usize);
                prop_assert!(data == &whole[at as usize..end] && padding.iter().all(|b| *b == 0));
                at += bytes.len() as u64;
            }
            prop_assert_eq!(at, (whole.len() as u64).next_multiple_of(PAGE as u64));
        }
    }

    #[test]
    fn a_shard_in_a_slot_goes_straight_to_the_disk() {
        let (header, state) = (vec![0u8; 2 * PAGE], 3 * CHUNK);
        let slot = Bytes::from_owner(AlignedBuffer::new(2 * state));
        let parts = [Bytes::from_owner(header), slot.slice(..state), slot.slice(state..)];
        let addresses: Vec<_> = parts.iter().map(|p| (p.as_ptr().addr(), p.len())).collect();
        let pieces = cut(&addresses);
        assert!(pieces[1..].iter().all(|p| matches!(p, Piece::Straight { .. })), "{pieces:?}");
    }
}
