//! What GPT-2 has beside Llama: LayerNorm, GELU, biases and learned positions.

use super::{Bench, cases, random};
use crate::device::cuda::driver::Driver;
use crate::device::{Device, NormShape, Part, PartMut, Write};

cases!(layernorm_and_its_backward, gelu_and_its_backward, biases, positions);

/// Rounded as RMSNorm is.
fn layernorm_and_its_backward<D: Driver>(bench: &mut Bench<'_, D>) {
    for (rows, width, first) in [(67, 40, 0), (5, 41, 3), (1700, 8, 0), (9, 776, 3), (9, 1032, 0), (3, 8192, 0)] {
        let norm = NormShape { rows, width, epsilon: 1e-5 };
        let n = rows * width;
        let (x, delta, affine) = (random(n, 0), random(n, 1), random(2 * width + first, 2));
        let (d_normed, d_x) = (random(n, 3), random(n, 4));
        for write in [Write::Replace, Write::Add] {
            let (tx, tdelta, taffine) = (bench.twin(&x), bench.twin(&delta), bench.twin(&affine));
            let [mut tsum, mut tnormed, mut tstats] = [n, n, 2 * rows].map(|n| bench.twin(&vec![0.0; n]));
            let (cpu, part) = (&bench.cpu, Part(&taffine, first));
            cpu.layernorm_forward(norm, &tx, Some((&tdelta, &mut tsum)), part, &mut tnormed, &mut tstats).unwrap();

            let cuda = bench.cuda;
            let (cx, cdelta, caffine) = (bench.halves(&x), bench.halves(&delta), bench.halves(&affine));
            let [mut sum, mut normed] = [n, n].map(|n| cuda.allocate_activation(n, "test").unwrap());
            let (mut stats, part) = (cuda.allocate(2 * rows, "test").unwrap(), Part(&caffine, first));
            cuda.layernorm_forward(norm, &cx, Some((&cdelta, &mut sum)), part, &mut normed, &mut stats).unwrap();
            bench.halves_are("sum", &sum, &tsum, 1.0);
            bench.halves_are("norm", &normed, &tnormed, 2.0);

            // Both sides go on from the same stream, and from the statistics of that.
            let cpu = &bench.cpu;
            let mut stream = vec![0.0; n];
            cuda.download_activation(Part(&sum, 0), &mut stream).unwrap();
            let (tx, td_normed) = (bench.twin(&stream), bench.twin(&d_normed));
            cpu.layernorm_forward(norm, &tx, None, Part(&taffine, first), &mut tnormed, &mut tstats).unwrap();
            let (mut td_x, mut td_affine) = (bench.twin(&d_x), bench.twin(&vec![9.0; 2 * width + 1]));
            let mut work = bench.twin(&vec![0.0; cpu.layernorm_workspace(norm)]);
            let (to, part) = (PartMut(&mut td_affine, 1), Part(&taffine, first));
            cpu.layernorm_backward(norm, &tx, &tstats, part, &td_normed, write, &mut td_x, to, &mut work).unwrap();

            let (cd_normed, mut cd_x, stats) = (bench.halves(&d_normed), bench.halves(&d_x), bench.floats(&tstats));
            let mut cd_affine = bench.floats(&vec![9.0; 2 * width + 1]);
            let mut work = bench.floats(&vec![f32::NAN; cuda.layernorm_workspace(norm)]);
            let (to, part) = (PartMut(&mut cd_affine, 1), Part(&caffine, first));
            cuda.layernorm_backward(norm, &sum, &stats, part, &cd_normed, write, &mut cd_x, to, &mut work).unwrap();
            bench.halves_are("gradient of the stream", &cd_x, &td_x, 2.0);
            bench.floats_are("gradient of gain and bias", &cd_affine, &td_affine, 1e-5);
        }
    }
}

/// One rounding of each result.
fn gelu_and_its_backward<D: Driver>(bench: &mut Bench<'_, D>) {
    let n = 5001;
    let pre: Vec<f32> = random(n, 0).iter().map(|x| x * 4.0).collect();
    let d_act = random(n, 1);
    let (mut tpre, mut td_act, mut tact) = (bench.twin(&pre), bench.twin(&d_act), bench.twin(&vec![0.0; n]));
    bench.cpu.gelu_forward(n, &tpre, &mut tact).unwrap();
    bench.cpu.gelu_backward(n, &mut tpre, &mut td_act).unwrap();
    let (mut pre, mut d_act) = (bench.halves(&pre), bench.halves(&d_act));
    let mut act = bench.cuda.allocate_activation(n, "test").unwrap();
    bench.cuda.gelu_forward(n, &pre, &mut act).unwrap();
    bench.cuda.gelu_backward(n, &mut pre, &mut d_act).unwrap();
    bench.halves_are("gelu", &act, &tact, 1.0);
    bench.halves_are("its gradient", &pre, &tpre, 1.0);
    bench.halves_are("the activation again", &d_act, &td_act, 1.0);
}

/// The sum is rounded once; the gradient is float32.
fn biases<D: Driver>(bench: &mut Bench<'_, D>) {
    for (rows, width) in [(70, 40), (9, 37), (1200, 264)] {
        let (bias, out) = (random(width + 3, 0), random(rows * width, 1));
        let (tbias, mut tout, mut td_bias) = (bench.twin(&bias), bench.twin(&out), bench.twin(&vec![9.0; width + 1]));
        let mut work = bench.twin(&vec![0.0; bench.cpu.bias_workspace(width, rows)]);
        bench.cpu.bias_gradient(width, rows, &tout, PartMut(&mut td_bias, 1), &mut work).unwrap();
        bench.cpu.add_bias(width, rows, Part(&tbias, 3), &mut tout).unwrap();
        let cuda = bench.cuda;
        let (cbias, mut cout, mut cd_bias) =
            (bench.halves(&bias), bench.halves(&out), bench.floats(&vec![9.0; width + 1]));
        let mut work = bench.floats(&vec![f32::NAN; cuda.bias_workspace(width, rows)]);
        cuda.bias_gradient(width, rows, &cout, PartMut(&mut cd_bias, 1), &mut work).unwrap();
        cuda.add_bias(width, rows, Part(&cbias, 3), &mut cout).unwrap();
        bench.halves_are("bias", &cout, &tout, 1.0);
        bench.floats_are("gradient of the bias", &cd_bias, &td_bias, 1e-5);
    }
}

/// The sum of two rows is rounded once; gradients are float32.
fn positions<D: Driver>(bench: &mut Bench<'_, D>) {
    for width in [8, 37] {
        let (batch, sequence, rows) = (3, 5, 15);
        let tokens: Vec<u32> = (0..rows as u32).map(|i| i * 7 % 11).collect();
        let (table, positions, d_out) = (random(11 * width, 0), random(6 * width + 1, 1), random(rows * width, 2));
        let (ttable, tpositions, td_out) = (bench.twin(&table), bench.twin(&positions), bench.twin(&d_out));
        let (mut tout, mut td) = (bench.twin(&vec![0.0; rows * width]), bench.twin(&vec![9.0; 6 * width + 1]));
        let learned = Some((Part(&tpositions, 1), sequence));
        bench.cpu.embedding_forward(width, rows, &tokens, Part(&ttable, 0), learned, &mut tout).unwrap();
        bench.cpu.position_backward(width, batch, sequence, &td_out, PartMut(&mut td, 1)).unwrap();

        let (cuda, tokens) = (bench.cuda, bench.tokens(&tokens));
        let (table, positions, d_out) = (bench.halves(&table), bench.halves(&positions), bench.halves(&d_out));
        let mut out = cuda.allocate_activation(rows * width, "test").unwrap();
        let mut d = bench.floats(&vec![9.0; 6 * width + 1]);
        let learned = Some((Part(&positions, 1), sequence));
        cuda.embedding_forward(width, rows, &tokens, Part(&table, 0), learned, &mut out).unwrap();
        cuda.position_backward(width, batch, sequence, &d_out, PartMut(&mut d, 1)).unwrap();
        bench.halves_are("embedding with positions", &out, &tout, 1.0);
        bench.floats_are("gradient of the positions", &d, &td, 1e-6);
    }
}
