//! The rules of a complete spec. Each message names the key, its value, and what would be right.
//!
//! A spec may also come from the wire or the store, where no reader of a job file has looked at its numbers. So each
//! range the reader has is repeated here, and only then come the rules that span several keys: what they divide by is
//! known not to be zero, and what they multiply is small.

use super::detect::Misfit;
use super::read::scheme;
use super::read_model::not_ours;
use super::reader::{
    BELOW_ONE, MOST, NOT_NEGATIVE, POSITIVE, SpecError, is_within, number_wanted, signed_wanted, whole_wanted,
};
use super::{
    Architecture, DataSpec, JobSpec, MOST_SEED, MOST_SPARES, MOST_THREADS, ModelSpec, PRIORITIES, SECONDS, STRAGGLER,
    VALIDATION_LOSS,
};

/// Most micro-batches of one update: their losses travel in one message, and the exact grid leaves room for so many.
const MOST_MICRO_BATCHES: usize = 1 << 20;
/// Most parities of a group: a group has at most eight nodes.
const MOST_PARITY: u64 = 7;

impl JobSpec {
    /// Checks a spec that is asked for now, from a job file or from the wire: what [`JobSpec::validate`] does, and that
    /// its timeouts leave time to one another.
    pub fn validate_new(&self, place: &str) -> Result<(), SpecError> {
        self.validate(place)?;
        timeouts(place, self.fault.check_margins())
    }

    /// Checks a complete spec, wherever it came from. A stored one that was taken once must be taken for ever.
    pub fn validate(&self, place: &str) -> Result<(), SpecError> {
        let refuse = |key: &str, found: String, wanted: String| {
            Err(SpecError::Value { place: place.into(), key: key.into(), found, wanted })
        };
        self.model.validate(place)?;
        self.data.validate(place)?;
        self.validate_whole_numbers(place)?;
        self.validate_numbers(place)?;
        self.validate_batch(place)?;
        let t = &self.training;
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
        let priority = i64::from(self.resources.priority);
        if !(PRIORITIES.0..=PRIORITIES.1).contains(&priority) {
            return refuse("resources.priority", priority.to_string(), signed_wanted(PRIORITIES));
        }
        self.validate_keeping(place)?;
        timeouts(place, self.fault.check_order())
    }

    /// Keeping the best needs something to tell it by.
    fn validate_keeping(&self, place: &str) -> Result<(), SpecError> {
        let refuse = |key: &str, found: String, wanted: &str| {
            Err(SpecError::Value { place: place.into(), key: key.into(), found, wanted: wanted.into() })
        };
        let c = &self.checkpoint;
        let name = &c.keep_best_metric;
        let usable = (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !usable {
            let shown: String = name.chars().take(80).collect();
            return refuse("checkpoint.keep_best_metric", format!("{shown:?}"), "1 to 64 of a-z A-Z 0-9 _");
        }
        let validates = self.training.validate_every > 0 && self.data.validation.is_some();
        if c.keep_best > 0 && name == VALIDATION_LOSS && !validates {
            let wanted = "0, or the job must validate: set data.validation and training.validate_every";
            return refuse("checkpoint.keep_best", c.keep_best.to_string(), wanted);
        }
        Ok(())
    }

    fn validate_whole_numbers(&self, place: &str) -> Result<(), SpecError> {
        let (t, s, c) = (&self.training, &self.schedule, &self.checkpoint);
        let ranges = [
            ("training.steps", t.steps, 1..=MOST),
            ("training.sequence_length", t.sequence_length as u64, 1..=MOST),
            ("training.global_batch", t.global_batch as u64, 1..=MOST),
            ("training.micro_batch", t.micro_batch as u64, 1..=MOST),
            ("training.seed", t.seed, 0..=MOST_SEED),
            ("training.validate_every", t.validate_every, 0..=MOST),
            ("training.validate_sequences", t.validate_sequences as u64, 1..=MOST),
            ("schedule.warmup_steps", s.warmup_steps, 0..=MOST),
            ("schedule.decay_steps", s.decay_steps, 1..=MOST),
            ("checkpoint.every_steps", c.every_steps, 1..=MOST),
            ("checkpoint.keep_last", c.keep_last as u64, 1..=MOST),
            ("checkpoint.memory_every", c.memory_every, 0..=MOST),
            ("checkpoint.parity", u64::from(c.parity), 0..=MOST_PARITY),
            ("checkpoint.keep_every", c.keep_every, 0..=MOST),
            ("checkpoint.keep_best", c.keep_best as u64, 0..=MOST),
            ("checkpoint.keep_within_steps", c.keep_within_steps, 0..=MOST),
            ("resources.threads", self.resources.threads as u64, 0..=MOST_THREADS),
            ("resources.spares", u64::from(self.resources.spares), 0..=MOST_SPARES),
        ];
        match ranges.into_iter().find(|(_, value, range)| !range.contains(value)) {
            None => Ok(()),
            Some((key, value, range)) => Err(SpecError::Value {
                place: place.into(),
                key: key.into(),
                found: value.to_string(),
                wanted: whole_wanted(value < *range.start(), &range),
            }),
        }
    }

    fn validate_numbers(&self, place: &str) -> Result<(), SpecError> {
        let (o, f) = (&self.optimizer, &self.fault);
        let ranges = [
            ("optimizer.learning_rate", o.learning_rate, POSITIVE),
            ("optimizer.betas", o.betas[0], BELOW_ONE),
            ("optimizer.betas", o.betas[1], BELOW_ONE),
            ("optimizer.epsilon", o.epsilon, POSITIVE),
            ("optimizer.weight_decay", o.weight_decay, NOT_NEGATIVE),
            ("optimizer.clip_norm", o.clip_norm.unwrap_or(1.0), POSITIVE),
            ("schedule.minimum_ratio", self.schedule.minimum_ratio, (0.0, 1.0)),
            ("fault.heartbeat", f.heartbeat, SECONDS),
            ("fault.suspicion", f.suspicion, SECONDS),
            ("fault.collective", f.collective, SECONDS),
            ("fault.hang", f.hang, SECONDS),
            ("fault.restart", f.restart, SECONDS),
            ("fault.grace", f.grace, SECONDS),
            ("fault.straggler", f.straggler, STRAGGLER),
        ];
        check_numbers(place, &ranges)
    }

    /// The sizes of one update, which are known to be at least 1.
    fn validate_batch(&self, place: &str) -> Result<(), SpecError> {
        let refuse = |key: &str, found: String, wanted: String| {
            Err(SpecError::Value { place: place.into(), key: key.into(), found, wanted })
        };
        let t = &self.training;
        if let Some(most) = self.model.max_position_embeddings.filter(|most| t.sequence_length > *most) {
            let wanted = format!("at most model.max_position_embeddings = {most}");
            return refuse("training.sequence_length", t.sequence_length.to_string(), wanted);
        }
        if !t.global_batch.is_multiple_of(t.micro_batch) {
            let down = t.global_batch - t.global_batch % t.micro_batch;
            let near = if down == 0 { t.micro_batch } else { down };
            let wanted = format!("a multiple of training.micro_batch = {} (such as {near})", t.micro_batch);
            return refuse("training.global_batch", t.global_batch.to_string(), wanted);
        }
        if t.micro_batches() > MOST_MICRO_BATCHES {
            let wanted = format!("at most {MOST_MICRO_BATCHES} times training.micro_batch = {}", t.micro_batch);
            return refuse("training.global_batch", t.global_batch.to_string(), wanted);
        }
        // A validation goes by micro-batches as well, and their losses travel in the same way.
        if t.validate_sequences.div_ceil(t.micro_batch) > MOST_MICRO_BATCHES {
            let most = (MOST_MICRO_BATCHES as u64).saturating_mul(t.micro_batch as u64);
            let wanted = format!(
                "at most {most}, {MOST_MICRO_BATCHES} micro-batches of training.micro_batch = {} sequences",
                t.micro_batch
            );
            return refuse("training.validate_sequences", t.validate_sequences.to_string(), wanted);
        }
        // The widest activation of one micro-batch must be addressable with room to spare.
        let wide = t.micro_batch as u128
            * t.sequence_length as u128
            * self.model.intermediate_size.max(self.model.vocab_size) as u128;
        if wide > 1 << 40 {
            let wanted = "smaller: micro_batch × sequence_length × width is beyond 2^40 elements".into();
            return refuse("training.micro_batch", t.micro_batch.to_string(), wanted);
        }
        // Tokens are counted in 64 bits, those of one update and those of the whole job.
        let Some(tokens) = (t.global_batch as u64).checked_mul(t.sequence_length as u64) else {
            let wanted = "smaller: global_batch × sequence_length is beyond 2^64 tokens".into();
            return refuse("training.global_batch", t.global_batch.to_string(), wanted);
        };
        if t.steps.checked_mul(tokens).is_none() {
            let wanted = format!("at most {}, or the job would read more than 2^64 tokens", u64::MAX / tokens);
            return refuse("training.steps", t.steps.to_string(), wanted);
        }
        Ok(())
    }
}

/// The refusal of a timeout that does not fit.
fn timeouts(place: &str, checked: Result<(), Misfit>) -> Result<(), SpecError> {
    checked.map_err(|(key, found, wanted)| SpecError::Value {
        place: place.into(),
        key: format!("fault.{key}"),
        found: format!("{found} s"),
        wanted,
    })
}

impl DataSpec {
    /// Checks that each dataset is a path: what a URL names elsewhere cannot be read.
    fn validate(&self, place: &str) -> Result<(), SpecError> {
        for (key, path) in [("data.train", Some(&self.train)), ("data.validation", self.validation.as_ref())] {
            if let Some((path, scheme)) = path.and_then(|path| Some((path, scheme(path)?))) {
                return Err(SpecError::Value {
                    place: place.into(),
                    key: key.into(),
                    found: format!("{path:?}"),
                    wanted: format!("a path; datasets are not read from {scheme}:// in this release"),
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
            return refuse("head_dim", self.head_dim, "even".into());
        }
        if self.num_hidden_layers > 4096 {
            return refuse("num_hidden_layers", self.num_hidden_layers, "at most 4096".into());
        }
        if self.architecture == Architecture::Gpt2 {
            let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
            if self.num_key_value_heads != heads {
                let wanted = format!("model.num_attention_heads = {heads}, for \"gpt2\" has no grouped queries");
                return refuse("num_key_value_heads", self.num_key_value_heads, wanted);
            }
            if self.head_dim.checked_mul(heads) != Some(hidden) {
                let wanted = format!("model.hidden_size / model.num_attention_heads = {hidden} / {heads}");
                return refuse("head_dim", self.head_dim, wanted);
            }
            let positions = self.max_position_embeddings.unwrap_or(1);
            if positions == 0 || positions > MOST {
                return refuse("max_position_embeddings", positions, format!("from 1 to {MOST}"));
            }
        }
        self.validate_own(place)?;
        check_numbers(place, &[("model.initializer_range", self.initializer_range, (0.0, 10.0))])
    }

    /// The keys that only some architectures have: there where they belong, within their ranges, and nowhere else.
    fn validate_own(&self, place: &str) -> Result<(), SpecError> {
        let epsilon = (POSITIVE.0, 1.0);
        let positions = self.max_position_embeddings.map(|most| most as f64);
        let own = [
            (Architecture::Llama, "model.rope_theta", self.rope_theta, (1.0, POSITIVE.1)),
            (Architecture::Llama, "model.rms_norm_eps", self.rms_norm_eps, epsilon),
            (Architecture::Gpt2, "model.max_position_embeddings", positions, (1.0, POSITIVE.1)),
            (Architecture::Gpt2, "model.layer_norm_epsilon", self.layer_norm_epsilon, epsilon),
        ];
        for (architecture, key, value, range) in own {
            let (place, key) = (place.to_string(), key.to_string());
            match value {
                Some(value) if architecture == self.architecture => check_numbers(&place, &[(&key, value, range)])?,
                Some(value) => {
                    let wanted = not_ours(architecture, self.architecture);
                    return Err(SpecError::Value { place, key, found: value.to_string(), wanted });
                }
                None if architecture == self.architecture => {
                    let wanted = format!("architecture {:?} has it", architecture.name());
                    return Err(SpecError::Missing { place, key, wanted });
                }
                None => {}
            }
        }
        Ok(())
    }
}

/// Refuses the first number outside its range.
fn check_numbers(place: &str, ranges: &[(&str, f64, (f64, f64))]) -> Result<(), SpecError> {
    match ranges.iter().find(|(_, value, range)| !is_within(*value, *range)) {
        None => Ok(()),
        Some((key, value, range)) => Err(SpecError::Value {
            place: place.into(),
            key: (*key).into(),
            found: value.to_string(),
            wanted: number_wanted(*range),
        }),
    }
}
