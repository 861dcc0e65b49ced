//! The loss, exact sums, and vectors of float32.

use super::{Bench, cases, full, random};
use crate::device::cuda::driver::Driver;
use crate::device::{Device, LossShape, Part, PartMut, Write};

cases!(losses, exact_sums, values_that_are_not_finite, vectors, transfers_longer_than_their_area; older: losses);

/// The gradient is rounded once; a row's loss is float32 on the device and float64 on the CPU.
fn losses<D: Driver>(bench: &mut Bench<'_, D>) {
    // The last is longer than what a block keeps in shared memory.
    for (vocabulary, rows) in [(5, 9), (61, 9), (257, 9), (57_001, 2)] {
        let (first, pitch) = (3, bench.cuda.logits_pitch(vocabulary));
        let dense: Vec<f32> = random(rows * vocabulary, 0).iter().map(|x| x * 4.0).collect();
        let targets: Vec<u32> = (0..rows + first).map(|i| (i * 7 % vocabulary) as u32).collect();
        let padded: Vec<f32> =
            dense.chunks(vocabulary).flat_map(|row| [row, &vec![8.0; pitch - vocabulary]].concat()).collect();
        let shape = LossShape { vocabulary, pitch, rows, first };
        let (cuda, tokens) = (bench.cuda, bench.tokens(&targets));
        let mut twin_losses = vec![0.5; 3];
        let mut losses = cuda.allocate_losses(3).unwrap();
        for (gradient, write) in [(None, Write::Replace), (Some(0.25), Write::Add)] {
            let (mut twin, mut logits) = (bench.twin(&dense), bench.halves(&padded));
            let there = LossShape { pitch: vocabulary, ..shape };
            bench.cpu.cross_entropy(there, &targets, gradient, &mut twin, write, &mut twin_losses, 1).unwrap();
            cuda.cross_entropy(shape, &tokens, gradient, &mut logits, write, &mut losses, 1).unwrap();
            if gradient.is_some() {
                let expected: Vec<f32> =
                    twin.chunks(vocabulary).flat_map(|row| [row, &vec![0.0; pitch - vocabulary]].concat()).collect();
                bench.halves_are("gradient of the logits", &logits, &expected, 1.0);
            }
        }
        let mut sums = [f64::NAN; 3];
        cuda.read_losses(&losses, &mut sums).unwrap();
        assert!((sums[1] - twin_losses[1]).abs() < 1e-4 * twin_losses[1], "{sums:?}, expected {twin_losses:?}");
        assert_eq!((sums[0], sums[2]), (0.0, 0.0));
        bench.results.extend(sums.map(|sum| sum as f32));
    }
}

/// Exact: the same bits as the CPU's.
fn exact_sums<D: Driver>(bench: &mut Bench<'_, D>) {
    let (elements, block, limit) = (5000, 1024, i32::MAX / 3);
    let mut twin_sums = bench.cpu.allocate_block_sums(elements, block).unwrap();
    let mut sums = bench.cuda.allocate_block_sums(elements, block).unwrap();
    let exponents = [-28, -30, -20, -126, -29];
    bench.cpu.set_exponents(&exponents, &mut twin_sums).unwrap();
    bench.cuda.set_exponents(&exponents, &mut sums).unwrap();
    for (lane, write) in [(0, Write::Replace), (1, Write::Add), (2, Write::Add)] {
        let values = full(elements, lane);
        let (twin, gradient) = (bench.twin(&values), bench.floats(&values));
        bench.cpu.accumulate_blocks(elements, &twin, limit, write, &mut twin_sums).unwrap();
        bench.cuda.accumulate_blocks(elements, &gradient, limit, write, &mut sums).unwrap();
    }
    let (mut expected, mut magnitudes) = ([0; 5], [1; 5]);
    bench.cpu.read_magnitudes(&twin_sums, &mut expected).unwrap();
    bench.cuda.read_magnitudes(&sums, &mut magnitudes).unwrap();
    assert_eq!(magnitudes, expected);
    for (at, n) in [(0, elements), (1500, 2001)] {
        let (mut twin, mut gradient) = (bench.twin(&vec![0.0; n]), bench.floats(&vec![9.0; n]));
        bench.cpu.gradient_from_blocks(n, 1.0 / 3.0, &twin_sums, at, &mut twin).unwrap();
        bench.cuda.gradient_from_blocks(n, 1.0 / 3.0, &sums, at, &mut gradient).unwrap();
        bench.floats_are("mean gradient", &gradient, &twin, 0.0);

        let count = n.div_ceil(block);
        let (mut expected, mut squares) = (vec![0.0; count], vec![0.0; count]);
        bench.cpu.block_square_sums(n, block, &twin, &mut expected).unwrap();
        bench.cuda.block_square_sums(n, block, &gradient, &mut squares).unwrap();
        for (got, expected) in squares.iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-12 * expected, "{squares:?}, expected {expected}");
        }
        bench.results.extend(squares.iter().map(|square| *square as f32));
    }
}

/// They show in their block's magnitude, and in that alone.
fn values_that_are_not_finite<D: Driver>(bench: &mut Bench<'_, D>) {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![0.25; 300];
        values[150] = bad;
        let (gradient, mut sums) = (bench.floats(&values), bench.cuda.allocate_block_sums(300, 100).unwrap());
        bench.cuda.set_exponents(&[-20; 3], &mut sums).unwrap();
        bench.cuda.accumulate_blocks(300, &gradient, i32::MAX, Write::Replace, &mut sums).unwrap();
        let mut magnitudes = [0; 3];
        bench.cuda.read_magnitudes(&sums, &mut magnitudes).unwrap();
        assert_eq!(magnitudes, [125, 255, 125], "{bad}");
    }
}

/// The same bits as the CPU's.
fn vectors<D: Driver>(bench: &mut Bench<'_, D>) {
    let n = 5001;
    let (x, y) = (full(n, 0), full(n, 1));
    let (twin_x, mut twin_y, cx, mut cy) = (bench.twin(&x), bench.twin(&y), bench.floats(&x), bench.floats(&y));
    bench.cpu.axpy(n - 3, 0.3, Part(&twin_x, 3), PartMut(&mut twin_y, 2)).unwrap();
    bench.cuda.axpy(n - 3, 0.3, Part(&cx, 3), PartMut(&mut cy, 2)).unwrap();
    bench.floats_are("axpy", &cy, &twin_y, 0.0);
    bench.cpu.scale(n - 7, -1.7, Part(&twin_x, 5), &mut twin_y).unwrap();
    bench.cuda.scale(n - 7, -1.7, Part(&cx, 5), &mut cy).unwrap();
    bench.floats_are("scale", &cy, &twin_y, 0.0);
    bench.cpu.zero(10, PartMut(&mut twin_y, 1)).unwrap();
    bench.cuda.zero(10, PartMut(&mut cy, 1)).unwrap();
    bench.floats_are("zero", &cy, &twin_y, 0.0);
}

/// Copies go through two areas of 4 MiB by turns.
fn transfers_longer_than_their_area<D: Driver>(bench: &mut Bench<'_, D>) {
    let values: Vec<f32> = (0..3_500_000).map(|i| i as f32).collect();
    let array = bench.floats(&values);
    bench.floats_are("floats", &array, &values, 0.0);
    let values: Vec<f32> = values.iter().map(|value| value % 256.0).collect();
    let array = bench.halves(&values);
    bench.halves_are("halves", &array, &values, 0.0);
}
