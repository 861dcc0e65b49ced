//! The driver that runs on an NVIDIA device, over cudarc's thin layer of its libraries.
//!
//! One context, two streams that never wait for the default one, kernels as cubins loaded at the start. Every thread
//! that calls binds the context first. A wait looks again and again whether the mark is reached, first at once and then
//! after short sleeps, so that a device that hangs becomes an error instead of a hung process. After such an error,
//! or one that CUDA says is for good, nothing is given back any more: giving back would wait for the device.

mod arena;
mod products;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use self::arena::Arena;
pub use self::products::Choice;
use self::products::Products;
use super::compile::{Compiler, cache_folder};
use super::driver::{After, Argument, Driver, Event, Graph, Identity, Launch, Memory, ProductKey, Stream};
use super::error::{CudaError, CudaResult};
use super::kernels::{MODULES, Module};
use super::libraries::{self, Kind};
use super::probe;

/// Dynamic shared memory above this has to be asked for.
const SHARED: usize = 48 << 10;
/// The most parameters a kernel has.
const PARAMETERS: usize = 16;
/// How long a wait looks without a pause, and the pause after that.
const SPIN: Duration = Duration::from_micros(100);
const PAUSE: Duration = Duration::from_micros(50);

/// A device.
pub struct Real {
    device: sys::CUdevice,
    context: sys::CUcontext,
    streams: [sys::CUstream; 2],
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, sys::CUfunction>,
    products: Option<Products>,
    arena: Mutex<Arena>,
    identity: Identity,
    /// Nothing more can be had of it.
    lost: AtomicBool,
}

// SAFETY: the handles are the driver's, which may be used from any thread once the context is bound to it, as every
// method does first; what is changed after the start is behind a lock of its own.
unsafe impl Send for Real {}
// SAFETY: as above.
unsafe impl Sync for Real {}

impl std::fmt::Debug for Real {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Real({})", self.identity.name)
    }
}

impl Real {
    /// Starts device `index`: finds the libraries, compiles or loads the kernels. Products get their algorithms by
    /// `choice`.
    pub fn new(index: usize, choice: Choice) -> CudaResult<Self> {
        let version = probe::start()?;
        libraries::find(Kind::CublasLt)?;
        let compiler = Compiler::new(cache_folder())?;
        probe::new_enough(version)?;
        let count = probe::count()?;
        if index >= count {
            return Err(CudaError::NoDevice { wanted: index, found: count });
        }
        let call = |operation: &str, code: DriverError| CudaError::Call {
            operation: operation.into(),
            code: code.to_string(),
        };
        let device = result::device::get(index as i32).map_err(|e| call("opening the device", e))?;
        let (name, capability) = probe::facts(device).map_err(|e| call("asking what the device is", e))?;
        probe::capable(&name, capability)?;
        let wanted = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: the device is one that the driver named.
        let multiprocessors = unsafe { result::device::get_attribute(device, wanted) }.unwrap_or(0).max(0) as u32;
        // SAFETY: as above; given back when the driver is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(|e| call("opening a context", e))?;
        let identity = Identity { name, capability, multiprocessors, libraries: vec![("nvrtc", compiler.version())] };
        // From here on dropping gives back what was taken.
        let mut driver = Self {
            device,
            context,
            streams: [ptr::null_mut(); 2],
            modules: Vec::new(),
            functions: HashMap::new(),
            products: None,
            arena: Mutex::default(),
            identity,
            lost: AtomicBool::new(false),
        };
        driver.bind()?;
        for stream in &mut driver.streams {
            let kind = result::stream::StreamKind::NonBlocking;
            *stream = result::stream::create(kind).map_err(|e| call("creating a stream", e))?;
        }
        driver.load(&compiler, capability)?;
        let products = Products::new(driver.streams[0], choice)?;
        driver.identity.libraries.push(("cublaslt", products.version()));
        driver.products = Some(products);
        Ok(driver)
    }

    /// Compiles all modules that the device has, each in a thread of its own, and loads them.
    fn load(&mut self, compiler: &Compiler, capability: (u32, u32)) -> CudaResult {
        let modules = || MODULES.iter().filter(|module| module.fits(capability));
        let cubins: Vec<CudaResult<Vec<u8>>> = std::thread::scope(|scope| {
            let compile =
                |module: &'static Module| scope.spawn(move || compiler.cubin(module, &module.architecture(capability)));
            let running: Vec<_> = modules().map(compile).collect();
            let panicked =
                || Err(CudaError::Call { operation: "compiling".into(), code: "its thread panicked".into() });
            running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| panicked())).collect()
        });
        for (module, cubin) in modules().zip(cubins) {
            let cubin = cubin?;
            let failed = |code: DriverError| CudaError::Kernel { kernel: module.file, code: code.to_string() };
            // SAFETY: a cubin, which says itself how long it is.
            let loaded = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(failed)?;
            self.modules.push(loaded);
            for kernel in module.kernels {
                let failed = |code: DriverError| CudaError::Kernel { kernel, code: code.to_string() };
                let name = CString::new(*kernel).unwrap_or_default();
                // SAFETY: the module was loaded and stays so.
                let function = unsafe { result::module::get_function(loaded, name) }.map_err(failed)?;
                self.functions.insert(kernel, function);
            }
        }
        Ok(())
    }

    /// Makes the context that of the calling thread.
    fn bind(&self) -> CudaResult {
        // SAFETY: the context is retained as long as this lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(|code| self.failed("binding the context", code))
    }

    fn stream(&self, stream: Stream) -> sys::CUstream {
        self.streams[stream as usize]
    }

    /// An error of a call, or the loss of the device if CUDA says so.
    fn failed(&self, operation: &str, code: DriverError) -> CudaError {
        if is_lost(code.0) {
            self.lost.store(true, Ordering::Relaxed);
            let device = self.identity.name.clone();
            return CudaError::Lost { device, operation: operation.into(), code: code.to_string() };
        }
        CudaError::Call { operation: operation.into(), code: code.to_string() }
    }

    fn arena(&self) -> MutexGuard<'_, Arena> {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what was taken can still be given back.
    fn alive(&self) -> bool {
        !self.lost.load(Ordering::Relaxed) && self.bind().is_ok()
    }

    /// Waits for everything, as what gives memory back must; what fails here fails again at the next call.
    fn settle(&self) {
        for stream in self.streams {
            // SAFETY: the stream lives as long as this.
            let _ = unsafe { result::stream::synchronize(stream) };
        }
    }
}

/// Errors after which the context is of no use, whatever is called.
fn is_lost(code: sys::CUresult) -> bool {
    use sys::CUresult as E;
    matches!(
        code,
        E::CUDA_ERROR_DEVICE_UNAVAILABLE
            | E::CUDA_ERROR_ECC_UNCORRECTABLE
            | E::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | E::CUDA_ERROR_ILLEGAL_ADDRESS
            | E::CUDA_ERROR_LAUNCH_TIMEOUT
            | E::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | E::CUDA_ERROR_ASSERT
            | E::CUDA_ERROR_HARDWARE_STACK_ERROR
            | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | E::CUDA_ERROR_MISALIGNED_ADDRESS
            | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | E::CUDA_ERROR_INVALID_PC
            | E::CUDA_ERROR_LAUNCH_FAILED
            | E::CUDA_ERROR_SYSTEM_NOT_READY
            | E::CUDA_ERROR_EXTERNAL_DEVICE
            | E::CUDA_ERROR_UNKNOWN
    )
}

impl Driver for Real {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn memory(&self) -> CudaResult<Memory> {
        self.bind()?;
        let memory = result::mem_get_info().map_err(|code| self.failed("asking for free memory", code))?;
        Ok(Memory { free: memory.0 as u64, total: memory.1 as u64 })
    }

    fn allocate(&self, bytes: usize, what: &'static str) -> CudaResult<u64> {
        self.bind()?;
        match self.arena().take(bytes) {
            Ok(address) => Ok(address),
            Err(code) if code.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(CudaError::OutOfMemory { bytes, what })
            }
            Err(code) => Err(self.failed("allocating memory", code)),
        }
    }

    fn release(&self, address: u64) {
        if self.alive() {
            self.arena().give_back(address);
        }
    }

    fn pin(&self, bytes: usize) -> CudaResult<NonNull<u8>> {
        self.bind()?;
        let none = || CudaError::OutOfMemory { bytes, what: "pinned host memory" };
        // Without the write-combined flag: the host reads what is copied here.
        // SAFETY: what comes is zeroed before anybody reads it.
        match unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) } {
            Ok(memory) => {
                let memory = NonNull::new(memory.cast::<u8>()).ok_or_else(none)?;
                // SAFETY: the memory has as many bytes.
                unsafe { memory.write_bytes(0, bytes) };
                Ok(memory)
            }
            Err(code) if code.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(none()),
            Err(code) => Err(self.failed("allocating pinned memory", code)),
        }
    }

    fn unpin(&self, memory: NonNull<u8>) {
        if self.alive() {
            self.settle();
            // SAFETY: the owner gives it back once, and all copies are done.
            let _ = unsafe { result::free_host(memory.as_ptr().cast()) };
        }
    }

    unsafe fn register(&self, memory: NonNull<u8>, bytes: usize) -> CudaResult {
        self.bind()?;
        // SAFETY: the caller keeps it mapped.
        let status =
            unsafe { sys::cuMemHostRegister_v2(memory.as_ptr().cast(), bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        status.result().map_err(|code| self.failed("pinning host memory", code))
    }

    fn unregister(&self, memory: NonNull<u8>) {
        if self.alive() {
            self.settle();
            // SAFETY: registered before, and all copies are done.
            let _ = unsafe { sys::cuMemHostUnregister(memory.as_ptr().cast()) };
        }
    }

    unsafe fn copy_in(&self, stream: Stream, from: *const u8, to: u64, bytes: usize) -> CudaResult {
        self.bind()?;
        // SAFETY: the caller vouches for both sides.
        let status = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast::<c_void>(), bytes, self.stream(stream)) };
        status.result().map_err(|code| self.failed("copying to the device", code))
    }

    unsafe fn copy_out(&self, stream: Stream, from: u64, to: *mut u8, bytes: usize) -> CudaResult {
        self.bind()?;
        // SAFETY: the caller vouches for both sides.
        let status = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast::<c_void>(), from, bytes, self.stream(stream)) };
        status.result().map_err(|code| self.failed("copying from the device", code))
    }

    unsafe fn copy(&self, stream: Stream, from: u64, to: u64, bytes: usize) -> CudaResult {
        self.bind()?;
        // SAFETY: the caller vouches for both sides.
        let status = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream(stream)) };
        status.result().map_err(|code| self.failed("copying on the device", code))
    }

    unsafe fn zero(&self, stream: Stream, to: u64, bytes: usize) -> CudaResult {
        self.bind()?;
        // SAFETY: the caller vouches for the address.
        let set = unsafe { result::memset_d8_async(to, 0, bytes, self.stream(stream)) };
        set.map_err(|code| self.failed("clearing memory", code))
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> CudaResult {
        self.bind()?;
        let Launch { kernel, grid, block, shared, arguments } = launch;
        let failed = |code: DriverError| match self.failed(kernel, code) {
            CudaError::Call { code, .. } => CudaError::Kernel { kernel, code },
            lost => lost,
        };
        let function = self.functions.get(kernel);
        let function = *function.ok_or_else(|| CudaError::Kernel { kernel, code: "there is no such kernel".into() })?;
        if *shared > SHARED {
            let wanted = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(function, wanted, *shared as i32) }.map_err(failed)?;
        }
        let mut pointers = [ptr::null_mut::<c_void>(); PARAMETERS];
        let count = arguments.len();
        if count > PARAMETERS {
            let code = format!("{count} arguments are more than the {PARAMETERS} there is room for");
            return Err(CudaError::Kernel { kernel, code });
        }
        for (pointer, argument) in pointers.iter_mut().zip(*arguments) {
            *pointer = ptr::from_ref::<Argument>(argument).cast_mut().cast();
        }
        let three = |[x, y, z]: [u32; 3]| (x, y, z);
        // SAFETY: the caller vouches for the arguments, which the driver copies before the call returns.
        let launched = unsafe {
            let stream = self.stream(stream);
            result::launch_kernel(function, three(*grid), three(*block), *shared as u32, stream, &mut pointers[..count])
        };
        launched.map_err(failed)
    }

    unsafe fn product(&self, key: &ProductKey, operands: [u64; 3], after: After) -> CudaResult<bool> {
        self.bind()?;
        let none = || CudaError::Product { product: key.to_string(), code: "products are not set up".into() };
        let products = self.products.as_ref().ok_or_else(none)?;
        // SAFETY: the caller vouches for the operands.
        unsafe { products.run(self, key, operands, after) }
    }

    fn plan_identity(&self) -> &'static str {
        self.products.as_ref().map_or("plans-none", Products::identity)
    }

    fn begin_graph(&self) -> CudaResult {
        self.bind()?;
        // Of this thread alone: what others ask meanwhile is not part of it.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(self.stream(Stream::Compute), mode) }
            .map_err(|code| self.failed("beginning a graph", code))
    }

    fn end_graph(&self) -> CudaResult<Graph> {
        self.bind()?;
        let failed = |code| self.failed("taking down a graph", code);
        // SAFETY: the stream is alive; the graph is given up once what can be played is made of it.
        unsafe {
            let graph = result::stream::end_capture(self.stream(Stream::Compute)).map_err(failed)?;
            if graph.is_null() {
                let code = "nothing was taken down".into();
                return Err(CudaError::Call { operation: "taking down a graph".into(), code });
            }
            let mut ready = ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0).result();
            let given_up = sys::cuGraphDestroy(graph).result();
            made.and(given_up).map_err(failed)?;
            Ok(Graph(ready as u64))
        }
    }

    fn play(&self, graph: Graph) -> CudaResult {
        self.bind()?;
        // SAFETY: both are alive.
        unsafe { sys::cuGraphLaunch(graph.0 as sys::CUgraphExec, self.stream(Stream::Compute)) }
            .result()
            .map_err(|code| self.failed("playing a graph", code))
    }

    fn release_graph(&self, graph: Graph) {
        if self.alive() {
            self.settle();
            // SAFETY: the owner gives it back once, and it is not running.
            let _ = unsafe { sys::cuGraphExecDestroy(graph.0 as sys::CUgraphExec) }.result();
        }
    }

    fn event(&self, timed: bool) -> CudaResult<Event> {
        use sys::CUevent_flags as F;
        self.bind()?;
        let made = result::event::create(if timed { F::CU_EVENT_DEFAULT } else { F::CU_EVENT_DISABLE_TIMING });
        made.map(|event| Event(event as u64)).map_err(|code| self.failed("creating an event", code))
    }

    fn release_event(&self, event: Event) {
        if self.alive() {
            // SAFETY: the owner gives it back once.
            let _ = unsafe { result::event::destroy(handle(event)) };
        }
    }

    fn record(&self, event: Event, stream: Stream) -> CudaResult {
        self.bind()?;
        // SAFETY: both are alive.
        unsafe { result::event::record(handle(event), self.stream(stream)) }
            .map_err(|code| self.failed("recording an event", code))
    }

    fn wait(&self, stream: Stream, event: Event) -> CudaResult {
        self.bind()?;
        // SAFETY: both are alive.
        unsafe { sys::cuStreamWaitEvent(self.stream(stream), handle(event), 0) }
            .result()
            .map_err(|code| self.failed("waiting for an event", code))
    }

    fn seconds(&self, from: Event, to: Event) -> CudaResult<f64> {
        self.bind()?;
        // SAFETY: both are alive.
        let milliseconds = unsafe { result::event::elapsed(handle(from), handle(to)) };
        milliseconds.map(|ms| f64::from(ms) / 1e3).map_err(|code| self.failed("timing", code))
    }

    fn wait_host(&self, event: Event, patience: Duration, operation: &'static str) -> CudaResult {
        self.bind()?;
        let began = Instant::now();
        loop {
            // SAFETY: the event is alive.
            match unsafe { result::event::query(handle(event)) } {
                Ok(()) => return Ok(()),
                Err(code) if code.0 == sys::CUresult::CUDA_ERROR_NOT_READY => {}
                Err(code) => return Err(self.failed(operation, code)),
            }
            let waited = began.elapsed();
            if waited >= patience {
                self.lost.store(true, Ordering::Relaxed);
                let (device, seconds) = (self.identity.name.clone(), patience.as_secs());
                return Err(CudaError::Hung { device, operation: operation.into(), seconds });
            }
            if waited < SPIN { std::hint::spin_loop() } else { std::thread::sleep(PAUSE) }
        }
    }
}

fn handle(event: Event) -> sys::CUevent {
    event.0 as sys::CUevent
}

impl Drop for Real {
    fn drop(&mut self) {
        if !self.alive() {
            return; // the process's end gives back what is left
        }
        self.settle();
        self.products = None;
        // SAFETY: each was made by this driver, and nothing runs any more.
        unsafe {
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            for stream in self.streams.into_iter().filter(|stream| !stream.is_null()) {
                let _ = result::stream::destroy(stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
