//! A whole job on a real S3-compatible server: trained, stopped, resumed at another size, verified.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tests::job::Job;
use tests::run::{LIMIT, Run, undisturbed};

/// The server, stopped when the test is done with it.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    /// `None` where no server is installed.
    fn start() -> Option<Self> {
        let program = std::env::var("CAIRN_MOTO").unwrap_or_else(|_| "moto_server".into());
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().ok()?;
        let server = Self { process, address: format!("127.0.0.1:{port}") };
        let deadline = Instant::now() + LIMIT;
        while std::net::TcpStream::connect(&server.address).is_err() {
            assert!(Instant::now() < deadline, "the server does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(server)
    }

    /// Makes a bucket with one plain HTTP request.
    fn make_bucket(&self, name: &str) {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(&self.address).expect("the server listens");
        let request =
            format!("PUT /{name} HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", self.address);
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_job_on_s3_has_the_same_digest() {
    let Some(server) = Server::start() else {
        tests::skip("no S3 server (run ./test, which installs moto, or set CAIRN_MOTO)");
        return;
    };
    server.make_bucket("bucket");
    let url = format!("http://{}", server.address);
    let environment = [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", &url),
        ("AWS_ALLOW_HTTP", "true"),
    ];
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
