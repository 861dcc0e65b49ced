//! Matrix products as they are defined: bfloat16 operands, float32 sums in the order of the inner index.

use crate::device::Product;
use crate::device::cuda::bf16;
use crate::device::cuda::driver::{After, Element, ProductKey};

/// Bytes from the first element of A, B and C to the last.
pub(super) fn bytes(key: &ProductKey) -> [usize; 3] {
    let ProductKey { m, n, k, result, .. } = *key;
    let size = if result == Element::Bfloat16 { 2 } else { 4 };
    [2 * m * k, 2 * k * n, size * m * n]
}

/// Makes the product.
///
/// # Safety
/// The addresses have as many bytes as [`bytes`] says, the bias one number a column, and what is kept as many as C.
pub(super) unsafe fn run(key: &ProductKey, [a, b, c]: [u64; 3], after: After) {
    let ProductKey { product, m, n, k, result, add, .. } = *key;
    // Distances of A's elements along m and k, and of B's along k and n.
    let (a_steps, b_steps) = match product {
        Product::NN => ((k, 1), (n, 1)),
        Product::NT => ((k, 1), (1, k)),
        Product::TN => ((1, m), (n, 1)),
    };
    let (a, b) = (a as *const u16, b as *const u16);
    for i in 0..m {
        for j in 0..n {
            let mut sum = 0.0f32;
            // SAFETY: all indices lie within the matrices, which the caller vouches for; addresses are even.
            unsafe {
                for l in 0..k {
                    let x = bf16::widen(*a.add(i * a_steps.0 + l * a_steps.1));
                    sum += x * bf16::widen(*b.add(l * b_steps.0 + j * b_steps.1));
                }
                let at = i * n + j;
                if let Some(bias) = after.bias {
                    sum += bf16::widen(*(bias as *const u16).add(j));
                }
                if let Some(pre) = after.pre {
                    *(pre as *mut u16).add(at) = bf16::round(sum);
                    sum = gelu(sum);
                }
                match result {
                    Element::Float32 => {
                        let to = (c as *mut f32).add(at);
                        *to = if add { *to + sum } else { sum };
                    }
                    Element::Bfloat16 => {
                        let to = (c as *mut u16).add(at);
                        *to = bf16::round(if add { bf16::widen(*to) + sum } else { sum });
                    }
                }
            }
        }
    }
}

/// See `Device::gelu_forward`.
fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())) as f32
}
