//! The sixteen lanes on x86-64: one AVX-512 register, or two of AVX2. See [`super::lanes`].

#[allow(clippy::wildcard_imports)] // some thirty intrinsics, all named `_mm…`
use std::arch::x86_64::*;

use super::lanes::Lanes;

/// Sixteen lanes in one register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

impl Lanes for Avx512 {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        Self(unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, p) })
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as u16, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, o.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, o.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, o.0) })
    }
    #[inline(always)]
    unsafe fn div(self, o: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, o.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, o.0) })
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, o.0) })
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        Self(unsafe { _mm512_sqrt_ps(self.0) })
    }
    #[inline(always)]
    unsafe fn shift_exponent(self, n: Self) -> Self {
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(n.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), shifted)))
        }
    }
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; 16] {
        // SAFETY: both are 64 bytes of plain floats.
        unsafe { std::mem::transmute::<__m512, [f32; 16]>(self.0) }
    }
}

/// Sixteen lanes in two registers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

/// Applies a 256-bit operation to both halves.
macro_rules! halves {
    ($op:ident, $a:expr $(, $b:expr)*) => {
        Avx2($op($a.0 $(, $b.0)*), $op($a.1 $(, $b.1)*))
    };
}

impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        unsafe { Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        if n == 16 {
            return unsafe { Self::load(p) };
        }
        let mut a = [0.0; 16];
        unsafe {
            std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n);
            Self::load(a.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        if n == 16 {
            return unsafe { self.store(p) };
        }
        unsafe { std::ptr::copy_nonoverlapping(self.to_array().as_ptr(), p, n) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        unsafe { halves!(_mm256_add_ps, self, o) }
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        unsafe { halves!(_mm256_sub_ps, self, o) }
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        unsafe { halves!(_mm256_mul_ps, self, o) }
    }
    #[inline(always)]
    unsafe fn div(self, o: Self) -> Self {
        unsafe { halves!(_mm256_div_ps, self, o) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        unsafe { halves!(_mm256_fmadd_ps, self, b, c) }
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        unsafe { halves!(_mm256_max_ps, self, o) }
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        unsafe { halves!(_mm256_min_ps, self, o) }
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        unsafe { halves!(_mm256_sqrt_ps, self) }
    }
    #[inline(always)]
    unsafe fn shift_exponent(self, n: Self) -> Self {
        #[inline(always)]
        unsafe fn half(x: __m256, n: __m256) -> __m256 {
            unsafe {
                let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shifted))
            }
        }
        unsafe { Self(half(self.0, n.0), half(self.1, n.1)) }
    }
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; 16] {
        // SAFETY: both are 64 bytes of plain floats, the low half first.
        unsafe { std::mem::transmute::<[__m256; 2], [f32; 16]>([self.0, self.1]) }
    }
}
