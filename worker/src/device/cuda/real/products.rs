//! Matrix products by cuBLASLt: a plan for each kind, made once.
//!
//! cuBLASLt has many algorithms for a product, with different bits. A plan fixes one: the first that its own heuristic
//! names, which follows from the library's version and the device alone, or the fastest of its first few, timed once
//! on scratch memory. Timing may choose differently on another day and by another worker, so it is for jobs that do not
//! ask for the same bits. Only algorithms whose sums are made in a fixed order are considered: those that split the
//! inner dimension join their parts in workspace, in float32, never in place.
//!
//! cuBLAS thinks in columns. A row-major matrix is the column-major form of its transpose, so C = A·B is asked for as
//! Cᵀ = Bᵀ·Aᵀ: its first operand is our B.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::result as driver;
use cudarc::driver::sys as driver_sys;

use super::Real;
use crate::device::Product;
use crate::device::cuda::driver::{After, Element, Epilogue, ProductKey};
use crate::device::cuda::error::{CudaError, CudaResult};

/// Bytes that algorithms may use to join parts: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Candidates that are timed, and how often each.
const CANDIDATES: usize = 8;
const ROUNDS: u32 = 3;

/// There is no such algorithm.
const NONE: CublasError = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);

/// How a product's algorithm is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The heuristic's first: the same on every machine with the same device and library.
    First,
    /// The fastest of the heuristic's first few on this machine.
    Fastest,
}

/// All plans of a device.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    stream: driver_sys::CUstream,
    workspace: u64,
    choice: Choice,
    /// `None` for what the library cannot make in one.
    plans: Mutex<HashMap<ProductKey, Option<Plan>>>,
}

/// One kind of product, ready to run.
struct Plan {
    description: Description,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// cuBLASLt's descriptors of a product; destroyed with this. Any may be null while it is being made.
struct Description {
    product: sys::cublasLtMatmulDesc_t,
    /// Of A, B and C, in our naming.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
}

impl Products {
    /// Allocates the workspace. The context is bound.
    pub(super) fn new(stream: driver_sys::CUstream, choice: Choice) -> CudaResult<Self> {
        let handle = result::create_handle()
            .map_err(|code| CudaError::Call { operation: "starting cuBLASLt".into(), code: code.to_string() })?;
        let mut products = Self { handle, stream, workspace: 0, choice, plans: Mutex::default() };
        let none = |_| CudaError::OutOfMemory { bytes: WORKSPACE, what: "the products' workspace" };
        // SAFETY: only products write there, and they write before they read.
        products.workspace = unsafe { driver::malloc_sync(WORKSPACE) }.map_err(none)?;
        Ok(products)
    }

    /// The library's version.
    #[allow(clippy::unused_self)] // a value of this type says that the library is loaded
    pub(super) fn version(&self) -> String {
        // SAFETY: the library is loaded.
        let version = unsafe { sys::cublasLtGetVersion() };
        format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
    }

    /// The rule.
    pub(super) fn identity(&self) -> &'static str {
        match self.choice {
            Choice::First => "plans-first",
            Choice::Fastest => "plans-timed",
        }
    }

    /// Enqueues a product. `false`: the library has no algorithm for it with its epilogue.
    ///
    /// # Safety
    /// As for `Driver::product`; the context is bound.
    pub(super) unsafe fn run(
        &self,
        real: &Real,
        key: &ProductKey,
        operands: [u64; 3],
        after: After,
    ) -> CudaResult<bool> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if !plans.contains_key(key) {
            plans.insert(*key, self.plan(real, key)?);
        }
        let Some(plan) = &plans[key] else { return Ok(false) };
        // SAFETY: the caller vouches for the operands.
        let status = unsafe { self.start(&plan.description, &plan.algorithm, key, (operands, after)) };
        match status {
            Ok(()) => Ok(true),
            // Some algorithms that the heuristic names turn out to be none with operands of odd sizes.
            Err(NONE) if key.epilogue != Epilogue::Plain => {
                plans.insert(*key, None);
                Ok(false)
            }
            Err(code) => Err(failed(real, key, code)),
        }
    }

    /// Chooses an algorithm by the rule.
    fn plan(&self, real: &Real, key: &ProductKey) -> CudaResult<Option<Plan>> {
        let failed = |code| failed(real, key, code);
        let description = Description::new(key).map_err(failed)?;
        let candidates = match self.candidates(&description, key) {
            Err(NONE) => Vec::new(),
            candidates => candidates.map_err(failed)?,
        };
        let algorithm = match (self.choice, candidates.as_slice()) {
            (_, []) if key.epilogue != Epilogue::Plain => return Ok(None),
            (_, []) => return Err(failed(NONE)),
            (Choice::First, [first, ..]) | (_, [first]) => *first,
            (Choice::Fastest, [first, ..]) => self.fastest(&description, key, &candidates).unwrap_or(*first),
        };
        Ok(Some(Plan { description, algorithm }))
    }

    /// The heuristic's first few algorithms whose sums have a fixed order, the most promising first.
    fn candidates(
        &self,
        description: &Description,
        key: &ProductKey,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let preference = Preference(result::create_matmul_pref()?);
        let set = |attribute, value: &[u8]| {
            // SAFETY: the preference is alive, and the value is as long as is said.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, value.as_ptr().cast(), value.len()) }
        };
        set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64).to_ne_bytes())?;
        let joined = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &joined.to_ne_bytes())?;
        let [a, b, c] = key.alignments.map(|bytes| u32::from(bytes).to_ne_bytes());
        set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b)?;
        set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a)?;
        set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c)?;
        set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c)?;
        // SAFETY: plain data, of which zeros are a value.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let (mut count, [a, b, c]) = (0, description.layouts);
        // SAFETY: the descriptors are alive, and there is room for as many results as are asked for.
        unsafe {
            let (room, list) = (CANDIDATES as i32, found.as_mut_ptr());
            let (product, preference) = (description.product, preference.0);
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                product,
                b,
                a,
                c,
                c,
                preference,
                room,
                list,
                &raw mut count,
            )
            .result()?;
        }
        let good = found.iter().take(count.max(0) as usize).filter(|found| found.state.result().is_ok());
        Ok(good.map(|found| found.algo).collect())
    }

    /// Times candidates on scratch memory; `None` where there is no room for it, or none ran.
    fn fastest(
        &self,
        description: &Description,
        key: &ProductKey,
        candidates: &[sys::cublasLtMatmulAlgo_t],
    ) -> Option<sys::cublasLtMatmulAlgo_t> {
        let scratch = Scratch::new(key)?;
        let timer = [Timer::new()?, Timer::new()?];
        let mut best: Option<(f32, sys::cublasLtMatmulAlgo_t)> = None;
        for algorithm in candidates {
            let mut least = f32::INFINITY;
            for round in 0..=ROUNDS {
                // SAFETY: the scratch has the operands' shapes; events and stream are alive.
                let time = unsafe {
                    driver::event::record(timer[0].0, self.stream).ok()?;
                    if self.start(description, algorithm, key, scratch.operands(key)).is_err() {
                        break;
                    }
                    driver::event::record(timer[1].0, self.stream).ok()?;
                    driver::event::synchronize(timer[1].0).ok()?;
                    driver::event::elapsed(timer[0].0, timer[1].0).ok()?
                };
                // The first warms up.
                least = if round == 0 { least } else { least.min(time) };
            }
            if least < best.map_or(f32::INFINITY, |(time, _)| time) {
                best = Some((least, *algorithm));
            }
        }
        best.map(|(_, algorithm)| algorithm)
    }

    /// Enqueues a product with an algorithm.
    ///
    /// # Safety
    /// The operands have the key's shapes.
    unsafe fn start(
        &self,
        description: &Description,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        key: &ProductKey,
        (operands, after): ([u64; 3], After),
    ) -> Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as A;
        for (attribute, address) in [
            (A::CUBLASLT_MATMUL_DESC_BIAS_POINTER, after.bias),
            (A::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, after.pre),
        ] {
            let Some(address) = address else { continue };
            description.set(attribute, &address.to_ne_bytes())?;
        }
        let (one, old) = (1.0f32, if key.add { 1.0f32 } else { 0.0 });
        let ([a, b, c], [a_layout, b_layout, c_layout]) =
            (operands.map(|address| address as *mut c_void), description.layouts);
        // SAFETY: the caller vouches for the operands; the rest lives as long as this.
        unsafe {
            result::matmul(
                self.handle,
                description.product,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&old).cast(),
                b,
                b_layout,
                a,
                a_layout,
                c,
                c_layout,
                c,
                c_layout,
                algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                self.stream.cast(),
            )
        }
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: made by this; the driver has waited for all work and bound the context.
        unsafe {
            let _ = result::destroy_handle(self.handle);
            if self.workspace != 0 {
                let _ = driver::free_sync(self.workspace);
            }
        }
    }
}

impl Description {
    fn new(key: &ProductKey) -> Result<Self, CublasError> {
        use sys::cublasLtEpilogue_t as E;
        use sys::cublasLtMatmulDescAttributes_t as A;
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let mut made = Self { product: ptr::null_mut(), layouts: [ptr::null_mut(); 3] };
        made.product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)?;
        let [a, b] = key.operands();
        let result_type = if key.result == Element::Bfloat16 { CUDA_R_16BF } else { CUDA_R_32F };
        let shapes = [(CUDA_R_16BF, a), (CUDA_R_16BF, b), (result_type, (key.m, key.n))];
        for (layout, (kind, (rows, columns))) in made.layouts.iter_mut().zip(shapes) {
            // In columns: as many rows as we have columns.
            *layout = result::create_matrix_layout(kind, columns as u64, rows as u64, columns as i64)?;
        }
        // Transposed in columns is what is as it is in rows, and B comes first.
        let (first, second) = match key.product {
            Product::NN => (false, false),
            Product::NT => (true, false),
            Product::TN => (false, true),
        };
        for (attribute, turned) in [(A::CUBLASLT_MATMUL_DESC_TRANSA, first), (A::CUBLASLT_MATMUL_DESC_TRANSB, second)] {
            made.set(attribute, &i32::from(turned).to_ne_bytes())?; // 1 is transposed
        }
        let epilogue = match key.epilogue {
            Epilogue::Plain => return Ok(made),
            Epilogue::Bias => E::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::BiasGelu => E::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
        };
        made.set(A::CUBLASLT_MATMUL_DESC_EPILOGUE, &(epilogue as u32).to_ne_bytes())?;
        if key.epilogue == Epilogue::BiasGelu {
            made.set(A::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(key.n as i64).to_ne_bytes())?;
        }
        Ok(made)
    }

    /// Sets an attribute of the product; `value` is as long as the attribute is.
    fn set(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &[u8]) -> Result<(), CublasError> {
        // SAFETY: the descriptor is alive, and the value is copied.
        unsafe { result::set_matmul_desc_attribute(self.product, attribute, value.as_ptr().cast(), value.len()) }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by this; work that was started has its own copy.
        unsafe {
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            if !self.product.is_null() {
                let _ = result::destroy_matmul_desc(self.product);
            }
        }
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by its owner.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// Operands to time a product on, and what its epilogue takes: small numbers, as zeros would be faster than most are.
struct Scratch([u64; 5]);

impl Scratch {
    fn new(key: &ProductKey) -> Option<Self> {
        let size = if key.result == Element::Bfloat16 { 2 } else { 4 };
        let result = key.m * key.n * size;
        let (bias, pre) = match key.epilogue {
            Epilogue::Plain => (1, 1),
            Epilogue::Bias => (2 * key.n, 1),
            Epilogue::BiasGelu => (2 * key.n, result),
        };
        let bytes = [2 * key.m * key.k, 2 * key.k * key.n, result, bias, pre];
        let mut made = Self([0; 5]);
        for (address, bytes) in made.0.iter_mut().zip(bytes) {
            // SAFETY: set before anything reads it.
            unsafe {
                *address = driver::malloc_sync(bytes).ok()?;
                driver::memset_d8_sync(*address, 0x3c, bytes).ok()?;
            }
        }
        Some(made)
    }

    fn operands(&self, key: &ProductKey) -> ([u64; 3], After) {
        let [a, b, c, bias, pre] = self.0;
        let after = match key.epilogue {
            Epilogue::Plain => After::default(),
            Epilogue::Bias => After { bias: Some(bias), pre: None },
            Epilogue::BiasGelu => After { bias: Some(bias), pre: Some(pre) },
        };
        ([a, b, c], after)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for address in self.0.into_iter().filter(|address| *address != 0) {
            // SAFETY: allocated by this; giving back waits for work that uses it.
            let _ = unsafe { driver::free_sync(address) };
        }
    }
}

struct Timer(driver_sys::CUevent);

impl Timer {
    fn new() -> Option<Self> {
        driver::event::create(driver_sys::CUevent_flags::CU_EVENT_DEFAULT).ok().map(Self)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: made by this.
        let _ = unsafe { driver::event::destroy(self.0) };
    }
}

/// An error of a product; cuBLAS does not say that a device is lost, so that is asked of the driver.
fn failed(real: &Real, key: &ProductKey, code: CublasError) -> CudaError {
    // SAFETY: the stream lives as long as the driver.
    let state = unsafe { driver_sys::cuStreamQuery(real.streams[0]) };
    match state.result().map_err(|code| real.failed("a matrix product", code)) {
        Err(lost @ CudaError::Lost { .. }) => lost,
        _ => CudaError::Product { product: key.to_string(), code: code.to_string() },
    }
}
