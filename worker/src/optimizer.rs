//! AdamW (Loshchilov and Hutter, 2019) on any run of the canonical space, and gradient clipping.
//!
//! The update is elementwise, so a shard's bits do not depend on where shards begin. Scalars are computed in float64
//! and cast once. Parameters whose names contain one of `no_decay` (norm gains by default) are not decayed.

use std::ops::Range;

use proto::spec::OptimizerSpec;

use crate::device::{AdamwParts, DeviceResult, HostDevice, Part, PartMut};
use crate::math;
use crate::model::ParamDecl;

/// The scalars of one update, as float32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwScalars {
    /// Decay of the first moment.
    pub beta1: f32,
    /// `1 − β₁`.
    pub one_minus_beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `1 − β₂`.
    pub one_minus_beta2: f32,
    /// Learning rate over the first moment's bias correction, `η / (1 − β₁ᵗ)`.
    pub step_size: f32,
    /// `1 / √(1 − β₂ᵗ)`.
    pub inverse_root_correction2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// What decayed parameters are multiplied by, `1 − η·λ`.
    pub keep: f32,
    /// What gradients are multiplied by, from [`clip_scale`].
    pub clip: f32,
}

/// What scales gradients of the given global norm to at most `clip_norm`; 1 where there is nothing to clip.
pub fn clip_scale(clip_norm: Option<f64>, norm: f64) -> f64 {
    match clip_norm {
        Some(limit) if norm > limit => limit / norm,
        _ => 1.0,
    }
}

/// The update rule of a job.
#[derive(Debug, Clone)]
pub struct AdamW {
    spec: OptimizerSpec,
    /// Ends of runs of the canonical space, and whether the run is decayed.
    runs: Vec<(usize, bool)>,
}

impl AdamW {
    /// The rule for a model of these parameters.
    pub fn new(spec: &OptimizerSpec, parameters: &[ParamDecl]) -> Self {
        let (mut runs, mut end): (Vec<(usize, bool)>, usize) = (Vec::new(), 0);
        for tensor in parameters {
            end += tensor.elements();
            let decay = !spec.no_decay.iter().any(|part| tensor.name.contains(part.as_str()));
            match runs.last_mut() {
                Some(last) if last.1 == decay => last.0 = end,
                _ => runs.push((end, decay)),
            }
        }
        Self { spec: spec.clone(), runs }
    }

    /// The scalars of update number `step` (1-based) at learning rate `rate`.
    pub fn scalars(&self, step: u64, rate: f64, clip: f64) -> AdamwScalars {
        let [beta1, beta2] = self.spec.betas;
        AdamwScalars {
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (rate / (1.0 - math::power(beta1, step))) as f32,
            inverse_root_correction2: (1.0 / (1.0 - math::power(beta2, step)).sqrt()) as f32,
            epsilon: self.spec.epsilon as f32,
            keep: (1.0 - rate * self.spec.weight_decay) as f32,
            clip: clip as f32,
        }
    }

    /// Runs of the canonical space of one treatment: the element each ends before, and whether it is decayed.
    pub fn runs(&self) -> &[(usize, bool)] {
        &self.runs
    }

    /// Updates the elements `shard` of the canonical space. `state.parameters` is the whole space (on the CPU the
    /// master copy is the parameters); all other buffers hold the shard alone.
    pub fn update<D: HostDevice>(
        &self,
        device: &D,
        scalars: &AdamwScalars,
        shard: Range<usize>,
        state: ShardUpdate<'_, D::Buffer>,
    ) -> DeviceResult {
        let ShardUpdate { parameters, mut mirror, from, to: [first, second], gradient } = state;
        let mut start = 0;
        for (end, decay) in &self.runs {
            let part = shard.start.max(start)..shard.end.min(*end);
            start = *end;
            if part.is_empty() {
                continue;
            }
            let at = part.start - shard.start;
            let parts = AdamwParts {
                parameters: PartMut(parameters, part.start),
                mirror: mirror.as_deref_mut().map(|mirror| PartMut(mirror, at)),
                from: from.map(|from| from.map(|buffer| Part(buffer, at))),
                to: [PartMut(first, at), PartMut(second, at)],
                gradient: Part(gradient, at),
            };
            device.adamw(part.len(), scalars, *decay, parts)?;
        }
        Ok(())
    }
}

/// What an update of a shard reads and writes.
#[derive(Debug)]
pub struct ShardUpdate<'a, B> {
    /// The whole space.
    pub parameters: &'a mut B,
    /// Gets the shard's new parameters too, for a snapshot.
    pub mirror: Option<&'a mut B>,
    /// First and second moment before the update; in place if not given.
    pub from: Option<[&'a B; 2]>,
    /// First and second moment after it.
    pub to: [&'a mut B; 2],
    /// The mean gradient.
    pub gradient: &'a B,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::{CpuBuffer, CpuDevice};
    use crate::rng::{Counter, Place};
    use proptest::prelude::*;
    use proto::spec::{ModelSpec, OptimizerKind};

    fn spec() -> OptimizerSpec {
        OptimizerSpec {
            kind: OptimizerKind::Adamw,
            learning_rate: 1e-3,
            betas: [0.9, 0.95],
            epsilon: 1e-8,
            weight_decay: 0.1,
            no_decay: vec!["norm".into()],
            clip_norm: Some(1.0),
        }
    }

    fn tensors() -> Vec<ParamDecl> {
        [("embed", 1000), ("a.norm.weight", 37), ("b.weight", 2000), ("norm.weight", 5)]
            .map(|(name, n)| ParamDecl { name: name.into(), shape: vec![n] })
            .to_vec()
    }

    /// Two updates of the whole space, cut into the given shards.
    fn train(cuts: &[usize], threads: usize, out_of_place: bool) -> (Vec<u32>, Vec<u32>) {
        let device = CpuDevice::new(threads).unwrap();
        let rule = AdamW::new(&spec(), &tensors());
        let random = Counter::new(9, Place::Test, 0);
        let mut parameters = CpuBuffer::zeroed(3042, "p").unwrap();
        parameters.iter_mut().enumerate().for_each(|(i, p)| *p = random.normal(i as u64) as f32);
        let ends: Vec<usize> = cuts.iter().copied().chain([3042]).collect();
        let (mut start, mut moments) = (0, vec![]);
        for end in ends {
            let n = end - start;
            let [mut m, mut v, mut g] = ["m", "v", "g"].map(|what| CpuBuffer::zeroed(n, what).unwrap());
            for step in 1..=2 {
                for (i, g) in g.iter_mut().enumerate() {
                    *g = random.normal((step * 10_000 + start as u64) + i as u64) as f32;
                }
                let scalars = rule.scalars(step, 1e-2, 0.5);
                let (p, mirror) = (&mut parameters, step == 2);
                if out_of_place && step == 2 {
                    let [mut m2, mut v2, mut copy] = ["m", "v", "c"].map(|w| CpuBuffer::zeroed(n, w).unwrap());
                    let (from, to) = (Some([&m, &v]), [&mut m2, &mut v2]);
                    let update =
                        ShardUpdate { parameters: p, mirror: mirror.then_some(&mut copy), from, to, gradient: &g };
                    rule.update(&device, &scalars, start..end, update).unwrap();
                    assert_eq!(copy[..], parameters[start..end], "the mirror has the new parameters");
                    (m, v) = (m2, v2);
                } else {
                    let to = [&mut m, &mut v];
                    let update = ShardUpdate { parameters: p, mirror: None, from: None, to, gradient: &g };
                    rule.update(&device, &scalars, start..end, update).unwrap();
                }
            }
            moments.extend(m.iter().chain(v.iter()).map(|value| value.to_bits()));
            start = end;
        }
        (parameters.iter().map(|p| p.to_bits()).collect(), moments)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn shards_do_not_change_bits(mut cuts in proptest::collection::vec(1usize..3042, 0..5), threads in 1usize..4) {
            cuts.sort_unstable();
            cuts.dedup();
            prop_assert_eq!(train(&cuts, threads, false).0, train(&[], 1, false).0);
            prop_assert_eq!(train(&cuts, threads, true), train(&cuts, 1, false));
        }
    }

    #[test]
    fn follows_the_definition_in_float64() {
        let random = Counter::new(9, Place::Test, 0);
        let (s, got) = (spec(), train(&[], 2, false).0);
        for i in [0usize, 999, 1000, 1036, 1037, 3036, 3037, 3041] {
            let decay = !((1000..1037).contains(&i) || i >= 3037);
            let (mut p, mut m, mut v) = (f64::from(random.normal(i as u64) as f32), 0.0, 0.0);
            for step in 1..=2i32 {
                let g = f64::from(random.normal(step as u64 * 10_000 + i as u64) as f32) * 0.5;
                p *= if decay { 1.0 - 1e-2 * s.weight_decay } else { 1.0 };
                m = 0.9 * m + 0.1 * g;
                v = 0.95 * v + 0.05 * g * g;
                let root = (v / (1.0 - 0.95f64.powi(step))).sqrt();
                p -= 1e-2 * (m / (1.0 - 0.9f64.powi(step))) / (root + 1e-8);
            }
            assert!((f64::from(f32::from_bits(got[i])) - p).abs() < 1e-6, "element {i}");
        }
    }

    #[test]
    fn clipping_and_the_real_models_runs() {
        assert_eq!(clip_scale(Some(1.0), 4.0), 0.25);
        assert_eq!(clip_scale(Some(1.0), 0.5), 1.0);
        assert_eq!(clip_scale(None, 1e9), 1.0);
        let model = ModelSpec::preset("tiny").unwrap();
        let rule = AdamW::new(&spec(), &crate::model::parameters(&model));
        // embedding, then norm and matrices by turns twice a layer, then the last norm
        assert_eq!(rule.runs.len(), 1 + 4 * 4 + 1);
        assert_eq!(rule.runs.iter().filter(|r| !r.1).count(), 2 * 4 + 1);
    }
}
