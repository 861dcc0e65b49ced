//! Starting from the nodes' memory: the newest step of which every block can be had, or an older state.

use std::time::Duration;

use prost::Message;
use proto::wire::{Announcement, FailureKind, SubmitMode, WorkerPhase};

use super::rig::{Rig, job_name, node, spec};
use crate::machine::Entry;

/// Three nodes with a worker each, a checkpoint at step 5, and step 7 in memory.
fn trained() -> Rig {
    let mut rig = Rig::new();
    for name in ["a", "b", "c"] {
        rig.attach(name, 1);
    }
    rig.submit(spec("{ min = 1, max = 3 }"), SubmitMode::New, None);
    rig.settle();
    rig.train(5);
    rig.snapshot(7);
    rig
}

fn last_start(rig: &Rig) -> (Option<u64>, Option<u64>) {
    let mut generations = rig.records.iter().filter_map(|entry| match entry {
        Entry::Generation(membership) => Some(membership),
        _ => None,
    });
    let last = generations.next_back().unwrap();
    (last.start.as_ref().map(|start| start.step.get()), last.memory.map(|memory| memory.step.get()))
}

fn announced(rig: &Rig, name: &str) -> Announcement {
    rig.nodes[&node(name)].desired[&job_name()].run.clone().unwrap()
}

#[test]
fn a_killed_worker_costs_the_steps_since_the_last_snapshot() {
    let mut rig = trained();
    rig.kill("b", 0);
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.live(), Some((2, 3)));
    assert_eq!(last_start(&rig), (Some(5), Some(7)));
    let start = announced(&rig, "b").memory.unwrap();
    assert_eq!((start.generation, start.step, start.world_size, start.groups.len()), (1, 7, 3, 1));
    assert!(start.groups[0].members.iter().all(|member| member.snapshots == format!("{}:1", member.node)));
}

#[test]
fn a_lost_node_is_made_up_for_by_parity_and_two_by_the_store() {
    let mut rig = trained();
    rig.lose("c");
    rig.pass(Duration::from_secs(8));
    assert_eq!(rig.live(), Some((2, 2)));
    assert_eq!(last_start(&rig), (Some(5), Some(7)));
    let members = announced(&rig, "a").memory.unwrap().groups.remove(0).members;
    assert_eq!(members.iter().filter(|member| member.snapshots.is_empty()).count(), 1, "the lost one");
    assert_eq!(announced(&rig, "a").group.unwrap().members.len(), 2, "the new generation's group");

    let mut rig = trained();
    rig.lose("c");
    rig.lose("b");
    rig.pass(Duration::from_secs(8));
    assert_eq!(rig.live(), Some((2, 1)));
    assert_eq!(last_start(&rig), (Some(5), None));
}

#[test]
fn an_announcement_is_short_however_many_nodes_there_are() {
    let mut rig = Rig::new();
    let name = |at: usize| format!("compute-{at:04}.rack-{:02}.example", at % 17);
    for at in 0..48 {
        rig.attach(&name(at), 4);
    }
    let mut large = spec("{ min = 1, max = 8 }");
    (large.training.global_batch, large.resources.workers.max) = (400, 192);
    rig.submit(large, SubmitMode::New, None);
    rig.settle();
    rig.train(5);
    rig.snapshot(7);
    rig.lose(&name(11));
    rig.pass(Duration::from_secs(8));
    let (generation, world) = rig.live().unwrap();
    assert_eq!(generation, 2);
    assert_eq!(last_start(&rig), (Some(5), Some(7)));
    for at in (0..48).filter(|at| *at != 11) {
        let run = announced(&rig, &name(at));
        let memory = run.memory.as_ref().unwrap();
        let needed: std::collections::BTreeSet<u32> = run
            .placements
            .iter()
            .flat_map(|placement| placement.rank * 192 / world..(placement.rank + 1) * 192 / world)
            .collect();
        let told: Vec<u32> = memory.groups.iter().flat_map(|g| &g.members).flat_map(|m| m.ranks.clone()).collect();
        assert!(needed.iter().all(|rank| told.contains(rank)), "all it needs");
        assert!(memory.groups.len() < 6, "{} groups", memory.groups.len());
        assert!(run.encoded_len() <= 3 << 10, "{} bytes", run.encoded_len());
    }
}

#[test]
fn a_failure_during_recovery_starts_from_the_same_step_again() {
    let mut rig = trained();
    rig.kill("b", 0);
    rig.pass(Duration::from_secs(1));
    // Nothing of generation 2 is in memory yet when it fails.
    rig.kill("a", 0);
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.live(), Some((3, 3)));
    assert_eq!(last_start(&rig), (Some(5), Some(7)));
}

#[test]
fn a_step_that_cannot_be_restored_is_given_up() {
    let mut rig = trained();
    rig.kill("b", 0);
    for generation in 2..=3 {
        // Announced, but before anyone has taken up its work a slot could not be filled.
        while rig.live().is_none_or(|(live, _)| live < generation) {
            rig.now += Duration::from_millis(100);
            for name in ["a", "b", "c"] {
                rig.report(&node(name));
            }
            if !rig.store() {
                rig.obey();
            }
        }
        assert_eq!(last_start(&rig).1, Some(7), "generation {generation}");
        let worker = &mut rig.nodes.get_mut(&node("a")).unwrap().workers[0];
        worker.place = Some((proto::ids::Generation::new(generation), proto::ids::Rank::new(0)));
        rig.fail("a", 0, WorkerPhase::Failed, FailureKind::Transient, "rank 1's snapshot cannot be had");
    }
    rig.pass(Duration::from_secs(2));
    assert_eq!(rig.live(), Some((4, 3)));
    assert_eq!(last_start(&rig), (Some(5), None), "the store's is the next best");
}

#[test]
fn without_the_memory_tier_checkpoints_are_what_there_is() {
    let mut rig = Rig::new();
    rig.attach("a", 2);
    let mut spec = spec("2");
    spec.checkpoint.memory = false;
    rig.submit(spec, SubmitMode::New, None);
    rig.settle();
    assert_eq!(announced(&rig, "a").group, None);
    rig.train(5);
    rig.kill("a", 0);
    rig.pass(Duration::from_secs(1));
    assert_eq!(last_start(&rig), (Some(5), None));
}
