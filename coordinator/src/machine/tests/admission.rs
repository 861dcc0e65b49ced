//! Nodes that are tested before they get work.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use proto::wire::coordinator_message::Body;

use super::super::admission::{Finding, Standing};
use super::super::members::{Home, Members};
use super::super::*;
use super::rig::node;

const TICK: Duration = Duration::from_millis(100);

/// Nodes and the network between them.
struct Lab<'a> {
    admission: Admission,
    members: Members,
    now: Duration,
    /// What two nodes reach; `None`: nothing.
    network: &'a dyn Fn(&str, &str) -> Option<f64>,
    /// How many exchanges each node took part in.
    exchanges: BTreeMap<String, usize>,
}

impl<'a> Lab<'a> {
    fn new(network: &'a dyn Fn(&str, &str) -> Option<f64>) -> Self {
        let (admission, members) = (Admission::new(true), Members::default());
        Self { admission, members, now: Duration::ZERO, network, exchanges: BTreeMap::new() }
    }

    fn come_all(&mut self, names: &[&str]) {
        for name in names {
            self.come(name);
        }
    }

    fn come(&mut self, name: &str) {
        let home = Home { snapshots: format!("{name}:1"), ..Home::default() };
        self.members.attach(self.now, &node(name), "i".into(), 1, 1, home);
        self.admission.arrive(self.now, &node(name), false, 0);
    }

    /// Lets ticks pass, in which pairs exchange what the network gives; whether all are judged by then.
    fn pass(&mut self, ticks: u32) {
        for _ in 0..ticks {
            self.now += TICK;
            let mut out = Vec::new();
            self.admission.advance(self.now, &self.members, &mut out);
            for action in out {
                let Action::Send { node: first, body: Body::Probe(probe), .. } = action else { continue };
                for name in [first.as_str(), &probe.node] {
                    *self.exchanges.entry(name.to_string()).or_default() += 1;
                }
                let finding = match (self.network)(first.as_str(), &probe.node) {
                    Some(rate) => Finding::Rate(rate),
                    None => Finding::Failed("connection refused".into()),
                };
                self.admission.probed(&first, probe.round, finding);
            }
        }
    }

    fn aside(&self, names: &[&str]) -> Vec<String> {
        let barred = names.iter().filter(|name| self.admission.bars(&node(name)));
        barred.map(ToString::to_string).collect()
    }
}

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

#[test]
fn one_node_alone_is_admitted_untested() {
    let mut lab = Lab::new(&|_, _| None);
    lab.come("a");
    assert!(lab.admission.bars(&node("a")));
    lab.pass(5);
    assert_eq!(lab.admission.standing(&node("a")), Some(&Standing::Admitted(None)));
    assert!(lab.exchanges.is_empty());
}

#[test]
fn a_node_nobody_reaches_is_set_aside_and_those_it_was_paired_with_are_not() {
    for count in 3..=NAMES.len() {
        for bad in &NAMES[..count] {
            let network = |a: &str, b: &str| (a != *bad && b != *bad).then_some(1e9);
            let mut lab = Lab::new(&network);
            lab.come_all(&NAMES[..count]);
            lab.pass(10);
            assert_eq!(lab.aside(&NAMES[..count]), [*bad], "of {count}");
            let Some(Standing::Aside(reason)) = lab.admission.standing(&node(bad)) else { panic!("a reason") };
            assert!(reason.contains("connection refused"), "{reason}");
        }
    }
}

#[test]
fn a_slow_node_is_set_aside_with_its_rates() {
    let network = |a: &str, b: &str| Some(if a == "d" || b == "d" { 1e7 } else { 1e9 });
    let mut lab = Lab::new(&network);
    lab.come_all(&NAMES);
    lab.pass(10);
    assert_eq!(lab.aside(&NAMES), ["d"]);
    let Some(Standing::Aside(reason)) = lab.admission.standing(&node("d")) else { panic!("a reason") };
    assert!(reason.contains("10.0 MB/s") && reason.contains("1000.0 MB/s are usual"), "{reason}");
    assert!(lab.admission.admit(&node("d")) && lab.aside(&NAMES).is_empty(), "let back by command");
    assert!(!lab.admission.admit(&node("d")), "no news");
}

#[test]
fn a_busy_helper_makes_nobody_slow() {
    let network = |a: &str, b: &str| Some(if a == "z" || b == "z" { 1e7 } else { 1e9 });
    let mut lab = Lab::new(&network);
    lab.come_all(&["a", "b", "c", "d"]);
    lab.pass(10);
    lab.come("z");
    lab.pass(10);
    assert!(lab.aside(&["z"]).is_empty(), "{:?}", lab.admission.standing(&node("z")));
}

#[test]
fn two_that_do_not_reach_each_other_leave_one_to_work_with() {
    let mut lab = Lab::new(&|_, _| None);
    lab.come("a");
    lab.come("b");
    lab.pass(10);
    assert_eq!(lab.aside(&NAMES), ["b"]);
    // With a third, the later life of the one set aside may show that it was not its fault.
    let network = |a: &str, b: &str| (a != "a" && b != "a").then_some(1e9);
    let mut lab = Lab { network: &network, ..lab };
    lab.come("c");
    lab.pass(10);
    assert_eq!(lab.aside(&NAMES), ["b", "c"], "the one that was admitted before is trusted");
}

#[test]
fn a_node_that_comes_later_is_tested_with_one_that_is_there() {
    let network = |a: &str, b: &str| (a != "z" && b != "z").then_some(1e9);
    let mut lab = Lab::new(&network);
    lab.come_all(&["a", "b", "c"]);
    lab.pass(10);
    lab.exchanges.clear();
    lab.come("z");
    lab.pass(10);
    assert_eq!(lab.aside(&["a", "b", "c", "z"]), ["z"]);
    assert_eq!(lab.exchanges, BTreeMap::from([("a".into(), 1), ("b".into(), 1), ("z".into(), 2)]));
    // Another life of its agent is tested anew.
    let good = |_: &str, _: &str| Some(1e9);
    let mut lab = Lab { network: &good, ..lab };
    lab.admission.leave(&node("z"));
    lab.come("z");
    lab.pass(10);
    assert!(lab.aside(&["z"]).is_empty());
}

#[test]
fn silence_is_a_failure_and_who_leaves_is_held_against_nobody() {
    let mut lab = Lab::new(&|_, _| Some(1e9));
    lab.come_all(&NAMES[..4]);
    let mut out = Vec::new();
    lab.now += Duration::from_secs(1);
    lab.admission.advance(lab.now, &lab.members, &mut out);
    assert_eq!(out.len(), 2, "two pairs, of which nothing is heard: {out:?}");
    lab.admission.leave(&node("b"));
    lab.members.detach(lab.now, &node("b"), 1);
    lab.now += Duration::from_secs(9);
    lab.pass(10);
    // c began its pair and was silent, while d, which it was with, exchanged well with a after that.
    assert_eq!(lab.aside(&["a", "c", "d"]), ["c"]);
    let Some(Standing::Aside(reason)) = lab.admission.standing(&node("c")) else { panic!("a reason") };
    assert!(reason.contains("c did not say how it went"), "{reason}");
}

#[test]
fn a_node_at_work_is_admitted_and_one_whose_clock_is_wrong_is_not() {
    let mut lab = Lab::new(&|_, _| Some(1e9));
    lab.admission.arrive(lab.now, &node("w"), true, 0);
    assert!(lab.aside(&["w"]).is_empty());
    lab.admission.arrive(lab.now, &node("t"), false, -95_000);
    assert_eq!(lab.aside(&["t"]), ["t"]);
    let Some(Standing::Aside(reason)) = lab.admission.standing(&node("t")) else { panic!("a reason") };
    assert!(reason.contains("95 s behind"), "{reason}");
}

proptest! {
    #[test]
    fn all_are_judged_and_a_good_network_sets_nobody_aside(
        arrivals in prop::collection::vec(0u32..12, 1..30),
        bad in prop::option::of(0usize..30),
    ) {
        // Whoever is bad is bad with everybody; rates of the others differ by up to two times.
        let names: Vec<String> = (0..arrivals.len()).map(|at| format!("n{at:02}")).collect();
        let bad = bad.and_then(|bad| names.get(bad).cloned());
        let is_bad = |name: &str| bad.as_deref() == Some(name);
        let rate = |name: &str| 1e9 + f64::from(name.bytes().map(u32::from).sum::<u32>() % 7) * 1e8;
        let network = |a: &str, b: &str| (!is_bad(a) && !is_bad(b)).then(|| rate(a).min(rate(b)));
        let mut lab = Lab::new(&network);
        for (name, wait) in names.iter().zip(&arrivals) {
            lab.come(name);
            lab.pass(*wait);
        }
        lab.pass(60);
        for name in &names {
            let standing = lab.admission.standing(&node(name));
            prop_assert_ne!(standing, Some(&Standing::New), "{} waits for ever", name);
            if bad.is_none() {
                prop_assert!(!lab.admission.bars(&node(name)), "{}: {:?}", name, standing);
            }
        }
    }
}
