//! The driver that runs the kernels on the CPU: host memory stands for the device's, products are plain loops.
//!
//! It is strict where a device is lenient. Memory comes full of NaN and between guards that are looked at when it goes.
//! Without a seed everything runs when it is enqueued. With one, nothing runs before somebody waits for it, and then
//! the two streams take turns as the seed says: a copy that nobody waited for is seen too late, a staging area that is
//! filled again too early is copied with its new content, and what depends on an order nobody asked for has other bits.

mod library;
mod products;

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::library::{Emulator, emulator};
use super::driver::{After, Argument, Driver, Epilogue, Event, Graph, Identity, Launch, Memory, ProductKey, Stream};
use super::error::{CudaError, CudaResult};

/// Bytes before and after each piece of memory that nobody may write to.
const GUARD: usize = 256;
/// What guards hold, and memory that nobody has written: as float32 and bfloat16 it is NaN.
const POISON: u8 = 0xff;
/// What the device claims to have.
const TOTAL: u64 = 64 << 30;

/// Work that is enqueued.
#[derive(Clone)]
enum Work {
    CopyIn {
        from: usize,
        to: u64,
        bytes: usize,
    },
    CopyOut {
        from: u64,
        to: usize,
        bytes: usize,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
    Zero {
        to: u64,
        bytes: usize,
    },
    Launch {
        kernel: &'static str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        arguments: Vec<Argument>,
    },
    Product {
        key: ProductKey,
        operands: [u64; 3],
        after: After,
    },
    /// The event's `n`-th mark.
    Record(Event, u64),
    Wait(Event, u64),
}

/// How many marks an event was given, and how many of them are reached.
#[derive(Clone, Copy, Default)]
struct Marks {
    given: u64,
    reached: u64,
}

#[derive(Default)]
struct State {
    /// Device memory by address: bytes, without guards.
    memory: BTreeMap<u64, usize>,
    /// Pinned memory by address.
    pinned: HashMap<usize, usize>,
    streams: [VecDeque<Work>; 2],
    events: HashMap<u64, Marks>,
    /// Work that is being taken down.
    taken_down: Option<Vec<Work>>,
    graphs: HashMap<u64, Vec<Work>>,
    /// Number of the newest event or graph.
    made: u64,
    random: u64,
    /// The first error, which every later call repeats, as on a device.
    failure: Option<CudaError>,
}

/// See the module's text.
pub struct Emulated {
    emulator: &'static Emulator,
    identity: Identity,
    deferred: bool,
    state: Mutex<State>,
}

impl Emulated {
    /// A device that defers its work by `seed`, or does it at once if there is none.
    pub fn new(seed: Option<u64>) -> CudaResult<Self> {
        let said = |words| CudaError::Call { operation: "building the emulator".into(), code: words };
        let emulator = emulator().map_err(said)?;
        let identity = Identity {
            name: "emulator".into(),
            capability: (9, 0),
            multiprocessors: 4,
            libraries: vec![("emulator", emulator.version.clone())],
        };
        let random = seed.unwrap_or(0).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let state = Mutex::new(State { random, ..State::default() });
        Ok(Self { emulator, identity, deferred: seed.is_some(), state })
    }

    fn state(&self) -> CudaResult<MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &state.failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(state),
        }
    }

    /// Puts work at the end of a stream; without a seed it is done at once.
    fn enqueue(&self, stream: Stream, work: Work) -> CudaResult {
        let mut state = self.state()?;
        if let Some(list) = &mut state.taken_down {
            let fits =
                matches!(work, Work::Copy { .. } | Work::Zero { .. } | Work::Launch { .. } | Work::Product { .. });
            if fits && stream == Stream::Compute {
                list.push(work);
                return Ok(());
            }
            let code = "this cannot be part of a graph".into();
            return state.fail(CudaError::Call { operation: "taking down a graph".into(), code });
        }
        state.streams[stream as usize].push_back(work);
        if self.deferred { Ok(()) } else { self.drain(&mut state) }
    }

    /// Does everything that is enqueued.
    fn drain(&self, state: &mut State) -> CudaResult {
        while state.streams.iter().any(|stream| !stream.is_empty()) {
            self.advance(state)?;
        }
        Ok(())
    }

    /// Does one piece of work of a stream that is not waiting, whichever the seed says.
    fn advance(&self, state: &mut State) -> CudaResult {
        let waits = |work: &Work| matches!(work, Work::Wait(event, mark) if state.events[&event.0].reached < *mark);
        let ready = |stream: &VecDeque<Work>| stream.front().is_some_and(|work| !waits(work));
        let which = match [ready(&state.streams[0]), ready(&state.streams[1])] {
            [true, true] => (state.chance() % 2) as usize,
            [true, false] => 0,
            [false, true] => 1,
            [false, false] => {
                let code = "every stream waits for an event that no work reaches".into();
                return state.fail(CudaError::Call { operation: "waiting".into(), code });
            }
        };
        let seed = state.chance();
        match state.streams[which].pop_front() {
            Some(work) => self.run(state, work, seed).or_else(|error| state.fail(error)),
            None => Ok(()),
        }
    }

    fn run(&self, state: &mut State, work: Work, seed: u64) -> CudaResult {
        match work {
            Work::CopyIn { from, to, bytes } => {
                state.check(to, bytes, "a copy to the device")?;
                // SAFETY: whoever enqueued it vouched for the host's side; the device's was checked.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
            }
            Work::CopyOut { from, to, bytes } => {
                state.check(from, bytes, "a copy from the device")?;
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
            }
            Work::Copy { from, to, bytes } => {
                state.check(from, bytes, "a copy on the device")?;
                state.check(to, bytes, "a copy on the device")?;
                // SAFETY: both sides were checked.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
            }
            Work::Zero { to, bytes } => {
                state.check(to, bytes, "clearing memory")?;
                // SAFETY: checked.
                unsafe { std::ptr::write_bytes(to as *mut u8, 0, bytes) };
            }
            Work::Launch { kernel, grid, block, shared, arguments } => {
                let launch = Launch { kernel, grid, block, shared, arguments: &arguments };
                // SAFETY: whoever enqueued it vouched for the arguments.
                let done = unsafe { self.emulator.launch(&launch, seed) };
                done.map_err(|code| CudaError::Kernel { kernel, code })?;
            }
            Work::Product { key, operands, after } => {
                let [a, b, c] = products::bytes(&key);
                for (address, bytes) in operands.into_iter().zip([a, b, c]) {
                    state.check(address, bytes, "a product")?;
                }
                for (address, bytes) in [(after.bias, 2 * key.n), (after.pre, c)] {
                    address.map_or(Ok(()), |address| state.check(address, bytes, "a product's epilogue"))?;
                }
                // SAFETY: the operands were checked.
                unsafe { products::run(&key, operands, after) };
            }
            Work::Record(event, mark) => {
                let marks = state.events.entry(event.0).or_default();
                marks.reached = marks.reached.max(mark);
            }
            Work::Wait(..) => {}
        }
        Ok(())
    }
}

impl State {
    fn chance(&mut self) -> u64 {
        // xorshift64*
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    fn fail(&mut self, error: CudaError) -> CudaResult {
        self.failure = Some(error.clone());
        Err(error)
    }

    /// Whether a range lies within memory that is allocated.
    fn check(&self, address: u64, bytes: usize, operation: &str) -> CudaResult {
        let fits = |(start, length): (&u64, &usize)| address + bytes as u64 <= start + *length as u64;
        if bytes == 0 || self.memory.range(..=address).next_back().is_some_and(fits) {
            return Ok(());
        }
        let code = format!("{bytes} bytes at {address:#x} are not allocated");
        Err(CudaError::Call { operation: operation.into(), code })
    }
}

/// The piece of memory around `bytes` bytes, with its guards.
fn guarded(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.checked_add(2 * GUARD)?, GUARD).ok()
}

impl Driver for Emulated {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn memory(&self) -> CudaResult<Memory> {
        let used: u64 = self.state()?.memory.values().map(|bytes| *bytes as u64).sum();
        Ok(Memory { free: TOTAL.saturating_sub(used), total: TOTAL })
    }

    fn allocate(&self, bytes: usize, what: &'static str) -> CudaResult<u64> {
        let mut state = self.state()?;
        let none = || CudaError::OutOfMemory { bytes, what };
        let layout = guarded(bytes).filter(|layout| layout.size() as u64 <= TOTAL).ok_or_else(none)?;
        // SAFETY: the size is not zero.
        let memory = NonNull::new(unsafe { alloc(layout) }).ok_or_else(none)?;
        // SAFETY: as many bytes were allocated.
        unsafe { memory.write_bytes(POISON, layout.size()) };
        let address = memory.as_ptr() as u64 + GUARD as u64;
        state.memory.insert(address, bytes);
        Ok(address)
    }

    fn release(&self, address: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // A failure stays where the next call finds it.
        let _ = self.drain(&mut state);
        let Some(bytes) = state.memory.remove(&address) else { return };
        let start = (address as usize - GUARD) as *mut u8;
        let guard = |from: usize| {
            (from..from + GUARD).all(|i| {
                // SAFETY: within the piece that was allocated.
                unsafe { *start.add(i) == POISON }
            })
        };
        let whole = guard(0) && guard(GUARD + bytes);
        if let Some(layout) = guarded(bytes) {
            // SAFETY: allocated with this layout, and not given back before.
            unsafe { dealloc(start, layout) };
        }
        assert!(whole || std::thread::panicking(), "work wrote beside {bytes} bytes of device memory");
    }

    fn pin(&self, bytes: usize) -> CudaResult<NonNull<u8>> {
        let mut state = self.state()?;
        let none = || CudaError::OutOfMemory { bytes, what: "pinned host memory" };
        let layout = guarded(bytes).ok_or_else(none)?;
        // SAFETY: the size is not zero.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(none)?;
        state.pinned.insert(memory.as_ptr() as usize, bytes);
        Ok(memory)
    }

    fn unpin(&self, memory: NonNull<u8>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.drain(&mut state);
        let bytes = state.pinned.remove(&(memory.as_ptr() as usize));
        if let Some(layout) = bytes.and_then(guarded) {
            // SAFETY: allocated with this layout, and not given back before.
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
    }

    unsafe fn register(&self, _memory: NonNull<u8>, _bytes: usize) -> CudaResult {
        self.state().map(drop)
    }

    fn unregister(&self, _memory: NonNull<u8>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.drain(&mut state);
    }

    unsafe fn copy_in(&self, stream: Stream, from: *const u8, to: u64, bytes: usize) -> CudaResult {
        self.enqueue(stream, Work::CopyIn { from: from as usize, to, bytes })
    }

    unsafe fn copy_out(&self, stream: Stream, from: u64, to: *mut u8, bytes: usize) -> CudaResult {
        self.enqueue(stream, Work::CopyOut { from, to: to as usize, bytes })
    }

    unsafe fn copy(&self, stream: Stream, from: u64, to: u64, bytes: usize) -> CudaResult {
        self.enqueue(stream, Work::Copy { from, to, bytes })
    }

    unsafe fn zero(&self, stream: Stream, to: u64, bytes: usize) -> CudaResult {
        self.enqueue(stream, Work::Zero { to, bytes })
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> CudaResult {
        let Launch { kernel, grid, block, shared, arguments } = *launch;
        self.enqueue(stream, Work::Launch { kernel, grid, block, shared, arguments: arguments.to_vec() })
    }

    unsafe fn product(&self, key: &ProductKey, operands: [u64; 3], after: After) -> CudaResult<bool> {
        // As a library that has no algorithm for some: both ways are tried.
        if key.epilogue != Epilogue::Plain && !key.n.is_multiple_of(8) {
            return Ok(false);
        }
        self.enqueue(Stream::Compute, Work::Product { key: *key, operands, after }).map(|()| true)
    }

    fn plan_identity(&self) -> &'static str {
        "plans-none"
    }

    fn begin_graph(&self) -> CudaResult {
        self.state()?.taken_down = Some(Vec::new());
        Ok(())
    }

    fn end_graph(&self) -> CudaResult<Graph> {
        let mut state = self.state()?;
        state.made += 1;
        let (graph, work) = (state.made, state.taken_down.take().unwrap_or_default());
        state.graphs.insert(graph, work);
        Ok(Graph(graph))
    }

    fn play(&self, graph: Graph) -> CudaResult {
        let work = self.state()?.graphs.get(&graph.0).cloned().unwrap_or_default();
        work.into_iter().try_for_each(|work| self.enqueue(Stream::Compute, work))
    }

    fn release_graph(&self, graph: Graph) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.drain(&mut state);
        state.graphs.remove(&graph.0);
    }

    fn event(&self, _timed: bool) -> CudaResult<Event> {
        let mut state = self.state()?;
        state.made += 1;
        let event = state.made;
        state.events.insert(event, Marks::default());
        Ok(Event(event))
    }

    fn release_event(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.drain(&mut state);
        state.events.remove(&event.0);
    }

    fn record(&self, event: Event, stream: Stream) -> CudaResult {
        let mark = {
            let mut state = self.state()?;
            let marks = state.events.entry(event.0).or_default();
            marks.given += 1;
            marks.given
        };
        self.enqueue(stream, Work::Record(event, mark))
    }

    fn wait(&self, stream: Stream, event: Event) -> CudaResult {
        let mark = self.state()?.events.entry(event.0).or_default().given;
        self.enqueue(stream, Work::Wait(event, mark))
    }

    fn seconds(&self, _from: Event, _to: Event) -> CudaResult<f64> {
        let code = "what is emulated takes no time of its own".into();
        Err(CudaError::Call { operation: "timing".into(), code })
    }

    fn wait_host(&self, event: Event, _patience: Duration, _operation: &'static str) -> CudaResult {
        let mut state = self.state()?;
        let marks = |state: &State| state.events.get(&event.0).copied().unwrap_or_default();
        while marks(&state).reached < marks(&state).given {
            self.advance(&mut state)?;
        }
        Ok(())
    }
}
