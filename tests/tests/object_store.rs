//! A whole job on a real S3-compatible server: trained, stopped, resumed at another size, verified.

use tests::job::Job;
use tests::run::{Run, undisturbed};
use tests::s3::Server;

#[test]
fn a_job_on_s3_has_the_same_digest() {
    let Some(server) = Server::start() else {
        tests::skip("no S3 server (run ./test, which installs moto, or set CAIRN_MOTO)");
        return;
    };
    server.make_bucket("bucket");
    let environment = server.environment();
    let environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let store = ["--store", "s3://bucket/cairn"];
    let job = Job::new();
    let file = job.file().display().to_string();
    let train = ["train", &file, "--output", "json", "--workers"];
    let first = [&train[..], &["3", "--steps", "15"], &store].concat();
    let first = Run::start_in(&first, &environment).finish();
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    let second = Run::start_in(&[&train[..], &["2", "--resume"], &store].concat(), &environment).finish();
    assert_eq!(second.of("step")[0]["step"], 16);
    assert_eq!(second.digest(), undisturbed());
    let verify = Run::start_in(&[&["checkpoint", "verify"], &store[..], &["t"]].concat(), &environment).finish();
    assert_eq!(verify.code, Some(0), "{}", verify.stderr);
}
