//! Bfloat16 on the host: the upper half of a float32.

/// The nearest bfloat16, ties to even; NaN stays NaN.
pub fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // Rounding could carry a NaN's bits over into infinity; the quiet bit keeps it one.
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The same value as float32.
pub fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_to_the_nearest_and_ties_to_even() {
        for exact in [0.0, -0.0, 1.0, -2.5, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(widen(round(exact)).to_bits(), exact.to_bits());
        }
        let step = 1.0 / 128.0;
        assert_eq!(widen(round(1.0 + step / 2.0)), 1.0, "a tie goes to the even one");
        assert_eq!(widen(round(1.0 + 1.5 * step)), 1.0 + 2.0 * step);
        assert_eq!(widen(round(1.0 + 0.51 * step)), 1.0 + step);
        assert_eq!(widen(round(f32::MAX)), f32::INFINITY);
        assert!(widen(round(f32::from_bits(0x7f80_0001))).is_nan());
    }
}
