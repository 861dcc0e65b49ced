//! Which device a worker computes on, decided at run time: one binary serves machines with and without a GPU.

use proto::spec::{DeviceKind, Reduction};

use super::DeviceResult;
use super::cuda::error::{CudaError, CudaResult};
use super::cuda::probe::Probe;
use super::cuda::real::{Choice, Real};
use super::cuda::{CudaDevice, PATIENCE};

/// A device of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chosen {
    /// The processor.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

/// What the worker at `place` of this node computes on, if its job asks for `kind`. A job that leaves the device to the
/// machine gets a GPU where there is one; a GPU that cannot be used is an error, since a job that trains on the CPU
/// instead would be many times slower, and would not say so.
pub fn choose(kind: DeviceKind, place: usize) -> CudaResult<Chosen> {
    match kind {
        DeviceKind::Cpu => Ok(Chosen::Cpu),
        DeviceKind::Auto | DeviceKind::Cuda => pick(&Probe::new(), kind, place),
    }
}

fn pick(probe: &Probe, kind: DeviceKind, place: usize) -> CudaResult<Chosen> {
    if probe.devices.is_empty() {
        return match probe.driver.clone() {
            Err(CudaError::LibraryAbsent { .. } | CudaError::NoDevice { .. }) | Ok(_) if kind == DeviceKind::Auto => {
                Ok(Chosen::Cpu)
            }
            Err(error) => Err(error),
            Ok(_) => Err(CudaError::NoDevice { wanted: place, found: 0 }),
        };
    }
    // Workers beyond the number of devices share them.
    let index = place % probe.devices.len();
    probe.usable(index)?;
    Ok(Chosen::Cuda(index))
}

/// Starts a GPU. Exact jobs take the products' algorithms that any machine with the same device would; a job that gave
/// exactness up takes the fastest here.
pub fn start(index: usize, reduction: Reduction) -> DeviceResult<CudaDevice<Real>> {
    let choice = match reduction {
        Reduction::Exact => Choice::First,
        Reduction::Fast => Choice::Fastest,
    };
    Ok(CudaDevice::new(Real::new(index, choice)?, PATIENCE)?)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::cuda::driver::Version;
    use super::super::cuda::probe::Found;
    use super::*;

    fn machine(devices: usize, driver: CudaResult<Version>) -> Probe {
        let device = Found { name: "a GPU".into(), capability: (9, 0), memory: None };
        Probe { driver, libraries: vec![("library", Ok(PathBuf::from("/lib")))], devices: vec![device; devices] }
    }

    const FOUND: Version = Version { major: 13, minor: 0 };

    #[test]
    fn the_cpu_is_taken_only_where_there_is_no_gpu_or_it_is_asked_for() {
        assert_eq!(choose(DeviceKind::Cpu, 3), Ok(Chosen::Cpu));
        let none = || Err(CudaError::NoDevice { wanted: 0, found: 0 });
        assert_eq!(pick(&machine(0, none()), DeviceKind::Auto, 0), Ok(Chosen::Cpu));
        assert_eq!(pick(&machine(0, none()), DeviceKind::Cuda, 0), none().map(|_: Version| Chosen::Cpu));
        let old =
            CudaError::DriverTooOld { found: Version { major: 11, minor: 0 }, needed: Version { major: 12, minor: 0 } };
        for kind in [DeviceKind::Auto, DeviceKind::Cuda] {
            assert_eq!(pick(&machine(0, Err(old.clone())), kind, 0), Err(old.clone()));
        }
        let mut broken = machine(2, Ok(FOUND));
        broken.devices[1].capability = (7, 0);
        assert!(matches!(pick(&broken, DeviceKind::Auto, 1), Err(CudaError::DeviceTooOld { .. })));
    }
}
