//! What this machine has of CUDA, found out without disturbing anybody: for `cairn doctor`, and for a job whose device
//! is left to the machine.
//!
//! Nothing is allocated. Reading how much memory is free takes a context on each device for a moment, which is why
//! the answer is given once and kept by whoever asked.

use std::path::PathBuf;

use cudarc::driver::{result, sys};

use super::driver::{Memory, Version};
use super::error::{CudaError, CudaResult};
use super::libraries::{self, Kind};

/// The least compute capability whose tensor cores take bfloat16.
pub(super) const CAPABILITY: (u32, u32) = (8, 0);
/// The oldest driver whose calls are used.
const DRIVER: Version = Version { major: 12, minor: 0 };

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The product's name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Its memory; `None` where it does not say, as when it is in another process's exclusive use.
    pub memory: Option<Memory>,
}

/// What there is.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The CUDA version the driver supports.
    pub driver: CudaResult<Version>,
    /// Where each library was found.
    pub libraries: Vec<(&'static str, CudaResult<PathBuf>)>,
    /// Devices the driver shows.
    pub devices: Vec<Found>,
}

impl Probe {
    /// Looks at the machine.
    pub fn new() -> Self {
        let driver = start();
        let libraries = Kind::ALL.map(|kind| (kind.name(), libraries::find(kind).map(PathBuf::from)));
        let count = driver.as_ref().map_or(0, |_| count().unwrap_or(0));
        let devices = (0..count).filter_map(|index| found(index).ok()).collect();
        Self { driver, libraries: libraries.into(), devices }
    }

    /// Whether a worker can compute on device `index`; if not, the first thing that is missing.
    pub fn usable(&self, index: usize) -> CudaResult {
        let driver = self.driver.clone()?;
        let device = self.devices.get(index);
        let device = device.ok_or(CudaError::NoDevice { wanted: index, found: self.devices.len() })?;
        capable(&device.name, device.capability)?;
        for (_, library) in &self.libraries {
            library.clone()?;
        }
        new_enough(driver)
    }
}

impl Default for Probe {
    fn default() -> Self {
        Self::new()
    }
}

/// Loads and starts the driver; says which version of CUDA it supports.
pub(super) fn start() -> CudaResult<Version> {
    libraries::find(Kind::Driver)?;
    let failed =
        |what: &str, code: result::DriverError| CudaError::Call { operation: what.into(), code: code.to_string() };
    let mut number = 0;
    // SAFETY: the library is loaded, and the call only writes the number.
    unsafe { sys::cuDriverGetVersion(&raw mut number) }
        .result()
        .map_err(|e| failed("asking the driver's version", e))?;
    let version = Version::from_number(number);
    if version < DRIVER {
        return Err(CudaError::DriverTooOld { found: version, needed: DRIVER });
    }
    match result::init() {
        Err(code) if code.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => Err(CudaError::NoDevice { wanted: 0, found: 0 }),
        started => started.map(|()| version).map_err(|code| failed("starting the driver", code)),
    }
}

/// Whether the driver can load what the compiler here makes: its own major version, or an older one.
pub(super) fn new_enough(driver: Version) -> CudaResult {
    let (mut major, mut minor) = (0, 0);
    libraries::find(Kind::Nvrtc)?;
    // SAFETY: the library is loaded, and the call only writes the two numbers. Should it fail, both stay zero.
    let _ = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    let needed = Version { major: major.max(0) as u32, minor: 0 };
    if driver < needed { Err(CudaError::DriverTooOld { found: driver, needed }) } else { Ok(()) }
}

/// Whether a device's tensor cores are new enough.
pub(super) fn capable(name: &str, capability: (u32, u32)) -> CudaResult {
    if capability < CAPABILITY { Err(CudaError::DeviceTooOld { name: name.into(), capability }) } else { Ok(()) }
}

/// How many devices the driver shows, once it is started.
pub(super) fn count() -> CudaResult<usize> {
    let count = result::device::get_count();
    count
        .map(|count| count.max(0) as usize)
        .map_err(|code| CudaError::Call { operation: "counting devices".into(), code: code.to_string() })
}

/// Name and compute capability of a device.
pub(super) fn facts(device: sys::CUdevice) -> Result<(String, (u32, u32)), result::DriverError> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    // SAFETY: the device is one that the driver named.
    let number = |which| unsafe { result::device::get_attribute(device, which) }.map(|n| n.max(0) as u32);
    Ok((result::device::get_name(device)?, (number(MAJOR)?, number(MINOR)?)))
}

fn found(index: usize) -> Result<Found, result::DriverError> {
    let device = result::device::get(index as i32)?;
    let (name, capability) = facts(device)?;
    // SAFETY: the device is one that the driver named; the context is given back here, whatever is in between.
    let memory = unsafe { result::primary_ctx::retain(device) }.and_then(|context| {
        let before = result::ctx::get_current();
        // SAFETY: the context was just retained; the one before is put back.
        let memory = unsafe { result::ctx::set_current(context) }.and_then(|()| result::mem_get_info());
        // SAFETY: as above; a null context is none.
        unsafe {
            let _ = result::ctx::set_current(before.ok().flatten().unwrap_or(std::ptr::null_mut()));
            let _ = result::primary_ctx::release(device);
        }
        memory.map(|(free, total)| Memory { free: free as u64, total: total as u64 })
    });
    Ok(Found { name, capability, memory: memory.ok() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_so_and_nothing_panics() {
        let probe = Probe::new();
        if probe.driver.is_ok() {
            return; // a machine with one
        }
        assert!(probe.devices.is_empty());
        assert!(
            matches!(probe.usable(0), Err(CudaError::LibraryAbsent { .. } | CudaError::NoDevice { .. })),
            "{probe:?}"
        );
    }

    #[test]
    fn versions_read_as_the_libraries_write_them() {
        assert_eq!(Version::from_number(13000).to_string(), "13.0");
        assert_eq!(Version::from_number(12080).to_string(), "12.8");
        assert_eq!(Version::from_number(-1).to_string(), "0.0");
        assert_eq!(
            capable("old", (7, 5)).unwrap_err().to_string().split(',').next(),
            Some("old has compute capability 7.5")
        );
        assert_eq!(capable("new", (9, 0)), Ok(()));
    }
}
