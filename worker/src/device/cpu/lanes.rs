//! Sixteen float32 lanes, on AVX-512, AVX2 and plain arrays.
//!
//! Kernels are written once over [`Lanes`]. Every implementation has the same sixteen lanes and does the same IEEE
//! operation in each (a fused multiply-add is one rounding everywhere), so a kernel's bits do not depend on the
//! instruction set it runs on. Calls inline into functions that enable the instruction set; see [`kernel`].
//!
//! The instruction sets' functions are unsafe to call where they may be missing: each `unsafe fn` here requires that
//! the CPU has the implementation's features and that pointers cover the lanes they touch.

/// The instruction sets kernels exist for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 F and DQ: 16 lanes in one register.
    Avx512,
    /// AVX2 and FMA: 16 lanes in two registers.
    Avx2,
    /// What the compiler's baseline has.
    Portable,
}

impl Isa {
    /// The best this CPU has.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// All that this CPU can run, for tests that compare them.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        let best = Self::detect();
        [Self::Avx512, Self::Avx2, Self::Portable]
            .into_iter()
            .filter(|isa| *isa == best || *isa == Self::Portable || best == Self::Avx512)
            .collect()
    }

    /// The name in a numeric identity.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// Sixteen float32 values.
///
/// # Safety
/// Each function requires the features of the implementing instruction set; pointers must be valid for 16 elements
/// (or `n` of them for the partial forms).
pub(crate) trait Lanes: Copy {
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// The first `n` elements, the other lanes zero.
    unsafe fn load_first(p: *const f32, n: usize) -> Self;
    /// Stores the first `n` lanes.
    unsafe fn store_first(self, p: *mut f32, n: usize);
    unsafe fn add(self, o: Self) -> Self;
    unsafe fn sub(self, o: Self) -> Self;
    unsafe fn mul(self, o: Self) -> Self;
    unsafe fn div(self, o: Self) -> Self;
    /// `self·b + c` with one rounding.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// `if self > o { self } else { o }`: a NaN in `o` stays.
    unsafe fn max(self, o: Self) -> Self;
    /// `if self < o { self } else { o }`: a NaN in `o` stays.
    unsafe fn min(self, o: Self) -> Self;
    unsafe fn sqrt(self) -> Self;
    /// Adds the integer in the low mantissa bits of `n` to the exponents: the last step of `exp`.
    unsafe fn shift_exponent(self, n: Self) -> Self;
    /// The lanes as an array.
    unsafe fn to_array(self) -> [f32; 16];

    /// Zeroes.
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self::splat(0.0) }
    }

    /// The lanes' sum, as a tree of halves.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut a = unsafe { self.to_array() };
        let mut half = 8;
        while half > 0 {
            for i in 0..half {
                a[i] += a[i + half];
            }
            half /= 2;
        }
        a[0]
    }

    /// The largest lane.
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let mut a = unsafe { self.to_array() };
        let mut half = 8;
        while half > 0 {
            for i in 0..half {
                a[i] = if a[i] > a[i + half] { a[i] } else { a[i + half] };
            }
            half /= 2;
        }
        a[0]
    }

    /// `e^x`, to about one unit in the last place between -87 and 88; held at those ends outside. NaN stays.
    ///
    /// `x = n·ln 2 + r` with the rounding done by adding 1.5·2^23, then a polynomial for `e^r` on `|r| <= ln(2)/2`.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.0;
        unsafe {
            let s = Self::splat;
            let x = s(88.0).min(s(-87.0).max(self));
            let t = x.fma(s(std::f32::consts::LOG2_E), s(ROUND));
            let n = t.sub(s(ROUND));
            let r = n.fma(s(-0.693_359_4), x);
            let r = n.fma(s(2.121_944_4e-4), r);
            let mut p = s(1.987_569_1e-4);
            for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
                p = p.fma(r, s(c));
            }
            let p = p.fma(r.mul(r), r.add(s(1.0)));
            p.shift_exponent(t)
        }
    }
}

/// Sixteen lanes as an array: runs anywhere.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 16])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { p.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { p.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        let mut a = [0.0; 16];
        unsafe { std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n) };
        Self(a)
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), p, n) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + o.0[i]))
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] - o.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * o.0[i]))
    }
    #[inline(always)]
    unsafe fn div(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] / o.0[i]))
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] > o.0[i] { self.0[i] } else { o.0[i] }))
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] < o.0[i] { self.0[i] } else { o.0[i] }))
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].sqrt()))
    }
    #[inline(always)]
    unsafe fn shift_exponent(self, n: Self) -> Self {
        Self(std::array::from_fn(|i| f32::from_bits(self.0[i].to_bits().wrapping_add(n.0[i].to_bits() << 23))))
    }
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; 16] {
        self.0
    }
}

/// Defines a kernel for every instruction set: `fn name(isa, …)` runs `body::<L>(…)` compiled for `isa`.
macro_rules! kernel {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        ///
        /// # Safety
        /// `isa` must come from `Isa::detect` or `Isa::available`, and the pointers must cover what the body says.
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name(isa: $crate::device::cpu::lanes::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                unsafe { $body::<$crate::device::cpu::x86::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                unsafe { $body::<$crate::device::cpu::x86::Avx2>($($arg),*) }
            }
            // SAFETY: `isa` was detected on this CPU; the caller vouches for the pointers.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::device::cpu::lanes::Isa::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::device::cpu::lanes::Isa::Avx2 => avx2($($arg),*),
                    _ => $body::<$crate::device::cpu::lanes::Portable>($($arg),*),
                }
            }
        }
    };
}
pub(super) use kernel;
