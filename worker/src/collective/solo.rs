//! A world of one: every sum is already there, every message is one's own.

use std::ops::Range;

use proto::ids::{Generation, Rank, WorldSize};

use super::{AbortHandle, Collective, CollectiveError, MAX_MESSAGE, Result, check_ranges};

/// The collective of a single worker; no sockets.
#[derive(Debug)]
pub struct Solo {
    generation: Generation,
    abort: AbortHandle,
}

impl Solo {
    /// The group of one of a generation.
    pub fn new(generation: Generation) -> Self {
        Self::with_abort(generation, AbortHandle::new())
    }

    /// As [`Solo::new`], ended by a handle made before.
    pub fn with_abort(generation: Generation, abort: AbortHandle) -> Self {
        Self { generation, abort }
    }

    fn check(&self, len: usize, ranges: &[Range<usize>]) -> Result<()> {
        check_ranges(len, ranges, WorldSize::ONE)?;
        self.check_alive()
    }

    fn check_alive(&self) -> Result<()> {
        if self.abort.is_aborted() { Err(CollectiveError::Aborted) } else { Ok(()) }
    }
}

impl Collective for Solo {
    fn rank(&self) -> Rank {
        Rank::ZERO
    }

    fn world_size(&self) -> WorldSize {
        WorldSize::ONE
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn reduce_scatter_i64(&mut self, data: &mut [i64], ranges: &[Range<usize>]) -> Result<()> {
        self.check(data.len(), ranges)
    }

    fn reduce_scatter_i32(&mut self, data: &mut [i32], ranges: &[Range<usize>]) -> Result<()> {
        self.check(data.len(), ranges)
    }

    fn reduce_scatter_f32(&mut self, data: &mut [f32], ranges: &[Range<usize>]) -> Result<()> {
        self.check(data.len(), ranges)
    }

    fn all_gather_f32(&mut self, data: &mut [f32], ranges: &[Range<usize>]) -> Result<()> {
        self.check(data.len(), ranges)
    }

    fn all_gather_u16(&mut self, data: &mut [u16], ranges: &[Range<usize>]) -> Result<()> {
        self.check(data.len(), ranges)
    }

    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.check_alive()?;
        if mine.len() > MAX_MESSAGE {
            return Err(super::tcp::too_large(mine.len()));
        }
        Ok(vec![mine.to_vec()])
    }

    fn barrier(&mut self) -> Result<()> {
        self.check_alive()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}
