//! Incidents: what broke a job's generation off, who was to blame, and how long each stage of the way back took.
//!
//! An incident begins when the generation is known to be over and ends with the first step of the next one. Times are
//! milliseconds of each stage, one after the other: nobody asks for the date. What operators and the scheduler do
//! (scaling, draining, giving way) takes the same way back, so it is recorded too, but counted apart.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::ids::{Generation, NodeName, Rank, Step};

/// Incidents remembered of one job; of older ones only the counts are.
pub const REMEMBERED: usize = 1_000;

/// What broke a generation off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A worker process ended.
    WorkerExit,
    /// A node or its agent was lost.
    LostNode,
    /// The exchange between workers broke, and nothing else explains it.
    Collective,
    /// No step, join or upload within its deadline.
    NoProgress,
    /// The loss or a gradient was no usable number.
    NonFinite,
    /// A checkpoint's bytes were not what its manifest says.
    Checkpoint,
    /// I/O trouble or a store out of reach.
    Transient,
    /// The job's data or settings are wrong for a node.
    Input,
    /// A defect of this program.
    Defect,
    /// An operator changed the number of workers.
    Scale,
    /// Nodes came, and the job grew.
    Grow,
    /// A node was drained or left in order.
    Drain,
    /// Another job needed the slots.
    Preempt,
}

impl Cause {
    /// Whether somebody wanted it: it stops after a step, with a checkpoint, and is no failure.
    pub fn is_planned(self) -> bool {
        matches!(self, Self::Scale | Self::Grow | Self::Drain | Self::Preempt)
    }

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::WorkerExit => "worker_exit",
            Self::LostNode => "lost_node",
            Self::Collective => "collective",
            Self::NoProgress => "no_progress",
            Self::NonFinite => "non_finite",
            Self::Checkpoint => "checkpoint",
            Self::Transient => "transient",
            Self::Input => "input",
            Self::Defect => "defect",
            Self::Scale => "scale",
            Self::Grow => "grow",
            Self::Drain => "drain",
            Self::Preempt => "preempt",
        }
    }
}

/// How an incident ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is under way. Stored once the next generation is agreed on, for a coordinator that may have to take over; the
    /// record of its end has the same number and takes its place.
    Open,
    /// The job takes steps again.
    Recovered,
    /// Another incident came first.
    Interrupted,
    /// The job came to rest first.
    Ended,
}

/// One incident. Stages that were not reached are not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incident {
    /// Its place among all of the job, from 1.
    pub number: u64,
    /// What broke the generation off.
    pub cause: Cause,
    /// How it ended.
    pub outcome: Outcome,
    /// In words.
    pub reason: String,
    /// The process's exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The signal that ended the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Where, if one node is to blame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeName>,
    /// The two nodes between which nothing gets through, if that is to blame: both live, and either may be the cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<(NodeName, NodeName)>,
    /// Which rank, if one is to blame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<Rank>,
    /// The generation that was broken off.
    pub generation: Generation,
    /// The generation that took its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Generation>,
    /// The newest step that was finished before.
    pub step: Step,
    /// The step the next generation started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Step>,
    /// Where its state came from: `memory`, `peer`, `parity`, `store` or `initialised`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// From the generation's last sign of progress to the verdict that it is over.
    pub detect_ms: u64,
    /// Until no worker acted in it any more; for a planned one, until it had stopped and saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort_ms: Option<u64>,
    /// Until the next generation was agreed on and its record stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agree_ms: Option<u64>,
    /// Until all its ranks held their state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_ms: Option<u64>,
    /// Until its first step was finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_step_ms: Option<u64>,
    /// Milliseconds the job has spent on steps so far, each step counted once.
    pub productive_ms: u64,
    /// Milliseconds since its first step, time at rest left out.
    pub wall_ms: u64,
}

impl Incident {
    /// Steps that had to be taken again.
    pub fn steps_lost(&self) -> Option<u64> {
        self.start.map(|start| self.step.get().saturating_sub(start.get()))
    }

    /// All its stages together.
    pub fn total_ms(&self) -> u64 {
        let stages = [self.abort_ms, self.agree_ms, self.restore_ms, self.first_step_ms];
        stages.into_iter().flatten().fold(self.detect_ms, u64::saturating_add)
    }
}

/// The incidents of a job: the newest in full, all of them counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incidents {
    /// The newest, oldest first; at most [`REMEMBERED`].
    pub latest: VecDeque<Incident>,
    /// How many there ever were, by cause.
    pub counts: BTreeMap<Cause, u64>,
}

impl Incidents {
    /// Whether there was never one.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// How many there ever were.
    pub fn total(&self) -> u64 {
        self.counts.values().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The newest, if it is not over yet.
    pub fn open(&self) -> Option<&Incident> {
        self.latest.back().filter(|last| last.outcome == Outcome::Open)
    }

    /// One more, or the end of the one that was open.
    pub fn add(&mut self, incident: Incident) {
        if self.open().is_some_and(|open| open.number == incident.number && open.cause == incident.cause) {
            self.latest.pop_back();
            self.latest.push_back(incident);
            return;
        }
        let count = self.counts.entry(incident.cause).or_default();
        *count = count.saturating_add(1);
        self.latest.push_back(incident);
        while self.latest.len() > REMEMBERED {
            self.latest.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_incident_takes_the_place_of_its_beginning() {
        let one = |number: u64, outcome: &str| -> Incident {
            let text = format!(
                r#"{{"number":{number},"cause":"lost_node","outcome":"{outcome}","reason":"","generation":3,"step":9,
                    "detect_ms":1,"productive_ms":0,"wall_ms":0}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        let mut incidents = Incidents::default();
        incidents.add(one(1, "open"));
        assert_eq!((incidents.total(), incidents.open().map(|open| open.number)), (1, Some(1)));
        incidents.add(one(1, "recovered"));
        assert_eq!((incidents.total(), incidents.latest.len(), incidents.open()), (1, 1, None));
        incidents.add(one(2, "open"));
        incidents.add(one(3, "recovered"));
        assert_eq!((incidents.total(), incidents.latest.len()), (3, 3));
    }

    #[test]
    fn the_newest_are_remembered_and_all_are_counted() {
        let mut incidents = Incidents::default();
        for number in 1..=REMEMBERED as u64 + 5 {
            let cause = if number % 2 == 0 { Cause::WorkerExit } else { Cause::Drain };
            let one = format!(
                r#"{{"number":{number},"cause":"{}","outcome":"recovered","reason":"","generation":3,"step":9,
                    "start":7,"detect_ms":1,"abort_ms":2,"productive_ms":0,"wall_ms":0}}"#,
                cause.name()
            );
            incidents.add(serde_json::from_str(&one).unwrap());
        }
        assert_eq!((incidents.total(), incidents.latest.len()), (1_005, 1_000));
        assert_eq!(incidents.latest[0].number, 6);
        assert_eq!((incidents.latest[0].steps_lost(), incidents.latest[0].total_ms()), (Some(2), 3));
        let json = serde_json::to_string(&incidents).unwrap();
        assert_eq!(serde_json::from_str::<Incidents>(&json).unwrap(), incidents);
        assert!(json.contains(r#""counts":{"worker_exit":502,"drain":503}"#), "{}", &json[json.len() - 80..]);
    }
}
