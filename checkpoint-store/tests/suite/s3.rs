//! Real S3 servers: one that is right, and two that must be caught.
//!
//! The first is moto, a process of its own, started if it is installed (or if CAIRN_MOTO names it). The other two are
//! the s3s-fs library in this process, whose create is not atomic, and the same with the condition dropped on the way.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use checkpoint_store::*;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use s3s::service::S3ServiceBuilder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

/// A client; unsigned for servers in this process, which know no users.
fn connect(address: SocketAddr, signed: bool) -> Store {
    open("s3://bucket/some/prefix", address, signed)
}

fn open(url: &str, address: SocketAddr, signed: bool) -> Store {
    let endpoint = format!("http://{address}");
    let options = [
        ("aws_endpoint", endpoint.as_str()),
        ("aws_region", "us-east-1"),
        ("aws_skip_signature", if signed { "false" } else { "true" }),
        ("aws_access_key_id", "test"),
        ("aws_secret_access_key", "test"),
    ];
    Store::open_with(url, &options).unwrap()
}

/// What the server does wrong beyond not being atomic.
#[derive(Clone, Copy, PartialEq)]
enum Trouble {
    Nothing,
    /// Drops the condition of every request.
    Overwrites,
    /// Carries out a put, then closes the connection instead of answering.
    LosesAnswers,
    /// Closes the connection before it carries out a put.
    LosesRequests,
}

/// Serves a folder over S3. The trouble can be changed while it runs.
async fn s3s(folder: &Path, trouble: Trouble) -> (Store, Arc<Mutex<Trouble>>) {
    std::fs::create_dir(folder.join("bucket")).unwrap();
    let service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder).unwrap()).build();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shared = Arc::new(Mutex::new(trouble));
    let trouble = Arc::clone(&shared);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (service, trouble) = (service.clone(), Arc::clone(&trouble));
            let answer = service_fn(move |mut request: hyper::Request<Incoming>| {
                let trouble = *trouble.lock().unwrap();
                let is_put = request.method() == hyper::Method::PUT;
                if trouble == Trouble::Overwrites {
                    request.headers_mut().remove("if-none-match");
                }
                let service = service.clone();
                async move {
                    if is_put && trouble == Trouble::LosesRequests {
                        return Err(std::io::Error::other("lost before"));
                    }
                    let answer = Service::call(&service, request).await.map_err(std::io::Error::other);
                    if is_put && trouble == Trouble::LosesAnswers {
                        return Err(std::io::Error::other("lost after"));
                    }
                    answer
                }
            });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), answer));
        }
    });
    (connect(address, false), shared)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_whose_create_races_conforms_otherwise_but_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = s3s(folder.path(), Trouble::Nothing).await;
    conformance::check_without_races(&store).await;
    let mut chain = running(&store, 3).await;
    let checkpoint = save(&mut chain, &medium(), 50).await;
    expect_loads(&store, &checkpoint, &medium(), 2).await;
    let error = probe_atomic_create(&store).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Input, "{error}");
    assert!(error.to_string().contains("`cairn coordinator --allow-single-coordinator`"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_overwrites_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = s3s(folder.path(), Trouble::Overwrites).await;
    let error = probe_atomic_create(&store).await.unwrap_err();
    assert!(error.to_string().contains("`cairn coordinator --allow-single-coordinator`"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_error_in_bounded_time() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let started = Instant::now();
    let error = connect(gone, false).get("jobs/x", 10).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Retry, "{error}");
    assert!(started.elapsed() < Duration::from_mins(1));
}

/// The answer to a create is lost. Whether it took effect is found out by reading back, never assumed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_lost_answer_is_settled_and_a_lost_request_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let (store, trouble) = s3s(folder.path(), Trouble::Nothing).await;
    let mut chain = running(&store, 1).await;
    let scaled = |workers| Record::new(EPOCH, chain_generation(), Event::Scaled { workers });
    *trouble.lock().unwrap() = Trouble::LosesAnswers;
    chain.append(scaled(2)).await.unwrap();
    let other = store.create(&layout::record(&job(), 2), "someone else's".into()).await.unwrap();
    assert_eq!(other, Create::AlreadyExists);
    *trouble.lock().unwrap() = Trouble::LosesRequests;
    let unclear = chain.append(scaled(3)).await.unwrap_err();
    assert!(matches!(unclear, ChainError::Store(StoreError::Indeterminate { .. })), "{unclear}");
    *trouble.lock().unwrap() = Trouble::Nothing;
    assert_eq!(chain.append(scaled(4)).await.unwrap_err().kind(), Kind::Fenced, "not before a refresh");
    assert_eq!(chain.refresh().await.unwrap().added, 0);
    assert_eq!(chain.append(scaled(4)).await.unwrap(), 3);
    assert_eq!(Chain::load(&store, &job()).await.unwrap().unwrap().history(), chain.history());
}

fn chain_generation() -> proto::ids::Generation {
    proto::ids::Generation::new(1)
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts moto with a bucket; `None`, with the reason printed, where it is not installed.
async fn moto() -> Option<(Server, SocketAddr)> {
    let program = std::env::var("CAIRN_MOTO").unwrap_or_else(|_| "moto_server".into());
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let started = Command::new(&program)
        .args(["-H", "127.0.0.1", "-p", &address.port().to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let server = match started {
        Ok(child) => Server(child),
        Err(e) => {
            assert!(std::env::var_os("CAIRN_REQUIRE_TOOLS").is_none(), "{program} does not start: {e}");
            eprintln!("skipped: {program} does not start ({e}); pip install 'moto[server]' or set CAIRN_MOTO");
            return None;
        }
    };
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        if let Ok(mut socket) = tokio::net::TcpStream::connect(address).await {
            let request =
                format!("PUT /bucket HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            socket.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            socket.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            return Some((server, address));
        }
        assert!(Instant::now() < deadline, "{program} did not come up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_right_server_passes_and_keeps_a_job() {
    let Some((_server, address)) = moto().await else { return };
    let store = connect(address, true);
    let nowhere = open("s3://no-such-bucket/x", address, true);
    let error = probe_atomic_create(&nowhere).await.unwrap_err().to_string();
    assert!(error.contains("bucket or container does not exist"), "{error}");
    conformance::check(&store).await;
    probe_atomic_create(&store).await.unwrap();
    let mut chain = running(&store, 3).await;
    let checkpoint = save(&mut chain, &medium(), 50).await;
    let reader = connect(address, true);
    let found = Chain::load(&reader, &job()).await.unwrap().unwrap();
    assert_eq!(found.history().newest_good(), Some(&checkpoint));
    expect_loads(&reader, &checkpoint, &medium(), 2).await;
    assert!(verify(&reader, &job(), &checkpoint).await.unwrap().is_good());
    let next = save(&mut chain, &medium(), 60).await;
    let (gone, files) = collect(&mut chain, EPOCH, 1, &std::collections::BTreeSet::new()).await.unwrap();
    assert_eq!((gone, files), (vec![checkpoint], 4));
    expect_loads(&reader, &next, &medium(), 2).await;
}
