//! The optimizer state on the device, its snapshots, and what is lent to the exchange.

use std::sync::Arc;

use proto::spec::{OptimizerKind, OptimizerSpec};

use super::{Bench, cases, full};
use crate::device::cuda::bf16;
use crate::device::cuda::driver::Driver;
use crate::device::{Device, Frozen, HostParameters, Part, PartMut, RankState, TrainDevice, Update, Write};
use crate::model::ParamDecl;
use crate::optimizer::AdamW;
use crate::slots::{Slot, Slots};

cases!(updates_and_snapshots, sums_are_lent, parameters_are_lent);

/// Elements of the space, and the shard's place in it: off every vector's alignment.
const SPACE: usize = 3042;
const SHARD: std::ops::Range<usize> = 11..3001;

fn rule() -> AdamW {
    let spec = OptimizerSpec {
        kind: OptimizerKind::Adamw,
        learning_rate: 1e-3,
        betas: [0.9, 0.95],
        epsilon: 1e-8,
        weight_decay: 0.1,
        no_decay: vec!["norm".into()],
        clip_norm: Some(1.0),
    };
    let tensors = [("embed", 1000), ("a.norm.weight", 37), ("b.weight", 2000), ("norm.weight", 5)];
    AdamW::new(&spec, &tensors.map(|(name, n)| ParamDecl { name: name.into(), shape: vec![n] }))
}

fn slots() -> Arc<Slots> {
    let slots = Arc::new(Slots::default());
    slots.reserve(SHARD.len()).unwrap();
    slots
}

/// What a frozen slot holds.
fn frozen(slot: &Slot) -> Vec<f32> {
    let bytes = 3 * SHARD.len() * size_of::<f32>();
    // SAFETY: the slot is frozen, and its copies have arrived.
    bytemuck::cast_slice::<u8, f32>(unsafe { slot.map.frozen(bytes) }).to_vec()
}

/// Steps of a state from the same start; the snapshot of every other one.
fn steps<V: TrainDevice>(device: &V) -> (Vec<f32>, Vec<Vec<f32>>) {
    let slots = slots();
    let mut state = V::State::new(device, slots.clone(), SHARD.len()).unwrap().unwrap();
    for (lane, part) in state.fill().into_iter().enumerate() {
        part.copy_from_slice(&full(SHARD.len(), lane as u32));
        if lane == 2 {
            for value in part {
                *value *= *value;
            }
        }
    }
    let mut parameters = device.allocate_activation(SPACE, "parameters").unwrap();
    let mut gradient = device.allocate(SHARD.len(), "gradient").unwrap();
    state.filled(device, &mut parameters, SHARD.start).unwrap();
    let (rule, mut snapshots, mut pending) = (rule(), Vec::new(), Vec::new());
    for step in 1..=6u64 {
        device.upload(&full(SHARD.len(), 10 + step as u32), PartMut(&mut gradient, 0)).unwrap();
        let capture = step % 2 == 0;
        assert!(state.ready());
        let update = Update {
            rule: &rule,
            scalars: rule.scalars(step, 1e-2, 0.5),
            shard: SHARD,
            parameters: &mut parameters,
            gradient: &gradient,
            capture,
        };
        assert!(state.update(device, update).unwrap());
        if capture {
            pending.push(state.freeze(device).unwrap());
        }
        // Snapshots are looked at late: after the update that follows them.
        if step % 2 == 1 || step == 6 {
            for Frozen { slot, arrival } in pending.drain(..) {
                if let Some(arrive) = arrival {
                    arrive().unwrap();
                }
                snapshots.push(frozen(&slot));
                slots.free(slot.index);
            }
        }
    }
    let mut all = vec![0.0; SPACE];
    device.download_activation(Part(&parameters, 0), &mut all).unwrap();
    (all, snapshots)
}

/// The same bits as the CPU's, but for the rounding of the model's copy.
fn updates_and_snapshots<D: Driver>(bench: &mut Bench<'_, D>) {
    let (expected, snapshots) = steps(&bench.cpu);
    let (parameters, ours) = steps(bench.cuda);
    assert_eq!((snapshots.len(), ours.len()), (3, 3));
    for (n, (expected, got)) in snapshots.iter().zip(&ours).enumerate() {
        let differs = expected.iter().zip(got).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "snapshot {n}");
    }
    for (i, (expected, got)) in expected.iter().zip(&parameters).enumerate() {
        assert_eq!(bf16::round(*expected), bf16::round(*got), "parameter {i}");
        assert_eq!(got.to_bits() & 0xffff, 0);
    }
    bench.results.extend(parameters);
}

/// All is shown, and only what is kept comes back.
fn sums_are_lent<D: Driver>(bench: &mut Bench<'_, D>) {
    let cuda = bench.cuda;
    let mut sums = cuda.allocate_block_sums(1000, 128).unwrap();
    cuda.set_exponents(&[0; 8], &mut sums).unwrap();
    let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let gradient = bench.floats(&values);
    cuda.accumulate_blocks(1000, &gradient, 1 << 20, Write::Replace, &mut sums).unwrap();
    let shown = cuda.lend_block_sums(&mut sums, 1000, 100..600, |host| {
        let shown = host.to_vec();
        for value in host {
            *value *= 2;
        }
        shown
    });
    assert_eq!(shown.unwrap(), (0..1000).collect::<Vec<i32>>());
    let mut back = bench.floats(&vec![0.0; 1000]);
    cuda.gradient_from_blocks(1000, 1.0, &sums, 0, &mut back).unwrap();
    let expected: Vec<f32> = values
        .iter()
        .enumerate()
        .map(|(i, value)| if (100..600).contains(&i) { 2.0 * value } else { *value })
        .collect();
    bench.floats_are("sums", &back, &expected, 0.0);

    let mut floats = bench.floats(&values);
    cuda.lend_floats(&mut floats, 1000, 100..600, |host| host.iter_mut().for_each(|value| *value *= 2.0)).unwrap();
    bench.floats_are("floats", &floats, &expected, 0.0);
    cuda.finish().unwrap();
}

/// Only the rank's own are right before; all come back.
fn parameters_are_lent<D: Driver>(bench: &mut Bench<'_, D>) {
    let cuda = bench.cuda;
    let mut parameters = bench.halves(&(0..200).map(|i| i as f32).collect::<Vec<_>>());
    let shown = cuda.lend_parameters(&mut parameters, 200, 50..90, |host| match host {
        HostParameters::Bf16(host) => {
            let shown: Vec<f32> = host[50..90].iter().map(|bits| bf16::widen(*bits)).collect();
            host.iter_mut().enumerate().for_each(|(i, value)| *value = bf16::round(-(i as f32)));
            shown
        }
        HostParameters::F32(_) => Vec::new(),
    });
    assert_eq!(shown.unwrap(), (50..90).map(|i| i as f32).collect::<Vec<_>>());
    bench.halves_are("parameters", &parameters, &(0..200).map(|i| -(i as f32)).collect::<Vec<_>>(), 0.0);
}
