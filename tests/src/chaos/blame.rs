//! Who is to be blamed for what: the incidents a fault may cause, held against those the ledger tells of.

use serde_json::Value;

use super::fault::{Fault, Kind};

/// Whose name an incident may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// The node that was struck.
    Node,
    /// That, or one of its links, or nobody's: where all wait for one another it may not be known, and the struck node
    /// must not get away at another one's cost.
    NodeOrNobody,
    /// The link between the two nodes, or one of them, or nobody: between two it cannot be known which.
    Either,
}

/// The causes and the culprits that are right for a fault; none where nothing may break.
fn right(kind: Kind) -> (&'static [&'static str], Whose) {
    use Kind as K;
    match kind {
        K::KillWorker => (&["worker_exit"], Whose::Node),
        // Its successor may be there before it is missed; then its workers are what is missed.
        K::KillAgent => (&["lost_node", "worker_exit"], Whose::Node),
        K::StopAgent | K::NodeOff | K::ControlCut => (&["lost_node"], Whose::Node),
        K::StopWorker => (&["collective", "no_progress"], Whose::Node),
        K::DataOff | K::Loss | K::Slow => (&["collective", "no_progress"], Whose::NodeOrNobody),
        K::RingOneWay | K::RingCut => (&["collective", "no_progress"], Whose::Either),
        K::KillLeader
        | K::KillStandby
        | K::StopWorkerBriefly
        | K::StopAgentBriefly
        | K::StopLeaderBriefly
        | K::StopLeader
        | K::LeaderOff
        | K::LeaderStoreCut
        | K::LeaderStopAndOff
        | K::Latency
        | K::StoreStop
        | K::StoreOff
        | K::StoreKill
        | K::FullStore
        | K::FullMemory => (&[], Whose::Node),
    }
}

/// Whether an incident is one that this fault may have caused, and says so.
pub fn is_right(fault: &Fault, incident: &Value) -> bool {
    let (causes, whose) = right(fault.kind);
    let node = incident["node"].as_str();
    let ends = || incident["link"].as_array().into_iter().flatten();
    let is_end = |of: &str| ends().count() == 0 || ends().any(|end| end == of);
    let named = match whose {
        Whose::Node => node == Some(fault.node.as_str()),
        Whose::NodeOrNobody => node.is_none_or(|node| node == fault.node) && is_end(&fault.node),
        Whose::Either => {
            let either = node.is_none_or(|node| node == fault.node || node == fault.other);
            either && is_end(&fault.node) && is_end(&fault.other)
        }
    };
    incident["cause"].as_str().is_some_and(|cause| causes.contains(&cause)) && named
}

/// Whether a fault cannot pass without an incident, if its node takes part in the job.
pub fn must_break(kind: Kind) -> bool {
    use Kind as K;
    matches!(
        kind,
        K::KillWorker | K::KillAgent | K::StopWorker | K::StopAgent | K::NodeOff | K::DataOff | K::ControlCut
    )
}

/// An incident in one line.
pub fn tell(incident: &Value) -> String {
    let text = |key: &str| incident[key].as_str().unwrap_or("-").to_string();
    let link = incident["link"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let link: Vec<&str> = link.collect();
    let whose = if link.is_empty() { text("node") } else { format!("link {}", link.join("\u{2013}")) };
    format!("{} of {whose}: {}", text("cause"), text("reason"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn the_wrong_node_the_wrong_cause_and_any_incident_of_a_harmless_fault_are_wrong() {
        let fault = |kind| Fault { kind, node: "n1".into(), other: "n2".into(), length: Duration::ZERO, strength: 0 };
        let incident = |cause: &str, node: &str| json!({"cause": cause, "node": node});
        assert!(is_right(&fault(Kind::KillWorker), &incident("worker_exit", "n1")));
        assert!(!is_right(&fault(Kind::KillWorker), &incident("worker_exit", "n2")));
        assert!(!is_right(&fault(Kind::KillWorker), &incident("lost_node", "n1")));
        assert!(is_right(&fault(Kind::DataOff), &json!({"cause": "collective"})));
        assert!(!is_right(&fault(Kind::DataOff), &incident("collective", "n2")));
        assert!(is_right(&fault(Kind::RingCut), &incident("collective", "n2")));
        assert!(is_right(&fault(Kind::RingCut), &json!({"cause": "collective"})));
        assert!(!is_right(&fault(Kind::RingCut), &incident("collective", "n3")));
        let link = |one: &str, other: &str| json!({"cause": "collective", "link": [one, other]});
        assert!(
            is_right(&fault(Kind::RingCut), &link("n2", "n1")) && is_right(&fault(Kind::DataOff), &link("n0", "n1"))
        );
        assert!(
            !is_right(&fault(Kind::RingCut), &link("n1", "n3")) && !is_right(&fault(Kind::DataOff), &link("n0", "n2"))
        );
        assert!(!is_right(&fault(Kind::StopLeader), &incident("lost_node", "n1")));
    }
}
