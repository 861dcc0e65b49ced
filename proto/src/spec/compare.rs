//! What may change between a job and its resumption.
//!
//! The trained weights are a function of the spec, so on resume only what cannot reach them may differ: `resources`,
//! `checkpoint`, `fault` and `training.validate_every`. Everything else must be as it was.

use std::fmt;

use serde_json::Value;

use super::JobSpec;

/// A key whose value may not change on resume, but does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The dotted key.
    pub key: String,
    /// Its value in the stored job.
    pub stored: String,
    /// Its value now.
    pub given: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, stored, given } = self;
        write!(f, "`{key}` is {given}, but the job in the store has {stored}")
    }
}

impl JobSpec {
    /// Every key that differs from `stored` and may not. Data paths may move: the data's fingerprint is compared
    /// instead, by the workers that read it.
    pub fn forbidden_changes(&self, stored: &Self) -> Vec<Difference> {
        let mut differences = Vec::new();
        let (given, stored) = (self.identity_fields(), stored.identity_fields());
        walk("", &stored, &given, &mut differences);
        differences
    }

    /// The fields that define the weights, as JSON.
    fn identity_fields(&self) -> Value {
        let mut training = serde_json::to_value(&self.training).unwrap_or_default();
        if let Some(fields) = training.as_object_mut() {
            fields.remove("validate_every");
        }
        serde_json::json!({
            "model": self.model,
            "training": training,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        })
    }
}

fn walk(path: &str, stored: &Value, given: &Value, differences: &mut Vec<Difference>) {
    match (stored, given) {
        (Value::Object(stored), Value::Object(given)) => {
            for (key, value) in stored {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                walk(&path, value, given.get(key).unwrap_or(&Value::Null), differences);
            }
        }
        _ if stored == given => {}
        _ => differences.push(Difference { key: path.into(), stored: stored.to_string(), given: given.to_string() }),
    }
}
