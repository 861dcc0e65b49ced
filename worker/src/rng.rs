//! Counter-based random numbers: Philox4x32-10.
//!
//! A random number is a function of (key, counter) with no hidden state, so a value can be had for any element, sample
//! or step without drawing those before it. That is what lets any shard, any worker and any resumed run see the same
//! numbers. The generator is that of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
//! (SC 2011); the test holds its published known answers.

use crate::math;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// What a random number is for; part of the counter, so that two uses of one seed never share numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Place {
    /// Initial weights; the index is the canonical element.
    Weights = 1,
    /// The order of the training samples.
    SampleOrder = 2,
    /// Free for tests.
    Test = 3,
}

/// Ten rounds of Philox on a 128-bit counter with a 64-bit key.
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut key, mut c) = (key, counter);
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
    }
    c
}

/// A stream of random numbers for one purpose, addressed by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    key: [u32; 2],
    place: Place,
    lane: u32,
}

impl Counter {
    /// The numbers of `seed` for `place`; `lane` separates further uses of the same place, such as epochs.
    pub fn new(seed: u64, place: Place, lane: u32) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], place, lane }
    }

    /// 128 random bits for `index`.
    pub fn words(&self, index: u64) -> [u32; 4] {
        philox(self.key, [index as u32, (index >> 32) as u32, self.place as u32, self.lane])
    }

    /// 64 random bits for `index`.
    pub fn bits(&self, index: u64) -> u64 {
        let w = self.words(index);
        u64::from(w[0]) | u64::from(w[1]) << 32
    }

    /// A number in `(0, 1)` with 53 random bits, for `index`.
    pub fn uniform(&self, index: u64) -> f64 {
        unit(self.bits(index))
    }

    /// A standard normal number for `index` (Box and Muller, 1958).
    pub fn normal(&self, index: u64) -> f64 {
        let w = self.words(index);
        let radius = unit(u64::from(w[0]) | u64::from(w[1]) << 32);
        let turn = unit(u64::from(w[2]) | u64::from(w[3]) << 32);
        (-2.0 * math::ln(radius)).sqrt() * math::cos_turns(turn)
    }
}

/// The middle of one of 2^53 equal cells of `(0, 1)`, so never 0 nor 1.
fn unit(bits: u64) -> f64 {
    ((bits >> 12) as f64 + 0.5) * (1.0 / (1u64 << 52) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0, !0], [!0; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normals_have_the_right_moments() {
        let counter = Counter::new(7, Place::Test, 0);
        let n = 200_000;
        let (mut sum, mut square, mut fourth) = (0.0, 0.0, 0.0);
        for i in 0..n {
            let x = counter.normal(i);
            sum += x;
            square += x * x;
            fourth += x.powi(4);
        }
        let n = n as f64;
        assert!((sum / n).abs() < 0.01 && (square / n - 1.0).abs() < 0.01 && (fourth / n - 3.0).abs() < 0.1);
    }

    #[test]
    fn places_and_lanes_differ() {
        let a = Counter::new(1, Place::Weights, 0);
        assert_ne!(a.bits(5), Counter::new(1, Place::SampleOrder, 0).bits(5));
        assert_ne!(a.bits(5), Counter::new(1, Place::Weights, 1).bits(5));
        assert_ne!(a.bits(5), Counter::new(2, Place::Weights, 0).bits(5));
        assert!((0..1000).all(|i| (0.0..1.0).contains(&a.uniform(i))));
    }
}
