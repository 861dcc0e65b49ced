//! Products and attention.

use super::{Bench, UNIT, cases, random};
use crate::device::cuda::driver::Driver;
use crate::device::{AttentionShape, Device, MatmulShape, Part, PartMut, Product, Write};

cases!(products_of_every_kind, products_with_epilogues, attention_and_its_backward; older: attention_and_its_backward);

/// Operands are exact and sums are float32 on both sides, in another order: the result is rounded once to bfloat16, or
/// differs by float32's own roundings. A product that is added to bfloat16 numbers may be rounded before that too.
fn products_of_every_kind<D: Driver>(bench: &mut Bench<'_, D>) {
    for (product, (m, n, k)) in [Product::NN, Product::NT, Product::TN]
        .into_iter()
        .flat_map(|p| [(5, 7, 9), (16, 40, 33), (64, 24, 8)].map(|s| (p, s)))
    {
        let shape = MatmulShape::new(m, n, k);
        let (a, b, c) = (random(m * k, 0), random(k * n, 1), random(m * n, 2));
        for write in [Write::Replace, Write::Add] {
            let (ta, tb, mut tc) = (bench.twin(&a), bench.twin(&b), bench.twin(&c));
            bench.cpu.matmul(product, shape, Part(&ta, 0), Part(&tb, 0), write, PartMut(&mut tc, 0)).unwrap();
            let (ca, cb) = (bench.halves(&a), bench.halves(&b));
            let (mut halves, mut floats) = (bench.halves(&c), bench.floats(&c));
            let cuda = bench.cuda;
            cuda.matmul(product, shape, Part(&ca, 0), Part(&cb, 0), write, PartMut(&mut halves, 0)).unwrap();
            cuda.matmul_gradient(product, shape, Part(&ca, 0), Part(&cb, 0), write, PartMut(&mut floats, 0)).unwrap();
            let name = format!("{product:?} {m} {n} {k} {write:?}");
            bench.halves_are(&name, &halves, &tc, if write == Write::Add { 2.0 } else { 1.0 });
            bench.floats_are(&name, &floats, &tc, 1e-5);
        }
    }
}

/// Operands begin off the start; and some sizes have no product with an epilogue, so that two kernels follow it.
fn products_with_epilogues<D: Driver>(bench: &mut Bench<'_, D>) {
    for (m, n, k, at) in [(6, 24, 16, 8), (5, 7, 9, 3), (33, 64, 40, 0)] {
        let (x, w, bias) = (random(m * k + at, 0), random(k * n + at, 1), random(n + at, 2));
        let (cx, cw, cb) = (bench.halves(&x), bench.halves(&w), bench.halves(&bias));
        let (tx, tw, tb) = (bench.twin(&x), bench.twin(&w), bench.twin(&bias));
        let shape = MatmulShape::new(m, n, k);
        for product in [Product::NN, Product::NT] {
            let [mut pre, mut act] = [0, 1].map(|_| bench.twin(&vec![0.0; m * n]));
            let (a, b, bias) = (Part(&tx, at), Part(&tw, at), Part(&tb, at));
            bench.cpu.matmul_gelu(product, shape, a, b, bias, &mut pre, &mut act).unwrap();
            let [mut sums, mut kept, mut got] = [0, 1, 2].map(|_| bench.halves(&vec![f32::NAN; m * n]));
            let (cuda, operands) = (bench.cuda, || (Part(&cx, at), Part(&cw, at), Part(&cb, at)));
            let (a, b, bias) = operands();
            cuda.matmul_bias(product, shape, a, b, bias, &mut sums).unwrap();
            let (a, b, bias) = operands();
            cuda.matmul_gelu(product, shape, a, b, bias, &mut kept, &mut got).unwrap();
            let name = format!("{product:?} {m} {n} {k}");
            bench.halves_are(&format!("{name} bias"), &sums, &pre, 2.0);
            bench.halves_are(&format!("{name} before GELU"), &kept, &pre, 2.0);
            bench.halves_are(&format!("{name} GELU"), &got, &act, 3.0);
        }
    }
}

/// Probabilities and their gradients are rounded to bfloat16 before they are multiplied, and so are the output, which
/// the backward reads, and the result. The gradient of a score is a difference of two large numbers, one of them made
/// of the rounded output; so single elements are off by up to 16 units of rounding (found by simulating these roundings
/// alone in float64), while all together are off by less than one.
fn attention_and_its_backward<D: Driver>(bench: &mut Bench<'_, D>) {
    for (batch, sequence, heads, kv_heads, head_dim) in
        [(1, 1, 1, 1, 2), (2, 17, 4, 2, 6), (1, 70, 2, 1, 32), (1, 33, 3, 3, 48), (1, 131, 2, 2, 64), (1, 65, 2, 1, 80)]
    {
        attention(bench, AttentionShape { batch, sequence, heads, kv_heads, head_dim }, (2.0, 24.0));
    }
}

/// Of the sizes that are trained, which take the emulator too long.
#[cfg(feature = "gpu-tests")]
#[test]
fn gpu_attention_of_long_sequences() {
    let lengths = |bench: &mut Bench<'_, _>| {
        for (batch, sequence, heads, kv_heads, head_dim) in [(2, 1024, 3, 3, 64), (1, 2048, 4, 2, 128)] {
            // The results are small beside the values that they are means of.
            attention(bench, AttentionShape { batch, sequence, heads, kv_heads, head_dim }, (8.0, 64.0));
        }
    };
    super::on_gpu(None, lengths);
    super::on_gpu(Some(super::OLDER), lengths);
}

fn attention<D: Driver>(bench: &mut Bench<'_, D>, shape: AttentionShape, roundings: (f64, f64)) {
    let (batch, sequence, heads) = (shape.batch, shape.sequence, shape.heads);
    let rows = batch * sequence;
    let (qkv, d_out) = (random(rows * shape.row(), 0), random(rows * shape.output_row(), 1));
    let name = format!("{shape:?}");

    let (cpu, n) = (&bench.cpu, rows * shape.output_row());
    let (tqkv, td) = (bench.twin(&qkv), bench.twin(&d_out));
    let [mut tout, mut stats] = [n, 2 * rows * heads].map(|n| bench.twin(&vec![0.0; n]));
    let mut work = bench.twin(&vec![0.0; cpu.attention_workspace(shape)]);
    cpu.attention_forward(shape, &tqkv, &mut tout, &mut stats, &mut work).unwrap();
    let mut td_qkv = bench.twin(&vec![0.0; qkv.len()]);
    cpu.attention_backward(shape, &tqkv, &tout, &stats, &td, &mut td_qkv, &mut work).unwrap();

    let cuda = bench.cuda;
    let (cqkv, cd) = (bench.halves(&qkv), bench.halves(&d_out));
    let [mut out, mut d_qkv] = [n, qkv.len()].map(|n| bench.halves(&vec![f32::NAN; n]));
    let [mut stats, mut work] =
        [2 * rows * heads, cuda.attention_workspace(shape)].map(|n| bench.floats(&vec![f32::NAN; n]));
    cuda.attention_forward(shape, &cqkv, &mut out, &mut stats, &mut work).unwrap();
    bench.halves_are(&name, &out, &tout, roundings.0);
    cuda.attention_backward(shape, &cqkv, &out, &stats, &cd, &mut d_qkv, &mut work).unwrap();
    bench.halves_are(&format!("backward {name}"), &d_qkv, &td_qkv, roundings.1);
    let from = bench.results.len() - td_qkv.len();
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let pairs = bench.results[from..].iter().zip(td_qkv.iter());
    let off = squares(&mut pairs.map(|(got, expected)| f64::from(*got) - f64::from(*expected))).sqrt();
    let all = squares(&mut td_qkv.iter().map(|value| f64::from(*value))).sqrt();
    assert!(off <= UNIT * all, "backward {name}: off by {} units in all", off / all / UNIT);
}
