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
        ("resources.priority", "-1001", &["resources.priority", "from -1000 to 1000"]),
        ("resources.priority", "1.5", &["resources.priority", "a whole number"]),
        ("resources.spares", "-1", &["resources.spares", "from 0 to 4096"]),
        ("resources.threads", "1025", &["resources.threads", "from 0 to 1024"]),
    ];
    for (key, value, wanted) in cases {
        let message = parse(GOOD, &[(key, value)]).expect_err(key);
        for part in *wanted {
            assert!(message.contains(part), "{key} = {value}: {message:?} lacks {part:?}");
        }
    }
}

/// What is there under a wrong name is misspelt, not missing.
#[test]
fn a_misspelt_required_key_is_named_with_the_right_one() {
    let shape = "hidden_size = 8\nnum_hidden_layers = 1\nnum_attention_heads = 2\nintermediate_size = 8\n\
                 vocab_size = 9";
    let whole = GOOD.replace("preset = \"tiny\"", shape);
    assert_eq!(parse(&whole, &[]).unwrap().model.head_dim, 4);
    let cases = [
        ("name = ", "nmae = ", "unknown key `nmae` (did you mean `name`?)"),
        ("[model]", "[modle]", "unknown key `modle` (did you mean `model`?)"),
        ("[data]", "[dta]", "unknown key `dta` (did you mean `data`?)"),
        ("[training]", "[trainig]", "unknown key `trainig` (did you mean `training`?)"),
        ("train = ", "trian = ", "unknown key `data.trian` (did you mean `data.train`?)"),
        ("steps = ", "stepz = ", "unknown key `training.stepz` (did you mean `training.steps`?)"),
        ("hidden_size", "hiden_size", "unknown key `model.hiden_size` (did you mean `model.hidden_size`?)"),
        ("vocab_size", "vocabulary_size", "unknown key `model.vocabulary_size` (did you mean `model.vocab_size`?)"),
    ];
    for (right, wrong, message) in cases {
        let found = parse(&whole.replace(right, wrong), &[]).expect_err(wrong);
        assert_eq!(found, format!("job.toml: {message}"));
    }
    // What is truly absent is missing.
    for (line, key) in [("steps = 20", "training.steps"), ("vocab_size = 9", "model.vocab_size")] {
        let found = parse(&whole.replace(line, ""), &[]).expect_err(key);
        assert!(found.starts_with(&format!("job.toml: key `{key}` is missing: ")), "{found}");
    }
    assert!(parse(&whole.replace("name = \"t\"", ""), &[]).unwrap_err().contains("key `name` is missing"));
}

#[test]
fn numbers_keep_their_meaning_in_32_bits() {
    for (key, value) in [
        ("optimizer.epsilon", "1e-40"),
        ("optimizer.epsilon", "1e39"),
        ("optimizer.learning_rate", "1e-300"),
        ("optimizer.weight_decay", "1e-39"),
        ("optimizer.clip_norm", "1e300"),
        ("optimizer.betas", "[0.9, 0.9999999999]"),
        ("model.rms_norm_eps", "1e-46"),
        ("model.rope_theta", "1e39"),
        ("model.initializer_range", "1e-39"),
    ] {
        let message = parse(GOOD, &[(key, value)]).expect_err(value);
        assert!(message.contains(&format!("`{key}` is ")), "{key} = {value}: {message}");
    }
    let tiny = parse(GOOD, &[("optimizer.epsilon", "1e-40")]).unwrap_err();
    assert!(tiny.contains("greater than 0 (from 1.2e-38 to 3.4e38, what a 32-bit float can hold)"), "{tiny}");
    for (key, value) in
        [("optimizer.epsilon", "1.2e-38"), ("optimizer.weight_decay", "0"), ("optimizer.betas", "[0, 0]")]
    {
        parse(GOOD, &[(key, value)]).expect(key);
    }
}

#[test]
fn a_validation_has_a_bounded_number_of_micro_batches() {
    let message = parse(GOOD, &[("training.validate_sequences", "2097153")]).unwrap_err();
    assert!(message.contains("`training.validate_sequences` is 2097153, but must be at most 2097152"), "{message}");
    parse(GOOD, &[("training.validate_sequences", "2097152")]).unwrap();
}

#[test]
fn data_may_be_a_path_or_a_file_url() {
    let train = |text: &str| parse(GOOD, &[("data.train", &format!("{text:?}"))]).map(|spec| spec.data.train);
    assert_eq!(train("file:///data/corpus.train").unwrap(), "/data/corpus.train");
    assert_eq!(train("FILE://localhost/a%20b/%C3%A9").unwrap(), "/a b/é");
    assert_eq!(train("/data/x").unwrap(), "/data/x");
    assert_eq!(train("./odd://name").unwrap(), "/jobs/here/./odd://name");
    for (text, wanted) in [
        ("s3://bucket/train", "not read from s3:// in this release"),
        ("https://host/train", "not read from https://"),
        ("file://data/train", "file:/// and an absolute path"),
        ("file:///a%2", "two hexadecimal digits"),
        ("file:///a%é", "two hexadecimal digits"),
        ("file:///a%00", "two hexadecimal digits"),
        ("file:///a%ff", "UTF-8"),
    ] {
        let message = train(text).expect_err(text);
        assert!(message.contains("`data.train` is ") && message.contains(wanted), "{text}: {message}");
    }
    let held_out = parse(GOOD, &[("data.validation", "\"gs://b/v\"")]).unwrap_err();
    assert!(held_out.contains("`data.validation`") && held_out.contains("gs://"), "{held_out}");
}

/// A file without an end, and a pipe that somebody keeps filling.
#[test]
fn what_does_not_end_is_no_job_file() {
    let none = Overrides::new();
    let message = JobSpec::load(Path::new("/dev/zero"), &none).unwrap_err().to_string();
    assert!(message.contains("/dev/zero") && message.contains("at most 1048576 bytes"), "{message}");
    let mut endless = std::process::Command::new("yes").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let pipe = endless.stdout.take().unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pipe));
    let message = JobSpec::load(Path::new(&path), &none).unwrap_err().to_string();
    endless.kill().unwrap();
    endless.wait().unwrap();
    assert!(message.contains("at most 1048576 bytes"), "{message}");
    let binary = JobSpec::load(&std::env::current_exe().unwrap(), &none).unwrap_err().to_string();
    assert!(binary.contains("cannot read job file"), "{binary}");
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
        ("training.validate_sequences", |s| s.training.validate_sequences = (2 << 20) + 1),
        ("data.train", |s| s.data.train = "s3://bucket/x".into()),
        ("data.validation", |s| s.data.validation = Some("file:///x".into())),
        ("optimizer.learning_rate", |s| s.optimizer.learning_rate = 0.0),
        ("optimizer.learning_rate", |s| s.optimizer.learning_rate = f64::INFINITY),
        ("optimizer.betas", |s| s.optimizer.betas[0] = -0.1),
        ("optimizer.betas", |s| s.optimizer.betas[1] = 1.0),
        ("optimizer.epsilon", |s| s.optimizer.epsilon = f64::NAN),
        ("optimizer.epsilon", |s| s.optimizer.epsilon = 1e-40),
        ("optimizer.epsilon", |s| s.optimizer.epsilon = 1e39),
        ("optimizer.betas", |s| s.optimizer.betas[1] = 1.0 - 1e-12),
        ("optimizer.weight_decay", |s| s.optimizer.weight_decay = -1.0),
        ("optimizer.weight_decay", |s| s.optimizer.weight_decay = 1e-50),
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
        ("model.rope_theta", |s| s.model.rope_theta = Some(0.5)),
        ("model.rms_norm_eps", |s| s.model.rms_norm_eps = Some(0.0)),
        ("model.rms_norm_eps", |s| s.model.rms_norm_eps = Some(1e-39)),
        ("model.initializer_range", |s| s.model.initializer_range = 11.0),
        ("model.num_key_value_heads", |s| s.model.num_key_value_heads = 0),
    ];
    for (number, (key, change)) in changes.iter().enumerate() {
        let mut spec = good.clone();
        change(&mut spec);
        let message = spec.validate("the wire").expect_err(key).to_string();
        assert!(message.starts_with(&format!("the wire: `{key}` is ")), "change {number}, {key}: {message}");
    }
    let mut widest = good.clone();
    (widest.training.validate_sequences, widest.optimizer.weight_decay) = (2 << 20, 0.0);
    (widest.optimizer.epsilon, widest.optimizer.betas) = (f64::from(f32::MIN_POSITIVE), [0.0, 0.999_999]);
    widest.validate("the wire").unwrap();
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
