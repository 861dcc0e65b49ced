//! Nodes that are drained and used again.

use std::time::Duration;

use proto::wire::{NodeStatus, SubmitMode};

use super::super::*;
use super::rig::{Rig, job_name, node, spec};

impl Rig {
    /// Stores what is to be recorded of nodes, if something is.
    pub(super) fn store_nodes(&mut self) -> Option<BTreeSet<NodeName>> {
        let drained = self.drained.take()?;
        self.handle(Event::NodesRecorded { outcome: Outcome::Done });
        Some(drained)
    }
}

fn drain(rig: &mut Rig, name: &str, empty: bool) -> Result<NodeStatus, Refusal> {
    let request = rig.ask(Ask::Drain(node(name), empty));
    if let Some(drained) = rig.store_nodes() {
        assert_eq!(drained.contains(&node(name)), empty);
    }
    match rig.replies[&request].clone()? {
        Answer::Node(status) => Ok(*status),
        other => panic!("{other:?}"),
    }
}

fn state(rig: &mut Rig, name: &str) -> (String, u32) {
    let request = rig.ask(Ask::Nodes);
    let Ok(Answer::Nodes(nodes)) = &rig.replies[&request] else { panic!("{:?}", rig.replies[&request]) };
    let status = nodes.iter().find(|status| status.node == name).unwrap();
    (status.state.clone(), status.used)
}

#[test]
fn a_drained_node_is_left_with_a_checkpoint_and_used_again_when_undrained() {
    let mut rig = Rig::new();
    rig.attach("a", 2);
    rig.attach("b", 2);
    rig.submit(spec("{ min = 1, max = 4 }"), SubmitMode::New, None);
    rig.settle();
    assert_eq!(rig.live(), Some((1, 4)));
    rig.train(5);
    assert_eq!(drain(&mut rig, "b", true).unwrap().state, "draining");
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.live(), Some((1, 4)), "it trains until it has saved");
    rig.train(6);
    assert_eq!((rig.live(), state(&mut rig, "b")), (Some((2, 2)), ("drained".into(), 0)));
    assert_eq!(state(&mut rig, "a"), ("ready".into(), 2));
    // Another life of the agent changes nothing.
    rig.lose("b");
    rig.pass(Duration::from_secs(2));
    assert_eq!(state(&mut rig, "b").0, "lost");
    rig.attach("b", 2);
    rig.pass(Duration::from_secs(5));
    rig.train(7);
    assert_eq!((rig.live(), state(&mut rig, "b").0.as_str()), (Some((2, 2)), "drained"));
    assert_eq!(drain(&mut rig, "b", false).unwrap().state, "ready");
    rig.pass(Duration::from_secs(4));
    rig.train(8);
    assert_eq!(rig.live(), Some((3, 4)));
    assert!(!rig.kinds().contains(&"failure"));
}

#[test]
fn a_job_whose_only_node_is_drained_waits_with_its_checkpoint() {
    let mut rig = Rig::running("2", 2);
    rig.train(5);
    drain(&mut rig, "a", true).unwrap();
    rig.pass(Duration::from_millis(300));
    rig.train(6);
    assert_eq!(rig.live(), None);
    let request = rig.ask(Ask::Status(job_name()));
    let Ok(Answer::Status(status)) = &rig.replies[&request] else { panic!() };
    assert_eq!((status.state.as_str(), status.checkpoint_step), ("queued", Some(6)));
    drain(&mut rig, "a", false).unwrap();
    rig.pass(Duration::from_millis(300));
    assert_eq!(rig.live(), Some((2, 2)));
}

#[test]
fn what_a_drained_node_is_about_to_forget_is_not_started_from() {
    let mut rig = Rig::new();
    rig.attach("a", 1);
    rig.attach("b", 1);
    rig.submit(spec("{ min = 1, max = 2 }"), SubmitMode::New, None);
    rig.settle();
    rig.train(5);
    drain(&mut rig, "b", true).unwrap();
    rig.pass(Duration::from_millis(300));
    rig.snapshot(6);
    rig.train(6);
    assert_eq!(rig.live(), Some((2, 1)));
    let run = rig.nodes[&node("a")].desired[&job_name()].run.clone().unwrap();
    let memory = run.memory.unwrap();
    let addresses: Vec<&str> = memory.groups[0].members.iter().map(|member| member.snapshots.as_str()).collect();
    assert_eq!((memory.step, addresses), (6, vec!["a:1", ""]), "the other's part comes from parity");
}

#[test]
fn a_node_nobody_knows_cannot_be_drained() {
    let mut rig = Rig::running("1", 1);
    let Err(Refusal::NotFound(text)) = drain(&mut rig, "z", true) else { panic!() };
    assert!(text.contains("known are a") && text.contains("cairn nodes"), "{text}");
}

#[test]
fn what_a_node_holds_is_kept_until_it_cannot_be_needed() {
    let mut rig = Rig::running("2", 2);
    rig.attach("b", 2);
    rig.train(5);
    rig.snapshot(7);
    let keeps =
        |rig: &Rig| rig.nodes[&node("a")].desired.get(&job_name()).map(|desired| (desired.workers, desired.keep));
    assert_eq!(keeps(&rig), Some((2, false)));
    drain(&mut rig, "a", true).unwrap();
    rig.pass(Duration::from_millis(300));
    rig.train(8);
    rig.pass(Duration::from_secs(1));
    assert_eq!((rig.live(), keeps(&rig)), (Some((2, 2)), Some((0, true))), "it moved, and has stored nothing yet");
    rig.train(10);
    assert_eq!(keeps(&rig), Some((0, false)));
}

#[test]
fn a_drain_takes_effect_once_it_is_recorded_and_outlives_the_coordinator() {
    let mut rig = Rig::new();
    rig.attach("a", 2);
    rig.attach("b", 2);
    let (first, second) = (rig.ask(Ask::Drain(node("b"), true)), rig.ask(Ask::Drain(node("a"), true)));
    assert_eq!(state(&mut rig, "b").0, "ready", "it is not recorded yet");
    rig.drained = None;
    rig.handle(Event::NodesRecorded { outcome: Outcome::Failed("the store is away".into()) });
    let Err(Refusal::Unavailable(why)) = &rig.replies[&first] else { panic!("{:?}", rig.replies[&first]) };
    assert!(why.contains("the store is away") && why.contains("ask again"), "{why}");
    assert_eq!((state(&mut rig, "b").0.as_str(), rig.replies.contains_key(&second)), ("ready", false));
    assert_eq!(rig.store_nodes(), Some([node("a")].into()), "the next one's turn");
    assert_eq!((state(&mut rig, "a").0.as_str(), rig.replies[&second].is_ok()), ("drained", true));

    let mut next = Rig::new();
    next.handle(Event::NodesLoaded { drained: [node("b"), node("z")].into() });
    next.attach("a", 2);
    next.attach("b", 2);
    next.submit(spec("{ min = 1, max = 4 }"), SubmitMode::New, None);
    next.settle();
    assert_eq!(next.live(), Some((1, 2)), "nothing is started on the node that is to be empty");
    assert_eq!((state(&mut next, "b").0.as_str(), state(&mut next, "z").0.as_str()), ("drained", "lost"));
    // One that is not there, and may never be again, is let back all the same.
    assert_eq!(drain(&mut next, "z", false).unwrap().state, "lost");
    assert!(matches!(drain(&mut next, "z", false), Err(Refusal::NotFound(_))));
    let request = next.ask(Ask::Drain(node("b"), false));
    next.handle(Event::NodesRecorded { outcome: Outcome::Lost("epoch 2 was taken".into()) });
    assert_eq!(next.fenced.as_deref(), Some("epoch 2 was taken"));
    assert!(matches!(next.replies[&request], Err(Refusal::Unavailable(_))));
}
