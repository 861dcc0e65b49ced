//! Each way a job file can be wrong, and the message it meets.

use std::path::Path;

use super::{JobSpec, Overrides, ScheduleKind, Workers};

const GOOD: &str = r#"
name = "t"
[model]
preset = "tiny"
[data]
train = "../data/x"
[training]
steps = 20
global_batch = 8
micro_batch = 2
[resources]
workers = 2
"#;

fn parse(text: &str, set: &[(&str, &str)]) -> Result<JobSpec, String> {
    let overrides: Overrides = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    JobSpec::parse("job.toml", text, Path::new("/jobs/here"), &overrides).map_err(|error| error.to_string())
}

#[test]
fn defaults_fill_a_short_job() {
    let spec = parse(GOOD, &[]).unwrap();
    assert_eq!(spec.training.micro_batches(), 4);
    assert_eq!(spec.resources.workers, Workers { min: 1, max: 2 });
    assert_eq!(spec.schedule.kind, ScheduleKind::Cosine);
    assert_eq!(spec.data.train, "/jobs/here/../data/x");
    assert_eq!(spec.checkpoint.store, "file:///jobs/here/cairn-store");
}

#[test]
fn a_spec_survives_json() {
    let spec = parse(GOOD, &[]).unwrap();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<JobSpec>(&text).unwrap(), spec);
}

#[test]
fn overrides_set_any_key() {
    let spec = parse(GOOD, &[("training.steps", "50"), ("model.tie_word_embeddings", "false")]).unwrap();
    assert_eq!(spec.training.steps, 50);
    assert!(!spec.model.tie_word_embeddings);
    let spec = parse(GOOD, &[("resources.workers", "{ min = 2, max = 4 }")]).unwrap();
    assert_eq!(spec.resources.workers, Workers { min: 2, max: 4 });
}

#[test]
fn each_mistake_names_its_place_and_what_would_be_right() {
    let cases: &[(&str, &str, &[&str])] = &[
        ("training.stepz", "5", &["unknown key `training.stepz`", "training.steps"]),
        ("trainin.steps", "5", &["unknown key `trainin`", "training"]),
        ("training.steps", "\"many\"", &["training.steps", "\"many\"", "whole number"]),
        ("training.steps", "0", &["training.steps", "at least 1"]),
        ("training.steps", "-3", &["training.steps", "-3"]),
        ("training.micro_batch", "3", &["training.global_batch", "multiple of training.micro_batch = 3"]),
        ("resources.workers", "5", &["resources.workers", "at most 4"]),
        ("model.num_attention_heads", "3", &["model.num_attention_heads", "divisor of model.hidden_size = 128"]),
        ("model.num_key_value_heads", "3", &["model.num_key_value_heads", "divisor"]),
        ("model.preset", "\"huge\"", &["model.preset", "tiny"]),
        ("optimizer.betas", "[0.9]", &["optimizer.betas", "two numbers"]),
        ("optimizer.betas", "[0.9, 1.0]", &["optimizer.betas"]),
        ("schedule.kind", "\"cosin\"", &["schedule.kind", "did you mean \"cosine\""]),
        ("fault.suspicion", "0.5", &["fault.suspicion", "fault.heartbeat"]),
        ("training.reduction", "true", &["training.reduction", "\"exact\""]),
        ("name", "\"a/b\"", &["name", "a-z"]),
        ("data", "3", &["data", "[data]"]),
        ("name.x", "3", &["--set name.x", "not a section"]),
    ];
    for (key, value, wanted) in cases {
        let message = parse(GOOD, &[(key, value)]).expect_err(key);
        for part in *wanted {
            assert!(message.contains(part), "{key} = {value}: {message:?} lacks {part:?}");
        }
    }
}

#[test]
fn only_what_cannot_reach_the_weights_may_change() {
    let stored = parse(GOOD, &[]).unwrap();
    let free = [("resources.workers", "1"), ("checkpoint.every_steps", "3"), ("training.validate_every", "7")];
    assert_eq!(parse(GOOD, &free).unwrap().forbidden_changes(&stored), []);
    let changed = parse(GOOD, &[("model.intermediate_size", "64"), ("optimizer.learning_rate", "1")]).unwrap();
    let keys: Vec<String> = changed.forbidden_changes(&stored).into_iter().map(|d| d.key).collect();
    assert_eq!(keys, ["model.intermediate_size", "optimizer.learning_rate"]);
}

proptest::proptest! {
    #[test]
    fn no_text_can_panic_the_reader(text in "[a-z0-9=\\[\\]{}\". \n-]{0,200}") {
        let _ = parse(&text, &[]);
    }
}
