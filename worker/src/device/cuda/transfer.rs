//! Values between host and device, through two pinned areas by turns: while one is copied the host fills or empties the
//! other.
//!
//! Copies are in the order of the computation, so what is uploaded is there for whatever is asked next, and what is
//! downloaded is what everything before has made. An upload returns when its values are in the areas; an area is filled
//! again only after the copy from it is done.

use std::sync::Arc;
use std::time::Duration;

use super::driver::{Driver, Stream};
use super::error::CudaResult;
use super::memory::{Array, Plain, Staging};

/// Bytes of an area: copies of this size run at the bus's full speed.
const AREA: usize = 4 << 20;

/// The two areas.
pub(super) struct Transfer<D: Driver> {
    driver: Arc<D>,
    areas: [Staging<D>; 2],
    turn: usize,
    patience: Duration,
}

impl<D: Driver> Transfer<D> {
    pub(super) fn new(driver: &Arc<D>, patience: Duration) -> CudaResult<Self> {
        let area = || Staging::new(driver, AREA);
        Ok(Self { driver: driver.clone(), areas: [area()?, area()?], turn: 0, patience })
    }

    /// Copies `count` elements to `to`, from element `first` on. `fill` writes the bytes of a run of them.
    pub(super) fn upload<T: Plain>(
        &mut self,
        count: usize,
        to: &Array<D, T>,
        first: usize,
        mut fill: impl FnMut(std::ops::Range<usize>, &mut [u8]),
    ) -> CudaResult {
        let (size, most) = (size_of::<T>(), AREA / size_of::<T>());
        for start in (0..count).step_by(most) {
            let run = start..count.min(start + most);
            let (bytes, address) = (run.len() * size, to.at(first + start, run.len()));
            self.turn ^= 1;
            let area = &mut self.areas[self.turn];
            self.driver.wait_host(area.done(), self.patience, "a copy to the device")?;
            fill(run, &mut area.bytes()[..bytes]);
            // SAFETY: the area is pinned, has so many bytes, and is filled again only after `done`.
            unsafe { self.driver.copy_in(Stream::Compute, area.start(), address, bytes)? };
            self.driver.record(area.done(), Stream::Compute)?;
        }
        Ok(())
    }

    /// Copies `count` elements from `from`, from element `first` on. `take` reads the bytes of a run of them.
    pub(super) fn download<T: Plain>(
        &mut self,
        count: usize,
        from: &Array<D, T>,
        first: usize,
        mut take: impl FnMut(std::ops::Range<usize>, &[u8]),
    ) -> CudaResult {
        let (size, most) = (size_of::<T>(), AREA / size_of::<T>());
        let mut under_way: Option<(usize, std::ops::Range<usize>)> = None;
        for start in (0..count).step_by(most) {
            let run = start..count.min(start + most);
            self.turn ^= 1;
            let area = &self.areas[self.turn];
            // An upload's copy may still read it.
            self.driver.wait_host(area.done(), self.patience, "a copy to the device")?;
            let (address, bytes) = (from.at(first + start, run.len()), run.len() * size);
            // SAFETY: the area is pinned, has so many bytes, and is looked at only after `done`.
            unsafe { self.driver.copy_out(Stream::Compute, address, area.start(), bytes)? };
            self.driver.record(area.done(), Stream::Compute)?;
            if let Some((turn, run)) = under_way.replace((self.turn, run)) {
                self.arrived(turn, run, size, &mut take)?;
            }
        }
        match under_way {
            Some((turn, run)) => self.arrived(turn, run, size, &mut take),
            None => Ok(()),
        }
    }

    /// Waits for all work before.
    pub(super) fn finish(&mut self) -> CudaResult {
        self.turn ^= 1;
        let area = &self.areas[self.turn];
        self.driver.record(area.done(), Stream::Compute)?;
        self.driver.wait_host(area.done(), self.patience, "the work so far")
    }

    fn arrived(
        &mut self,
        turn: usize,
        run: std::ops::Range<usize>,
        size: usize,
        take: &mut impl FnMut(std::ops::Range<usize>, &[u8]),
    ) -> CudaResult {
        let area = &mut self.areas[turn];
        self.driver.wait_host(area.done(), self.patience, "the work before a copy to the host")?;
        let bytes = run.len() * size;
        take(run, &area.bytes()[..bytes]);
        Ok(())
    }
}
