//! The CUDA device: kernels of our own compiled by NVRTC, matrix products by cuBLASLt, bfloat16 where it is enough.
//!
//! ```text
//! operations   the Device trait: checks operands, knows each kernel's launch
//!   memory     arrays on the device, pinned memory of the host        transfer, tokens   what goes to and fro
//! driver       the seam: memory, streams, copies, launches, products, events
//!   real       NVIDIA's libraries (libraries, compile, probe)
//!   emulated   the same kernels on the CPU         recording           notes what is asked
//! ```
//!
//! Nothing here is linked: the libraries are looked for when a device is asked for, so that one binary serves machines
//! with and without a GPU. An operation enqueues and returns; only what brings something to the host waits, each time
//! with a deadline. All work of a device is in one order, [`Stream::Compute`], but for snapshots, which are copied
//! beside it. Parameters as the model reads them, activations and their gradients are bfloat16; sums within kernels,
//! parameters' gradients and the optimizer's state are float32.

pub mod bf16;
pub mod driver;
pub mod error;
pub mod libraries;
pub mod memory;
pub mod probe;
pub mod real;

mod attention;
mod blocks;
mod compile;
#[cfg(any(test, feature = "emulator"))]
pub mod emulated;
mod kernels;
mod lend;
mod loss;
mod norms;
mod operations;
#[cfg(test)]
mod recording;
mod repeat;
mod state;
#[cfg(test)]
mod tests;
mod tokens;
mod transfer;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytemuck::Pod;

pub use self::blocks::CudaBlockSums;
use self::driver::{After, Argument, Driver, Element, Launch, ProductKey, Stream, alignment};
use self::error::CudaResult;
pub use self::memory::{Array, Bf16};
use self::memory::{Mark, Plain, Staging};
pub use self::operations::NoSums;
pub use self::repeat::CudaRepeated;
pub use self::state::CudaState;
pub use self::tokens::CudaTokens;
use self::transfer::Transfer;
use super::{DeviceResult, MatmulShape, Product, Write};

/// How long a step's work may take until the device counts as hanging.
pub const PATIENCE: Duration = Duration::from_mins(2);
/// Bytes of scratch memory for what an operation has between two of its kernels.
const SCRATCH: usize = 64 << 20;

/// Arguments of a kernel in their order.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &[$($crate::device::cuda::driver::Argument::from($value)),*] };
}
use arguments;

/// A CUDA device, or what stands for one, as a [`super::Device`].
pub struct CudaDevice<D: Driver> {
    driver: Arc<D>,
    /// By which kernels are chosen where there are several.
    capability: (u32, u32),
    /// Float32, for one operation at a time.
    scratch: Array<D, f32>,
    transfer: Mutex<Transfer<D>>,
    /// What is lent to the exchange lies here; there is none before the first.
    exchange: Mutex<Option<Staging<D>>>,
    /// Before and after an operation that is timed.
    timer: [Mark<D>; 2],
    patience: Duration,
}

impl<D: Driver> std::fmt::Debug for CudaDevice<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaDevice({})", self.driver.identity().name)
    }
}

impl<D: Driver> CudaDevice<D> {
    /// The device behind a driver. It counts as hanging when a wait takes longer than `patience`.
    pub fn new(driver: D, patience: Duration) -> CudaResult<Self> {
        let driver = Arc::new(driver);
        let scratch = Array::zeroed(&driver, SCRATCH / 4, "scratch memory")?;
        let transfer = Mutex::new(Transfer::new(&driver, patience)?);
        let timer = [Mark::new(&driver, true)?, Mark::new(&driver, true)?];
        let capability = driver.identity().capability;
        Ok(Self { driver, capability, scratch, transfer, exchange: Mutex::new(None), timer, patience })
    }

    /// The same device with the kernels of another.
    #[cfg(test)]
    fn like(mut self, capability: (u32, u32)) -> Self {
        self.capability = capability;
        self
    }

    /// What runs this device's work.
    pub fn driver(&self) -> &D {
        &self.driver
    }

    fn transfer(&self) -> MutexGuard<'_, Transfer<D>> {
        self.transfer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uploads `count` elements to `to`, from element `first` on, each as `value` says.
    fn send<T: Plain, H: Pod>(
        &self,
        count: usize,
        to: &Array<D, T>,
        first: usize,
        value: impl Fn(usize) -> H,
    ) -> DeviceResult {
        const { assert!(size_of::<T>() == size_of::<H>()) };
        let fill = |run: Range<usize>, bytes: &mut [u8]| {
            let elements: &mut [H] = bytemuck::cast_slice_mut(bytes);
            elements.iter_mut().zip(run).for_each(|(element, i)| *element = value(i));
        };
        Ok(self.transfer().upload(count, to, first, fill)?)
    }

    /// Downloads `count` elements of `from`, from element `first` on, and shows each to `take`.
    fn receive<T: Plain, H: Pod>(
        &self,
        count: usize,
        from: &Array<D, T>,
        first: usize,
        mut take: impl FnMut(usize, H),
    ) -> DeviceResult {
        const { assert!(size_of::<T>() == size_of::<H>()) };
        let empty = |run: Range<usize>, bytes: &[u8]| {
            let elements: &[H] = bytemuck::cast_slice(bytes);
            run.zip(elements).for_each(|(i, element)| take(i, *element));
        };
        Ok(self.transfer().download(count, from, first, empty)?)
    }

    /// Sets bytes to zero.
    fn clear(&self, to: u64, bytes: usize) -> DeviceResult {
        // SAFETY: the address comes from `Array::at` for as many bytes.
        unsafe { self.driver.zero(Stream::Compute, to, bytes) }?;
        Ok(())
    }

    /// Enqueues a kernel.
    fn run(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        block: u32,
        shared: usize,
        arguments: &[Argument],
    ) -> DeviceResult {
        let grid = grid.map(|count| count as u32);
        if grid.contains(&0) {
            return Ok(());
        }
        let launch = Launch { kernel, grid, block: [block, 1, 1], shared, arguments };
        // SAFETY: addresses come from `Array::at`, which checks that the operands are as long as the shape asks for,
        // and the borrows of the operation's buffers keep what is written apart from what is read.
        unsafe { self.driver.launch(Stream::Compute, &launch) }?;
        Ok(())
    }

    /// Enqueues a product of bfloat16 matrices. Operands are given with the elements there are from their place on.
    /// `false`: there is no such product with this epilogue, and nothing was done.
    fn multiply(
        &self,
        product: Product,
        shape: MatmulShape,
        operands: [(u64, usize); 3],
        (result, write, after): (Element, Write, After),
    ) -> DeviceResult<bool> {
        let MatmulShape { m, n, k } = shape;
        if m == 0 || n == 0 {
            return Ok(true);
        }
        for (needed, (_, elements)) in [m * k, k * n, m * n].into_iter().zip(operands) {
            assert!(needed <= elements, "a product of {shape:?} reads or writes beyond its operands");
        }
        let addresses = operands.map(|(address, _)| address);
        let alignments = addresses.map(alignment);
        let (add, epilogue) = (write == Write::Add, after.epilogue());
        let key = ProductKey { product, m, n, k, alignments, result, add, epilogue };
        // SAFETY: the operands were just checked, and what the epilogue takes by the caller; what is written is
        // borrowed exclusively.
        Ok(unsafe { self.driver.product(&key, addresses, after) }?)
    }
}

/// A size as the kernels take it.
///
/// # Panics
/// If it does not fit: no device has room for activations of so many rows or columns.
fn int(size: usize) -> i32 {
    i32::try_from(size).unwrap_or_else(|_| panic!("{size} rows or columns are more than a kernel counts"))
}

/// A count as the kernels take it where it may be large.
fn long(count: usize) -> i64 {
    count as i64
}
