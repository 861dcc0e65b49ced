//! Training as a whole on the emulator: any number of workers, the same state.

use super::Emulated;
use crate::device::cuda::{CudaDevice, PATIENCE};
use crate::worlds::{SMALL, same_bits_in_every_world, spec};

#[test]
fn worlds_agree_on_the_emulator() {
    let make = || CudaDevice::new(Emulated::new(Some(5)).unwrap(), PATIENCE).unwrap();
    same_bits_in_every_world(&make, &spec(SMALL, "exact"), 2);
}

/// On a card, which all workers share; and its losses beside the CPU's on the same data.
#[cfg(feature = "gpu-tests")]
mod gpu {
    use crate::device::ExactForm;
    use crate::device::cpu::CpuDevice;
    use crate::device::cuda::real::{Choice, Real};
    use crate::device::cuda::tests::skip;
    use crate::device::cuda::{CudaDevice, PATIENCE};
    use crate::worlds::{SMALL, SMALL_GPT2, run, same_bits_in_every_world, spec};

    fn gpu() -> CudaDevice<Real> {
        CudaDevice::new(Real::new(0, Choice::First).unwrap(), PATIENCE).unwrap()
    }

    /// Whether there is a GPU; says why where there is none.
    fn there_is_one() -> bool {
        Real::new(0, Choice::First).map_err(|error| skip(&format!("no GPU to test on: {error}"))).is_ok()
    }

    #[test]
    fn worlds_agree() {
        for model in [SMALL, SMALL_GPT2] {
            if there_is_one() {
                same_bits_in_every_world(&gpu, &spec(model, "exact"), 6);
            }
        }
    }

    #[test]
    fn curves_are_those_of_the_cpu() {
        for model in [SMALL, SMALL_GPT2] {
            if !there_is_one() {
                return;
            }
            let (mut spec, cpu) = (spec(model, "exact"), || CpuDevice::new(4).unwrap().with_form(ExactForm::Blocks));
            spec.optimizer.learning_rate = 1e-3; // small enough for roundings to stay small
            let (ours, theirs) = (run(&gpu, &spec, 1, None, 60), run(&cpu, &spec, 1, None, 60));
            let losses = |bits: &[u64]| bits.iter().map(|loss| f64::from_bits(*loss)).collect::<Vec<f64>>();
            let (ours, theirs) = (losses(&ours.losses), losses(&theirs.losses));
            assert_eq!(ours.len(), 60);
            // Weights and activations have eight significant bits there.
            for (step, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                assert!((ours - theirs).abs() < 0.03 * theirs, "step {step}: {ours}, on the CPU {theirs}");
            }
        }
    }
}
