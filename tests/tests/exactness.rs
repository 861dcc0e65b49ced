//! P1: the trained weights do not depend on how many workers or threads computed them.

use tests::job::Job;
use tests::run::Run;

#[test]
fn one_two_three_and_five_workers_train_the_same_bits() {
    let reference = Run::train(&Job::new(), &["--workers", "1"]).finish();
    let digest = reference.digest();
    let losses = reference.losses();
    assert_eq!(losses.len() as u64, Job::STEPS);
    for workers in ["2", "3", "5"] {
        let outcome = Run::train(&Job::new(), &["--workers", workers]).finish();
        assert_eq!(outcome.digest(), digest, "{workers} workers");
        assert_eq!(outcome.losses(), losses, "{workers} workers");
        assert_eq!(outcome.of("validation"), reference.of("validation"), "{workers} workers");
    }
}

/// The job of `examples/gpt2-tiny.toml`, cut short: learned positions, biases and LayerNorm are as exact.
#[test]
fn a_gpt2_trains_the_same_bits_on_one_and_two_workers() {
    let file = tests::root().join("examples/gpt2-tiny.toml").display().to_string();
    let train = |workers: &str| {
        let store = tempfile::tempdir().expect("a temporary folder");
        let place = store.path().join("store").display().to_string();
        let short = ["training.steps=20", "training.validate_every=10", "schedule.warmup_steps=5"];
        let short: Vec<&str> = short.iter().flat_map(|set| ["--set", set]).collect();
        let first = ["train", &file, "--store", &place, "--output", "json", "--workers", workers];
        Run::start(&[&first[..], &short].concat()).finish()
    };
    let (one, two) = (train("1"), train("2"));
    assert_eq!(one.digest(), two.digest());
    let losses = one.losses();
    assert_eq!((losses.len(), &losses), (20, &two.losses()));
    assert_eq!(one.of("validation"), two.of("validation"));
    let loss = |step: usize| one.of("step")[step]["loss"].as_f64().expect("a loss");
    println!("losses {} to {}", loss(0), loss(19));
    assert!(loss(0) > 5.0 && loss(19) < 4.0, "{} to {}", loss(0), loss(19));
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let of_threads = |threads: &str| {
        let set = format!("resources.threads={threads}");
        let outcome = Run::train(&Job::new(), &["--workers", "2", "--set", &set]).finish();
        (outcome.digest(), outcome.losses())
    };
    let one = of_threads("1");
    assert_eq!(of_threads("2"), one);
    assert_eq!(of_threads("3"), one);
}

#[test]
fn training_learns() {
    let outcome = Run::train(&Job::new(), &["--workers", "2"]).finish();
    let losses: Vec<f64> = outcome.of("validation").iter().filter_map(|event| event["loss"].as_f64()).collect();
    assert!(losses.len() >= 3, "{losses:?}");
    // ln(256) = 5.55 is a model that knows nothing.
    assert!(losses[losses.len() - 1] < 3.9 && losses[losses.len() - 1] < losses[0], "{losses:?}");
}

/// The first command of the README, with its store elsewhere.
#[test]
fn the_readmes_job_learns() {
    let store = tempfile::tempdir().expect("a temporary folder");
    let file = tests::root().join("examples/tiny.toml").display().to_string();
    let place = store.path().join("store").display().to_string();
    let mut run = Run::start(&["train", &file, "--store", &place, "--output", "json"]);
    let loss = |event: &serde_json::Value| event["loss"].as_f64().expect("a loss");
    let losses: Vec<f64> =
        [50, 100, 150, 200].map(|step| loss(&run.wait_for("validation", |e| e["step"] == step))).into();
    let outcome = run.finish();
    assert_eq!(outcome.digest().len(), 64);
    assert_eq!(outcome.of("step").len(), 200);
    let first = loss(outcome.of("step")[0]);
    println!("training loss {first} at first, validation losses {losses:?}");
    assert!(first > 5.0, "an untrained model knows nothing: {first}");
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]) && losses[3] < 2.0, "{losses:?}");
}

#[test]
fn another_seed_is_another_model() {
    let one = Run::train(&Job::new(), &["--workers", "2"]).finish().digest();
    let two = Run::train(&Job::new(), &["--workers", "2", "--set", "training.seed=8"]).finish().digest();
    assert_ne!(one, two);
}

#[test]
fn fast_sums_train_too_and_stay_near_the_exact_ones() {
    let exact = Run::train(&Job::new(), &["--workers", "1"]).finish();
    let warning = "the weights will depend on the number of workers";
    assert!(!exact.stderr.contains(warning), "{}", exact.stderr);
    let exact = exact.losses();
    let fast = Run::train(&Job::new(), &["--workers", "3", "--set", "training.reduction=fast"]).finish();
    assert!(!fast.digest().is_empty());
    assert!(fast.stderr.contains(warning), "{}", fast.stderr);
    let fast = fast.losses();
    assert_eq!(fast.len(), exact.len());
    for (step, (loss, _)) in &fast {
        let (fast, exact) = (f64::from_bits(*loss), f64::from_bits(exact[step].0));
        assert!((fast - exact).abs() < 0.01, "step {step}: {fast} and {exact}");
    }
}
