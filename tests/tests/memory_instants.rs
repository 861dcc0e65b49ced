//! Nodes lost at the worst instants: while parity is made, while a state is restored, and several at once.

use std::path::Path;
use std::time::{Duration, Instant};

use tests::job::Job;
use tests::nodes::nodes;
use tests::process::signal;
use tests::run::{LIMIT, Outcome, Run};

/// A snapshot at every step and nothing stored before the last: what a generation starts from was in memory.
const KEYS: [&str; 3] = ["checkpoint.memory_every=1", "fault.suspicion=3", "checkpoint.every_steps=1000"];

fn job(keys: &[&str]) -> Job {
    Job::with(&[&KEYS[..], keys].concat())
}

fn expected(keys: &[&str]) -> String {
    Run::train(&job(keys), &["--workers", "1"]).finish().digest()
}

/// The steps and sources of all recoveries, and the sizes of all generations.
fn recoveries(outcome: &Outcome) -> (Vec<(u64, String)>, Vec<u64>) {
    let events = outcome.of("recovered").into_iter();
    let recovered = events.map(|e| (e["step"].as_u64().unwrap(), e["source"].as_str().unwrap().to_owned()));
    let sizes = outcome.of("generation").into_iter().filter_map(|event| event["world_size"].as_u64());
    (recovered.collect(), sizes.collect())
}

/// Whether a step's parity has been begun in a folder and is not finished.
fn is_encoding(folder: &Path) -> bool {
    let names = std::fs::read_dir(folder).expect("the folder is there").flatten();
    let names: Vec<String> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let is_note = |name: &str| Path::new(name).extension().is_some_and(|ending| ending == "json");
    let of_step = |name: &str| {
        let of = name.strip_prefix("parity-")?;
        // A stripe's file ends with its number, which the step's note has not.
        let stem = if is_note(name) { of.strip_suffix(".json")? } else { of.rsplit_once('-')?.0 };
        Some(stem.to_owned())
    };
    let finished: Vec<String> = names.iter().filter(|name| is_note(name)).filter_map(|name| of_step(name)).collect();
    let begun = names.iter().filter(|name| !is_note(name)).filter_map(|name| of_step(name));
    begun.into_iter().any(|step| !finished.contains(&step))
}

#[test]
fn a_node_killed_while_it_makes_parity_costs_the_steps_since_the_last_snapshot() {
    let keys = ["training.steps=160"];
    let expected = expected(&keys);
    let job = job(&keys);
    let (mut nodes, mut watch) = nodes(&job, 3, &[]);
    watch.wait_for("generation", |event| event["world_size"] == 3);
    watch.wait_for_step(60);
    let folder = nodes.folder("n1");
    let victim = nodes.agents.remove(1);
    let deadline = Instant::now() + LIMIT;
    loop {
        assert!(Instant::now() < deadline, "never seen to encode");
        if is_encoding(&folder) {
            // Stopped, it stays as it is: seen to encode now, it is killed while encoding.
            signal(victim.id(), "STOP");
            if is_encoding(&folder) {
                break;
            }
            signal(victim.id(), "CONT");
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    victim.kill();
    assert!(is_encoding(&folder), "it died while it was making parity");
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let (recovered, sizes) = recoveries(&outcome);
    assert_eq!(sizes, [3, 2]);
    assert_eq!(recovered.len(), 1, "{recovered:?}");
    assert_eq!(recovered[0].1, "parity");
    assert!(recovered[0].0 >= 30, "went on from {}", recovered[0].0);
}

/// A state large enough that restoring it takes a while: 50 MiB a worker.
const LARGE: [&str; 6] = [
    "model={ hidden_size = 512, num_hidden_layers = 4, num_attention_heads = 8, num_key_value_heads = 4, \
     intermediate_size = 1408, vocab_size = 256, tie_word_embeddings = true }",
    "training.steps=12",
    "training.sequence_length=16",
    "training.global_batch=4",
    "checkpoint.parity=2",
    "fault.suspicion=3",
];

#[test]
fn a_node_killed_while_the_others_restore_is_made_up_for_too() {
    let expected = expected(&LARGE);
    let job = job(&LARGE);
    let (mut nodes, mut watch) = nodes(&job, 4, &[]);
    watch.wait_for("generation", |event| event["world_size"] == 4);
    watch.wait_for_step(6);
    let second = nodes.agents.remove(2);
    nodes.agents.remove(1).kill();
    watch.wait_for("generation", |event| event["world_size"] == 3);
    // Stopped, it can neither restore its own rank nor give others what they need.
    signal(second.id(), "STOP");
    std::thread::sleep(Duration::from_millis(300));
    second.kill();
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let (recovered, sizes) = recoveries(&outcome);
    assert_eq!(sizes, [4, 3, 2]);
    assert_eq!(recovered.len(), 1, "the generation of three was restoring when it was lost: {recovered:?}");
    assert_eq!(recovered[0].1, "parity");
    assert!(recovered[0].0 >= 1, "went on from {}", recovered[0].0);
}

#[test]
fn each_of_several_groups_may_lose_a_node() {
    let keys = ["training.steps=60", "training.global_batch=9"];
    let expected = expected(&keys);
    let job = job(&keys);
    let (mut nodes, mut watch) = nodes(&job, 9, &[]);
    watch.wait_for("generation", |event| event["world_size"] == 9);
    watch.wait_for_step(20);
    let status = &nodes.cluster.call(&["status", "t"]).events[0];
    assert!(status["memory"].as_str().unwrap().contains("each of 2 parity groups"), "{status}");
    // Nodes are dealt to the groups in turn, so neighbours are in different ones.
    let (one, two) = (nodes.agents.remove(5), nodes.agents.remove(4));
    signal(one.id(), "KILL");
    two.kill();
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let (recovered, sizes) = recoveries(&outcome);
    assert_eq!((sizes.first(), sizes.last()), (Some(&9), Some(&7)));
    assert!(recovered.iter().all(|(step, source)| source != "store" && *step >= 5), "{recovered:?}");
    assert!(recovered.iter().any(|(_, source)| source == "parity"), "{recovered:?}");
}
