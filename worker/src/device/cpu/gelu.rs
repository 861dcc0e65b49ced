//! GELU in its tanh form (Hendrycks and Gimpel, 2016), which GPT-2 was published with.
//!
//! `x/2·(1 + tanh u)` with `u = √(2/π)·(x + 0.044715·x³)` is `x·σ(2u)`, so one exponential does, and no digits are lost
//! where the tanh is near −1.

use super::lanes::{Isa, Lanes, kernel};
use super::pool::{Pool, Shared, chunk};

/// Elements of one task; a whole number of vectors.
const ELEMENTS: usize = 1 << 14;
/// `2·√(2/π)`.
const SCALE: f32 = 1.595_769;
/// The weight of the cube.
const CUBE: f32 = 0.044_715;
/// Beyond this `σ(2u)` is 0 or 1 in float32; inputs are held there, so that the cube of a finite one is finite.
const END: f32 = 16.0;

/// What one element needs.
struct Gate<L> {
    /// `σ(2u)`.
    open: L,
    /// `1 − σ(2u)`, not by that difference, which has few digits where the gate is open.
    shut: L,
    /// `x` held above −[`END`], so that a huge negative one times the gate's smallest value is nearly zero.
    above: L,
    /// `x` held within ±[`END`].
    held: L,
}

#[inline(always)]
unsafe fn gate<L: Lanes>(x: L) -> Gate<L> {
    unsafe {
        let above = L::splat(-END).max(x);
        let held = L::splat(END).min(above);
        let u2 = held.mul(L::splat(SCALE)).mul(held.mul(held).fma(L::splat(CUBE), L::splat(1.0)));
        let (one, e) = (L::splat(1.0), L::zero().sub(u2).exp());
        let open = one.div(one.add(e));
        Gate { open, shut: e.mul(open), above, held }
    }
}

#[inline(always)]
unsafe fn forward_run<L: Lanes>(n: usize, pre: *const f32, act: *mut f32) {
    unsafe {
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let Gate { open, above, .. } = gate(L::load_first(pre.add(j), m));
            above.mul(open).store_first(act.add(j), m);
        }
    }
}

#[inline(always)]
unsafe fn backward_run<L: Lanes>(n: usize, pre: *mut f32, d_act: *mut f32) {
    unsafe {
        let one = L::splat(1.0);
        for j in (0..n).step_by(16) {
            let m = 16.min(n - j);
            let (x, d) = (L::load_first(pre.add(j), m), L::load_first(d_act.add(j), m));
            let Gate { open, shut, above, held } = gate(x);
            // d(x·σ(2u))/dx = σ·(1 + x·(1 − σ)·2u'), 2u' = 2·√(2/π)·(1 + 3·0.044715·x²)
            let slope_u2 = held.mul(held).fma(L::splat(3.0 * CUBE), one).mul(L::splat(SCALE));
            let slope = held.mul(shut).fma(slope_u2, one).mul(open);
            d.mul(slope).store_first(pre.add(j), m);
            above.mul(open).store_first(d_act.add(j), m);
        }
    }
}

kernel! {
    /// GELU of a run of elements.
    fn forward_kernel(n: usize, pre: *const f32, act: *mut f32) = forward_run
}
kernel! {
    /// GELU's backward over a run of elements.
    fn backward_kernel(n: usize, pre: *mut f32, d_act: *mut f32) = backward_run
}

/// GELU; see [`crate::device::Device::gelu_forward`].
pub(super) fn forward(pool: &Pool, isa: Isa, pre: &[f32], act: &mut [f32]) {
    let elements = pre.len();
    assert!(act.len() >= elements);
    let act = Shared::new(act);
    pool.each(elements.div_ceil(ELEMENTS), |task| {
        let run = chunk(task, ELEMENTS, elements);
        // SAFETY: the assertion covers the run, which belongs to this task.
        unsafe { forward_kernel(isa, run.len(), pre.as_ptr().add(run.start), act.at(run.start)) }
    });
}

/// GELU's backward in place; see [`crate::device::Device::gelu_backward`].
pub(super) fn backward(pool: &Pool, isa: Isa, pre: &mut [f32], d_act: &mut [f32]) {
    let elements = pre.len();
    assert!(d_act.len() >= elements);
    let (pre, d_act) = (Shared::new(pre), Shared::new(d_act));
    pool.each(elements.div_ceil(ELEMENTS), |task| {
        let run = chunk(task, ELEMENTS, elements);
        // SAFETY: the assertion covers the run, which belongs to this task.
        unsafe { backward_kernel(isa, run.len(), pre.at(run.start), d_act.at(run.start)) }
    });
}
