//! What walks over rows: embedding, norms, rotary positions, SwiGLU.

use super::{Bench, cases, random};
use crate::device::cuda::driver::Driver;
use crate::device::{AttentionShape, Device, NormShape, Part, PartMut, Write};

cases!(embeddings, embeddings_in_groups, rmsnorm_and_its_backward, rope_and_back, swiglu_and_its_backward);

/// Rows are copied, and gradients of exact numbers added in float32: in the CPU's order only within a piece.
fn embeddings<D: Driver>(bench: &mut Bench<'_, D>) {
    for width in [8, 37, 72] {
        let tokens: Vec<u32> = (0..200u32).map(|i| if i % 3 == 0 { 5 } else { i * 7 % 11 }).collect();
        let (table, d_out, d_table) = (random(12 * width, 0), random(200 * width, 1), random(12 * width + 1, 2));
        let twin_tokens = tokens.clone();
        let (ttable, td_out) = (bench.twin(&table), bench.twin(&d_out));
        let (mut tout, mut td_table) = (bench.twin(&vec![0.0; 200 * width]), bench.twin(&d_table));
        bench.cpu.embedding_forward(width, 200, &twin_tokens, Part(&ttable, width), None, &mut tout).unwrap();
        bench.cpu.embedding_backward(width, 200, &twin_tokens, &td_out, PartMut(&mut td_table, 1)).unwrap();

        let (cuda, tokens) = (bench.cuda, bench.tokens(&tokens));
        let (ctable, cd_out, mut cd_table) = (bench.halves(&table), bench.halves(&d_out), bench.floats(&d_table));
        let mut out = cuda.allocate_activation(200 * width, "test").unwrap();
        cuda.embedding_forward(width, 200, &tokens, Part(&ctable, width), None, &mut out).unwrap();
        cuda.embedding_backward(width, 200, &tokens, &cd_out, PartMut(&mut cd_table, 1)).unwrap();
        bench.halves_are("embedding", &out, &tout, 0.0);
        bench.floats_are("gradient of the table", &cd_table, &td_table, 1e-6);
    }
}

/// More pieces than the scratch memory holds at a time: 16 Mi numbers, so 2,048 pieces of 8,192.
fn embeddings_in_groups<D: Driver>(bench: &mut Bench<'_, D>) {
    let (width, rows) = (8192, 2100);
    let tokens: Vec<u32> = (0..rows as u32).collect();
    let d_out: Vec<f32> = (0..rows * width).map(|i| (i / width % 100 + i % 3) as f32).collect();
    let (cuda, tokens) = (bench.cuda, bench.tokens(&tokens));
    let (d_out_cuda, mut d_table) = (bench.halves(&d_out), cuda.allocate(rows * width, "test").unwrap());
    cuda.embedding_backward(width, rows, &tokens, &d_out_cuda, PartMut(&mut d_table, 0)).unwrap();
    bench.floats_are("gradient of the table", &d_table, &d_out, 0.0);
}

/// The sum and the norm are each rounded once; the gradient of the stream once, and once more where added to.
fn rmsnorm_and_its_backward<D: Driver>(bench: &mut Bench<'_, D>) {
    for (rows, width, first) in [(67, 40, 0), (5, 41, 3), (1700, 8, 0), (9, 776, 3), (9, 1032, 0), (3, 8192, 0)] {
        let norm = NormShape { rows, width, epsilon: 1e-5 };
        let n = rows * width;
        let (x, delta, weight) = (random(n, 0), random(n, 1), random(width + first, 2));
        let (d_normed, d_x) = (random(n, 3), random(n, 4));
        for fused in [false, true] {
            let (tx, tdelta, tweight) = (bench.twin(&x), bench.twin(&delta), bench.twin(&weight));
            let [mut tsum, mut tnormed, mut tscale] = [n, n, rows].map(|n| bench.twin(&vec![0.0; n]));
            let add = fused.then_some((&tdelta, &mut tsum));
            bench.cpu.rmsnorm_forward(norm, &tx, add, Part(&tweight, first), &mut tnormed, &mut tscale).unwrap();

            let cuda = bench.cuda;
            let (cx, cdelta, cweight) = (bench.halves(&x), bench.halves(&delta), bench.halves(&weight));
            let [mut sum, mut normed] = [n, n].map(|n| cuda.allocate_activation(n, "test").unwrap());
            let mut scale = cuda.allocate(rows, "test").unwrap();
            let add = fused.then_some((&cdelta, &mut sum));
            cuda.rmsnorm_forward(norm, &cx, add, Part(&cweight, first), &mut normed, &mut scale).unwrap();
            bench.halves_are("sum", &sum, &tsum, 1.0);
            bench.halves_are("norm", &normed, &tnormed, 2.0);
            bench.floats_are("scale", &scale, &tscale, 1e-2);

            // Both sides go on from the same stream.
            let mut stream = vec![0.0; n];
            cuda.download_activation(Part(if fused { &sum } else { &cx }, 0), &mut stream).unwrap();
            let (tx, td_normed) = (bench.twin(&stream), bench.twin(&d_normed));
            let mut tnormed = bench.twin(&vec![0.0; n]);
            bench.cpu.rmsnorm_forward(norm, &tx, None, Part(&tweight, first), &mut tnormed, &mut tscale).unwrap();
            let (mut td_x, mut td_weight) = (bench.twin(&d_x), bench.twin(&vec![9.0; width + 1]));
            let mut work = bench.twin(&vec![0.0; bench.cpu.norm_workspace(norm)]);
            let write = if fused { Write::Add } else { Write::Replace };
            let (to, cpu) = (PartMut(&mut td_weight, 1), &bench.cpu);
            let part = Part(&tweight, first);
            cpu.rmsnorm_backward(norm, &tx, &tscale, part, &td_normed, write, &mut td_x, to, &mut work).unwrap();

            let (cx, cd_normed, mut cd_x) = (bench.halves(&stream), bench.halves(&d_normed), bench.halves(&d_x));
            let (cscale, mut cd_weight) = (bench.floats(&tscale), bench.floats(&vec![9.0; width + 1]));
            let mut work = bench.floats(&vec![f32::NAN; cuda.norm_workspace(norm)]);
            let (to, part) = (PartMut(&mut cd_weight, 1), Part(&cweight, first));
            cuda.rmsnorm_backward(norm, &cx, &cscale, part, &cd_normed, write, &mut cd_x, to, &mut work).unwrap();
            bench.halves_are("gradient of the stream", &cd_x, &td_x, 2.0);
            bench.floats_are("gradient of the gain", &cd_weight, &td_weight, 1e-5);
        }
    }
}

/// One rounding each way.
fn rope_and_back<D: Driver>(bench: &mut Bench<'_, D>) {
    for (heads, kv_heads, head_dim) in [(3, 1, 10), (4, 2, 64)] {
        let shape = AttentionShape { batch: 2, sequence: 5, heads, kv_heads, head_dim };
        let (qkv, half) = (random(10 * shape.row(), 0), head_dim / 2);
        let angle = |t: usize, i: usize| t as f32 * 0.3 + i as f32;
        let table: Vec<f32> = (0..5)
            .flat_map(|t| (0..half).map(move |i| angle(t, i).cos()).chain((0..half).map(move |i| angle(t, i).sin())))
            .collect();
        let (ttable, ctable) = (bench.twin(&table), bench.floats(&table));
        let (mut twin, mut turned) = (bench.twin(&qkv), bench.halves(&qkv));
        for inverse in [false, true] {
            bench.cpu.rope(shape, inverse, &ttable, &mut twin).unwrap();
            bench.cuda.rope(shape, inverse, &ctable, &mut turned).unwrap();
            bench.halves_are("rope", &turned, &twin, if inverse { 2.0 } else { 1.0 });
        }
    }
}

/// One rounding of each result.
fn swiglu_and_its_backward<D: Driver>(bench: &mut Bench<'_, D>) {
    for (width, rows) in [(40, 70), (37, 9)] {
        let (gate_up, d_act) = (random(2 * width * rows, 0), random(width * rows, 1));
        let gate_up: Vec<f32> = gate_up.iter().map(|x| x * 4.0).collect();
        let (mut tgate_up, mut td_act) = (bench.twin(&gate_up), bench.twin(&d_act));
        let mut tact = bench.twin(&vec![0.0; width * rows]);
        bench.cpu.swiglu_forward(width, rows, &tgate_up, &mut tact).unwrap();
        bench.cpu.swiglu_backward(width, rows, &mut tgate_up, &mut td_act).unwrap();

        let cuda = bench.cuda;
        let (mut gate_up, mut d_act) = (bench.halves(&gate_up), bench.halves(&d_act));
        let mut act = cuda.allocate_activation(width * rows, "test").unwrap();
        cuda.swiglu_forward(width, rows, &gate_up, &mut act).unwrap();
        cuda.swiglu_backward(width, rows, &mut gate_up, &mut d_act).unwrap();
        bench.halves_are("swiglu", &act, &tact, 1.0);
        bench.halves_are("gradient of gate and up", &gate_up, &tgate_up, 1.0);
        bench.halves_are("the activation again", &d_act, &td_act, 1.0);
    }
}
