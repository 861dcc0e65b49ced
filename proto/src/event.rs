//! What a job tells its watchers: the JSON lines of `--output json`.
//!
//! The names and fields are a contract with the tooling that reads them. `event` names the kind.

use serde::{Deserialize, Serialize};

use crate::incident::Incident;

/// Where a checkpoint lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// In the memory of the nodes.
    Memory,
    /// In the object store.
    Store,
}

/// One event in a job's life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum JobEvent {
    /// A membership is agreed and announced.
    Generation {
        /// Its number.
        generation: u64,
        /// Its number of workers.
        world_size: u32,
    },
    /// An optimizer update is done.
    Step {
        /// The step.
        step: u64,
        /// Mean training loss of its global batch.
        loss: f64,
        /// Global gradient norm before clipping.
        grad_norm: f64,
        /// Tokens the job has trained on so far.
        tokens: u64,
        /// Rate of this step.
        tokens_per_second: f64,
    },
    /// The held-out loss was measured.
    Validation {
        /// After this step.
        step: u64,
        /// Mean loss over the held-out sequences.
        loss: f64,
    },
    /// A checkpoint is committed.
    Checkpoint {
        /// Its step.
        step: u64,
        /// Where it lies.
        tier: Tier,
        /// Its digest, in hex.
        digest: String,
        /// How long the slowest rank's training thread was held, in milliseconds.
        stall_ms: f64,
        /// From the complete, hashed snapshot to commit.
        seconds: f64,
        /// Bytes written.
        bytes: u64,
    },
    /// A stored checkpoint was skipped because storage is slower than the cadence.
    Skipped {
        /// The step that was not stored.
        step: u64,
        /// Skipped so far in this job's run.
        skipped: u64,
    },
    /// A worker, or all of one agent's, failed.
    Failure {
        /// The generation it was part of.
        generation: u64,
        /// Its rank, if one rank is to blame.
        rank: Option<u32>,
        /// What happened.
        reason: String,
    },
    /// A rank holds the others up, or does so no longer.
    Straggler {
        /// The step after which it was noticed.
        step: u64,
        /// The rank.
        rank: u32,
        /// Its node.
        node: String,
        /// Its time for a micro-batch over the median's; `None`: it keeps up again.
        ratio: Option<f64>,
    },
    /// The workers of a generation hold the state it starts from, which was not initialised but loaded.
    Loaded {
        /// The generation.
        generation: u64,
        /// The step of the state.
        step: u64,
        /// What each stage cost.
        stages: Vec<LoadedStage>,
    },
    /// A new generation took its place and its workers hold state again.
    Recovered {
        /// The new generation.
        generation: u64,
        /// The step it goes on from.
        step: u64,
        /// From the failure to here.
        seconds: f64,
        /// Where the state came from.
        source: String,
    },
    /// What broke the last generation off is over: the job takes steps again, or has come to rest.
    Incident(Box<Incident>),
    /// A checkpoint is not what it should be and is set aside.
    Quarantined {
        /// Its step.
        step: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The last step is done and stored.
    Finished {
        /// The last step.
        step: u64,
        /// Its training loss.
        loss: Option<f64>,
        /// Digest of the final state.
        digest: String,
    },
    /// The job stopped with a checkpoint and can be resumed.
    Paused {
        /// The step it stopped after.
        step: u64,
        /// Training loss of that step, if one was taken.
        loss: Option<f64>,
        /// Digest of the stored state; none if the job stopped before its first checkpoint.
        digest: Option<String>,
    },
    /// The job was given up.
    Failed {
        /// Why, and what to do.
        reason: String,
        /// Exit code of a command that waits for it.
        code: u8,
    },
    /// The job was cancelled.
    Cancelled {},
}

/// One stage of a load: the rank that took longest, and the bytes of all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadedStage {
    /// From the store `list`, `plan`, `read`, `verify` and `place`; from memory `memory`, `peer`, `parity`, `store` and
    /// `verify`.
    pub stage: String,
    /// Of the slowest rank, added up over its threads.
    pub seconds: f64,
    /// The slowest rank.
    pub rank: u32,
    /// Its node.
    pub node: String,
    /// Of all ranks.
    pub bytes: u64,
}

impl JobEvent {
    /// Whether nothing follows this event until the job is resumed.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Paused { .. } | Self::Failed { .. } | Self::Cancelled {})
    }

    /// The event as one line of JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|error| format!("{{\"event\":\"broken\",\"reason\":\"{error}\"}}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_the_promised_fields() {
        let step = JobEvent::Step { step: 3, loss: 0.1, grad_norm: 2.0, tokens: 12, tokens_per_second: 4.0 };
        let expected = r#"{"event":"step","step":3,"loss":0.1,"grad_norm":2.0,"tokens":12,"tokens_per_second":4.0}"#;
        assert_eq!(step.to_json(), expected);
        let generation = JobEvent::Generation { generation: 1, world_size: 2 };
        assert_eq!(generation.to_json(), r#"{"event":"generation","generation":1,"world_size":2}"#);
    }
}
