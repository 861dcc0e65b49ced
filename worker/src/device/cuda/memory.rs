//! Memory of the device and pinned memory of the host, each given back when its owner goes.
//!
//! A step allocates nothing: every array is made when a model, a state or the device itself is, and lives as long.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use super::driver::{Driver, Event, Stream};
use super::error::CudaResult;

/// A type of element that lies in device memory as it does in the host's.
pub trait Plain: Copy + Send + Sync + 'static {}

/// A bfloat16, as its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Plain for Bf16 {}
impl Plain for u8 {}
impl Plain for i8 {}
impl Plain for f32 {}
impl Plain for f64 {}
impl Plain for i32 {}
impl Plain for u32 {}
impl Plain for i64 {}

/// Elements in the memory of a device.
pub struct Array<D: Driver, T: Plain> {
    driver: Arc<D>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<D: Driver, T: Plain> Array<D, T> {
    /// `len` elements, all bits zero; `what` names them in the error when there is no room.
    pub(super) fn zeroed(driver: &Arc<D>, len: usize, what: &'static str) -> CudaResult<Self> {
        let bytes = len.saturating_mul(size_of::<T>());
        let address = driver.allocate(bytes, what)?;
        let array = Self { driver: driver.clone(), address, len, element: PhantomData };
        // SAFETY: just allocated with so many bytes.
        unsafe { driver.zero(Stream::Compute, address, bytes)? };
        Ok(array)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of `elements` elements from element `first` on.
    ///
    /// # Panics
    /// If there are not so many.
    pub(super) fn at(&self, first: usize, elements: usize) -> u64 {
        let fits = first <= self.len && elements <= self.len - first;
        assert!(fits, "elements {first}+{elements} of {}", self.len);
        self.address + (first * size_of::<T>()) as u64
    }

    /// The address of element `first`, and how many there are from it on.
    pub(super) fn from(&self, first: usize) -> (u64, usize) {
        (self.at(first, 0), self.len - first)
    }
}

impl<D: Driver, T: Plain> std::fmt::Debug for Array<D, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Array({} elements of {} bytes)", self.len, size_of::<T>())
    }
}

impl<D: Driver, T: Plain> Drop for Array<D, T> {
    fn drop(&mut self) {
        self.driver.release(self.address);
    }
}

/// An event, given back when it goes.
pub(super) struct Mark<D: Driver> {
    driver: Arc<D>,
    pub(super) event: Event,
}

impl<D: Driver> Mark<D> {
    /// Not recorded yet; one that is `timed` can be asked for times.
    pub(super) fn new(driver: &Arc<D>, timed: bool) -> CudaResult<Self> {
        Ok(Self { event: driver.event(timed)?, driver: driver.clone() })
    }

    /// The host waits for it.
    pub(super) fn wait_host(&self, patience: Duration, operation: &'static str) -> CudaResult {
        self.driver.wait_host(self.event, patience, operation)
    }
}

impl<D: Driver> Drop for Mark<D> {
    fn drop(&mut self) {
        self.driver.release_event(self.event);
    }
}

/// Pinned memory of the host, and the event that says when the device is done with it.
pub(super) struct Staging<D: Driver> {
    driver: Arc<D>,
    memory: NonNull<u8>,
    bytes: usize,
    done: Event,
}

// SAFETY: the memory is this value's own, and is reached through it only.
unsafe impl<D: Driver> Send for Staging<D> {}
// SAFETY: shared references give the pointer, but what it points at is only touched through exclusive ones.
unsafe impl<D: Driver> Sync for Staging<D> {}

impl<D: Driver> Staging<D> {
    pub(super) fn new(driver: &Arc<D>, bytes: usize) -> CudaResult<Self> {
        let done = driver.event(false)?;
        let memory = driver.pin(bytes).inspect_err(|_| driver.release_event(done))?;
        Ok(Self { driver: driver.clone(), memory, bytes, done })
    }

    /// How many bytes it has.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    /// Its bytes, for the host: nothing on the device may still use them.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: as many were pinned, zeroed; exclusive through self, the device being done with them.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.bytes) }
    }

    /// Its start, for copies.
    pub(super) fn start(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Reached when the device is done with it.
    pub(super) fn done(&self) -> Event {
        self.done
    }
}

impl<D: Driver> Drop for Staging<D> {
    fn drop(&mut self) {
        self.driver.unpin(self.memory);
        self.driver.release_event(self.done);
    }
}
