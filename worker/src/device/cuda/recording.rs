//! A driver that computes nothing and notes what it is asked: for tests of what the device asks for, in which order,
//! and of what it does when a call fails.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::driver::{After, Driver, Event, Graph, Identity, Launch, Memory, ProductKey, Stream};
use super::error::{CudaError, CudaResult};

/// A call, with what tests look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    Allocate(usize),
    Release,
    Pin(usize),
    Unpin,
    Register(usize),
    CopyIn(Stream, usize),
    CopyOut(Stream, usize),
    Copy(Stream, usize),
    Zero(Stream, usize),
    Launch { kernel: &'static str, grid: [u32; 3], block: [u32; 3], shared: usize, arguments: usize },
    Product(ProductKey),
    BeginGraph,
    EndGraph,
    Play,
    Event,
    Record(Event, Stream),
    Wait(Stream, Event),
    WaitHost(Event),
}

#[derive(Default)]
struct Notes {
    calls: Vec<Call>,
    /// Fails the call that so many others come before.
    fail: Option<(usize, CudaError)>,
    next: u64,
    pinned: HashMap<usize, usize>,
}

/// See the module's text.
pub(crate) struct Recording {
    identity: Identity,
    notes: Mutex<Notes>,
}

impl Recording {
    pub(crate) fn new() -> Self {
        let identity =
            Identity { name: "recording".into(), capability: (9, 0), multiprocessors: 132, libraries: Vec::new() };
        Self { identity, notes: Mutex::new(Notes { next: 1 << 20, ..Notes::default() }) }
    }

    /// What was asked since the last time.
    pub(crate) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner).calls)
    }

    /// Lets `after` more calls succeed and fails the next one.
    pub(crate) fn fail(&self, after: usize, error: CudaError) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).fail = Some((after, error));
    }

    fn note(&self, call: Call) -> CudaResult<u64> {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((after, error)) = notes.fail.take() {
            if after == 0 {
                return Err(error);
            }
            notes.fail = Some((after - 1, error));
        }
        let bytes = if let Call::Allocate(bytes) = call { bytes } else { 0 };
        notes.calls.push(call);
        let address = notes.next;
        notes.next += (bytes as u64).next_multiple_of(256).max(256);
        Ok(address)
    }

    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes.max(1), 64).ok()
    }
}

impl Driver for Recording {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn memory(&self) -> CudaResult<Memory> {
        Ok(Memory { free: 1 << 40, total: 1 << 40 })
    }

    fn allocate(&self, bytes: usize, _what: &'static str) -> CudaResult<u64> {
        self.note(Call::Allocate(bytes))
    }

    fn release(&self, _address: u64) {
        let _ = self.note(Call::Release);
    }

    fn pin(&self, bytes: usize) -> CudaResult<NonNull<u8>> {
        self.note(Call::Pin(bytes))?;
        let none = || CudaError::OutOfMemory { bytes, what: "pinned host memory" };
        let layout = Self::layout(bytes).ok_or_else(none)?;
        // SAFETY: the size is not zero.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(none)?;
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).pinned.insert(memory.as_ptr() as usize, bytes);
        Ok(memory)
    }

    fn unpin(&self, memory: NonNull<u8>) {
        let _ = self.note(Call::Unpin);
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = notes.pinned.remove(&(memory.as_ptr() as usize));
        if let Some(layout) = bytes.and_then(Self::layout) {
            // SAFETY: allocated with this layout, and not given back before.
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
    }

    unsafe fn register(&self, _memory: NonNull<u8>, bytes: usize) -> CudaResult {
        self.note(Call::Register(bytes)).map(drop)
    }

    fn unregister(&self, _memory: NonNull<u8>) {}

    unsafe fn copy_in(&self, stream: Stream, _from: *const u8, _to: u64, bytes: usize) -> CudaResult {
        self.note(Call::CopyIn(stream, bytes)).map(drop)
    }

    unsafe fn copy_out(&self, stream: Stream, _from: u64, _to: *mut u8, bytes: usize) -> CudaResult {
        self.note(Call::CopyOut(stream, bytes)).map(drop)
    }

    unsafe fn copy(&self, stream: Stream, _from: u64, _to: u64, bytes: usize) -> CudaResult {
        self.note(Call::Copy(stream, bytes)).map(drop)
    }

    unsafe fn zero(&self, stream: Stream, _to: u64, bytes: usize) -> CudaResult {
        self.note(Call::Zero(stream, bytes)).map(drop)
    }

    unsafe fn launch(&self, _stream: Stream, launch: &Launch<'_>) -> CudaResult {
        let Launch { kernel, grid, block, shared, arguments } = *launch;
        self.note(Call::Launch { kernel, grid, block, shared, arguments: arguments.len() }).map(drop)
    }

    unsafe fn product(&self, key: &ProductKey, _operands: [u64; 3], _after: After) -> CudaResult<bool> {
        self.note(Call::Product(*key)).map(|_| true)
    }

    fn plan_identity(&self) -> &'static str {
        "plans-none"
    }

    fn begin_graph(&self) -> CudaResult {
        self.note(Call::BeginGraph).map(drop)
    }

    fn end_graph(&self) -> CudaResult<Graph> {
        self.note(Call::EndGraph).map(Graph)
    }

    fn play(&self, _graph: Graph) -> CudaResult {
        self.note(Call::Play).map(drop)
    }

    fn release_graph(&self, _graph: Graph) {}

    fn event(&self, _timed: bool) -> CudaResult<Event> {
        self.note(Call::Event).map(Event)
    }

    fn release_event(&self, _event: Event) {}

    fn record(&self, event: Event, stream: Stream) -> CudaResult {
        self.note(Call::Record(event, stream)).map(drop)
    }

    fn wait(&self, stream: Stream, event: Event) -> CudaResult {
        self.note(Call::Wait(stream, event)).map(drop)
    }

    fn seconds(&self, _from: Event, _to: Event) -> CudaResult<f64> {
        Ok(0.0)
    }

    fn wait_host(&self, event: Event, _patience: Duration, _operation: &'static str) -> CudaResult {
        self.note(Call::WaitHost(event)).map(drop)
    }
}
