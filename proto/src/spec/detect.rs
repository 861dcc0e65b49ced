//! How long a failure can go unnoticed, as a function of `[fault]`.
//!
//! Every failure meets a timeout of its own, and each must leave time to those before it, or the wrong thing is blamed:
//! a stuck exchange noticed before the lost node that caused it would put that node into the next generation as well.
//! So the keys form one chain, `check_margins` refuses what is too near, and [`FaultSpec::detection`]
//! says what it comes to. The constants are those the coordinator works by: it takes them from here.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::FaultSpec;

/// Between two looks of the coordinator at the time; what depends on a deadline is noticed this much later.
pub const TICK: Duration = Duration::from_millis(100);
/// Between two reports of an agent that has no job.
pub const IDLE_HEARTBEAT: Duration = Duration::from_secs(1);
/// So many idle heartbeats must be missing before an agent is lost, whatever a job asks for: one late is no loss.
pub const MISSED_HEARTBEATS: f64 = 2.5;
/// How long a closed stream of an agent may stay closed before the agent is lost.
pub const REATTACH: Duration = Duration::from_secs(1);
/// How long a broken exchange waits for its cause to be known while a member's agent may come back.
pub const ATTRIBUTION: Duration = Duration::from_millis(1500);

/// The longest until the coordinator knows of a failure, by its kind, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Detection {
    /// A worker's process has ended. Its agent waits for that and says so at once; should the agent's stream have
    /// broken at the same moment, it comes back with the news or is lost after [`REATTACH`].
    pub worker_exit: f64,
    /// A node has gone silent: nothing closed its connections, so only the missing reports tell. The last one may have
    /// come just before the end.
    pub lost_node: f64,
    /// A rank does not take part in an exchange that its peers are in, though its process and node live. Counted from
    /// when they wait for it; then the cause is looked for.
    pub broken_exchange: f64,
    /// The ranks live and talk, and no step is finished. Counted from the last one.
    pub no_progress: f64,
    /// A generation does not form. Counted from when it could have.
    pub not_formed: f64,
}

impl FaultSpec {
    /// The worst case of each kind of failure.
    pub fn detection(&self) -> Detection {
        let tick = TICK.as_secs_f64();
        Detection {
            worker_exit: REATTACH.as_secs_f64() + tick,
            lost_node: self.suspicion.max(least_suspicion()) + tick,
            broken_exchange: self.collective + ATTRIBUTION.as_secs_f64() + tick,
            no_progress: self.hang + tick,
            not_formed: self.restart + tick,
        }
    }

    /// Refuses timeouts that are out of order: the later key, its value, and what would be right. What is stored must
    /// be readable for ever, so this rule never becomes stricter; [`FaultSpec::check_margins`] is for what is new.
    pub(super) fn check_order(&self) -> Result<(), Misfit> {
        self.check_links([0.0; 4], [""; 4])
    }

    /// Refuses timeouts that do not leave time to those before them.
    pub(super) fn check_margins(&self) -> Result<(), Misfit> {
        let (least, attribution) = (least_suspicion(), ATTRIBUTION.as_secs_f64());
        let suspicion = format!(", and than {least} s, in which no agent is lost whatever the job says");
        let collective =
            format!(" by more than the {attribution} s in which the cause of a broken exchange is looked for");
        let floors = [0.0, least, self.collective + attribution, 0.0];
        self.check_links(floors, ["", &suspicion, &collective, ""])
    }

    /// Each timeout must be above the one before it and above its own floor; `why` says what that one is.
    fn check_links(&self, floors: [f64; 4], why: [&str; 4]) -> Result<(), Misfit> {
        let Self { heartbeat, suspicion, collective, hang, restart, .. } = *self;
        let keys = ["heartbeat", "suspicion", "collective", "hang", "restart"];
        let values = [heartbeat, suspicion, collective, hang, restart];
        for (at, (least, why)) in floors.into_iter().zip(why).enumerate() {
            let (low, low_value, high, high_value) = (keys[at], values[at], keys[at + 1], values[at + 1]);
            let floor = low_value.max(least);
            if high_value <= floor {
                // The plain rule explains most mistakes; the margin is told where it is what was violated.
                let why = if high_value <= low_value { "" } else { why };
                let wanted = format!(
                    "greater than fault.{low} = {low_value} s{why}: above {floor} s (heartbeat < suspicion < \
                     collective < hang < restart)"
                );
                return Err((high, high_value, wanted));
            }
        }
        Ok(())
    }
}

/// A timeout's key, its value in seconds, and what would be right.
pub(super) type Misfit = (&'static str, f64, String);

/// The shortest silence after which an agent is ever lost, in seconds.
fn least_suspicion() -> f64 {
    IDLE_HEARTBEAT.as_secs_f64() * MISSED_HEARTBEATS
}

impl fmt::Display for Detection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { worker_exit, lost_node, broken_exchange, no_progress, not_formed } = self;
        write!(
            f,
            "noticed at the latest: a worker's end after {worker_exit:.1} s, a silent node after {lost_node:.1} s, a \
             stuck exchange after {broken_exchange:.1} s, no step after {no_progress:.1} s, a generation that does not \
             form after {not_formed:.1} s"
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chain(values: [f64; 5]) -> FaultSpec {
        let [heartbeat, suspicion, collective, hang, restart] = values;
        let (grace, restarts_without_progress, straggler) = (30.0, 5, 1.5);
        FaultSpec { restarts_without_progress, heartbeat, suspicion, collective, hang, restart, grace, straggler }
    }

    fn refusal(values: [f64; 5]) -> String {
        let (key, value, wanted) = chain(values).check_margins().expect_err("out of order");
        format!("fault.{key} is {value} s, but must be {wanted}")
    }

    #[test]
    fn the_defaults_come_to_what_is_documented() {
        let fault = chain([1.0, 5.0, 30.0, 120.0, 300.0]);
        fault.check_margins().unwrap();
        let Detection { worker_exit, lost_node, broken_exchange, no_progress, not_formed } = fault.detection();
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
        near(worker_exit, 1.1);
        near(lost_node, 5.1);
        near(broken_exchange, 31.6);
        near(no_progress, 120.1);
        near(not_formed, 300.1);
        near(chain([0.1, 0.2, 30.0, 120.0, 300.0]).detection().lost_node, 2.6);
        assert!(fault.detection().to_string().contains("a silent node after 5.1 s"));
    }

    #[test]
    fn a_broken_chain_names_both_keys_and_what_would_be_right() {
        let rows: [([f64; 5], &[&str]); 6] = [
            ([5.0, 5.0, 30.0, 120.0, 300.0], &["fault.suspicion is 5 s", "fault.heartbeat = 5 s", "above 5 s"]),
            ([1.0, 30.0, 20.0, 120.0, 300.0], &["fault.collective is 20 s", "fault.suspicion = 30 s", "above 30 s"]),
            ([1.0, 1.5, 2.0, 120.0, 300.0], &["fault.collective is 2 s", "fault.suspicion = 1.5 s", "above 2.5 s"]),
            ([1.0, 5.0, 30.0, 20.0, 300.0], &["fault.hang is 20 s", "fault.collective = 30 s", "above 31.5 s"]),
            ([1.0, 5.0, 30.0, 31.0, 300.0], &["fault.hang is 31 s", "the 1.5 s in which the cause", "above 31.5 s"]),
            ([1.0, 5.0, 30.0, 120.0, 120.0], &["fault.restart is 120 s", "fault.hang = 120 s", "above 120 s"]),
        ];
        for (values, parts) in rows {
            let message = refusal(values);
            for part in parts {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn what_is_stored_need_only_be_in_order() {
        let tight = chain([0.1, 0.2, 0.3, 0.4, 0.5]);
        tight.check_order().unwrap();
        tight.check_margins().unwrap_err();
        chain([0.1, 0.2, 0.2, 0.4, 0.5]).check_order().unwrap_err();
    }

    proptest! {
        #[test]
        fn what_comes_later_in_a_valid_chain_is_noticed_later(values in prop::array::uniform5(0.01f64..400.0)) {
            // In order, some are valid and some too near each other; of those refused nothing is claimed.
            let mut values = values;
            values.sort_by(f64::total_cmp);
            let fault = chain(values);
            if fault.check_margins().is_ok() {
                let d = fault.detection();
                let times = [d.worker_exit, d.lost_node, d.broken_exchange, d.no_progress, d.not_formed];
                prop_assert!(times.windows(2).all(|pair| pair[0] < pair[1]), "{times:?} of {values:?}");
            }
        }
    }
}
