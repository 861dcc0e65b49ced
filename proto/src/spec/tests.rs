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
fn what_is_kept_has_defaults_also_for_a_spec_stored_before() {
    let spec = parse(GOOD, &[]).unwrap();
    let mut json = serde_json::to_value(&spec).unwrap();
    let checkpoint = json["checkpoint"].as_object_mut().unwrap();
    let kept: Vec<String> = checkpoint.keys().filter(|key| key.starts_with("keep_")).cloned().collect();
    assert_eq!(kept.len(), 6, "{kept:?}");
    kept.iter().filter(|key| *key != "keep_last").for_each(|key| drop(checkpoint.remove(key)));
    assert_eq!(serde_json::from_value::<JobSpec>(json).unwrap(), spec);
    let refused = parse(GOOD, &[("checkpoint.keep_best", "2")]).unwrap_err();
    assert!(refused.contains("training.validate_every"), "{refused}");
    let validates = [("data.validation", "\"v\""), ("training.validate_every", "5"), ("checkpoint.keep_best", "2")];
    let spec = parse(GOOD, &validates).unwrap();
    assert_eq!((spec.checkpoint.keep_best, spec.checkpoint.keep_best_metric.as_str()), (2, "validation_loss"));
    let order = parse(GOOD, &[("checkpoint.keep_best_order", "\"hihgest\"")]).unwrap_err();
    assert!(order.contains("did you mean \"highest\""), "{order}");
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
        ("name.x", "3", &["--set name.x=3", "not a section"]),
        ("training.steps", "281474976710657", &["training.steps", "from 1 to 281474976710656"]),
        ("training.seed", "-1", &["training.seed", "from 0 to 9223372036854775807"]),
        ("resources.workers", "4294967297", &["resources.workers", "from 1 to 4294967295"]),
        ("resources.workers", "{ min = 4294967297 }", &["`resources.workers.min` is", "from 1 to 4294967295"]),
        ("resources.workers", "{ max = 4294967297 }", &["`resources.workers.max` is", "from 1 to 4294967295"]),
        ("resources.workers", "{ mix = 1 }", &["unknown key `resources.workers.mix`", "`resources.workers.min`"]),
        ("fault.restarts_without_progress", "4294967296", &["restarts_without_progress", "from 0 to 4294967295"]),
        ("resources.threads", "1025", &["resources.threads", "from 0 to 1024"]),
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
    let fewer = parse(GOOD, &[("training.validate_sequences", "3")]).unwrap().forbidden_changes(&stored);
    assert_eq!(fewer.iter().map(|d| d.key.as_str()).collect::<Vec<_>>(), ["training.validate_sequences"]);
}

#[test]
fn the_place_is_where_the_wrong_value_was_given() {
    let set = [("training.steps", "0")];
    assert!(parse(GOOD, &set).unwrap_err().starts_with("--set training.steps=0: `training.steps`"));
    assert!(parse(GOOD, &[("trainin.x", "1")]).unwrap_err().starts_with("--set trainin.x=1: unknown key `trainin`"));
    assert!(parse(GOOD, &[("fault.suspicion", "0.5")]).unwrap_err().starts_with("--set fault.suspicion=0.5: "));
    let range = [("resources.workers", "{ min = 0 }")];
    assert!(
        parse(GOOD, &range).unwrap_err().starts_with("--set resources.workers={ min = 0 }: `resources.workers.min`")
    );
    // An override of another key does not take the blame.
    let bad = GOOD.replace("workers = 2", "workers = { min = 0 }");
    let message = parse(&bad, &[("training.steps", "30"), ("resources.threads", "1")]).unwrap_err();
    assert!(message.starts_with("job.toml: `resources.workers.min` is 0"), "{message}");
}

#[test]
fn every_seed_toml_can_write_is_taken() {
    for seed in [0, i64::MAX as u64] {
        assert_eq!(parse(GOOD, &[("training.seed", &seed.to_string())]).unwrap().training.seed, seed);
    }
}

/// A spec from the wire or the store, of which no job file was read.
#[test]
fn a_complete_spec_is_held_to_the_same_ranges() {
    let good = parse(GOOD, &[]).unwrap();
    type Change = fn(&mut JobSpec);
    let changes: &[(&str, Change)] = &[
        ("training.steps", |s| s.training.steps = 0),
        ("training.steps", |s| s.training.steps = 1 << 60),
        ("training.steps", |s| (s.training.steps, s.training.global_batch) = (1 << 48, 1 << 20)),
        ("training.sequence_length", |s| s.training.sequence_length = 1 << 60),
        ("training.global_batch", |s| (s.training.global_batch, s.training.micro_batch) = (0, 0)),
        ("training.micro_batch", |s| s.training.micro_batch = 0),
        ("training.global_batch", |s| s.training.global_batch = 2 << 21),
        ("training.micro_batch", |s| (s.training.global_batch, s.training.micro_batch) = (1 << 40, 1 << 40)),
        ("training.seed", |s| s.training.seed = u64::MAX),
        ("training.validate_sequences", |s| s.training.validate_sequences = 0),
        ("optimizer.learning_rate", |s| s.optimizer.learning_rate = 0.0),
        ("optimizer.learning_rate", |s| s.optimizer.learning_rate = f64::INFINITY),
        ("optimizer.betas", |s| s.optimizer.betas[0] = -0.1),
        ("optimizer.betas", |s| s.optimizer.betas[1] = 1.0),
        ("optimizer.epsilon", |s| s.optimizer.epsilon = f64::NAN),
        ("optimizer.weight_decay", |s| s.optimizer.weight_decay = -1.0),
        ("optimizer.clip_norm", |s| s.optimizer.clip_norm = Some(0.0)),
        ("schedule.minimum_ratio", |s| s.schedule.minimum_ratio = 1.5),
        ("schedule.decay_steps", |s| s.schedule.decay_steps = 0),
        ("checkpoint.every_steps", |s| s.checkpoint.every_steps = 0),
        ("checkpoint.keep_last", |s| s.checkpoint.keep_last = 0),
        ("checkpoint.keep_every", |s| s.checkpoint.keep_every = u64::MAX),
        ("checkpoint.keep_best", |s| s.checkpoint.keep_best = 1),
        ("checkpoint.keep_best_metric", |s| s.checkpoint.keep_best_metric = "a b".into()),
        ("checkpoint.keep_within_steps", |s| s.checkpoint.keep_within_steps = u64::MAX),
        ("resources.threads", |s| s.resources.threads = 1025),
        ("resources.workers", |s| s.resources.workers = Workers { min: 0, max: 1 }),
        ("fault.heartbeat", |s| s.fault.heartbeat = f64::NAN),
        ("fault.restart", |s| s.fault.restart = f64::INFINITY),
        ("fault.grace", |s| s.fault.grace = -1.0),
        ("model.rope_theta", |s| s.model.rope_theta = 0.5),
        ("model.rms_norm_eps", |s| s.model.rms_norm_eps = 0.0),
        ("model.initializer_range", |s| s.model.initializer_range = 11.0),
        ("model.num_key_value_heads", |s| s.model.num_key_value_heads = 0),
    ];
    for (number, (key, change)) in changes.iter().enumerate() {
        let mut spec = good.clone();
        change(&mut spec);
        let message = spec.validate("the wire").expect_err(key).to_string();
        assert!(message.starts_with(&format!("the wire: `{key}` is ")), "change {number}, {key}: {message}");
    }
    let mut unclipped = good.clone();
    unclipped.optimizer.clip_norm = None;
    unclipped.validate("the wire").unwrap();
}

proptest::proptest! {
    #[test]
    fn no_text_can_panic_the_reader(text in "[a-z0-9=\\[\\]{}\". \n-]{0,200}") {
        let _ = parse(&text, &[]);
    }
}
