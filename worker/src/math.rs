//! Elementary functions in plain float64 arithmetic.
//!
//! The platform's `libm` may give another last bit on another machine, and then the "same" job would start from other
//! weights. Everything here is additions, multiplications, divisions and square roots, which IEEE 754 fixes to the bit.
//! The errors are a few units in the last place, far below what float32 training sees.

use std::f64::consts::{FRAC_PI_2, LN_2, TAU};

/// `2^exponent`, for exponents of normal float32 numbers, -126 to 127.
pub fn power_of_two(exponent: i32) -> f32 {
    debug_assert!((-126..=127).contains(&exponent));
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// Natural logarithm of a positive normal number.
///
/// Splits `x = m·2^e` with `m` in `[√½, √2)` and sums the series of `2·atanh((m-1)/(m+1))`.
pub fn ln(x: f64) -> f64 {
    debug_assert!(x.is_normal() && x > 0.0);
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let mut series = 0.0;
    // |s| < 0.172, so the term s^25/25 is below 1e-20.
    for odd in (1..=23).rev().step_by(2) {
        series = series * square + 1.0 / f64::from(odd);
    }
    2.0 * s * series + exponent as f64 * LN_2
}

/// `e^x`, zero below -700 and infinite above 700.
pub fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    if x > 700.0 {
        return f64::INFINITY;
    }
    let n = (x / LN_2).round_ties_even();
    let r = x - n * LN_2;
    let mut sum = 1.0;
    for k in (1..=18).rev() {
        sum = 1.0 + sum * r / f64::from(k);
    }
    sum * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

/// Integer power by repeated squaring.
pub fn power(base: f64, mut exponent: u64) -> f64 {
    let (mut result, mut square) = (1.0, base);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= square;
        }
        square *= square;
        exponent >>= 1;
    }
    result
}

/// Sine and cosine of an angle in radians, for angles up to about 1e8.
pub fn sin_cos(angle: f64) -> (f64, f64) {
    let quarter = (angle / FRAC_PI_2).round_ties_even();
    // π/2 in two parts (Cody and Waite), so that the difference keeps its low bits.
    let r = (angle - quarter * 1.570_796_326_734_125_6) - quarter * 6.077_100_506_506_192e-11;
    let square = r * r;
    let (mut sine, mut cosine) = (0.0, 0.0);
    for k in (0..=10).rev() {
        let (odd, even) = (f64::from(2 * k + 1), f64::from(2 * k));
        sine = 1.0 - square / ((odd + 1.0) * (odd + 2.0)) * if k == 10 { 1.0 } else { sine };
        cosine = 1.0 - square / ((even + 1.0) * (even + 2.0)) * if k == 10 { 1.0 } else { cosine };
    }
    sine *= r;
    match (quarter as i64).rem_euclid(4) {
        0 => (sine, cosine),
        1 => (cosine, -sine),
        2 => (-sine, -cosine),
        _ => (-cosine, sine),
    }
}

/// Cosine of a number of whole turns: `cos(2π·turns)` for `turns` in `[0, 1]`.
pub fn cos_turns(turns: f64) -> f64 {
    sin_cos(turns * TAU).1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agree_with_the_platform() {
        for i in 1..4000 {
            let x = f64::from(i) * 0.37;
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1.0), "ln {x}");
            let y = x * 0.1 - 70.0;
            assert!((exp(y) / y.exp() - 1.0).abs() < 2e-14, "exp {y}");
            let (s, c) = sin_cos(x * 7.0);
            assert!((s - (x * 7.0).sin()).abs() < 1e-12 && (c - (x * 7.0).cos()).abs() < 1e-12, "sin_cos {x}");
        }
        assert!((cos_turns(0.5) + 1.0).abs() < 1e-15 && (cos_turns(1.0) - 1.0).abs() < 1e-15);
        assert_eq!(power(0.5, 3), 0.125);
        assert_eq!(power(0.9, 0), 1.0);
        assert!((power(0.95, 1000) / 0.95f64.powi(1000) - 1.0).abs() < 1e-12);
    }
}
