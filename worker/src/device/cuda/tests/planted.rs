//! Mistakes on purpose, in kernels and in the order of copies: the emulator must show each of them.

use std::sync::Arc;

use super::{Emulated, PATIENCE, full};
use crate::device::cuda::driver::{Argument, Driver, Launch, Stream};
use crate::device::cuda::error::{CudaError, CudaResult};
use crate::device::cuda::memory::{Array, Staging};

/// Blocks of 64 threads that a planted kernel has, each of which turns 64 numbers around.
const BLOCKS: usize = 3;
const N: usize = 64 * BLOCKS;

/// What goes wrong between host and device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plant {
    Nothing,
    /// The kernel does not wait for the copy, which is in the other stream.
    NoWait,
    /// The host fills the area again before it is copied.
    EarlyReuse,
    /// The host does not wait for the result.
    NoHostWait,
}

/// Copies 192 numbers to the device, runs a kernel on them and copies the result back.
fn run(kernel: &'static str, plant: Plant, seed: u64) -> CudaResult<Vec<f32>> {
    let driver = Arc::new(Emulated::new(Some(seed))?);
    let [input, output] = [Array::<_, f32>::zeroed(&driver, N, "test")?, Array::zeroed(&driver, N, "test")?];
    let (mut area, mut back) = (Staging::new(&driver, 4 * N)?, Staging::new(&driver, 4 * N)?);
    area.bytes().copy_from_slice(bytemuck::cast_slice(&full(N, 0)));
    let ready = driver.event(false)?;
    // What was cleared when it was allocated must be clear before the other stream writes it.
    driver.record(ready, Stream::Compute)?;
    driver.wait(Stream::Copy, ready)?;
    // SAFETY: pinned areas of so many bytes; what is wrong with their use is the point, and stays within them.
    unsafe { driver.copy_in(Stream::Copy, area.start(), input.at(0, N), 4 * N)? };
    driver.record(area.done(), Stream::Copy)?;
    if plant != Plant::EarlyReuse {
        driver.wait_host(area.done(), PATIENCE, "the copy")?;
    }
    area.bytes().fill(0x3f);
    if plant == Plant::NoWait {
        // SAFETY: as above.
        unsafe { driver.copy_in(Stream::Copy, area.start(), input.at(0, N), 4 * N)? };
    } else {
        driver.wait(Stream::Compute, area.done())?;
    }
    let arguments = [Argument::from(output.at(0, N)), Argument::from(input.at(0, N))];
    let launch = Launch { kernel, grid: [BLOCKS as u32, 1, 1], block: [64, 1, 1], shared: 0, arguments: &arguments };
    // SAFETY: the kernel takes these two addresses; areas as above.
    unsafe {
        driver.launch(Stream::Compute, &launch)?;
        driver.copy_out(Stream::Compute, output.at(0, N), back.start(), 4 * N)?;
    }
    driver.record(back.done(), Stream::Compute)?;
    if plant != Plant::NoHostWait {
        driver.wait_host(back.done(), PATIENCE, "the result")?;
    }
    let result = bytemuck::cast_slice(back.bytes()).to_vec();
    driver.release_event(ready);
    Ok(result)
}

/// Whether a run is as it should be, for each of some seeds.
fn outcomes(kernel: &'static str, plant: Plant) -> Vec<bool> {
    let expected: Vec<f32> = full(N, 0).chunks(64).flat_map(|block| block.iter().rev().copied()).collect();
    (1..=8).map(|seed| run(kernel, plant, seed).is_ok_and(|result| result == expected)).collect()
}

#[test]
fn sound_kernels_are_right_in_every_order_and_planted_mistakes_are_not() {
    for sound in ["planted_sound_wait", "planted_sound_barrier"] {
        assert_eq!(outcomes(sound, Plant::Nothing), [true; 8], "{sound}");
    }
    for wrong in ["planted_missing_wait", "planted_missing_barrier", "planted_divergent_barrier"] {
        assert!(outcomes(wrong, Plant::Nothing).contains(&false), "{wrong} was not noticed");
    }
    let words = run("planted_divergent_barrier", Plant::Nothing, 1).unwrap_err().to_string();
    assert!(words.contains("planted_divergent_barrier") && words.contains("block"), "{words}");
    let unknown = run("no_such_kernel", Plant::Nothing, 1);
    assert!(matches!(unknown, Err(CudaError::Kernel { kernel: "no_such_kernel", .. })), "{unknown:?}");
}

/// Whether the product of a warpgroup is as it should be, for each of some seeds.
fn products(kernel: &'static str) -> Vec<bool> {
    let run = |seed| -> CudaResult<Vec<f32>> {
        let driver = Arc::new(Emulated::new(Some(seed))?);
        let (output, mut back) = (Array::<_, f32>::zeroed(&driver, 128, "test")?, Staging::new(&driver, 512)?);
        let arguments = [Argument::from(output.at(0, 128))];
        let launch = Launch { kernel, grid: [1; 3], block: [128, 1, 1], shared: 16 << 10, arguments: &arguments };
        // SAFETY: the kernel takes this one address, of 128 numbers, which fit into the area.
        unsafe {
            driver.launch(Stream::Compute, &launch)?;
            driver.copy_out(Stream::Compute, output.at(0, 128), back.start(), 512)?;
        }
        driver.record(back.done(), Stream::Compute)?;
        driver.wait_host(back.done(), PATIENCE, "the result")?;
        Ok(bytemuck::cast_slice(back.bytes()).to_vec())
    };
    (1..=8).map(|seed| run(seed).is_ok_and(|result| result == [64.0; 128])).collect()
}

#[test]
fn products_that_nobody_waits_for_and_tiles_that_are_not_whole_are_noticed() {
    assert_eq!(products("planted_sound_product"), [true; 8]);
    for wrong in ["planted_product_without_wait", "planted_product_without_barrier"] {
        assert!(products(wrong).contains(&false), "{wrong} was not noticed");
    }
}

#[test]
fn waits_that_are_missing_between_host_and_device_are_noticed() {
    for plant in [Plant::NoWait, Plant::EarlyReuse, Plant::NoHostWait] {
        assert!(outcomes("planted_sound_wait", plant).contains(&false));
    }
}
