//! What the device asks of its driver, and in which order; and that every error of a call comes through.

use crate::device::cuda::driver::Stream;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::recording::{Call, Recording};
use crate::device::cuda::tests::model::{batch, spec};
use crate::device::cuda::{CudaDevice, PATIENCE};
use crate::device::{Device, DeviceError, PartMut};
use crate::model::{Model, ModelError};

type Recorded = CudaDevice<Recording>;

fn device() -> Recorded {
    CudaDevice::new(Recording::new(), PATIENCE).unwrap()
}

/// A model, its parameters and gradient, ready for a step.
struct Ready {
    model: Model<Recorded>,
    parameters: <Recorded as Device>::Activation,
    gradient: <Recorded as Device>::Buffer,
    losses: <Recorded as Device>::Losses,
}

impl Ready {
    fn new(device: &Recorded) -> Self {
        let model = Model::new(&spec(), 2, 19, device).unwrap();
        let count = model.parameter_count();
        Self {
            parameters: device.allocate_activation(count, "parameters").unwrap(),
            gradient: device.allocate(count, "a gradient").unwrap(),
            losses: device.allocate_losses(4).unwrap(),
            model,
        }
    }

    fn compute(&mut self, device: &Recorded, index: usize) -> Result<(), ModelError> {
        let [tokens, targets] = batch();
        self.model.load(device, crate::model::MicroBatch { tokens: &tokens, targets: &targets })?;
        self.model.compute(device, &self.parameters, &mut self.gradient, &mut self.losses, index)
    }
}

#[test]
fn a_step_allocates_nothing_and_waits_for_nothing_but_old_copies() {
    let device = device();
    let mut ready = Ready::new(&device);
    device.driver().take();
    for index in 0..4 {
        ready.compute(&device, index).unwrap();
        let calls = device.driver().take();
        let allocates = |call: &&Call| matches!(call, Call::Allocate(_) | Call::Pin(_) | Call::Event | Call::Release);
        assert_eq!(calls.iter().find(allocates), None);
        assert!(!calls.iter().any(|call| matches!(call, Call::CopyOut(..))), "losses are read by who wants them");
        // The host waits before it fills an area again, once for tokens and once for targets.
        let waits = calls.iter().filter(|call| matches!(call, Call::WaitHost(_))).count();
        assert_eq!(waits, 2);
        // The layers' forward and backward: done once, then taken down, then only played.
        let count = |wanted: Call| calls.iter().filter(|call| **call == wanted).count();
        let expected = [(0, 0), (2, 2), (0, 2), (0, 2)][index];
        assert_eq!((count(Call::BeginGraph), count(Call::Play)), expected);
        let launches = calls.iter().filter(|call| matches!(call, Call::Launch { .. })).count();
        assert_eq!(launches < 10, index >= 2, "{launches} launches");
    }
}

#[test]
fn a_graph_is_ended_when_what_it_takes_down_fails() {
    let device = device();
    let mut ready = Ready::new(&device);
    ready.compute(&device, 0).unwrap();
    device.driver().take();
    ready.compute(&device, 1).unwrap();
    let begin = device.driver().take().iter().position(|call| *call == Call::BeginGraph).unwrap();

    let mut ready = Ready::new(&device);
    ready.compute(&device, 0).unwrap();
    let full = CudaError::OutOfMemory { bytes: 1, what: "a test" };
    device.driver().take();
    device.driver().fail(begin + 2, full);
    assert!(ready.compute(&device, 1).is_err());
    let calls = device.driver().take();
    assert_eq!((calls.get(begin), calls.last()), (Some(&Call::BeginGraph), Some(&Call::EndGraph)));
    for _ in 0..2 {
        ready.compute(&device, 1).unwrap();
    }
}

#[test]
fn copies_come_before_their_use_and_areas_are_filled_again_only_when_copied() {
    let device = device();
    let mut ready = Ready::new(&device);
    device.driver().take();
    ready.compute(&device, 0).unwrap();
    let calls = device.driver().take();
    let at = |wanted: &dyn Fn(&Call) -> bool| calls.iter().position(wanted).unwrap();
    let launched =
        |name: &'static str| move |call: &Call| matches!(call, Call::Launch { kernel, .. } if *kernel == name);
    let copies: Vec<usize> =
        (0..calls.len()).filter(|i| matches!(calls[*i], Call::CopyIn(Stream::Compute, _))).collect();
    assert_eq!(copies.len(), 2, "tokens and targets, in the order of the computation");
    assert!(copies.iter().all(|copy| *copy < at(&launched("embedding_forward"))));
    for copy in copies {
        let (Call::WaitHost(waited), Call::Record(recorded, Stream::Compute)) = (&calls[copy - 1], &calls[copy + 1])
        else {
            panic!("around the copy: {:?}", &calls[copy - 1..copy + 2]);
        };
        assert_eq!(waited, recorded);
    }
    // Areas take turns: the next micro-batch waits for other events.
    let events = |calls: &[Call]| -> Vec<Call> {
        calls.iter().filter(|call| matches!(call, Call::WaitHost(_))).cloned().collect()
    };
    ready.compute(&device, 1).unwrap();
    let second = device.driver().take();
    assert_ne!(events(&calls), events(&second));
    ready.compute(&device, 2).unwrap();
    assert_eq!(events(&calls), events(&device.driver().take()));
}

#[test]
fn a_value_is_read_after_its_copy_is_done() {
    let device = device();
    let buffer = device.allocate(10, "test").unwrap();
    device.driver().take();
    device.download(crate::device::Part(&buffer, 2), &mut [0.0; 5]).unwrap();
    let calls = device.driver().take();
    let [
        Call::WaitHost(area),
        Call::CopyOut(Stream::Compute, 20),
        Call::Record(done, Stream::Compute),
        Call::WaitHost(waited),
    ] = calls.as_slice()
    else {
        panic!("{calls:?}");
    };
    assert!(area == done && done == waited);
}

#[test]
fn every_error_of_a_call_comes_through() {
    let lost =
        CudaError::Lost { device: "a".into(), operation: "b".into(), code: "CUDA_ERROR_ECC_UNCORRECTABLE".into() };
    let device = device();
    // At first, when the layers are taken down, and when they are played.
    for before in 0..3 {
        let ready = || {
            let mut ready = Ready::new(&device);
            (0..before).for_each(|_| ready.compute(&device, 0).unwrap());
            device.driver().take();
            ready
        };
        let mut unhurt = ready();
        unhurt.compute(&device, 0).unwrap();
        let calls = device.driver().take().len();
        assert!(calls > if before < 2 { 50 } else { 10 }, "{calls}");
        for after in 0..calls {
            let mut ready = ready();
            device.driver().fail(after, lost.clone());
            match ready.compute(&device, 0) {
                Err(ModelError::Device(DeviceError::Cuda(error))) => assert_eq!(error, lost),
                other => panic!("call {after} of {calls} failed, but: {other:?}"),
            }
        }
    }
    let said = lost.to_string();
    assert!(said.contains("a is lost") && said.contains("dmesg"), "{said}");
}

#[test]
fn a_lack_of_memory_names_what_it_was_for_and_what_to_do() {
    let device = device();
    device.driver().fail(0, CudaError::OutOfMemory { bytes: 7, what: "activations" });
    let error = device.allocate(100, "activations").unwrap_err();
    assert!(matches!(error, DeviceError::OutOfMemory { bytes: 7, what: "activations" }));
    assert!(error.to_string().contains("smaller micro_batch"), "{error}");
}

#[test]
fn what_no_kernel_takes_is_refused() {
    let device = device();
    let norm = crate::device::NormShape { rows: 1, width: 8193, epsilon: 1e-5 };
    let (x, mut normed) =
        (device.allocate_activation(8193, "x").unwrap(), device.allocate_activation(8193, "x").unwrap());
    let mut scale = device.allocate(1, "x").unwrap();
    let refused = device.rmsnorm_forward(norm, &x, None, crate::device::Part(&x, 0), &mut normed, &mut scale);
    assert!(matches!(refused, Err(DeviceError::Unsupported(why)) if why.contains("8193")));
    assert!(matches!(device.allocate_sums(1), Err(DeviceError::Unsupported(_))));
    device.upload(&[1.0], PartMut(&mut scale, 0)).unwrap();
}
