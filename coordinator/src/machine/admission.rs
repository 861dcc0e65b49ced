//! Admission: no node gets work before it has shown that it can exchange data, and at what rate.
//!
//! New nodes are paired in the order of their names, then the fastest with the slowest; each pair exchanges data, and
//! says how fast. A pair that fails has two suspects, and the second pairing tells which: who never exchanged well with
//! anybody is set aside with the reason, unless all it failed with are worse than it (the node check of DLRover). Where
//! numbers are odd an admitted node lends a hand; one node alone has nobody to exchange with and is admitted. A node
//! set aside comes back by command, or with another life of its agent, which is tested anew.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::NodeName;
use proto::wire::Probe;
use proto::wire::coordinator_message::Body;

use super::action::Action;
use super::members::Members;

/// Bytes that each of a pair sends and receives.
pub const EXCHANGED: u64 = 32 << 20;
/// For a pair to exchange; agents stop by themselves before and tell the rate so far.
const WITHIN: Duration = Duration::from_secs(8);
/// How long the first nodes are waited for, so that they are tested together; longer while more come.
const GATHER: Duration = Duration::from_millis(300);
/// However many come, the first has waited so long at the most.
const GATHERED: Duration = Duration::from_secs(2);
/// A rate below this share of the usual one is no good. Two nodes of one machine that share its cores with others may
/// well differ by several times.
const SLOW: f64 = 0.1;
/// A clock that differs by more from the coordinator's would break certificates and logs.
pub const MOST_SKEW: Duration = Duration::from_secs(60);

/// What an exchange came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Finding {
    /// Bytes a second, each way.
    Rate(f64),
    /// It did not work, and why.
    Failed(String),
}

/// Where a node stands.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Standing {
    /// It has just come, or is being tested.
    New,
    /// It may have work. With its best rate, if it was tested.
    Admitted(Option<f64>),
    /// It gets none, and why.
    Aside(String),
}

/// One pairing under way.
#[derive(Debug)]
struct Round {
    number: u64,
    /// By the node that begins: with whom, and what came of it.
    pairs: BTreeMap<NodeName, (NodeName, Option<Finding>)>,
    /// Whether it is the second, from which conclusions are drawn.
    is_second: bool,
    until: Duration,
}

/// All nodes' standing. Off, it admits everybody.
#[derive(Debug, Default)]
pub(super) struct Admission {
    enabled: bool,
    nodes: BTreeMap<NodeName, Standing>,
    /// The nodes being tested; others that come meanwhile wait.
    candidates: BTreeSet<NodeName>,
    /// What came of their earlier pairing: with whom, and what.
    findings: BTreeMap<NodeName, Vec<(NodeName, Finding)>>,
    round: Option<Round>,
    rounds: u64,
    /// When the first and the last new node came.
    come: Option<(Duration, Duration)>,
    /// What an exchange usually reaches.
    usual: Option<f64>,
    changed: bool,
}

impl Admission {
    pub(super) fn new(enabled: bool) -> Self {
        Self { enabled, ..Self::default() }
    }

    /// A new life of a node's agent. One that is at work already has been admitted by an earlier coordinator.
    pub(super) fn arrive(&mut self, now: Duration, node: &NodeName, at_work: bool, skew: i64) {
        let late = Duration::from_millis(skew.unsigned_abs()) > MOST_SKEW;
        let standing = match () {
            () if !self.enabled || at_work => Standing::Admitted(None),
            () if late => {
                let (seconds, how) = (skew.unsigned_abs() / 1000, if skew > 0 { "ahead of" } else { "behind" });
                let text =
                    format!("its clock is {seconds} s {how} the coordinator's: set it, and start its agent again");
                Standing::Aside(text)
            }
            () => {
                let first = self.come.map_or(now, |(first, _)| first);
                self.come = Some((first, now));
                Standing::New
            }
        };
        self.forget(node);
        self.nodes.insert(node.clone(), standing);
        self.changed = true;
    }

    /// A node's agent is gone.
    pub(super) fn leave(&mut self, node: &NodeName) {
        if !matches!(self.nodes.get(node), Some(Standing::Aside(_))) {
            self.nodes.remove(node);
        }
        self.forget(node);
    }

    /// Whoever was paired with it has had no test; it is not held against anybody.
    fn forget(&mut self, node: &NodeName) {
        self.candidates.remove(node);
        self.findings.remove(node);
        if let Some(round) = &mut self.round {
            round.pairs.retain(|first, (second, _)| first != node && second != node);
        }
    }

    /// Lets a node have work, whatever was found. Whether that is news.
    pub(super) fn admit(&mut self, node: &NodeName) -> bool {
        let standing = self.nodes.get_mut(node);
        let aside = standing.filter(|standing| matches!(standing, Standing::Aside(_)));
        let news = aside.is_some_and(|standing| {
            *standing = Standing::Admitted(None);
            true
        });
        self.changed |= news;
        news
    }

    /// Whether a node may not have work.
    pub(super) fn bars(&self, node: &NodeName) -> bool {
        self.enabled && !matches!(self.nodes.get(node), None | Some(Standing::Admitted(_)))
    }

    /// Where a node stands.
    pub(super) fn standing(&self, node: &NodeName) -> Option<&Standing> {
        self.nodes.get(node)
    }

    /// Whether [`Self::bars`] may say something else than when this was last asked.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// What a pair found.
    pub(super) fn probed(&mut self, node: &NodeName, number: u64, finding: Finding) {
        let round = self.round.as_mut().filter(|round| round.number == number);
        if let Some((_, found)) = round.and_then(|round| round.pairs.get_mut(node)) {
            found.get_or_insert(finding);
        }
    }

    /// Starts what is to be tested, and draws conclusions from what was.
    pub(super) fn advance(&mut self, now: Duration, members: &Members, out: &mut Vec<Action>) {
        if let Some(round) = self.round.take_if(|round| round.is_over(now)) {
            let is_second = round.is_second;
            self.note(round);
            if !is_second {
                let order = self.by_rate();
                self.pair(now, members, out, order, true);
            }
            if self.round.is_none() {
                self.judge(out);
            }
        }
        if self.round.is_none() && self.is_time(now) {
            self.come = None;
            let new = self.nodes.iter().filter(|(_, standing)| **standing == Standing::New);
            self.candidates = new.map(|(node, _)| node.clone()).collect();
            self.findings.clear();
            let order = self.candidates.iter().cloned().collect();
            self.pair(now, members, out, order, false);
            if self.round.is_none() {
                // Nobody to exchange with.
                self.judge(out);
            }
        }
    }

    /// Whether new nodes have waited long enough for others.
    fn is_time(&self, now: Duration) -> bool {
        self.come
            .is_some_and(|(first, last)| now.saturating_sub(last) >= GATHER || now.saturating_sub(first) >= GATHERED)
    }

    /// The candidates, so that the fastest and the slowest stand side by side. Untested ones are in the middle.
    fn by_rate(&self) -> Vec<NodeName> {
        let rate = |node: &NodeName| match self.findings.get(node).and_then(|all| all.first()) {
            Some((_, Finding::Rate(rate))) => *rate,
            Some((_, Finding::Failed(_))) => 0.0,
            None => self.usual.unwrap_or(0.0),
        };
        let mut order: Vec<(f64, NodeName)> = self.candidates.iter().map(|node| (rate(node), node.clone())).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        let (mut sorted, mut out) = (order.into_iter().map(|(_, node)| node), Vec::new());
        while let Some(slow) = sorted.next() {
            out.push(slow);
            out.extend(sorted.next_back());
        }
        out
    }

    /// Lets neighbours of this order exchange data; one too many is helped by a node that is admitted.
    fn pair(
        &mut self,
        now: Duration,
        members: &Members,
        out: &mut Vec<Action>,
        mut order: Vec<NodeName>,
        is_second: bool,
    ) {
        let here = |node: &NodeName| members.get(node).is_some_and(|agent| agent.connection.is_some());
        order.retain(here);
        if let Some(odd) = order.last().filter(|_| order.len() % 2 == 1) {
            let partners = self.findings.get(odd);
            let used = |node: &NodeName| partners.is_some_and(|all| all.iter().any(|(with, _)| with == node));
            let helpers = || {
                let admitted = self.nodes.iter().filter(|(_, standing)| matches!(standing, Standing::Admitted(_)));
                admitted.map(|(node, _)| node).filter(|node| here(node))
            };
            // A helper it has not been paired with tells more.
            let helper = helpers().find(|node| !used(node)).or_else(|| helpers().next()).cloned();
            order.extend(helper);
        }
        let mut pairs = BTreeMap::new();
        self.rounds += 1;
        for pair in order.chunks_exact(2) {
            let (first, second) = (&pair[0], &pair[1]);
            let (Some(from), Some(to)) = (members.get(first), members.get(second)) else { continue };
            let Some(connection) = from.connection else { continue };
            let body = Body::Probe(Probe {
                round: self.rounds,
                node: second.to_string(),
                address: to.home.snapshots.clone(),
                bytes: EXCHANGED,
            });
            out.push(Action::Send { node: first.clone(), connection, body });
            pairs.insert(first.clone(), (second.clone(), None));
        }
        let round = Round { number: self.rounds, pairs, is_second, until: now.saturating_add(WITHIN) };
        self.round = (!round.pairs.is_empty()).then_some(round);
    }

    /// Takes in what a round has found, of both of each pair.
    fn note(&mut self, round: Round) {
        let mut rates = Vec::new();
        for (first, (second, found)) in round.pairs {
            let finding = found.unwrap_or_else(|| Finding::Failed(format!("{first} did not say how it went")));
            rates.extend(match &finding {
                Finding::Rate(rate) => Some(*rate),
                Finding::Failed(_) => None,
            });
            self.findings.entry(first.clone()).or_default().push((second.clone(), finding.clone()));
            self.findings.entry(second).or_default().push((first, finding));
        }
        rates.sort_by(f64::total_cmp);
        // Of several the median of the newest round; one alone says what is usual only if nothing else does.
        if let Some(median) = rates.get(rates.len() / 2).filter(|_| rates.len() > 1 || self.usual.is_none()) {
            self.usual = Some(*median);
        }
    }

    /// Admits the candidates, or sets them aside.
    fn judge(&mut self, out: &mut Vec<Action>) {
        let bad: BTreeMap<NodeName, usize> =
            self.findings.keys().filter_map(|node| Some((node.clone(), self.failures(node)?))).collect();
        for node in std::mem::take(&mut self.candidates) {
            let findings = self.findings.get(&node).map_or(&[][..], Vec::as_slice);
            let aside = bad.get(&node).is_some_and(|failures| {
                // Acquitted, if all it failed with are worse; of two that are as bad the first is, for want of proof,
                // unless the other was admitted before.
                let worse = |with: &NodeName| {
                    let was_admitted = matches!(self.nodes.get(with), Some(Standing::Admitted(_)));
                    bad.get(with).is_some_and(|of| of > failures || (of == failures && !was_admitted && node < *with))
                };
                !findings.iter().all(|(with, _)| worse(with))
            });
            let best = findings.iter().filter_map(|(_, finding)| rate(finding)).max_by(f64::total_cmp);
            let standing = if aside { Standing::Aside(self.reason(findings)) } else { Standing::Admitted(best) };
            let text = match &standing {
                Standing::Aside(reason) => {
                    format!("node {node} is set aside: {reason}; let it back: cairn undrain {node}")
                }
                Standing::New | Standing::Admitted(None) => format!("node {node} is admitted untested"),
                Standing::Admitted(Some(best)) => {
                    format!("node {node} is admitted: it exchanged {:.0} MB/s each way", best / 1e6)
                }
            };
            out.push(Action::Log { job: None, text });
            self.nodes.insert(node, standing);
        }
        self.changed = true;
    }

    /// How often a node's exchange was no good, if it never was any good.
    fn failures(&self, node: &NodeName) -> Option<usize> {
        let findings = self.findings.get(node)?;
        let least = self.usual.unwrap_or(0.0) * SLOW;
        // A helper may be at work, which slows an exchange and says nothing of the network.
        let slow = |with: &NodeName, rate: f64| self.candidates.contains(with) && rate < least;
        let good = |(with, finding): &(NodeName, Finding)| rate(finding).is_some_and(|rate| !slow(with, rate));
        let failed = findings.iter().any(|(_, finding)| rate(finding).is_none());
        let never = !findings.is_empty() && !findings.iter().any(good);
        // Slow once may be chance.
        (never && (failed || findings.len() > 1)).then_some(findings.len())
    }

    fn reason(&self, findings: &[(NodeName, Finding)]) -> String {
        let each = findings.iter().map(|(with, finding)| match finding {
            Finding::Rate(rate) => format!("it exchanged {:.1} MB/s with {with}", rate / 1e6),
            Finding::Failed(reason) => format!("its exchange with {with} failed: {reason}"),
        });
        let each: Vec<String> = each.collect();
        let usual = self.usual.map_or(String::new(), |usual| format!(" ({:.1} MB/s are usual)", usual / 1e6));
        format!("{}{usual}", each.join("; "))
    }
}

impl Round {
    fn is_over(&self, now: Duration) -> bool {
        now >= self.until || self.pairs.values().all(|(_, found)| found.is_some())
    }
}

fn rate(finding: &Finding) -> Option<f64> {
    match finding {
        Finding::Rate(rate) => Some(*rate),
        Finding::Failed(_) => None,
    }
}
