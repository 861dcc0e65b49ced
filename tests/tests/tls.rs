//! Mutual TLS on real processes (P6): the weights are the same bits, nothing crosses in clear, and who lacks the right
//! certificate is turned away with the reason.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::tls::Authority;
use tests::certs::Certs;
use tests::cluster::{Cluster, Part};
use tests::job::Job;
use tests::relay::{Relay, huffman};
use tests::run::{LIMIT, Outcome, Run, cairn};

/// Names that occur nowhere else in a protocol.
const JOB: &str = "wire-tapped-job";
const NODE: &str = "wire-tapped-node";

/// A whole job whose every word with the coordinator goes over a recorded wire: its digest, and what of the token, the
/// node's and the job's name could be read there.
fn tapped(secured: bool) -> (String, [bool; 3]) {
    let job = Job::with(&[&format!("name={JOB:?}")]);
    let mut cluster = if secured { Cluster::secured(&job) } else { Cluster::new(&job) };
    let _coordinator = cluster.coordinator();
    let relay = Relay::start(&cluster.address);
    cluster.address.clone_from(&relay.address);
    let _agents = (cluster.agent(NODE), cluster.agent("b"));
    let file = job.file().display().to_string();
    let submitted = cluster.call(&["submit", &file, "--set", "resources.workers={ min = 4, max = 4 }"]);
    assert_eq!(submitted.code, Some(0), "{}", submitted.stderr);
    let digest = Run::start(&cluster.words(&["watch", JOB])).finish().digest();
    let token = fs::read_to_string(&cluster.token).expect("the token is read");
    let credential = huffman(&format!("Bearer {}", token.trim()));
    assert!(relay.bytes().len() > 10_000, "the job went over the relay");
    (digest, [relay.saw(&credential), relay.saw(NODE.as_bytes()), relay.saw(JOB.as_bytes())])
}

#[test]
fn a_job_over_tls_has_the_same_digest_and_nothing_crosses_in_clear() {
    let (plain, seen) = tapped(false);
    assert_eq!(seen, [true; 3], "what is looked for is found without TLS: token, node, job");
    let (encrypted, seen) = tapped(true);
    assert_eq!(seen, [false; 3], "token, node, job");
    assert_eq!(encrypted, plain);
}

#[test]
fn a_lost_node_comes_back_from_its_peers_over_tls() {
    let keys = ["training.steps=160", "checkpoint.memory_every=1", "fault.suspicion=3"];
    let expected = Run::train(&Job::with(&keys), &["--workers", "1"]).finish().digest();
    let job = Job::with(&[&keys[..], &["checkpoint.every_steps=1000"]].concat());
    let cluster = Cluster::secured(&job);
    let _coordinator = cluster.coordinator();
    let [_a, b, _c] = ["a", "b", "c"].map(|node| cluster.agent_with(node, 1));
    // Starts at its full size, whatever agent comes first.
    std::thread::sleep(std::time::Duration::from_secs(2));
    let file = job.file().display().to_string();
    assert_eq!(cluster.call(&["submit", &file, "--set", "resources.workers={ min = 1, max = 3 }"]).code, Some(0));
    let mut watch = Run::start(&cluster.words(&["watch", "t"]));
    watch.wait_for("generation", |event| event["world_size"] == 3);
    watch.wait_for_step(60);
    b.kill();
    let outcome = watch.finish();
    assert_eq!(outcome.digest(), expected);
    let recovered = outcome.of("recovered");
    let last = recovered.last().expect("something was recovered");
    // Nothing was stored: it was read from the others, over TLS, and so was what their parity was made of.
    assert_eq!(last["source"], "parity", "{last}");
    assert!(last["step"].as_u64() >= Some(30), "{last}");
}

fn expect(outcome: &Outcome, code: i32, words: &[&str], what: &str) {
    assert_eq!(outcome.code, Some(code), "{what}: {}", outcome.stderr);
    for word in words {
        assert!(outcome.stderr.contains(word), "{what}: {:?} lacks {word:?}", outcome.stderr);
    }
}

#[test]
fn who_lacks_the_right_certificate_is_told_why() {
    let job = Job::new();
    let cluster = Cluster::secured(&job);
    let _coordinator = cluster.coordinator();
    let (certs, other) = (cluster.certs(), Certs::new(&job.folder().join("other")));
    let way = ["--coordinator", &cluster.address, "--token-file", &cluster.token];
    let jobs = |more: &[&str]| cairn(&[&["jobs"][..], &way, more].concat());
    expect(&jobs(&["--tls", certs.operator()]), 0, &[], "the operator");
    expect(&jobs(&["--tls", &certs.issue("coordinator", "main")]), 0, &[], "the coordinator's own");
    expect(&jobs(&[]), 3, &["--tls"], "no certificate");
    expect(&jobs(&["--tls", other.operator()]), 2, &["of another cluster"], "another cluster's");
    let agents = certs.issue("agent", "a");
    expect(&jobs(&["--tls", &agents]), 2, &["cairn://lab/agent/a", "--role operator"], "an agent's");
    let memory = job.folder().join("m").display().to_string();
    let agent =
        |node, tls: &str| cairn(&[&["agent"][..], &way, &["--node", node, "--memory", &memory, "--tls", tls]].concat());
    expect(&agent("b", &agents), 2, &["cairn://lab/agent/a", "--node a", "--name b"], "another node's");
    expect(&agent("a", &other.issue("agent", "a")), 2, &["of another cluster"], "another cluster's agent");
    expect(&agent("me", certs.operator()), 2, &["cairn://lab/operator/me", "--role agent"], "an operator's");
    let old = job.folder().join("old");
    let authority = Authority::read(certs.folder()).expect("the authority is read");
    let identity = "cairn://lab/operator/me".parse().expect("an identity");
    authority.issue(&old, &identity, &[], -1).expect("a certificate is issued");
    let old = old.display().to_string();
    expect(&jobs(&["--tls", &old]), 2, &["cert.pem expired on 20", "cairn certs issue"], "an expired one");
    // A client with TLS meets nobody, and a coordinator without.
    let plain = Cluster::new(&job);
    let ask = || {
        let words = ["jobs", "--coordinator", &plain.address, "--token-file", &plain.token];
        cairn(&[&words[..], &["--tls", certs.operator()]].concat())
    };
    expect(&ask(), 3, &["no coordinator answers", "Connection refused"], "nobody");
}

/// A whole cluster moves to another authority, and nothing but the coordinator is restarted, to make the agents connect
/// anew.
#[test]
fn renewed_certificates_are_taken_up_by_what_runs() {
    let job = Job::new();
    let cluster = Cluster::secured(&job);
    let first = cluster.coordinator();
    let _agent = cluster.agent("a");
    let wait_for_agent = || {
        let deadline = Instant::now() + LIMIT;
        while !cluster.call(&["nodes"]).events.iter().any(|node| node["state"] == "ready") {
            assert!(Instant::now() < deadline, "the agent does not come");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait_for_agent();
    let (certs, next) = (cluster.certs(), Certs::new(&job.folder().join("next")));
    let way = ["--coordinator", &cluster.address, "--token-file", &cluster.token];
    let jobs = |tls: &str| cairn(&[&["jobs"][..], &way, &["--tls", tls]].concat());
    expect(&jobs(next.operator()), 2, &["of another cluster"], "before");
    let before = job.folder().join("before");
    fs::create_dir(&before).expect("a folder");
    for name in ["ca.pem", "cert.pem", "key.pem"] {
        fs::copy(Path::new(certs.operator()).join(name), before.join(name)).expect("copied");
    }
    let replace = |old: &str, new: &str| {
        for name in ["ca.pem", "cert.pem", "key.pem"] {
            fs::rename(Path::new(new).join(name), Path::new(old).join(name)).expect("replaced");
        }
    };
    replace(&certs.issue("coordinator", "main"), &next.issue("coordinator", "main"));
    expect(&jobs(next.operator()), 0, &[], "the same process takes the new authority's operator in");
    expect(&jobs(&before.display().to_string()), 2, &["of another cluster"], "and the old one's no more");
    replace(&certs.issue("agent", "a"), &next.issue("agent", "a"));
    replace(certs.operator(), next.operator());
    first.kill();
    let _second = cluster.coordinator();
    wait_for_agent();
}

#[test]
fn a_coordinator_without_tls_is_told_from_one_that_is_away() {
    let job = Job::new();
    let cluster = Cluster::new(&job);
    let _coordinator = cluster.coordinator();
    let certs = Certs::new(&job.folder().join("certs"));
    let words = ["jobs", "--coordinator", &cluster.address, "--token-file", &cluster.token, "--tls", certs.operator()];
    expect(&cairn(&words), 3, &["does not speak TLS", "--tls"], "a plain coordinator");
}

#[test]
fn nothing_listens_off_loopback_in_clear_unless_asked_by_name() {
    let job = Job::new();
    let cluster = Cluster::secured(&job);
    let advice = ["cairn certs init", "--tls", "--insecure-plaintext"];
    let coordinator = |listen: &'static str| {
        vec!["coordinator", "--store", &cluster.store, "--listen", listen, "--token-file", &cluster.token]
    };
    expect(&cairn(&coordinator("0.0.0.0:0")), 2, &advice, "a coordinator in the open");
    expect(&cairn(&coordinator("[::]:0")), 2, &advice, "on IPv6");
    fs::write(&cluster.token, format!("{}\n", "ab".repeat(32))).expect("written");
    fs::set_permissions(&cluster.token, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("chmod");
    let memory = job.folder().join("m").display().to_string();
    let agent = |more: &[&str]| {
        let words = ["agent", "--node", "a", "--token-file", &cluster.token, "--memory", &memory];
        cairn(&[&words[..], more].concat())
    };
    expect(&agent(&["--ring-host", "192.0.2.1"]), 2, &advice, "an agent's snapshots in the open");
    expect(&agent(&["--coordinator", "192.0.2.1:7070"]), 2, &advice, "an agent's token in the open");
    let any = agent(&["--ring-host", "0.0.0.0", "--insecure-plaintext"]);
    expect(&any, 2, &["--ring-host 0.0.0.0"], "an address that is none");
    let certificate = cluster.certs().issue("agent", "a");
    let unnamed = agent(&["--ring-host", "192.0.2.1", "--tls", &certificate]);
    expect(&unnamed, 2, &["cert.pem", "--host 192.0.2.1"], "an address the certificate lacks");
    let jobs = cairn(&["jobs", "--coordinator", "192.0.2.1:7070", "--token-file", &cluster.token]);
    expect(&jobs, 2, &advice, "an operator's token in the open");
    let both = cairn(&["jobs", "--tls", &certificate, "--insecure-plaintext", "--token-file", &cluster.token]);
    expect(&both, 2, &["exclude each other"], "both");
    listens_everywhere(
        &cluster,
        &["--tls", &cluster.certs().issue("coordinator", "main")],
        &["--tls", cluster.certs().operator()],
    );
    listens_everywhere(&cluster, &["--insecure-plaintext"], &[]);
}

/// A coordinator on all addresses, asked on one.
fn listens_everywhere(cluster: &Cluster, how: &[&str], ask: &[&str]) {
    let port = cluster.address.rsplit_once(':').expect("a port").1;
    let listen = format!("0.0.0.0:{port}");
    let words = ["coordinator", "--store", &cluster.store, "--listen", &listen, "--token-file", &cluster.token];
    let part = Part::start(&[&words[..], how].concat());
    let jobs = ["jobs", "--coordinator", &cluster.address, "--token-file", &cluster.token];
    let answers = || cairn(&[&jobs[..], ask].concat()).code == Some(0);
    let tries = (0..200).find(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        answers()
    });
    assert!(tries.is_some(), "{how:?}");
    part.kill();
}

#[test]
fn a_private_key_that_others_can_read_is_refused() {
    let job = Job::new();
    let certs = Certs::new(&job.folder().join("certs"));
    let key = Path::new(certs.operator()).join("key.pem");
    fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("chmod");
    let open = cairn(&["jobs", "--tls", certs.operator()]);
    expect(&open, 2, &["key.pem", "0644", "chmod 600"], "an open key");
    let again = cairn(&["certs", "init", &certs.folder().display().to_string()]);
    expect(&again, 2, &["ca-key.pem", "exists already"], "an authority that is there");
    let host = cairn(&["certs", "issue", &certs.folder().display().to_string(), "--name", "x", "--host", "a:1"]);
    expect(&host, 2, &["--host", "without a port"], "a host with a port");
}
