//! Exact gradient sums in 32 bits on a grid for each block; see [`crate::exact32`].

use std::sync::Arc;

use super::driver::Driver;
use super::error::CudaResult;
use super::memory::Array;

/// Sums over the canonical space, with an exponent and the largest magnitude of each block.
pub struct CudaBlockSums<D: Driver> {
    pub(super) sums: Array<D, i32>,
    /// Elements of a block.
    pub(super) block: usize,
    pub(super) exponents: Array<D, i8>,
    /// The bits of the largest magnitudes.
    pub(super) maxima: Array<D, u32>,
}

impl<D: Driver> CudaBlockSums<D> {
    pub(super) fn zeroed(driver: &Arc<D>, elements: usize, block: usize) -> CudaResult<Self> {
        let blocks = elements.div_ceil(block);
        Ok(Self {
            sums: Array::zeroed(driver, elements, "gradient sums")?,
            block,
            exponents: Array::zeroed(driver, blocks, "exponents")?,
            maxima: Array::zeroed(driver, blocks, "magnitudes")?,
        })
    }
}
