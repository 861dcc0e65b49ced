//! Kernels over the canonical space: exact accumulation, norms, AdamW.
//!
//! All are elementwise but the norm, whose sums are cut by blocks. They are bound by memory, so chunks are large enough
//! to stream and small enough to share out.

use super::lanes::{Isa, Lanes, kernel};
use super::pool::{Pool, Shared, chunk};
use crate::device::Write;
use crate::exact::{GRID, GradientFault};
use crate::optimizer::AdamwScalars;

/// Elements of one task.
const CHUNK: usize = 1 << 16;

/// Rounds `n` gradients onto the grid into `sums`; whether all of them were within `bound`.
unsafe fn grid_portable(n: usize, gradient: *const f32, bound: f64, add: bool, sums: *mut i64) -> bool {
    let mut good = true;
    for i in 0..n {
        // SAFETY: the caller's pointers cover n elements.
        unsafe {
            let x = f64::from(*gradient.add(i)) * GRID;
            good &= x.abs() <= bound;
            // The conversion saturates where the check fails, so it is always defined.
            let q = x.round_ties_even() as i64;
            *sums.add(i) = if add { (*sums.add(i)).wrapping_add(q) } else { q };
        }
    }
    good
}

/// The same, eight at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn grid_avx512(n: usize, gradient: *const f32, bound: f64, add: bool, sums: *mut i64) -> bool {
    use std::arch::x86_64::{
        _CMP_LE_OQ, _mm256_loadu_ps, _mm512_abs_pd, _mm512_add_epi64, _mm512_cmp_pd_mask, _mm512_cvtpd_epi64,
        _mm512_cvtps_pd, _mm512_loadu_si512, _mm512_mul_pd, _mm512_set1_pd, _mm512_storeu_si512,
    };
    let whole = n / 8 * 8;
    let (grid, high, mut good) = (_mm512_set1_pd(GRID), _mm512_set1_pd(bound), 0xffu8);
    // SAFETY: the caller's pointers cover n elements.
    unsafe {
        for i in (0..whole).step_by(8) {
            let x = _mm512_mul_pd(_mm512_cvtps_pd(_mm256_loadu_ps(gradient.add(i))), grid);
            good &= _mm512_cmp_pd_mask::<_CMP_LE_OQ>(_mm512_abs_pd(x), high);
            // Rounds to nearest, ties to even: the CPU's default mode, which nothing here changes.
            let mut q = _mm512_cvtpd_epi64(x);
            if add {
                q = _mm512_add_epi64(q, _mm512_loadu_si512(sums.add(i).cast()));
            }
            _mm512_storeu_si512(sums.add(i).cast(), q);
        }
        let rest = grid_portable(n - whole, gradient.add(whole), bound, add, sums.add(whole));
        good == 0xff && rest
    }
}

/// Accumulation on the grid; see [`crate::device::Device::accumulate_exact`].
pub(super) fn accumulate_exact(
    pool: &Pool,
    isa: Isa,
    gradient: &[f32],
    limit: i64,
    write: Write,
    sums: &mut [i64],
) -> Option<GradientFault> {
    let n = gradient.len();
    let bound = largest_at_most(limit);
    let failed = std::sync::atomic::AtomicBool::new(false);
    let shared = Shared::new(&mut sums[..n]);
    pool.each(n.div_ceil(CHUNK), |task| {
        let part = chunk(task, CHUNK, n);
        let add = write == Write::Add;
        // SAFETY: the part belongs to this task; the instruction set was detected.
        let good = unsafe {
            let (from, to) = (gradient.as_ptr().add(part.start), shared.at(part.start));
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => grid_avx512(part.len(), from, bound, add, to),
                _ => grid_portable(part.len(), from, bound, add, to),
            }
        };
        if !good {
            failed.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    });
    if !failed.into_inner() {
        return None;
    }
    let fits = |g: &f32| (f64::from(*g) * GRID).abs() <= bound;
    gradient.iter().position(|g| !fits(g)).map(|element| GradientFault { element, value: gradient[element] })
}

/// The largest float64 that is not above `limit`.
fn largest_at_most(limit: i64) -> f64 {
    let near = limit as f64;
    // Above 2^53 the conversion may round up; one step down is then below the limit.
    if near as i128 > i128::from(limit) { f64::from_bits(near.to_bits() - 1) } else { near }
}

/// Sums back to float32; see [`crate::device::Device::gradient_from_sums`].
pub(super) fn gradient_from_sums(pool: &Pool, scale: f64, sums: &[i64], gradient: &mut [f32]) {
    let n = gradient.len();
    let shared = Shared::new(gradient);
    pool.each(n.div_ceil(CHUNK), |task| {
        let part = chunk(task, CHUNK, n);
        // SAFETY: the part belongs to this task.
        let to = unsafe { shared.part(part.start, part.len()) };
        for (g, sum) in to.iter_mut().zip(&sums[part]) {
            *g = (*sum as f64 * scale) as f32;
        }
    });
}

/// `y += alpha·x`; see [`crate::device::Device::axpy`].
pub(super) fn axpy(pool: &Pool, alpha: f32, x: &[f32], y: &mut [f32]) {
    let n = y.len();
    let shared = Shared::new(y);
    pool.each(n.div_ceil(CHUNK), |task| {
        let part = chunk(task, CHUNK, n);
        // SAFETY: the part belongs to this task.
        let to = unsafe { shared.part(part.start, part.len()) };
        for (y, x) in to.iter_mut().zip(&x[part]) {
            *y += alpha * x;
        }
    });
}

/// Sums of squares by block; see [`crate::device::Device::block_square_sums`].
pub(super) fn block_square_sums(pool: &Pool, block: usize, gradient: &[f32], out: &mut [f64]) {
    let n = gradient.len();
    assert_eq!(out.len(), n.div_ceil(block), "one sum for each block");
    let shared = Shared::new(out);
    pool.each(n.div_ceil(block), |task| {
        let values = &gradient[chunk(task, block, n)];
        // Sixteen running sums, element i to sum i mod 16, then added in order.
        let mut sums = [0.0f64; 16];
        for run in values.chunks(16) {
            for (sum, value) in sums.iter_mut().zip(run) {
                *sum += f64::from(*value) * f64::from(*value);
            }
        }
        // SAFETY: entry `task` belongs to this task.
        unsafe { *shared.at(task) = sums.iter().sum() };
    });
}

/// AdamW on `n` elements: decay, moments, step. The moments are read from one place and written to another, which may
/// be the same; a mirror that is not null gets the new parameters too.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // the form that `kernel!` calls
unsafe fn adamw_chunk<L: Lanes>(
    n: usize,
    scalars: AdamwScalars,
    keep: f32,
    parameters: *mut f32,
    mirror: *mut f32,
    from: [*const f32; 2],
    to: [*mut f32; 2],
    gradient: *const f32,
) {
    unsafe {
        let s = L::splat;
        let (b1, b2) = (s(scalars.beta1), s(scalars.beta2));
        let (a1, a2) = (s(scalars.one_minus_beta1), s(scalars.one_minus_beta2));
        for i in (0..n).step_by(16) {
            let m = 16.min(n - i);
            let g = L::load_first(gradient.add(i), m).mul(s(scalars.clip));
            let first = g.mul(a1).add(L::load_first(from[0].add(i), m).mul(b1));
            let second = g.mul(g).mul(a2).add(L::load_first(from[1].add(i), m).mul(b2));
            let denominator = second.sqrt().mul(s(scalars.inverse_root_correction2)).add(s(scalars.epsilon));
            let step = first.mul(s(scalars.step_size)).div(denominator);
            let kept = L::load_first(parameters.add(i), m).mul(s(keep));
            first.store_first(to[0].add(i), m);
            second.store_first(to[1].add(i), m);
            let updated = kept.sub(step);
            updated.store_first(parameters.add(i), m);
            if !mirror.is_null() {
                updated.store_first(mirror.add(i), m);
            }
        }
    }
}

kernel! {
    /// [`adamw_chunk`] for an instruction set.
    fn adamw_kernel(
        n: usize, scalars: AdamwScalars, keep: f32, parameters: *mut f32, mirror: *mut f32, from: [*const f32; 2],
        to: [*mut f32; 2], gradient: *const f32,
    ) = adamw_chunk
}

/// The operands of one update, all of one length; see [`crate::device::Device::adamw`].
pub(super) struct Operands<'a> {
    pub(super) parameters: &'a mut [f32],
    pub(super) mirror: Option<&'a mut [f32]>,
    pub(super) from: Option<[&'a [f32]; 2]>,
    pub(super) to: [&'a mut [f32]; 2],
    pub(super) gradient: &'a [f32],
}

/// One update; see [`crate::device::Device::adamw`].
pub(super) fn adamw(pool: &Pool, isa: Isa, scalars: &AdamwScalars, decay: bool, operands: Operands<'_>) {
    let Operands { parameters, mirror, from, to: [first, second], gradient } = operands;
    let n = parameters.len();
    let lengths = [first.len(), second.len(), gradient.len(), mirror.as_ref().map_or(n, |mirror| mirror.len())];
    let from_fits = from.is_none_or(|from| from.iter().all(|part| part.len() == n));
    assert!(from_fits && lengths.iter().all(|length| *length == n), "all operands have {n} elements");
    let keep = if decay { scalars.keep } else { 1.0 };
    let (parameters, first, second) = (Shared::new(parameters), Shared::new(first), Shared::new(second));
    let mirror = mirror.map(Shared::new);
    pool.each(n.div_ceil(CHUNK), |task| {
        let part = chunk(task, CHUNK, n);
        let at = part.start;
        // SAFETY: the part belongs to this task and lies within all operands, which do not overlap.
        unsafe {
            let to = [first.at(at), second.at(at)];
            let from = match from {
                Some(from) => from.map(|part| part.as_ptr().add(at)),
                None => to.map(<*mut f32>::cast_const),
            };
            let mirror = mirror.as_ref().map_or(std::ptr::null_mut(), |mirror| mirror.at(at));
            let gradient = gradient.as_ptr().add(at);
            adamw_kernel(isa, part.len(), *scalars, keep, parameters.at(at), mirror, from, to, gradient);
        }
    });
}
