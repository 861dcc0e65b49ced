//! What the machine reaches: the store, the coordinators, and the token they are asked with.

use std::time::{Duration, Instant};

use bytes::Bytes;
use checkpoint_store::{Space, Store, StoreError, normalize_url, probe_atomic_create};
use proto::auth::Token;
use proto::spec::JobSpec;
use proto::wire::{BUILD, NodesRequest};
use serde_json::json;
use tokio::time::timeout;

use super::args::DoctorArgs;
use super::{Finding, Verdict};
use crate::client;
use crate::failure::{Failure, chain};
use crate::parts;
use crate::table;
use crate::train::random_bytes;

/// Rounds of which the median counts, and the bytes of each.
const ROUNDS: (usize, usize) = (5, 1 << 10);
/// Bytes of the large object.
const LARGE: usize = 64 << 20;
/// The longest any one check of a store may take.
const STORE: Duration = Duration::from_secs(120);
/// A leader's beat that takes longer than this gets near to being taken for dead.
const SLOW: f64 = 0.5;
/// A coordinator answers within this.
const ANSWER: Duration = Duration::from_secs(10);
/// Bytes of state for each parameter, stored with every checkpoint.
const STATE: u64 = 12;

/// Whether a store can be trusted, and how fast it is.
pub(super) async fn store(url: &str, spec: Option<&JobSpec>) -> Vec<Finding> {
    let (store, made) = match open(url) {
        Ok(opened) => opened,
        Err((error, advice)) => return vec![Finding::fail("store", error, advice)],
    };
    let advice = "see that the store is mounted, the credentials in the environment, and docs/store.md";
    let mut findings = Vec::new();
    let atomic = timeout(STORE, probe_atomic_create(&store)).await;
    findings.push(match atomic {
        Ok(Ok(())) => {
            let note = if made { " (its folder was missing and was made)" } else { "" };
            Finding::ok("store", format!("{} creates objects atomically{note}", store.url()))
        }
        Ok(Err(error)) => Finding::fail("store", chain(&error), advice),
        Err(_) => Finding::fail("store", format!("no answer within {} s", STORE.as_secs()), advice),
    });
    if findings[0].verdict == Verdict::Fail {
        // What cannot be written to is not measured: one cause, one line.
        return findings;
    }
    // No folder of its own: on a local disk an empty one would stay behind.
    let mark = format!("probe/doctor-{}", store.token());
    findings.push(measured("store latency", latency(&store, &mark)).await);
    findings.push(measured("store bandwidth", bandwidth(&store, &mark, spec)).await);
    findings
}

/// A measurement, or why there is none.
async fn measured(check: &'static str, work: impl Future<Output = Result<Finding, StoreError>>) -> Finding {
    match timeout(STORE, work).await {
        Ok(Ok(finding)) => finding,
        Ok(Err(error)) => Finding::fail(check, chain(&error), "see docs/store.md for timeouts and limits"),
        Err(_) => Finding::fail(check, format!("not done within {} s", STORE.as_secs()), "use a faster store"),
    }
}

/// Opens a store; of a local folder only the last level is made, so that a misspelt path is not taken for a new store.
fn open(url: &str) -> Result<(Store, bool), (String, String)> {
    let wrong = |error: StoreError| (chain(&error), "correct --store or checkpoint.store".to_string());
    let here = std::env::current_dir().map_err(|error| (error.to_string(), "change to a folder that exists".into()))?;
    let url = normalize_url(url, &here).map_err(wrong)?;
    if url.starts_with("memory:") {
        return Err((
            "memory:// ends with its process".into(),
            "give a path, or file://, s3://, gs:// or az://".into(),
        ));
    }
    let missing = Store::open_existing(&url).is_err();
    if let Some((parent, _)) = url.rsplit_once('/').filter(|(parent, _)| missing && parent.starts_with("file:///"))
        && let Err(error) = Store::open_existing(parent)
    {
        return Err((chain(&error), format!("make the folder {url}, or correct --store or checkpoint.store")));
    }
    Store::open(&url).map(|store| (store, missing)).map_err(wrong)
}

/// The median of small round trips: what a record of a chain or a leader's beat takes.
async fn latency(store: &Store, mark: &str) -> Result<Finding, StoreError> {
    let bytes = Bytes::from(vec![7; ROUNDS.1]);
    let mut times = [const { Vec::new() }; 3];
    for round in 0..ROUNDS.0 {
        let path = format!("{mark}-small-{round}");
        let began = Instant::now();
        store.create(&path, bytes.clone()).await?;
        let put = Instant::now();
        let read = store.get(&path, ROUNDS.1 as u64).await;
        let got = Instant::now();
        store.delete(&path).await?;
        read?;
        let spans = [put - began, got - put, got.elapsed()];
        times.iter_mut().zip(spans).for_each(|(times, span)| times.push(span.as_secs_f64()));
    }
    let [put, get, delete] = times.map(median);
    let found = format!("put {:.1} ms, get {:.1} ms, delete {:.1} ms", put * 1e3, get * 1e3, delete * 1e3);
    let finding = if put > SLOW {
        let advice = "a leader's beat is a put: move the coordinator nearer to the store";
        Finding::warn("store latency", found, advice)
    } else {
        Finding::ok("store latency", found)
    };
    Ok(finding.with(json!({"put_seconds": put, "get_seconds": get, "delete_seconds": delete})))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// A large object written and read back.
async fn bandwidth(store: &Store, mark: &str, spec: Option<&JobSpec>) -> Result<Finding, StoreError> {
    let path = format!("{mark}-large");
    // Bytes a store cannot compress.
    let seed = random_bytes().first_chunk().map_or(1, |bytes| u64::from_le_bytes(*bytes));
    let words = (1..=LARGE as u64 / 8).flat_map(|word| (word ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    let bytes = Bytes::from(words.collect::<Vec<u8>>());
    let began = Instant::now();
    let written = store.upload(&path, vec![bytes.clone()]).await;
    let write = began.elapsed();
    let began = Instant::now();
    let read = if written.is_ok() { Some(store.get(&path, LARGE as u64).await) } else { None };
    let took = began.elapsed();
    let deleted = store.delete(&path).await;
    written?;
    if let Some(read) = read
        && read? != bytes
    {
        return Err(StoreError::Corrupt(format!("{path} holds other bytes than were written")));
    }
    deleted?;
    let rate = |took: Duration| LARGE as f64 / took.as_secs_f64().max(1e-9);
    let mut found = format!(
        "{} written at {:.2} GB/s, read back at {:.2} GB/s",
        table::bytes(LARGE as u64),
        rate(write) / 1e9,
        rate(took) / 1e9
    );
    let state = spec.and_then(|spec| Space::of_model(&spec.model).ok()).map(|space| space.elements() * STATE);
    if let Some(state) = state {
        let (size, seconds) = (table::bytes(state), state as f64 / rate(write));
        found = format!("{found}; a checkpoint of {size} in {seconds:.1} s");
    }
    let values = json!({"write_bytes_per_second": rate(write), "read_bytes_per_second": rate(took)});
    Ok(Finding::ok("store bandwidth", found).with(values))
}

/// The token file, and every coordinator that was named.
pub(super) async fn coordinators(args: &DoctorArgs) -> Vec<Finding> {
    let (token, finding) = token(args);
    let mut findings = vec![finding];
    if args.coordinator.is_empty() {
        findings.push(Finding::skip("coordinator", "none given: name one with --coordinator HOST:PORT"));
    }
    for address in &args.coordinator {
        findings.push(match &token {
            None => Finding::fail("coordinator", format!("{address} cannot be asked without a token"), ""),
            Some(token) => match ask(args, address, token.clone()).await {
                Ok(finding) => finding,
                Err(failure) => {
                    Finding::fail("coordinator", failure, "see that it runs and that this machine may reach it")
                }
            },
        });
    }
    findings
}

/// The token; without one nothing is wrong as long as there is nobody to ask.
fn token(args: &DoctorArgs) -> (Option<Token>, Finding) {
    let path = match client::token_path(args.token_file.as_deref()) {
        Ok(path) => path,
        Err(failure) => return (None, Finding::skip("token", failure)),
    };
    let needed = !args.coordinator.is_empty() || args.token_file.is_some();
    match Token::read(&path) {
        Ok(token) => (Some(token), Finding::ok("token", format!("{}, readable by its owner only", path.display()))),
        Err(_) if !needed && !path.exists() => {
            (None, Finding::skip("token", format!("{} is not there; a coordinator makes it", path.display())))
        }
        Err(error) => {
            let advice = format!("chmod 600 {0}, or copy the coordinator's token file there", path.display());
            (None, Finding::fail("token", chain(&error), advice))
        }
    }
}

/// What a coordinator says of itself.
async fn ask(args: &DoctorArgs, address: &str, token: Token) -> Result<Finding, Failure> {
    let security = parts::security(&args.security)?;
    security.may_connect("--coordinator", address).map_err(|error| Failure::request(chain(&error)))?;
    let mut client = client::connect(address, token, &security)?;
    let began = Instant::now();
    let reply = client.list_nodes(client::timed_for(NodesRequest {}, ANSWER)).await;
    let reply = reply.map_err(|status| client::explain(status, address))?.into_inner();
    let milliseconds = began.elapsed().as_secs_f64() * 1e3;
    let build: String = reply.build.chars().take(40).collect();
    let (epoch, nodes) = (reply.epoch, reply.nodes.len());
    let found = format!("{address}: cairn {build}, epoch {epoch}, {nodes} nodes, answered in {milliseconds:.1} ms");
    let values = json!({"address": address, "build": build, "epoch": epoch, "nodes": nodes, "ms": milliseconds});
    if build != BUILD {
        let advice = format!("this is cairn {BUILD}: run the same version everywhere");
        return Ok(Finding::fail("coordinator", found, advice).with(values));
    }
    Ok(Finding::ok("coordinator", found).with(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_store_is_tried_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().join("s").display().to_string();
        let findings = store(&url, None).await;
        assert_eq!(findings.iter().map(|f| f.check).collect::<Vec<_>>(), ["store", "store latency", "store bandwidth"]);
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok), "{findings:?}");
        assert!(findings[0].found.contains("was made"), "{findings:?}");
        let (opened, made) = open(&url).unwrap();
        assert!(!made && opened.list("probe", None, 10).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_store_that_is_not_there_fails_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().join("no/such").display().to_string();
        let findings = store(&url, None).await;
        assert_eq!((findings.len(), findings[0].verdict), (1, Verdict::Fail), "{findings:?}");
        assert!(findings[0].advice.contains("make the folder"), "{findings:?}");
        assert!(!folder.path().join("no").exists(), "nothing was made");
        assert_eq!(store("memory://", None).await[0].verdict, Verdict::Fail);
    }
}
