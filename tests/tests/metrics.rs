//! Where the time of saves and loads went, as watchers and scrapers see it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use tests::cluster::Cluster;
use tests::job::Job;
use tests::process;
use tests::run::{LIMIT, Run};

/// What a scraper gets.
fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("the endpoint is there");
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("application/openmetrics-text"), "{answer}");
    answer
}

/// The value of a series that has all these labels.
fn value(text: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let series = |line: &&str| line.starts_with(name) && labels.iter().all(|label| line.contains(label));
    text.lines().find(series)?.rsplit(' ').next()?.parse().ok()
}

#[test]
fn saves_and_loads_are_told_rank_by_rank_and_stage_by_stage() {
    let job = Job::with(&["training.steps=200", "checkpoint.memory=false", "checkpoint.every_steps=10"]);
    let cluster = Cluster::new(&job);
    let endpoint = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).unwrap().to_string();
    let _coordinator = cluster.coordinator_with(&["--metrics", &endpoint]);
    let agent = cluster.agent("a");
    let file = job.file().display().to_string();
    assert_eq!(cluster.call(&["submit", &file, "--set", "resources.workers=2"]).code, Some(0));
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    watch.wait_for("checkpoint", |event| event["step"].as_u64() >= Some(10));
    let deadline = Instant::now() + LIMIT;
    while value(&scrape(&endpoint), "cairn_saves_total", &["job=\"t\""]).is_none_or(|saves| saves < 1.0) {
        assert!(Instant::now() < deadline, "no save is counted:\n{}", scrape(&endpoint));
        std::thread::sleep(Duration::from_millis(50));
    }
    let text = scrape(&endpoint);
    for (rank, stage) in [("0", "capture"), ("1", "hash"), ("1", "upload"), ("coordinator", "commit")] {
        let labels = ["job=\"t\"", &format!("rank=\"{rank}\""), &format!("stage=\"{stage}\"")];
        for name in ["cairn_save_stage_seconds", "cairn_save_stage_bytes"] {
            assert!(value(&text, name, &labels).is_some(), "{name} {labels:?}:\n{text}");
        }
    }
    assert!(value(&text, "cairn_memory_budget_bytes", &["node=\"a\""]) > Some(0.0), "{text}");
    assert!(text.trim_end().ends_with("# EOF"), "{text}");

    let mut workers = process::descendants(agent.id()).into_iter().filter(|process| process.part() == "worker");
    process::signal(workers.next_back().expect("a worker").id, "KILL");
    let loaded = watch.wait_for("loaded", |_| true);
    let stages: Vec<&str> = loaded["stages"].as_array().unwrap().iter().map(|s| s["stage"].as_str().unwrap()).collect();
    assert_eq!(stages, ["list", "plan", "read", "verify", "place"], "{loaded}");
    assert!(loaded["stages"][3]["bytes"].as_u64() > Some(100_000) && loaded["stages"][3]["node"] == "a", "{loaded}");
    let text = scrape(&endpoint);
    let read = value(&text, "cairn_load_stage_bytes", &["job=\"t\"", "rank=\"1\"", "stage=\"read\""]);
    assert!(read > Some(0.0), "{text}");
    assert!(value(&text, "cairn_failures_total", &["job=\"t\""]) >= Some(1.0), "{text}");
    watch.finish().digest();
}
