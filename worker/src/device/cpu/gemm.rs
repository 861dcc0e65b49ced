//! Matrix products on faer's kernels.
//!
//! A product is cut into tiles by its shape alone, and each tile is one single-threaded call of faer. So the bits of
//! an element depend on the shape only, without relying on how the library would split the work among threads. Inside
//! a tile faer sums in blocks of fixed depth, in order.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::pool::{Pool, Shared};
use crate::device::{MatmulShape, Product, Write};

/// Multiply-adds below which a product is one tile.
const SMALL: usize = 1 << 20;
/// Multiply-adds of one tile at least; a smaller one would spend its time on copying its operands together.
const TILE: usize = 24 << 20;
/// Tiles of one product at most.
const MOST: usize = 64;

/// `c (+)= product of a and b`; slices start at the matrices' first elements.
pub(super) fn gemm(
    pool: &Pool,
    product: Product,
    shape: MatmulShape,
    a: &[f32],
    b: &[f32],
    write: Write,
    c: &mut [f32],
) {
    let MatmulShape { m, n, k, .. } = shape;
    assert!(a.len() >= m * k && b.len() >= n * k && c.len() >= m * n, "operands cover {shape:?}");
    let (rows, columns) = tiles(shape);
    let out = Shared::new(&mut c[..m * n]);
    pool.each(m.div_ceil(rows) * n.div_ceil(columns), |tile| {
        let across = n.div_ceil(columns);
        let (top, left) = (tile / across * rows, tile % across * columns);
        let (height, width) = (rows.min(m - top), columns.min(n - left));
        let (a_at, a_row, a_column) = match product {
            Product::NN | Product::NT => (top * k, k, 1),
            Product::TN => (top, 1, m),
        };
        let (b_at, b_row, b_column) = match product {
            Product::NN | Product::TN => (left, n, 1),
            Product::NT => (left * k, 1, k),
        };
        // SAFETY: the assertion above covers every element the strides reach; tiles of C do not overlap.
        unsafe {
            let a = MatRef::from_raw_parts(a.as_ptr().add(a_at), height, k, a_row as isize, a_column as isize);
            let b = MatRef::from_raw_parts(b.as_ptr().add(b_at), k, width, b_row as isize, b_column as isize);
            let c = MatMut::from_raw_parts_mut(out.at(top * n + left), height, width, n as isize, 1);
            let accum = if write == Write::Add { Accum::Add } else { Accum::Replace };
            matmul(c, accum, a, b, 1.0f32, Par::Seq);
        }
    });
}

/// The height and width of a product's tiles.
fn tiles(shape: MatmulShape) -> (usize, usize) {
    let MatmulShape { m, n, k, .. } = shape;
    let work = m.saturating_mul(n).saturating_mul(k);
    if work <= SMALL {
        return (m.max(1), n.max(1));
    }
    let count = (work / TILE).clamp(2, MOST);
    let (mut height, mut width, mut tiles) = (m, n, 1);
    // Halve the longer side again and again: near-square tiles copy least. 96 and 4 are the sides of faer's own tiles.
    while tiles < count && height.max(width) > 96 {
        if height >= width {
            height = height.div_ceil(2).next_multiple_of(32);
        } else {
            width = width.div_ceil(2).next_multiple_of(96);
        }
        tiles = m.div_ceil(height) * n.div_ceil(width);
    }
    (height, width)
}

/// What decides how the products add up beyond the libraries' versions. With vectors of AVX2 or AVX-512 the sums are
/// cut at fixed lengths; elsewhere the fallback cuts them by the sizes of the caches, so those are part of the
/// arithmetic.
pub(super) fn identity() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "products-avx512".into();
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "products-avx2".into();
        }
    }
    let size = |index: usize| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        std::fs::read_to_string(path).map_or_else(|_| "?".into(), |text| text.trim().to_string())
    };
    let caches: Vec<String> = (0..4).map(size).collect();
    format!("products-portable gemm-{FALLBACK} caches-{}", caches.join("/"))
}

/// The locked version of the library that makes the products where there are no wide vectors.
pub(super) const FALLBACK: &str = "0.19.0";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Counter, Place};

    fn random(n: usize, lane: u32) -> Vec<f32> {
        let counter = Counter::new(3, Place::Test, lane);
        (0..n).map(|i| counter.normal(i as u64) as f32).collect()
    }

    fn naive(product: Product, s: MatmulShape, a: &[f32], b: &[f32]) -> Vec<f64> {
        let mut c = vec![0.0; s.m * s.n];
        for i in 0..s.m {
            for j in 0..s.n {
                c[i * s.n + j] = (0..s.k)
                    .map(|l| {
                        let x = if product == Product::TN { a[l * s.m + i] } else { a[i * s.k + l] };
                        let y = if product == Product::NT { b[j * s.k + l] } else { b[l * s.n + j] };
                        f64::from(x) * f64::from(y)
                    })
                    .sum();
            }
        }
        c
    }

    #[test]
    fn agrees_with_the_definition_and_is_the_same_for_every_thread_count() {
        for (m, n, k) in [(1, 1, 1), (37, 24, 16), (1, 50, 64), (130, 97, 33), (256, 192, 600), (700, 96, 128)] {
            let shape = MatmulShape::new(m, n, k);
            let (a, b, old) = (random(m * k, 0), random(n * k, 1), random(m * n, 2));
            for product in [Product::NN, Product::NT, Product::TN] {
                let expected = naive(product, shape, &a, &b);
                let mut first: Option<Vec<f32>> = None;
                for threads in 1..=4 {
                    let pool = Pool::new(threads).unwrap();
                    let mut c = old.clone();
                    gemm(&pool, product, shape, &a, &b, Write::Add, &mut c);
                    for i in 0..m * n {
                        let error = f64::from(c[i]) - f64::from(old[i]) - expected[i];
                        assert!(error.abs() < 1e-5 * (k as f64).sqrt() * 4.0, "{product:?} {shape:?}: {error}");
                    }
                    assert_eq!(first.get_or_insert_with(|| c.clone()), &c, "{product:?} {shape:?} {threads} threads");
                }
            }
        }
    }
}
