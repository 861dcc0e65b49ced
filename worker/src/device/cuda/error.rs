//! What can go wrong between Cairn and a CUDA device, in words that say what to do.
//!
//! Three kinds matter to whoever reads them: what was never there (a library, a device, a new enough driver), which
//! installing something mends; what there was too little of; and a device that is lost. CUDA's errors of the last kind
//! are sticky: once a kernel has read where it may not, or the hardware has failed, every later call in the process
//! fails too, so the process has to end and be replaced.

use super::driver::Version;
use crate::device::DeviceError;

/// Why a CUDA call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// A library is not on this machine.
    #[error("{library} was not found; looked in {searched}; {advice}")]
    LibraryAbsent {
        /// File name.
        library: &'static str,
        /// Folders, or the loader's own list.
        searched: String,
        /// What brings it.
        advice: &'static str,
    },
    /// The driver sees no device, or not the one asked for.
    #[error("there is no CUDA device {wanted}: the driver sees {found} (CUDA_VISIBLE_DEVICES limits what it shows)")]
    NoDevice {
        /// Index asked for.
        wanted: usize,
        /// Devices there are.
        found: usize,
    },
    /// The driver cannot run what the toolkit makes.
    #[error("the NVIDIA driver supports CUDA {found}, but {needed} is needed: install a newer driver")]
    DriverTooOld {
        /// What it supports.
        found: Version,
        /// What is needed at least.
        needed: Version,
    },
    /// The device cannot run the kernels.
    #[error("{name} has compute capability {}.{}, but 8.0 is needed (Ampere or newer)", capability.0, capability.1)]
    DeviceTooOld {
        /// The device's name.
        name: String,
        /// What it has.
        capability: (u32, u32),
    },
    /// No room, on the device or for pinned memory of the host.
    #[error("no {bytes} bytes for {what}")]
    OutOfMemory {
        /// Size asked for.
        bytes: usize,
        /// What it was for.
        what: &'static str,
    },
    /// The device failed for good.
    #[error(
        "{device} is lost: {operation}: {code}; this process cannot use it again (the kernel's log may say why: dmesg \
         | grep Xid)"
    )]
    Lost {
        /// Its name.
        device: String,
        /// What was asked of it.
        operation: String,
        /// CUDA's name of the error.
        code: String,
    },
    /// The device did not finish in time.
    #[error("{device} did not finish {operation} within {seconds} s; it hangs, or its work is far too large")]
    Hung {
        /// Its name.
        device: String,
        /// What was waited for.
        operation: String,
        /// The deadline.
        seconds: u64,
    },
    /// A kernel could not be launched.
    #[error("kernel {kernel} failed: {code}")]
    Kernel {
        /// Its name.
        kernel: &'static str,
        /// CUDA's name of the error, or the emulator's words.
        code: String,
    },
    /// A kernel's source does not compile.
    #[error("{file} does not compile for {architecture}:\n{log}")]
    Compile {
        /// File of the source.
        file: &'static str,
        /// Such as `sm_90`.
        architecture: String,
        /// What the compiler says.
        log: String,
    },
    /// A matrix product could not be planned or started.
    #[error("the product {product}: {code}")]
    Product {
        /// Its shape.
        product: String,
        /// cuBLAS's name of the error.
        code: String,
    },
    /// Any other call.
    #[error("{operation}: {code}")]
    Call {
        /// What was asked of the driver.
        operation: String,
        /// CUDA's name of the error.
        code: String,
    },
}

/// The result of a call.
pub type CudaResult<T = ()> = Result<T, CudaError>;

impl From<CudaError> for DeviceError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::OutOfMemory { bytes, what } => Self::OutOfMemory { bytes, what },
            other => Self::Cuda(other),
        }
    }
}
