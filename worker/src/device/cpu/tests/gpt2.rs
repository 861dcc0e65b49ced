//! The kernels GPT-2 adds, against scalar definitions in float64: LayerNorm, GELU, biases and learned positions.

use super::super::{bias, elementwise, gelu, layernorm};
use super::{close, on_all, random};
use crate::device::{NormShape, Write};

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// `normed`, `1/σ` by its square, `dx`, `d_gain` and `d_bias` of one row after another.
fn naive_layernorm(norm: NormShape, sum: &[f64], affine: &[f32], dy: &[f32]) -> [Vec<f64>; 3] {
    let (n, count) = (norm.width, norm.width as f64);
    let (mut normed, mut dx, mut d_affine) = (Vec::new(), Vec::new(), vec![0.0f64; 2 * n]);
    for (x, dy) in sum.chunks(n).zip(dy.chunks(n)) {
        let mean = x.iter().sum::<f64>() / count;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        let inverse = 1.0 / (variance + f64::from(norm.epsilon)).sqrt();
        let hat: Vec<f64> = x.iter().map(|x| (x - mean) * inverse).collect();
        let g: Vec<f64> = (0..n).map(|i| f64::from(dy[i]) * f64::from(affine[i])).collect();
        let mean_g = g.iter().sum::<f64>() / count;
        let product = g.iter().zip(&hat).map(|(g, hat)| g * hat).sum::<f64>() / count;
        for i in 0..n {
            normed.push(hat[i] * f64::from(affine[i]) + f64::from(affine[n + i]));
            dx.push(inverse * (g[i] - mean_g - hat[i] * product));
            d_affine[i] += f64::from(dy[i]) * hat[i];
            d_affine[n + i] += f64::from(dy[i]);
        }
    }
    [normed, dx, d_affine]
}

#[test]
fn layernorm_and_its_backward() {
    for (rows, width) in [(67, 41), (33, 16), (5, 1), (40, 130)] {
        let norm = NormShape { rows, width, epsilon: 1e-5 };
        let n = rows * width;
        // A mean far from zero: a variance from the mean of squares would be off.
        let x: Vec<f32> = random(n, 0).iter().map(|x| x + 30.0).collect();
        let (delta, affine, dy) = (random(n, 1), random(2 * width, 2), random(n, 3));
        let forward = on_all("layernorm", |pool, isa| {
            let (mut sum, mut normed, mut statistics) = (vec![0.0; n], vec![f32::NAN; n], vec![0.0; 2 * rows]);
            let add = Some((&delta[..], &mut sum[..]));
            layernorm::forward(pool, isa, norm, &x, add, &affine, &mut normed, &mut statistics);
            let (mut alone, mut same) = (vec![f32::NAN; n], vec![0.0; 2 * rows]);
            layernorm::forward(pool, isa, norm, &sum, None, &affine, &mut alone, &mut same);
            assert!(alone == normed && same == statistics, "without a delta");
            [sum, normed, statistics].concat()
        });
        let (sum, statistics) = (&forward[..n], &forward[2 * n..]);
        let backward = |write| {
            on_all("layernorm backward", |pool, isa| {
                let (mut dx, mut d_affine) = (vec![1.0; n], vec![9.0; 2 * width]);
                let mut parts = vec![f32::NAN; layernorm::workspace(norm)];
                let (dx_to, to, parts) = (&mut dx, &mut d_affine, &mut parts);
                layernorm::backward(pool, isa, norm, sum, statistics, &affine, &dy, write, dx_to, to, parts);
                [dx, d_affine].concat()
            })
        };
        let [normed, dx, d_affine] = naive_layernorm(norm, &wide(sum), &affine, &dy);
        let shape = format!("layernorm {rows}x{width}");
        close(&shape, &forward[n..2 * n], &normed, 4e-6);
        let replaced = backward(Write::Replace);
        close(&format!("{shape} dx"), &replaced[..n], &dx, 4e-6);
        close(&format!("{shape} d affine"), &replaced[n..], &d_affine, 4e-6);
        let plus_one: Vec<f64> = dx.iter().map(|d| d + 1.0).collect();
        close(&format!("{shape} dx added"), &backward(Write::Add)[..n], &plus_one, 4e-6);
    }
}

#[test]
fn gelu_and_its_backward() {
    // Several tasks and a ragged end, and the far ends, where the exponential is held.
    let mut pre: Vec<f32> = random(40_003, 0).iter().map(|x| x * 4.0).collect();
    pre[..8].copy_from_slice(&[0.0, -0.0, 12.0, -12.0, 1e4, -1e4, f32::MAX, f32::MIN]);
    let d_act = random(pre.len(), 1);
    let act = on_all("gelu", |pool, isa| {
        let mut act = vec![f32::NAN; pre.len()];
        gelu::forward(pool, isa, &pre, &mut act);
        act
    });
    let slopes = on_all("gelu backward", |pool, isa| {
        let (mut p, mut d) = (pre.clone(), d_act.clone());
        gelu::backward(pool, isa, &mut p, &mut d);
        assert_eq!(d, act, "the activation comes back");
        p
    });
    let (scale, cube) = ((2.0 / std::f64::consts::PI).sqrt(), 0.044_715);
    let (mut expected, mut expected_d) = (Vec::new(), Vec::new());
    for (x, d) in wide(&pre).into_iter().zip(wide(&d_act)) {
        let u = (scale * (x + cube * x.powi(3))).clamp(-50.0, 50.0);
        let slope = if x.abs() > 20.0 { 0.0 } else { scale * (1.0 + 3.0 * cube * x * x) };
        expected.push(0.5 * x * (1.0 + u.tanh()));
        expected_d.push(d * (0.5 * (1.0 + u.tanh()) + 0.5 * x * slope / u.cosh().powi(2)));
    }
    for i in [6, 7] {
        assert!((f64::from(act[i]) - expected[i]).abs() <= 1e-6 * expected[i].abs() + 1e-30, "{}: {}", pre[i], act[i]);
    }
    close("gelu", &act[8..], &expected[8..], 1e-6);
    close("gelu ends", &act[..4], &expected[..4], 1e-6);
    close("gelu backward", &slopes, &expected_d, 1e-6);
}

#[test]
fn biases_are_added_to_every_row_and_their_gradients_summed_over_all() {
    for (rows, width) in [(1, 1), (70, 37), (200, 64), (33, 150)] {
        let (x, b) = (random(rows * width, 0), random(width, 1));
        let sum = on_all("bias", |pool, _| {
            let mut out = x.clone();
            bias::add(pool, width, rows, &b, &mut out);
            out
        });
        assert!((0..rows * width).all(|i| sum[i] == x[i] + b[i % width]), "{rows}x{width}");
        let got = on_all("bias gradient", |pool, isa| {
            let mut d = vec![f32::NAN; width];
            bias::gradient(pool, isa, width, rows, &x, &mut d);
            d
        });
        let expected: Vec<f64> = (0..width).map(|j| (0..rows).map(|i| f64::from(x[i * width + j])).sum()).collect();
        close(&format!("bias gradient {rows}x{width}"), &got, &expected, 1e-6);
    }
}

#[test]
fn positions_are_added_and_get_the_sum_over_the_sequences() {
    let (width, batch, sequence) = (21, 3, 40);
    let rows = batch * sequence;
    let tokens: Vec<u32> = (0..rows).map(|i| (i * 5 % 7) as u32).collect();
    let (table, positions, d_out) = (random(7 * width, 0), random(sequence * width, 1), random(rows * width, 2));
    let got = on_all("positions", |pool, _| {
        let (mut out, mut d) = (vec![f32::NAN; rows * width], vec![f32::NAN; sequence * width]);
        elementwise::embedding_forward(pool, width, &tokens, &table, Some((&positions, sequence)), &mut out);
        bias::position_backward(pool, width, batch, sequence, &d_out, &mut d);
        [out, d].concat()
    });
    let (out, d) = got.split_at(rows * width);
    for (i, value) in out.iter().enumerate() {
        let (row, column) = (i / width, i % width);
        let position = positions[row % sequence * width + column];
        assert_eq!(*value, table[tokens[row] as usize * width + column] + position, "row {row}, column {column}");
    }
    for i in 0..sequence * width {
        let of = |b: usize| d_out[b * sequence * width + i];
        assert_eq!(d[i], of(0) + of(1) + of(2), "element {i}");
    }
}
