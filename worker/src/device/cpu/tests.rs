//! Kernels against scalar definitions in float64, on every instruction set this CPU has, with equal bits on all.

mod gpt2;

use super::lanes::Isa;
use super::pool::Pool;
use super::{attention, attention_backward, elementwise, loss, state};
use crate::device::{AttentionShape, NormShape, Write};
use crate::exact::GRID;
use crate::rng::{Counter, Place};

fn random(n: usize, lane: u32) -> Vec<f32> {
    let counter = Counter::new(8, Place::Test, lane);
    (0..n).map(|i| counter.normal(i as u64) as f32).collect()
}

fn close(name: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let scale = expected.iter().fold(1e-3f64, |m, e| m.max(e.abs()));
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*g) - e).abs() <= tolerance * scale, "{name}[{i}]: {g}, expected {e}");
    }
}

/// Runs a kernel on every instruction set and several thread counts; all must give the same bits, which are returned.
fn on_all(name: &str, run: impl Fn(&Pool, Isa) -> Vec<f32>) -> Vec<f32> {
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        for threads in [1, 3] {
            let got = run(&Pool::new(threads).unwrap(), isa);
            let expected = first.get_or_insert_with(|| got.clone());
            for (i, (a, b)) in expected.iter().zip(&got).enumerate() {
                assert_eq!(a.to_bits(), b.to_bits(), "{name}[{i}] on {isa:?} with {threads} threads: {b}, first {a}");
            }
        }
    }
    first.unwrap()
}

#[test]
fn swiglu_and_its_backward() {
    let (width, rows) = (37, 70);
    let (gate_up, d_act) = (random(2 * width * rows, 0), random(width * rows, 1));
    let gate_up: Vec<f32> = gate_up.iter().map(|x| x * 8.0).collect();
    let act = on_all("swiglu", |pool, isa| {
        let mut act = vec![0.0; width * rows];
        elementwise::swiglu_forward(pool, isa, width, rows, &gate_up, &mut act);
        act
    });
    let backward = on_all("swiglu backward", |pool, isa| {
        let (mut g, mut d) = (gate_up.clone(), d_act.clone());
        elementwise::swiglu_backward(pool, isa, width, rows, &mut g, &mut d);
        assert_eq!(d, act, "the activation comes back");
        g
    });
    let (mut expected, mut d_expected) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let at = |i: usize| f64::from(gate_up[2 * row * width + i]);
        let (mut dg, mut du) = (Vec::new(), Vec::new());
        for i in 0..width {
            let (g, u, d) = (at(i), at(width + i), f64::from(d_act[row * width + i]));
            let s = 1.0 / (1.0 + (-g).exp());
            expected.push(g * s * u);
            dg.push(d * u * s * (1.0 + g * (1.0 - s)));
            du.push(d * g * s);
        }
        d_expected.extend(dg.into_iter().chain(du));
    }
    close("swiglu", &act, &expected, 1e-6);
    close("swiglu backward", &backward, &d_expected, 1e-6);
}

#[test]
fn rmsnorm_and_its_backward() {
    let norm = NormShape { rows: 67, width: 41, epsilon: 1e-5 };
    let n = norm.rows * norm.width;
    let (x, delta, weight, dy) = (random(n, 0), random(n, 1), random(norm.width, 2), random(n, 3));
    let forward = on_all("norm", |pool, isa| {
        let (mut sum, mut normed, mut scale) = (vec![0.0; n], vec![0.0; n], vec![0.0; norm.rows]);
        let add = Some((&delta[..], &mut sum[..]));
        elementwise::rmsnorm_forward(pool, isa, norm, &x, add, &weight, &mut normed, &mut scale);
        [sum, normed, scale].concat()
    });
    let (sum, scale) = (&forward[..n], &forward[2 * n..]);
    let backward = on_all("norm backward", |pool, isa| {
        let (mut dx, mut dw) = (vec![1.0; n], vec![9.0; norm.width]);
        let mut workspace = vec![7.0; elementwise::norm_workspace(norm)];
        let write = Write::Add;
        elementwise::rmsnorm_backward(
            pool,
            isa,
            norm,
            sum,
            scale,
            &weight,
            &dy,
            write,
            &mut dx,
            &mut dw,
            &mut workspace,
        );
        [dx, dw].concat()
    });
    let (mut normed, mut dx, mut dw) = (Vec::new(), Vec::new(), vec![0.0f64; norm.width]);
    for row in 0..norm.rows {
        let at = row * norm.width;
        let v: Vec<f64> = (0..norm.width).map(|i| f64::from(x[at + i]) + f64::from(delta[at + i])).collect();
        let s = 1.0 / (v.iter().map(|v| v * v).sum::<f64>() / norm.width as f64 + 1e-5).sqrt();
        let g: Vec<f64> = (0..norm.width).map(|i| f64::from(dy[at + i]) * f64::from(weight[i])).collect();
        let dot = g.iter().zip(&v).map(|(g, v)| g * v).sum::<f64>() / norm.width as f64;
        for i in 0..norm.width {
            normed.push(v[i] * s * f64::from(weight[i]));
            dx.push(1.0 + s * g[i] - s * s * s * v[i] * dot);
            dw[i] += f64::from(dy[at + i]) * v[i] * s;
        }
    }
    close("norm", &forward[n..2 * n], &normed, 1e-6);
    close("norm dx", &backward[..n], &dx, 1e-6);
    close("norm dw", &backward[n..], &dw, 1e-6);
}

#[test]
fn rope_turns_pairs_and_back() {
    let shape = AttentionShape { batch: 2, sequence: 5, heads: 3, kv_heads: 1, head_dim: 10 };
    let n = 10 * shape.row();
    let qkv = random(n, 0);
    let angle = |t: usize, i: usize| (t as f32) * 0.3 + i as f32;
    let table: Vec<f32> = (0..5)
        .flat_map(|t| (0..5).map(move |i| angle(t, i).cos()).chain((0..5).map(move |i| angle(t, i).sin())))
        .collect();
    let turned = on_all("rope", |pool, isa| {
        let mut x = qkv.clone();
        elementwise::rope(pool, isa, shape, false, &table, &mut x);
        x
    });
    let mut expected: Vec<f64> = qkv.iter().map(|x| f64::from(*x)).collect();
    for row in 0..10 {
        for head in 0..4 {
            for i in 0..5 {
                let at = row * shape.row() + head * 10 + i;
                let (c, s) = (f64::from(table[row % 5 * 10 + i]), f64::from(table[row % 5 * 10 + 5 + i]));
                let (a, b) = (expected[at], expected[at + 5]);
                (expected[at], expected[at + 5]) = (a * c - b * s, b * c + a * s);
            }
        }
    }
    close("rope", &turned, &expected, 1e-6);
    let mut back = turned;
    elementwise::rope(&Pool::new(1).unwrap(), Isa::detect(), shape, true, &table, &mut back);
    close("rope back", &back, &qkv.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), 1e-6);
}

#[test]
fn cross_entropy_and_its_gradient() {
    for vocabulary in [5, 16, 61] {
        let rows = 40;
        let logits: Vec<f32> = random(rows * vocabulary, 0).iter().map(|x| x * 6.0).collect();
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % vocabulary) as u32).collect();
        let result = on_all("cross-entropy", |pool, isa| {
            let mut d = logits.clone();
            let with = loss::cross_entropy(pool, isa, vocabulary, &targets, Some(0.25), &mut d);
            let mut scratch = logits.clone();
            assert_eq!(with, loss::cross_entropy(pool, isa, vocabulary, &targets, None, &mut scratch));
            d.push(with as f32);
            d
        });
        let (mut sum, mut expected) = (0.0, Vec::new());
        for (row, target) in logits.chunks(vocabulary).zip(&targets) {
            let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            sum += total.ln() - f64::from(row[*target as usize]);
            for (i, x) in row.iter().enumerate() {
                let hot = if i == *target as usize { 1.0 } else { 0.0 };
                expected.push(0.25 * (f64::from(*x).exp() / total - hot));
            }
        }
        close("loss", &result[rows * vocabulary..], &[sum], 1e-6);
        close("d logits", &result[..rows * vocabulary], &expected, 1e-6);
    }
}

/// Causal attention of one query head by its definition: output and, from `d_out`, the gradients of q, k and v.
fn naive_attention(s: AttentionShape, qkv: &[f32], d_out: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (t, hd, row) = (s.sequence, s.head_dim, s.row());
    let (mut out, mut d) = (vec![0.0; s.batch * t * s.output_row()], vec![0.0; qkv.len()]);
    let x = |i: usize| f64::from(qkv[i]);
    for (b, h) in (0..s.batch).flat_map(|b| (0..s.heads).map(move |h| (b, h))) {
        let kv = h / (s.heads / s.kv_heads);
        let (q, k) = (b * t * row + h * hd, b * t * row + (s.heads + kv) * hd);
        let v = k + s.kv_heads * hd;
        for i in 0..t {
            let scale = 1.0 / (hd as f64).sqrt();
            let scores: Vec<f64> = (0..=i)
                .map(|j| (0..hd).map(|e| x(q + i * row + e) * x(k + j * row + e)).sum::<f64>() * scale)
                .collect();
            let total: f64 = scores.iter().map(|s| s.exp()).sum();
            let p: Vec<f64> = scores.iter().map(|s| s.exp() / total).collect();
            let o = (b * t + i) * s.output_row() + h * hd;
            let g: Vec<f64> = (0..hd).map(|e| f64::from(d_out[o + e])).collect();
            for e in 0..hd {
                out[o + e] = (0..=i).map(|j| p[j] * x(v + j * row + e)).sum();
            }
            let dp: Vec<f64> = (0..=i).map(|j| (0..hd).map(|e| g[e] * x(v + j * row + e)).sum()).collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
            for j in 0..=i {
                let ds = p[j] * (dp[j] - mean) * scale;
                for e in 0..hd {
                    d[v + j * row + e] += p[j] * g[e];
                    d[q + i * row + e] += ds * x(k + j * row + e);
                    d[k + j * row + e] += ds * x(q + i * row + e);
                }
            }
        }
    }
    (out, d)
}

#[test]
fn attention_and_its_backward() {
    for (batch, sequence, heads, kv_heads, head_dim) in
        [(1, 1, 1, 1, 2), (2, 37, 4, 2, 6), (1, 70, 2, 1, 32), (1, 33, 3, 3, 48), (2, 96, 2, 2, 64), (1, 65, 1, 1, 16)]
    {
        let shape = AttentionShape { batch, sequence, heads, kv_heads, head_dim };
        let tokens = batch * sequence;
        let (qkv, d_out) = (random(tokens * shape.row(), 0), random(tokens * shape.output_row(), 1));
        let scratch = attention::Padded::new(shape).scratch();
        let forward = |pool: &Pool, isa| {
            let mut out = vec![0.0; tokens * shape.output_row()];
            let mut statistics = vec![0.0; 2 * tokens * heads];
            let mut workspace = vec![f32::NAN; scratch * pool.len()];
            attention::forward(pool, isa, shape, &qkv, &mut out, &mut statistics, &mut workspace);
            (out, statistics)
        };
        let out = on_all("attention", |pool, isa| forward(pool, isa).0);
        let backward = on_all("attention backward", |pool, isa| {
            let (out, statistics) = forward(pool, isa);
            let mut d = vec![f32::NAN; qkv.len()];
            let mut workspace = vec![f32::NAN; scratch * pool.len()];
            attention_backward::backward(pool, isa, shape, &qkv, &out, &statistics, &d_out, &mut d, &mut workspace);
            d
        });
        let (expected, d_expected) = naive_attention(shape, &qkv, &d_out);
        close(&format!("{shape:?}"), &out, &expected, 2e-6);
        close(&format!("backward {shape:?}"), &backward, &d_expected, 4e-6);
    }
}

#[test]
fn embedding_rows_are_fetched_and_added_in_order() {
    let (width, tokens) = (70, [3u32, 0, 3, 2]);
    let (table, d_out) = (random(4 * width, 0), random(4 * width, 1));
    let got = on_all("embedding", |pool, _| {
        let (mut out, mut d) = (vec![0.0; 4 * width], vec![0.5; 4 * width]);
        elementwise::embedding_forward(pool, width, &tokens, &table, None, &mut out);
        elementwise::embedding_backward(pool, width, &tokens, &d_out, &mut d);
        [out, d].concat()
    });
    assert_eq!(got[width..2 * width], table[..width]);
    let d = &got[4 * width..];
    assert_eq!(d[3 * width], 0.5 + d_out[0] + d_out[2 * width]);
    assert_eq!(d[width], 0.5);
}

#[test]
fn the_grid_has_the_same_bits_on_every_instruction_set() {
    // Ties, signs, tiny and large values, and a ragged end.
    let mut values = random(100_003, 0);
    for (i, v) in values.iter_mut().enumerate() {
        *v = match i % 5 {
            0 => (i as f32 + 0.5) / GRID as f32,
            1 => -(i as f32 + 0.5) / GRID as f32,
            2 => *v * 1e-12,
            3 => *v * 1e5,
            _ => *v,
        };
    }
    let expected: Vec<i64> = values.iter().map(|v| 2 * (f64::from(*v) * GRID).round_ties_even() as i64).collect();
    for isa in Isa::available() {
        let (pool, mut sums) = (Pool::new(2).unwrap(), vec![99; values.len()]);
        for write in [Write::Replace, Write::Add] {
            assert_eq!(state::accumulate_exact(&pool, isa, &values, i64::MAX / 2, write, &mut sums), None);
        }
        assert_eq!(sums, expected, "{isa:?}");
    }
}

#[test]
fn the_numeric_identity_names_the_locked_libraries() {
    let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock")).unwrap();
    for (name, version) in super::LIBRARIES.into_iter().chain([("gemm", super::gemm::FALLBACK)]) {
        let entry = format!("name = \"{name}\"\nversion = \"{version}\"\n");
        assert!(lock.contains(&entry), "{name} {version} is not what Cargo.lock has; raise it here");
    }
}

#[test]
fn axpy_adds_a_multiple() {
    let (x, y) = (random(70_000, 0), random(70_000, 1));
    let got = on_all("axpy", |pool, _| {
        let mut sum = y.clone();
        state::axpy(pool, 0.5, &x, &mut sum);
        sum
    });
    assert!((0..70_000).all(|i| got[i] == y[i] + 0.5 * x[i]));
}
