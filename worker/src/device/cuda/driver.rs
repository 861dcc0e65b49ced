//! The seam between the CUDA device and whatever runs its work.
//!
//! [`Driver`] is what Cairn asks of CUDA: memory, two streams, copies, launches, products, events. `real` gives it with
//! the NVIDIA libraries; in tests `emulated` runs the same kernels on the CPU, and `recording` notes what it was asked.
//! Everything is enqueued and nothing waits, but for [`Driver::wait_host`] and what says so.
//!
//! Addresses are plain numbers, as CUDA's are. Whoever enqueues work vouches for them, which is why those methods are
//! unsafe; the device above checks every operand's length against its buffer.

use std::fmt;
use std::ptr::NonNull;
use std::time::Duration;

use super::error::CudaResult;
use crate::device::Product;

/// A version of CUDA, as NVIDIA counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Such as 13.
    pub major: u32,
    /// Such as 0.
    pub minor: u32,
}

impl Version {
    /// From the form `1000·major + 10·minor` in which the libraries say it.
    pub fn from_number(number: i32) -> Self {
        let number = number.max(0) as u32;
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a device is, and with what it is used: all that its arithmetic may depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The product's name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Streaming multiprocessors: cuBLAS chooses by them.
    pub multiprocessors: u32,
    /// What kernels were compiled with, and products are made by, each with its version.
    pub libraries: Vec<(&'static str, String)>,
}

/// Bytes of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Not in use by any process.
    pub free: u64,
    /// All there is.
    pub total: u64,
}

/// An order of work: what is enqueued in one runs one after another, what is in two may run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Kernels and products.
    Compute,
    /// Copies between host and device that go on beside them.
    Copy,
}

/// A mark in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Event(pub(super) u64);

/// Work of [`Stream::Compute`] that was taken down instead of done, to be done as often as is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Graph(pub(super) u64);

/// An argument of a kernel: its bytes, from the first one on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argument(pub(super) u64);

impl From<u64> for Argument {
    /// An address on the device; 0 is the null pointer.
    fn from(address: u64) -> Self {
        Self(address)
    }
}

impl From<i64> for Argument {
    fn from(value: i64) -> Self {
        Self(u64::from_ne_bytes(value.to_ne_bytes()))
    }
}

impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Self::first_four(value.to_ne_bytes())
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::first_four(value.to_ne_bytes())
    }
}

impl From<f64> for Argument {
    fn from(value: f64) -> Self {
        Self(u64::from_ne_bytes(value.to_ne_bytes()))
    }
}

impl Argument {
    /// A kernel reads as many bytes as its parameter has, from the address of the argument on.
    fn first_four([a, b, c, d]: [u8; 4]) -> Self {
        Self(u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0]))
    }
}

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch<'a> {
    /// Its name in the source.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// In the order of the parameters.
    pub arguments: &'a [Argument],
}

/// Type of a product's result; its operands are bfloat16 and its sums float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Element {
    /// 16 bits.
    Bfloat16,
    /// 32 bits.
    Float32,
}

/// What a product does with its sums before it rounds them to C.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    Plain,
    /// Adds a number to each column.
    Bias,
    /// Adds a number to each column, keeps that in a matrix of C's shape and pitch, and takes GELU of it.
    BiasGelu,
}

/// The addresses of a product's epilogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct After {
    /// What is added, a bfloat16 for each column.
    pub bias: Option<u64>,
    /// Where the sums are kept, as bfloat16, and what C then gets is their GELU.
    pub pre: Option<u64>,
}

impl After {
    /// What it comes to.
    pub fn epilogue(self) -> Epilogue {
        match self {
            Self { pre: Some(_), .. } => Epilogue::BiasGelu,
            Self { bias: Some(_), .. } => Epilogue::Bias,
            Self { .. } => Epilogue::Plain,
        }
    }
}

/// Everything the choice of a product's algorithm may depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProductKey {
    /// Which operand is transposed.
    pub product: Product,
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Bytes, up to 16, that the addresses of A, B and C are multiples of.
    pub alignments: [u8; 3],
    /// Type of C.
    pub result: Element,
    /// Whether the product is added to C.
    pub add: bool,
    /// What happens to the sums.
    pub epilogue: Epilogue,
}

impl ProductKey {
    /// Rows and columns of A and of B, as they lie in memory.
    pub fn operands(&self) -> [(usize, usize); 2] {
        let Self { m, n, k, .. } = *self;
        match self.product {
            Product::NN => [(m, k), (k, n)],
            Product::NT => [(m, k), (n, k)],
            Product::TN => [(k, m), (k, n)],
        }
    }
}

impl fmt::Display for ProductKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { product, m, n, k, alignments: [x, y, z], .. } = self;
        let result = if self.result == Element::Bfloat16 { "bf16" } else { "f32" };
        let write = match (self.epilogue, self.add) {
            (Epilogue::Plain, false) => "replace",
            (Epilogue::Plain, true) => "add",
            (Epilogue::Bias, _) => "bias",
            (Epilogue::BiasGelu, _) => "bias-gelu",
        };
        write!(f, "{product:?} {m} {n} {k} {x} {y} {z} {result} {write}")
    }
}

/// See the module's text. Every `what` and `operation` names its subject in errors.
pub trait Driver: Send + Sync + 'static {
    /// What device this is.
    fn identity(&self) -> &Identity;
    /// How much memory it has.
    fn memory(&self) -> CudaResult<Memory>;

    /// Device memory, its content undefined, aligned to 256 bytes. May wait for the device.
    fn allocate(&self, bytes: usize, what: &'static str) -> CudaResult<u64>;
    /// Gives memory back, after all work enqueued so far.
    fn release(&self, address: u64);
    /// Zeroed memory of the host that copies can read and write while both sides work; cached, as reads of it are
    /// common.
    fn pin(&self, bytes: usize) -> CudaResult<NonNull<u8>>;
    /// Gives pinned memory back, after all work enqueued so far.
    fn unpin(&self, memory: NonNull<u8>);
    /// Pins memory that the host already has, such as a slot.
    ///
    /// # Safety
    /// It stays mapped until [`Driver::unregister`].
    unsafe fn register(&self, memory: NonNull<u8>, bytes: usize) -> CudaResult;
    /// Undoes [`Driver::register`], after all work enqueued so far.
    fn unregister(&self, memory: NonNull<u8>);

    /// Copies to the device.
    ///
    /// # Safety
    /// `from` is pinned or registered and neither changed nor freed until the copy is done; `to` has room.
    unsafe fn copy_in(&self, stream: Stream, from: *const u8, to: u64, bytes: usize) -> CudaResult;
    /// Copies to the host.
    ///
    /// # Safety
    /// `to` is pinned or registered and not touched until the copy is done; both sides have `bytes` bytes.
    unsafe fn copy_out(&self, stream: Stream, from: u64, to: *mut u8, bytes: usize) -> CudaResult;
    /// Copies from one place of the device to another.
    ///
    /// # Safety
    /// Both have as many bytes, and do not overlap.
    unsafe fn copy(&self, stream: Stream, from: u64, to: u64, bytes: usize) -> CudaResult;
    /// Sets bytes to zero.
    ///
    /// # Safety
    /// The address has as many.
    unsafe fn zero(&self, stream: Stream, to: u64, bytes: usize) -> CudaResult;
    /// Launches a kernel.
    ///
    /// # Safety
    /// The arguments are what the kernel's parameters ask for.
    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> CudaResult;
    /// Makes a matrix product on [`Stream::Compute`]. The first of a kind may allocate and wait, to choose its
    /// algorithm. `false`: this kind with this epilogue cannot be made, now or ever, and nothing was done.
    ///
    /// # Safety
    /// The three addresses hold matrices of these shapes and pitches, and C overlaps neither A nor B; those of `after`,
    /// which is the key's epilogue, hold one number a column and a matrix like C.
    unsafe fn product(&self, key: &ProductKey, operands: [u64; 3], after: After) -> CudaResult<bool>;
    /// Names the rule by which products' algorithms are chosen: a word for the numeric identity.
    fn plan_identity(&self) -> &'static str;

    /// From here on this thread's work for [`Stream::Compute`] is taken down, not done: kernels, products, copies on
    /// the device, and clearing. Nothing else may be asked for until [`Driver::end_graph`].
    fn begin_graph(&self) -> CudaResult;
    /// What was taken down. Whatever went wrong in between, this ends it.
    fn end_graph(&self) -> CudaResult<Graph>;
    /// Enqueues all of a graph.
    fn play(&self, graph: Graph) -> CudaResult;
    /// Gives a graph back, after all work enqueued so far.
    fn release_graph(&self, graph: Graph);

    /// A new event, not recorded; one that is `timed` can be asked for times.
    fn event(&self, timed: bool) -> CudaResult<Event>;
    /// Gives an event back.
    fn release_event(&self, event: Event);
    /// Moves the event's mark to the end of what the stream has so far.
    fn record(&self, event: Event, stream: Stream) -> CudaResult;
    /// What is enqueued in `stream` from now on waits for the event's mark; the host does not.
    fn wait(&self, stream: Stream, event: Event) -> CudaResult;
    /// Seconds between two marks of timed events that are reached.
    fn seconds(&self, from: Event, to: Event) -> CudaResult<f64>;
    /// The host waits for the event's mark, `patience` at the most.
    fn wait_host(&self, event: Event, patience: Duration, operation: &'static str) -> CudaResult;
}

/// The largest power of two up to 16 that divides an address.
pub(super) fn alignment(address: u64) -> u8 {
    1 << address.trailing_zeros().min(4)
}
