//! Work that is the same at every step, enqueued with one call (CUDA graphs).
//!
//! A small model's kernels are shorter than the time a launch takes, so the host falls behind. The first time such work
//! is asked for it is done as always, which also makes the plans of its products; the second time it is taken down and
//! played; from then on it is only played. What is played is what was asked for, kernel by kernel, so the bits are the
//! same.

use std::sync::Arc;

use super::driver::{Driver, Graph};
use super::error::CudaResult;
use super::memory::{Array, Bf16};
use super::{CudaDevice, DeviceResult};

/// The addresses from outside that the work reads and writes: parameters and gradient.
type Outside = (u64, Option<u64>);

/// What is kept of such work.
#[derive(Default)]
pub enum CudaRepeated<D: Driver> {
    /// Nothing yet.
    #[default]
    New,
    /// It was done once.
    Seen(Outside),
    /// It can be played.
    Kept(Outside, Played<D>),
}

/// A graph, given back when it goes.
pub struct Played<D: Driver> {
    driver: Arc<D>,
    graph: Graph,
}

impl<D: Driver> Drop for Played<D> {
    fn drop(&mut self) {
        self.driver.release_graph(self.graph);
    }
}

impl<D: Driver> CudaDevice<D> {
    /// See `Device::repeat`.
    pub(super) fn play(
        &self,
        repeated: &mut CudaRepeated<D>,
        parameters: &Array<D, Bf16>,
        gradient: Option<&mut Array<D, f32>>,
        work: impl FnOnce(Option<&mut Array<D, f32>>) -> DeviceResult,
    ) -> DeviceResult {
        let outside = (parameters.at(0, 0), gradient.as_ref().map(|gradient| gradient.at(0, 0)));
        match repeated {
            CudaRepeated::Kept(known, played) if *known == outside => return Ok(self.driver.play(played.graph)?),
            CudaRepeated::Seen(known) if *known == outside => {}
            _ => {
                work(gradient)?;
                *repeated = CudaRepeated::Seen(outside);
                return Ok(());
            }
        }
        self.driver.begin_graph()?;
        let asked = work(gradient);
        // It must end in any case, or the stream would never work again.
        let taken_down: CudaResult<Graph> = self.driver.end_graph();
        asked?;
        let played = Played { driver: self.driver.clone(), graph: taken_down? };
        self.driver.play(played.graph)?;
        *repeated = CudaRepeated::Kept(outside, played);
        Ok(())
    }
}
