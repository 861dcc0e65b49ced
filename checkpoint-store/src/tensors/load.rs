//! Loading for a set of ranks: each needed byte leaves the store once, whatever the ranks want.
//!
//! The plan knows what every rank wants. It takes the chunks that hold it, joins neighbours that the same ranks want
//! into reads, and gives each read to one of those ranks, the least-loaded: reads wanted by few first, among them the
//! largest first. A rank then fetches and proves its reads, places what it wants itself, and cuts the rest into
//! [`Parcel`]s for the others, which travel by whatever the ranks have.
//!
//! Reads near each other are made one where the bytes between are few: all bytes read stay within
//! [`LoadOptions::over_read`] times the bytes needed. Proving needs whole chunks, and those may take a lone reader over
//! that bound (a column of a tensor that was cut in rows, read by nobody else); no gap is read then, and
//! [`LoadPlan::ratio`] says what it costs. When the ranks together want all of a tensor the ratio is 1.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use futures::stream::{self, StreamExt, TryStreamExt};
use proto::ids::Rank;

use super::catalog::BoxPiece;
use super::coverage::coverage;
use super::plan::max_over_mean;
use super::region::{Region, copy_region};
use super::source::{ChunkId, Reader};
use crate::error::StoreError;
use crate::load::READS_IN_FLIGHT;
use crate::plan::MAX_READ;

/// How to load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadOptions {
    /// Bytes read over bytes needed, at most, when gaps between reads are read along; at least 1.
    pub over_read: f64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { over_read: 1.05 }
    }
}

/// One range read of a rank and the chunks to prove in it.
#[derive(Debug, Clone)]
struct Read {
    object: u32,
    bytes: Range<u64>,
    chunks: Vec<ChunkId>,
}

/// Which rank reads what, and who gets it.
#[derive(Debug, Clone)]
pub struct LoadPlan {
    /// Per rank, the boxes it wants.
    wanted: Vec<Vec<(usize, Region)>>,
    /// Per tensor, who wants some of it: rank and place among its boxes.
    by_tensor: BTreeMap<usize, Vec<(usize, usize)>>,
    reads: Vec<Vec<Read>>,
    needed: u64,
}

/// Part of a wanted box, on its way from the rank that read it to one that wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parcel {
    /// Who wants it.
    pub to: Rank,
    /// Which of that rank's boxes it is part of.
    pub request: usize,
    /// The part, in the tensor.
    pub region: Region,
    /// Its elements, row by row.
    pub bytes: Vec<u8>,
}

impl LoadPlan {
    /// Plans a load: `wanted` has the boxes of each rank, rank 0 first. A pure function, so that all ranks who know
    /// what everyone wants have the same plan.
    pub fn new(reader: &Reader, wanted: &[Vec<BoxPiece>], options: LoadOptions) -> Result<Self, StoreError> {
        let locate = |piece| reader.catalog().locate(piece).map(|(tensor, region)| (tensor, region.clone()));
        let wanted = wanted.iter().map(|own| own.iter().map(locate).collect::<Result<Vec<_>, _>>());
        let wanted: Vec<Vec<_>> = wanted.collect::<Result<_, _>>()?;
        let mut by_tensor: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut chunks: BTreeMap<ChunkId, Vec<usize>> = BTreeMap::new();
        for (rank, own) in wanted.iter().enumerate() {
            for (request, (tensor, region)) in own.iter().enumerate() {
                by_tensor.entry(*tensor).or_default().push((rank, request));
                for id in reader.chunks(*tensor, region) {
                    let wanting = chunks.entry(id).or_default();
                    if wanting.last() != Some(&rank) {
                        wanting.push(rank);
                    }
                }
            }
        }
        let needed = needed(reader, &wanted, &by_tensor)?;
        let mut reads = share_out(joined(reader, chunks), wanted.len());
        let proved: u64 = reads.iter().flatten().map(|read| read.bytes.end - read.bytes.start).sum();
        let allowed = (needed as f64 * options.over_read.max(1.0)) as u64;
        bridge(&mut reads, allowed.saturating_sub(proved));
        Ok(Self { wanted, by_tensor, reads, needed })
    }

    /// Bytes that some rank wants, each counted once.
    pub fn bytes_needed(&self) -> u64 {
        self.needed
    }

    /// Bytes that each rank reads from the store.
    pub fn bytes_read(&self) -> Vec<u64> {
        let sum = |reads: &Vec<Read>| reads.iter().map(|read| read.bytes.end - read.bytes.start).sum();
        self.reads.iter().map(sum).collect()
    }

    /// Range reads over all ranks.
    pub fn reads(&self) -> usize {
        self.reads.iter().map(Vec::len).sum()
    }

    /// Bytes read over bytes needed.
    pub fn ratio(&self) -> f64 {
        if self.needed == 0 { 1.0 } else { self.bytes_read().iter().sum::<u64>() as f64 / self.needed as f64 }
    }

    /// The most bytes a rank reads over the mean.
    pub fn max_over_mean(&self) -> f64 {
        max_over_mean(&self.bytes_read())
    }

    /// Does one rank's reads. What it wants itself goes into `own`, a buffer for each of its boxes; what others want
    /// goes to `send`. Memory: the reads in flight, and one parcel.
    pub async fn run(
        &self,
        reader: &Reader,
        rank: Rank,
        own: &mut [&mut [u8]],
        mut send: impl FnMut(Parcel) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.check_buffers(reader, rank, own)?;
        let reads = self.reads.get(rank.index()).map_or(&[][..], Vec::as_slice);
        let mut arriving = stream::iter(reads)
            .map(|read| async move {
                let bytes = reader.fetch(read.object, read.bytes.clone(), &read.chunks).await?;
                Ok::<_, StoreError>((read, bytes))
            })
            .buffer_unordered(READS_IN_FLIGHT);
        while let Some((read, bytes)) = arriving.try_next().await? {
            for &id in &read.chunks {
                let at = reader.bytes(id).start - read.bytes.start;
                for (tensor, region, offset) in reader.parts(id) {
                    let size = reader.size(tensor);
                    let start = (at + offset) as usize;
                    let body = &bytes[start..start + (region.elements() * size) as usize];
                    self.hand_out((tensor, &region, body, size), rank, own, &mut send)?;
                }
            }
        }
        Ok(())
    }

    /// As [`LoadPlan::run`] for a reader that is alone.
    pub(super) async fn run_alone(&self, reader: &Reader, own: &mut [&mut [u8]]) -> Result<(), StoreError> {
        let nobody = |_| Err(StoreError::Bug("a reader that is alone has a parcel for another".into()));
        self.run(reader, Rank::ZERO, own, nobody).await
    }

    /// Reads and proves all reads of all ranks, and keeps nothing.
    pub(super) async fn prove(&self, reader: &Reader) -> Result<(), StoreError> {
        let mut proved = stream::iter(self.reads.iter().flatten())
            .map(|read| reader.fetch(read.object, read.bytes.clone(), &read.chunks))
            .buffer_unordered(READS_IN_FLIGHT);
        while proved.try_next().await?.is_some() {}
        Ok(())
    }

    /// Puts a parcel from another rank into this rank's buffers.
    pub fn place(&self, reader: &Reader, rank: Rank, parcel: &Parcel, own: &mut [&mut [u8]]) -> Result<(), StoreError> {
        let wanted = self.wanted.get(rank.index()).and_then(|w| w.get(parcel.request)).filter(|_| parcel.to == rank);
        let (Some((tensor, region)), Some(dst)) = (wanted, own.get_mut(parcel.request)) else {
            return Err(StoreError::Input(format!("a parcel for rank {} came to rank {rank}", parcel.to)));
        };
        let from = (&parcel.bytes[..], &parcel.region);
        copy_region(from, (dst, region), &parcel.region, reader.size(*tensor))
            .map_err(|e| StoreError::Input(format!("a parcel for rank {rank} does not fit: {e}")))
    }

    /// Gives a box that was read to all who want some of it.
    fn hand_out(
        &self,
        (tensor, region, body, size): (usize, &Region, &[u8], u64),
        rank: Rank,
        own: &mut [&mut [u8]],
        send: &mut impl FnMut(Parcel) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for &(to, request) in self.by_tensor.get(&tensor).map_or(&[][..], Vec::as_slice) {
            let wanted = &self.wanted[to][request].1;
            let Some(part) = region.intersect(wanted) else { continue };
            if to == rank.index() {
                copy_region((body, region), (&mut *own[request], wanted), &part, size)?;
            } else {
                let mut bytes = vec![0; (part.elements() * size) as usize];
                copy_region((body, region), (&mut bytes, &part), &part, size)?;
                send(Parcel { to: Rank::new(to as u32), request, region: part, bytes })?;
            }
        }
        Ok(())
    }

    fn check_buffers(&self, reader: &Reader, rank: Rank, own: &[&mut [u8]]) -> Result<(), StoreError> {
        let wanted = self.wanted.get(rank.index()).map_or(&[][..], Vec::as_slice);
        let lengths = wanted.iter().map(|(tensor, region)| region.elements() * reader.size(*tensor));
        if lengths.eq(own.iter().map(|buffer| buffer.len() as u64)) {
            return Ok(());
        }
        Err(StoreError::Bug(format!("rank {rank}: its buffers do not have the sizes of the boxes it wants")))
    }
}

/// Bytes that at least one rank wants.
fn needed(
    reader: &Reader,
    wanted: &[Vec<(usize, Region)>],
    by_tensor: &BTreeMap<usize, Vec<(usize, usize)>>,
) -> Result<u64, StoreError> {
    let mut bytes = 0;
    for (&tensor, places) in by_tensor {
        let regions: BTreeSet<_> = places.iter().map(|&(rank, request)| &wanted[rank][request].1).collect();
        let info = &reader.catalog().tensors()[tensor];
        let found = coverage(&Region::whole(&info.shape), regions.into_iter().cloned().collect());
        let found = found.ok_or_else(|| {
            StoreError::Input(format!("the boxes wanted of tensor {:?} are too entangled to be planned", info.name))
        })?;
        bytes += found.covered * info.dtype.size();
    }
    Ok(bytes)
}

/// Joins chunks that follow one another and that the same ranks want, up to the bound on reads.
fn joined(reader: &Reader, chunks: BTreeMap<ChunkId, Vec<usize>>) -> Vec<(Read, Vec<usize>)> {
    let mut joined: Vec<(Read, Vec<usize>)> = vec![];
    for (id, wanting) in chunks {
        let bytes = reader.bytes(id);
        match joined.last_mut() {
            Some((read, before))
                if read.object == id.object
                    && read.bytes.end == bytes.start
                    && bytes.end - read.bytes.start <= MAX_READ
                    && *before == wanting =>
            {
                read.bytes.end = bytes.end;
                read.chunks.push(id);
            }
            _ => joined.push((Read { object: id.object, bytes, chunks: vec![id] }, wanting)),
        }
    }
    joined
}

/// Gives each read to one of the ranks that want it; each rank's reads come out in the order of the store.
fn share_out(reads: Vec<(Read, Vec<usize>)>, ranks: usize) -> Vec<Vec<Read>> {
    let length = |read: &Read| read.bytes.end - read.bytes.start;
    let mut order: Vec<usize> = (0..reads.len()).collect();
    order.sort_by_key(|&i| (reads[i].1.len(), Reverse(length(&reads[i].0))));
    let (mut loads, mut reader) = (vec![0; ranks], vec![0; reads.len()]);
    for i in order {
        let (read, wanting) = &reads[i];
        // Whatever was planned is wanted by someone.
        let lightest = wanting.iter().copied().min_by_key(|&rank| (loads[rank], rank)).unwrap_or(0);
        loads[lightest] += length(read);
        reader[i] = lightest;
    }
    let mut out = vec![vec![]; ranks];
    for ((read, _), rank) in reads.into_iter().zip(reader) {
        out[rank].push(read);
    }
    out
}

/// Makes neighbouring reads of a rank one, the smallest gaps between them first, as long as the gaps sum to at most
/// `budget`. A gap that another rank reads stays one: no byte is read twice.
fn bridge(reads: &mut [Vec<Read>], mut budget: u64) {
    let mut starts: Vec<(u32, u64)> = reads.iter().flatten().map(|read| (read.object, read.bytes.start)).collect();
    starts.sort_unstable();
    let gap = |a: &Read, b: &Read| {
        let next = starts.partition_point(|&start| start <= (a.object, a.bytes.start));
        let is_free = starts.get(next) == Some(&(b.object, b.bytes.start)) && a.object == b.object;
        is_free.then(|| b.bytes.start - a.bytes.end)
    };
    let mut gaps: Vec<(u64, usize, usize)> = vec![];
    for (rank, own) in reads.iter().enumerate() {
        let found = own.windows(2).enumerate().filter_map(|(i, w)| Some((gap(&w[0], &w[1])?, rank, i + 1)));
        gaps.extend(found.filter(|(gap, ..)| *gap <= MAX_READ));
    }
    gaps.sort_unstable();
    let mut bridged = BTreeSet::new();
    for (gap, rank, at) in gaps {
        if gap > budget {
            break;
        }
        budget -= gap;
        bridged.insert((rank, at));
    }
    for (rank, own) in reads.iter_mut().enumerate() {
        let mut out: Vec<Read> = vec![];
        for (at, read) in std::mem::take(own).into_iter().enumerate() {
            match out.last_mut().filter(|_| bridged.contains(&(rank, at))) {
                Some(before) if read.bytes.end - before.bytes.start <= MAX_READ => {
                    before.bytes.end = read.bytes.end;
                    before.chunks.extend(read.chunks);
                }
                _ => out.push(read),
            }
        }
        *own = out;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(object: u32, bytes: Range<u64>) -> Read {
        Read { object, bytes, chunks: vec![] }
    }

    fn bridged(reads: &[&[(u32, u64, u64)]], budget: u64) -> Vec<Vec<(u32, u64, u64)>> {
        let of_rank = |own: &&[(u32, u64, u64)]| own.iter().map(|&(o, a, b)| read(o, a..b)).collect();
        let mut reads: Vec<Vec<Read>> = reads.iter().map(of_rank).collect();
        bridge(&mut reads, budget);
        let back = |own: Vec<Read>| own.into_iter().map(|r| (r.object, r.bytes.start, r.bytes.end)).collect();
        reads.into_iter().map(back).collect()
    }

    #[test]
    fn small_free_gaps_are_read_along_within_the_budget() {
        let own: &[_] = &[(0, 0, 10), (0, 14, 20), (0, 22, 30), (0, 30, 40), (1, 0, 10)];
        assert_eq!(bridged(&[own], 0), [vec![(0, 0, 10), (0, 14, 20), (0, 22, 40), (1, 0, 10)]]);
        assert_eq!(bridged(&[own], 5), [vec![(0, 0, 10), (0, 14, 40), (1, 0, 10)]]);
        assert_eq!(bridged(&[own], 6), [vec![(0, 0, 40), (1, 0, 10)]]);
        // What another rank reads is not read twice, however large the budget.
        let other: &[_] = &[(0, 20, 22)];
        assert_eq!(bridged(&[own, other], 100), [vec![(0, 0, 20), (0, 22, 40), (1, 0, 10)], other.to_vec()]);
        // Nor does a read grow without bound.
        let large: &[_] = &[(0, 0, MAX_READ - 5), (0, MAX_READ - 4, MAX_READ + 1)];
        assert_eq!(bridged(&[large], 100), [large.to_vec()]);
    }
}
