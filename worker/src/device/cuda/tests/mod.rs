//! The CUDA device against the CPU's, operation by operation and as a whole model.
//!
//! Each case runs on a device, checks what comes out against [`CpuDevice`] on the same operands (rounded to bfloat16
//! beforehand where the device has them so), and returns all results. Here a case runs on the emulator, at once and
//! deferred in several orders, and all its results must have the same bits; with the feature `gpu-tests` the same cases
//! run on a real device, twice.

mod asked;
mod compiled;
mod elementwise;
mod gpt;
mod model;
mod planted;
mod products;
mod sums;
mod training;
mod worlds;

use super::driver::Driver;
use super::emulated::Emulated;
use super::{Array, Bf16, CudaDevice, PATIENCE, bf16};
use crate::device::cpu::{CpuBuffer, CpuDevice};
use crate::device::{Device, Part, PartMut};
use crate::rng::{Counter, Place};

/// The unit of rounding to bfloat16, whose numbers have eight significant bits: half a step at 1.
const UNIT: f64 = 1.0 / 256.0;
/// A device without any instruction that is younger than the oldest device with tensor cores for bfloat16.
const OLDER: (u32, u32) = (8, 0);
/// Orders the emulator tries.
const SEEDS: [Option<u64>; 4] = [None, Some(1), Some(2), Some(3)];

/// A device under test with its twin.
struct Bench<'a, D: Driver> {
    cuda: &'a CudaDevice<D>,
    cpu: CpuDevice,
    /// Everything that came out, for comparing bits.
    results: Vec<f32>,
}

impl<'a, D: Driver> Bench<'a, D> {
    fn new(cuda: &'a CudaDevice<D>) -> Self {
        Self { cuda, cpu: CpuDevice::new(1).unwrap(), results: Vec::new() }
    }

    fn floats(&self, values: &[f32]) -> Array<D, f32> {
        let mut array = self.cuda.allocate(values.len(), "test").unwrap();
        self.cuda.upload(values, PartMut(&mut array, 0)).unwrap();
        array
    }

    fn halves(&self, values: &[f32]) -> Array<D, Bf16> {
        let mut array = self.cuda.allocate_activation(values.len(), "test").unwrap();
        self.cuda.upload_activation(values, PartMut(&mut array, 0)).unwrap();
        array
    }

    /// The twin's memory.
    #[allow(clippy::unused_self)] // reads like its neighbours
    fn twin(&self, values: &[f32]) -> CpuBuffer {
        let mut buffer = CpuBuffer::zeroed(values.len(), "test").unwrap();
        buffer.copy_from_slice(values);
        buffer
    }

    fn tokens(&self, values: &[u32]) -> super::CudaTokens<D> {
        let mut tokens = self.cuda.allocate_tokens(values.len()).unwrap();
        self.cuda.upload_tokens(values, true, &mut tokens).unwrap();
        tokens
    }

    /// Downloads float32 results and holds them against `expected`: off by at most `tolerance` of the value itself and
    /// of the root of the mean square of all, where sums cancel.
    fn floats_are(&mut self, name: &str, got: &Array<D, f32>, expected: &[f32], tolerance: f64) {
        let mut values = vec![f32::NAN; expected.len()];
        self.cuda.download(Part(got, 0), &mut values).unwrap();
        close(name, &values, expected, tolerance);
        self.results.extend(values);
    }

    /// The same for bfloat16 results, in roundings to bfloat16.
    fn halves_are(&mut self, name: &str, got: &Array<D, Bf16>, expected: &[f32], roundings: f64) {
        let mut values = vec![f32::NAN; expected.len()];
        self.cuda.download_activation(Part(got, 0), &mut values).unwrap();
        close(name, &values, expected, roundings * UNIT);
        self.results.extend(values);
    }
}

fn close(name: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let mean = expected.iter().map(|e| f64::from(*e).powi(2)).sum::<f64>() / expected.len().max(1) as f64;
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let (g, e) = (f64::from(*g), f64::from(*e));
        assert!((g - e).abs() <= tolerance * (e.abs() + mean.sqrt()), "{name}[{i}] is {g}, expected {e}");
    }
}

/// Normal random numbers that bfloat16 holds.
fn random(n: usize, lane: u32) -> Vec<f32> {
    full(n, lane).into_iter().map(|value| bf16::widen(bf16::round(value))).collect()
}

/// Normal random numbers.
fn full(n: usize, lane: u32) -> Vec<f32> {
    let counter = Counter::new(8, Place::Test, lane);
    (0..n).map(|i| counter.normal(i as u64) as f32).collect()
}

/// Runs a case in every order; the bits must be the same. The kernels are those of `capability`, or of the device.
fn on_emulator(capability: Option<(u32, u32)>, case: impl Fn(&mut Bench<'_, Emulated>)) {
    let mut first: Option<Vec<f32>> = None;
    for seed in SEEDS {
        let device = CudaDevice::new(Emulated::new(seed).unwrap(), PATIENCE).unwrap();
        let capability = capability.unwrap_or(device.capability);
        let device = device.like(capability);
        let mut bench = Bench::new(&device);
        case(&mut bench);
        let results = std::mem::take(&mut bench.results);
        let expected = first.get_or_insert_with(|| results.clone());
        let differs = expected.iter().zip(&results).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!((differs, results.len()), (None, expected.len()), "in the order of seed {seed:?}");
    }
}

/// Runs a case twice on a real device, with the kernels of `capability` or its own; the bits must be the same. Says why
/// where there is none.
#[cfg(feature = "gpu-tests")]
fn on_gpu(capability: Option<(u32, u32)>, case: impl Fn(&mut Bench<'_, super::real::Real>)) {
    use super::real::{Choice, Real};
    let driver = match Real::new(0, Choice::First) {
        Ok(driver) => driver,
        Err(error) => return skip(&format!("no GPU to test on: {error}")),
    };
    let device = CudaDevice::new(driver, PATIENCE).unwrap();
    let capability = capability.unwrap_or(device.capability);
    let device = device.like(capability);
    let run = || {
        let mut bench = Bench::new(&device);
        case(&mut bench);
        bench.results.iter().map(|value| value.to_bits()).collect::<Vec<u32>>()
    };
    assert_eq!(run(), run(), "a second run has other bits");
}

/// Says that a test is skipped for want of a tool; where tools are required, fails instead.
fn skip(why: &str) {
    assert!(std::env::var_os("CAIRN_REQUIRE_TOOLS").is_none(), "{why}");
    eprintln!("skipped: {why}");
}

/// Tests of cases, on the emulator and with the feature on a GPU; those behind `older` with kernels of old devices too.
macro_rules! cases {
    ($($case:ident),+ $(,)? $(; older: $($older:ident),+)?) => {
        mod emulated {
            $(#[test]
            fn $case() {
                crate::device::cuda::tests::on_emulator(None, super::$case);
            })+
        }
        #[cfg(feature = "gpu-tests")]
        mod gpu {
            $(#[test]
            fn $case() {
                crate::device::cuda::tests::on_gpu(None, super::$case);
            })+
        }
        $(mod emulated_older {
            $(#[test]
            fn $older() {
                crate::device::cuda::tests::on_emulator(Some(crate::device::cuda::tests::OLDER), super::$older);
            })+
        }
        #[cfg(feature = "gpu-tests")]
        mod gpu_older {
            $(#[test]
            fn $older() {
                crate::device::cuda::tests::on_gpu(Some(crate::device::cuda::tests::OLDER), super::$older);
            })+
        })?
    };
}
use cases;
