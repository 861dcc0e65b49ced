//! Token ids on the device, and the order in which an embedding's gradient is summed.
//!
//! Many rows of a micro-batch have the same token, and their gradients belong to one row of the table. The host sorts
//! the rows by token, stably, and cuts each token's run into pieces; the kernels add the rows of a piece in order, then
//! a run's pieces in order. So the order of additions depends on the tokens alone.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::driver::{Driver, Stream};
use super::error::CudaResult;
use super::memory::{Array, Bf16, Staging};
use super::{CudaDevice, arguments, int};
use crate::device::{DeviceError, DeviceResult, PartMut};

/// Rows of a piece, at most.
const PIECE: usize = 64;
/// Lists begin at multiples of so many words, for aligned accesses.
const ALIGN: usize = 64;

/// Rows sorted by token.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Runs {
    /// Row numbers, by token, then by row.
    order: Vec<u32>,
    /// Where each piece begins in `order`, and where the last ends.
    piece_start: Vec<u32>,
    /// Where each token's run begins among the pieces, and where the last ends.
    run_piece: Vec<u32>,
    /// Each run's token.
    run_token: Vec<u32>,
    /// How many rows have each token; kept for its memory.
    counts: Vec<u32>,
}

impl Runs {
    /// Sorts by counting.
    fn sort(&mut self, tokens: &[u32]) {
        let highest = tokens.iter().max().map_or(0, |token| *token as usize + 1);
        self.counts.clear();
        self.counts.resize(highest, 0);
        for token in tokens {
            self.counts[*token as usize] += 1;
        }
        self.piece_start.clear();
        self.run_piece.clear();
        self.run_token.clear();
        let mut start = 0;
        for (token, count) in self.counts.iter_mut().enumerate().filter(|(_, count)| **count > 0) {
            self.run_token.push(token as u32);
            self.run_piece.push(self.piece_start.len() as u32);
            self.piece_start.extend((start..start + *count).step_by(PIECE));
            // From here on, where the token's next row goes.
            (*count, start) = (start, start + *count);
        }
        self.piece_start.push(start);
        self.run_piece.push(self.piece_start.len() as u32 - 1);
        self.order.clear();
        self.order.resize(tokens.len(), 0);
        for (row, token) in tokens.iter().enumerate() {
            let place = &mut self.counts[*token as usize];
            self.order[*place as usize] = row as u32;
            *place += 1;
        }
    }

    /// Has no rows any more.
    fn forget(&mut self) {
        for list in [&mut self.order, &mut self.piece_start, &mut self.run_piece, &mut self.run_token] {
            list.clear();
        }
    }

    /// Runs that together have at most `most` pieces, one group after another. `None`: one run alone has more.
    pub(super) fn groups(&self, most: usize) -> Option<Vec<Range<usize>>> {
        let pieces = |runs: &Range<usize>| (self.run_piece[runs.end] - self.run_piece[runs.start]) as usize;
        let mut groups: Vec<Range<usize>> = Vec::new();
        for run in 0..self.run_token.len() {
            match groups.last_mut() {
                Some(last) if pieces(&(last.start..run + 1)) <= most => last.end = run + 1,
                _ => groups.push(run..run + 1),
            }
        }
        groups.iter().all(|group| pieces(group) <= most).then_some(groups)
    }

    /// The pieces of some runs.
    pub(super) fn pieces(&self, runs: &Range<usize>) -> Range<usize> {
        self.run_piece[runs.start] as usize..self.run_piece[runs.end] as usize
    }
}

/// Token ids, and their order.
pub struct CudaTokens<D: Driver> {
    driver: Arc<D>,
    /// The lists one after another: ids, order, starts of pieces, runs' pieces, runs' tokens.
    words: Array<D, u32>,
    /// Where each begins.
    starts: [usize; 5],
    staging: [Staging<D>; 2],
    turn: usize,
    rows: usize,
    pub(super) runs: Runs,
}

impl<D: Driver> CudaTokens<D> {
    pub(super) fn new(driver: &Arc<D>, rows: usize) -> CudaResult<Self> {
        // No list has more than one entry a row and one at the end.
        let words = 5 * (rows + 1).next_multiple_of(ALIGN);
        let staging = || Staging::new(driver, 4 * words);
        Ok(Self {
            driver: driver.clone(),
            words: Array::zeroed(driver, words, "tokens")?,
            starts: [0; 5],
            staging: [staging()?, staging()?],
            turn: 0,
            rows: 0,
            runs: Runs::default(),
        })
    }

    /// Copies `tokens`, and their order if they are to be `ordered`. Waits only for the copy before the last one.
    pub(super) fn upload(&mut self, tokens: &[u32], ordered: bool, patience: Duration) -> CudaResult {
        if ordered {
            self.runs.sort(tokens);
        } else {
            self.runs.forget();
        }
        let Runs { order, piece_start, run_piece, run_token, .. } = &self.runs;
        self.turn ^= 1;
        let staging = &mut self.staging[self.turn];
        self.driver.wait_host(staging.done(), patience, "a copy of tokens")?;
        let area: &mut [u32] = bytemuck::cast_slice_mut(staging.bytes());
        let mut at = 0;
        for (list, start) in [tokens, order, piece_start, run_piece, run_token].into_iter().zip(&mut self.starts) {
            area[at..at + list.len()].copy_from_slice(list);
            *start = at;
            at += list.len().next_multiple_of(ALIGN);
        }
        // SAFETY: pinned, as long as the array, and filled again only after `done`.
        unsafe { self.driver.copy_in(Stream::Compute, staging.start(), self.words.at(0, at), 4 * at)? };
        self.driver.record(staging.done(), Stream::Compute)?;
        self.rows = tokens.len();
        Ok(())
    }

    /// The address of the ids of `rows` rows from `first` on.
    pub(super) fn ids(&self, first: usize, rows: usize) -> u64 {
        assert!(first <= self.rows && rows <= self.rows - first, "rows {first}+{rows} of {}", self.rows);
        self.words.at(self.starts[0] + first, rows)
    }

    /// The addresses of the order, and of the lists of a group of runs: starts of pieces, runs' pieces, runs' tokens.
    pub(super) fn order(&self, rows: usize, runs: &Range<usize>) -> [u64; 4] {
        assert_eq!(rows, self.runs.order.len(), "all rows, in their order");
        let pieces = self.runs.pieces(runs);
        let at = |list: usize, first: usize, count: usize| self.words.at(self.starts[list] + first, count);
        [
            at(1, 0, rows),
            at(2, pieces.start, pieces.len() + 1),
            at(3, runs.start, runs.len() + 1),
            at(4, runs.start, runs.len()),
        ]
    }
}

impl<D: Driver> CudaDevice<D> {
    /// See `Device::embedding_backward`.
    pub(super) fn embed_backward(
        &self,
        width: usize,
        rows: usize,
        tokens: &CudaTokens<D>,
        d_out: &Array<D, Bf16>,
        d_table: PartMut<'_, Array<D, f32>>,
    ) -> DeviceResult {
        // Partial sums go through the scratch memory, as many runs at a time as fit.
        let most = self.scratch.len() / width.max(1);
        let unfit = || DeviceError::Unsupported(format!("{rows} rows of {width} numbers with one token"));
        let (d_out, partial, (d_table, _)) =
            (d_out.at(0, rows * width), self.scratch.at(0, 0), d_table.0.from(d_table.1));
        for group in tokens.runs.groups(most).ok_or_else(unfit)? {
            let (pieces, columns) = (tokens.runs.pieces(&group), width.div_ceil(1024));
            let [order, piece_start, run_piece, run_token] = tokens.order(rows, &group);
            let arguments = arguments![partial, d_out, order, piece_start, int(pieces.len()), int(width)];
            self.run("embedding_backward_pieces", [pieces.len(), columns, 1], 128, 0, arguments)?;
            // The runs count their pieces from the first of all.
            let first = partial.wrapping_sub((pieces.start * width * 4) as u64);
            let arguments = arguments![d_table, first, run_piece, run_token, int(group.len()), int(width)];
            self.run("embedding_backward_join", [group.len(), columns, 1], 128, 0, arguments)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(tokens: &[u32]) -> Runs {
        let mut runs = Runs::default();
        runs.sort(&[9, 9, 1]); // what was before leaves nothing
        runs.sort(tokens);
        runs
    }

    #[test]
    fn rows_are_sorted_stably_and_cut_into_pieces() {
        let runs = sorted(&[3, 0, 3, 2, 0]);
        assert_eq!(runs.order, [1, 4, 3, 0, 2]);
        assert_eq!((&runs.piece_start[..], &runs.run_piece[..]), (&[0, 2, 3, 5][..], &[0, 1, 2, 3][..]));
        assert_eq!(runs.run_token, [0, 2, 3]);

        let mut tokens = vec![7; 150];
        tokens.insert(100, 4);
        let runs = sorted(&tokens);
        assert_eq!(runs.order[0], 100);
        assert_eq!((&runs.piece_start[..], &runs.run_piece[..]), (&[0, 1, 65, 129, 151][..], &[0, 1, 4][..]));
        assert_eq!(runs.pieces(&(1..2)), 1..4);
        assert!(sorted(&[]).run_token.is_empty());
    }

    #[test]
    fn groups_keep_runs_whole() {
        let tokens: Vec<u32> = (0..10).chain([5; 130]).collect();
        let runs = sorted(&tokens);
        let ends = |most| Some(runs.groups(most)?.iter().map(|group| group.end).collect::<Vec<_>>());
        assert_eq!(ends(100), Some(vec![10]));
        assert_eq!(ends(4), Some(vec![4, 6, 10]), "the sixth run has three pieces");
        assert_eq!(ends(3), Some(vec![3, 5, 6, 9, 10]));
        assert_eq!(ends(2), None);
        assert_eq!(sorted(&[]).groups(1), Some(vec![]));
    }
}
