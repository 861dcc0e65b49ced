//! The learning rate as a function of the step: warm-up, then cosine, linear, warmup-stable-decay or constant.
//!
//! Pure float64 arithmetic of (spec, step), so a resumed job sees the same rates as an undisturbed one. `step` counts
//! from 1 for the first update, as Adam's bias correction does; step `total` reaches the minimum exactly.

use proto::spec::{ScheduleKind, ScheduleSpec};

use crate::math;

/// The learning rate of update number `step` (1-based) of a job of `total` updates with the given peak.
///
/// Warm-up is linear: update `warmup_steps` is the first at the peak. Steps past `total` keep the final rate.
pub fn learning_rate(spec: &ScheduleSpec, peak: f64, total: u64, step: u64) -> f64 {
    if step < spec.warmup_steps {
        return peak * (step as f64 / spec.warmup_steps as f64);
    }
    let low = spec.minimum_ratio;
    let share = match spec.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Cosine => {
            let done = progress(spec.warmup_steps, total, step);
            low + (1.0 - low) * 0.5 * (1.0 + math::cos_turns(done * 0.5))
        }
        ScheduleKind::Linear => 1.0 - (1.0 - low) * progress(spec.warmup_steps, total, step),
        ScheduleKind::Wsd => {
            let start = total.saturating_sub(spec.decay_steps).max(spec.warmup_steps);
            1.0 - (1.0 - low) * progress(start, total, step)
        }
    };
    peak * share
}

/// How far `step` is from `start` to `end`, in `[0, 1]`.
fn progress(start: u64, end: u64, step: u64) -> f64 {
    if step <= start {
        return 0.0;
    }
    if step >= end {
        return 1.0;
    }
    (step - start) as f64 / (end - start) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(kind: ScheduleKind) -> ScheduleSpec {
        ScheduleSpec { kind, warmup_steps: 10, decay_steps: 20, minimum_ratio: 0.1 }
    }

    #[test]
    fn known_points() {
        let at = |kind, step| learning_rate(&spec(kind), 2.0, 110, step);
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Wsd, ScheduleKind::Constant] {
            assert_eq!(at(kind, 1), 0.2);
            assert_eq!(at(kind, 10), 2.0);
        }
        assert!((at(ScheduleKind::Cosine, 60) - 1.1).abs() < 1e-12);
        assert!((at(ScheduleKind::Linear, 60) - 1.1).abs() < 1e-12);
        assert_eq!(at(ScheduleKind::Wsd, 90), 2.0);
        assert!((at(ScheduleKind::Wsd, 100) - 1.1).abs() < 1e-12);
        assert_eq!(at(ScheduleKind::Constant, 1000), 2.0);
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Wsd] {
            assert!((at(kind, 110) - 0.2).abs() < 1e-12 && (at(kind, 5000) - 0.2).abs() < 1e-12);
        }
    }

    #[test]
    fn no_warmup_and_degenerate_horizons() {
        let mut s = spec(ScheduleKind::Wsd);
        s.warmup_steps = 0;
        s.decay_steps = 500;
        assert!((learning_rate(&s, 1.0, 100, 50) - 0.55).abs() < 1e-12);
        assert_eq!(learning_rate(&spec(ScheduleKind::Cosine), 1.0, 5, 10), 1.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn stays_between_zero_and_peak_and_falls_after_warmup(
            warmup in 0u64..50, decay in 0u64..80, low in 0.0f64..1.0, total in 1u64..200, kind in 0usize..4,
        ) {
            let kind = [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Wsd, ScheduleKind::Constant][kind];
            let s = ScheduleSpec { kind, warmup_steps: warmup, decay_steps: decay, minimum_ratio: low };
            let mut before = f64::INFINITY;
            for step in 1..total + 20 {
                let rate = learning_rate(&s, 3.0, total, step);
                prop_assert!((0.0..=3.0 + 1e-12).contains(&rate));
                if step >= warmup {
                    prop_assert!(rate <= before + 1e-12);
                    before = rate;
                }
            }
        }
    }
}
