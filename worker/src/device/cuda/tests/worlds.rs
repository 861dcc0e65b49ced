//! Training as a whole on the emulator: any number of workers, the same state.

use super::Emulated;
use crate::device::cuda::{CudaDevice, PATIENCE};
use crate::worlds::{SMALL, same_bits_in_every_world, spec};

#[test]
fn worlds_agree_on_the_emulator() {
    let make = || CudaDevice::new(Emulated::new(Some(5)).unwrap(), PATIENCE).unwrap();
    same_bits_in_every_world(&make, &spec(SMALL, "exact"), 2);
}
