//! Rules that span several keys. Each message names the key, its value, and what would be right.

use super::reader::SpecError;
use super::{DeviceKind, JobSpec, ModelSpec};

impl JobSpec {
    /// Checks a complete spec, whether it came from a job file or from the wire.
    pub fn validate(&self, place: &str) -> Result<(), SpecError> {
        let refuse = |key: &str, found: String, wanted: String| {
            Err(SpecError::Value { place: place.into(), key: key.into(), found, wanted })
        };
        self.model.validate(place)?;
        let t = &self.training;
        let sizes = [
            ("training.sequence_length", t.sequence_length),
            ("training.global_batch", t.global_batch),
            ("training.micro_batch", t.micro_batch),
            ("checkpoint.keep_last", self.checkpoint.keep_last),
        ];
        for (key, value) in sizes {
            if value == 0 {
                return refuse(key, "0".into(), "at least 1".into());
            }
        }
        if !t.global_batch.is_multiple_of(t.micro_batch) {
            let down = t.global_batch - t.global_batch % t.micro_batch;
            let near = if down == 0 { t.micro_batch } else { down };
            let wanted = format!("a multiple of training.micro_batch = {} (such as {near})", t.micro_batch);
            return refuse("training.global_batch", t.global_batch.to_string(), wanted);
        }
        let workers = self.resources.workers;
        if workers.min == 0 || workers.min > workers.max {
            return refuse("resources.workers", format!("{workers:?}"), "1 <= min <= max".into());
        }
        if workers.max as usize > t.micro_batches() {
            let wanted = format!(
                "at most {}, the micro-batches of one update (training.global_batch / training.micro_batch)",
                t.micro_batches()
            );
            return refuse("resources.workers", workers.max.to_string(), wanted);
        }
        // The widest activation of one micro-batch must be addressable with room to spare.
        let wide = t.micro_batch as u128
            * t.sequence_length as u128
            * self.model.intermediate_size.max(self.model.vocab_size) as u128;
        if wide > 1 << 40 {
            let wanted = "smaller: micro_batch × sequence_length × width is beyond 2^40 elements".into();
            return refuse("training.micro_batch", t.micro_batch.to_string(), wanted);
        }
        if self.resources.device == DeviceKind::Cuda {
            return refuse(
                "resources.device",
                "\"cuda\"".into(),
                "\"cpu\" or \"auto\": this build has no GPU device".into(),
            );
        }
        self.validate_timeouts(place)
    }

    fn validate_timeouts(&self, place: &str) -> Result<(), SpecError> {
        let f = &self.fault;
        let chain = [
            ("heartbeat", f.heartbeat),
            ("suspicion", f.suspicion),
            ("collective", f.collective),
            ("hang", f.hang),
            ("restart", f.restart),
        ];
        for pair in chain.windows(2) {
            let ((low, low_value), (high, high_value)) = (pair[0], pair[1]);
            if low_value >= high_value {
                return Err(SpecError::Value {
                    place: place.into(),
                    key: format!("fault.{high}"),
                    found: format!("{high_value} s"),
                    wanted: format!(
                        "greater than fault.{low} = {low_value} s (heartbeat < suspicion < collective < hang < restart)"
                    ),
                });
            }
        }
        Ok(())
    }
}

impl ModelSpec {
    /// Checks that the shape is one the kernels can compute.
    pub fn validate(&self, place: &str) -> Result<(), SpecError> {
        let refuse = |key: &str, found: usize, wanted: String| {
            Err(SpecError::Value { place: place.into(), key: format!("model.{key}"), found: found.to_string(), wanted })
        };
        const MOST: usize = 1 << 24;
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
        ];
        for (key, value) in sizes {
            if value == 0 || value > MOST {
                return refuse(key, value, format!("from 1 to {MOST}"));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let wanted = format!("a divisor of model.num_attention_heads = {}", self.num_attention_heads);
            return refuse("num_key_value_heads", self.num_key_value_heads, wanted);
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse("head_dim", self.head_dim, "even, for rotary positions".into());
        }
        if self.num_hidden_layers > 4096 {
            return refuse("num_hidden_layers", self.num_hidden_layers, "at most 4096".into());
        }
        Ok(())
    }
}
