//! Certificates that are wrong in every way they can be, on disk and in a handshake.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::Request;
use tower::Service;

use super::client::Connector;
use super::*;
use crate::auth::Token;
use crate::ids::{ClusterName, NodeName};

/// A cluster's authority and the folders it issued.
struct Lab {
    folder: tempfile::TempDir,
    authority: Authority,
}

impl Lab {
    fn new(cluster: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cluster = ClusterName::new(cluster).unwrap();
        Authority::create(folder.path(), &cluster).unwrap();
        // Whatever issues has read it back.
        let authority = Authority::read(folder.path()).unwrap();
        assert_eq!(authority.cluster(), &cluster);
        Self { folder, authority }
    }

    fn issue(&self, role: Role, name: &str, host: &str, days: i32) -> PathBuf {
        let out = self.folder.path().join(format!("{role}-{name}-{host}-{days}"));
        let cluster = self.authority.cluster().clone();
        let identity = Identity { cluster, role, name: NodeName::new(name).unwrap() };
        self.authority.issue(&out, &identity, &[host.parse().unwrap()], days).unwrap();
        out
    }

    fn load(&self, role: Role, name: &str) -> Credentials {
        Credentials::load(&self.issue(role, name, "127.0.0.1", 2)).unwrap()
    }
}

/// Three days ago.
fn earlier() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() - 3 * 86_400))
}

#[test]
fn an_identity_is_read_as_it_is_written_and_nothing_else_is_one() {
    let text = "cairn://lab/agent/node-1.example";
    let identity: Identity = text.parse().unwrap();
    assert_eq!(identity.to_string(), text);
    assert!(identity.may_attach(&NodeName::new("node-1.example").unwrap()));
    assert!(!identity.may_attach(&NodeName::new("node-2").unwrap()));
    let long = format!("cairn://lab/agent/{}", "x".repeat(64));
    for bad in
        ["", "cairn://", "cairn://lab/agent", "cairn://lab/agent/a/b", "cairn://lab/root/a", "https://lab/agent/a"]
            .into_iter()
            .chain(["cairn:///agent/a", "cairn://lab/agent/", "cairn://lab/agent/..", "CAIRN://lab/agent/a", &long])
    {
        assert!(bad.parse::<Identity>().is_err(), "{bad}");
    }
    let lab = Lab::new("lab");
    let folder = lab.issue(Role::Agent, "a", "127.0.0.1", 2);
    let pem = std::fs::read(folder.join("cert.pem")).unwrap();
    let der = CertificateDer::from_pem_slice(&pem).unwrap();
    assert_eq!(Identity::of(&der).unwrap().to_string(), "cairn://lab/agent/a");
    assert_eq!(Identity::of(&CertificateDer::from(vec![0x30, 3, 1, 2])), None);
}

#[test]
fn nothing_is_written_over_and_keys_are_private() {
    let lab = Lab::new("lab");
    let again = Authority::create(lab.folder.path(), lab.authority.cluster());
    assert!(matches!(again, Err(TlsError::Exists { .. })));
    let out = lab.issue(Role::Agent, "a", "127.0.0.1", 2);
    let identity = "cairn://lab/agent/b".parse().unwrap();
    assert!(matches!(lab.authority.issue(&out, &identity, &[], 1), Err(TlsError::Exists { .. })));
    for key in [out.join("key.pem"), lab.folder.path().join("ca-key.pem")] {
        assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let key = lab.folder.path().join("ca-key.pem");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(Authority::read(lab.folder.path()), Err(TlsError::Open { mode: 0o640, .. })));
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Authority::read(empty.path()), Err(TlsError::NoAuthority { .. })));
}

/// A change to a folder that was fine, and what is said of it.
type Wrong<'a> = (&'static str, Box<dyn Fn(&Path) + 'a>, &'static [&'static str]);

#[test]
fn a_folder_is_checked_before_anything_is_started() {
    let (lab, other) = (Lab::new("lab"), Lab::new("lab"));
    let b = lab.issue(Role::Agent, "b", "127.0.0.1", 2);
    let foreign = other.issue(Role::Agent, "a", "127.0.0.1", 2);
    let replace = |name: &'static str, from: &Path| {
        let from = from.join(name);
        Box::new(move |to: &Path| {
            std::fs::copy(&from, to.join(name)).unwrap();
        }) as Box<dyn Fn(&Path)>
    };
    let rows: Vec<Wrong<'_>> = vec![
        ("no key", Box::new(|to| std::fs::remove_file(to.join("key.pem")).unwrap()), &["key.pem", "certs issue"]),
        ("no CA", Box::new(|to| std::fs::remove_file(to.join("ca.pem")).unwrap()), &["ca.pem", "certs issue"]),
        (
            "no PEM",
            Box::new(|to| std::fs::write(to.join("cert.pem"), "hello").unwrap()),
            &["cert.pem", "a certificate"],
        ),
        ("binary", Box::new(|to| std::fs::write(to.join("ca.pem"), [0xff; 99]).unwrap()), &["ca.pem"]),
        ("key is none", replace_key("nothing"), &["key.pem", "a private key"]),
        (
            "open key",
            Box::new(|to| {
                std::fs::set_permissions(to.join("key.pem"), std::fs::Permissions::from_mode(0o644)).unwrap();
            }),
            &["key.pem", "0644", "chmod 600"],
        ),
        ("key of another", replace("key.pem", &b), &["key.pem", "is not that of the certificate", "cert.pem"]),
        ("CA of another cluster", replace("ca.pem", &foreign), &["cert.pem", "was not signed by", "ca.pem"]),
    ];
    for (what, change, parts) in rows {
        let folder = lab.issue(Role::Agent, &what.replace(' ', "-"), "127.0.0.1", 2);
        assert!(Credentials::load(&folder).is_ok(), "{what}");
        change(&folder);
        let error = Credentials::load(&folder).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{what}: {error}");
    }
    let expired = Credentials::load(&lab.issue(Role::Agent, "old", "127.0.0.1", -2)).unwrap_err();
    assert!(matches!(&expired, TlsError::Expired { on, .. } if on.starts_with("20")), "{expired}");
    let early = Credentials::load_at(&b, earlier()).unwrap_err();
    assert!(matches!(&early, TlsError::NotYet { from, .. } if from.starts_with("20")), "{early}");
    let agent = lab.load(Role::Agent, "a");
    assert!(agent.check_role(Role::Agent).is_ok());
    assert!(agent.check_role(Role::Coordinator).unwrap_err().to_string().contains("--role coordinator"));
    assert!(agent.check_host("127.0.0.1").is_ok());
    assert!(agent.check_host("10.0.0.1").unwrap_err().to_string().contains("--host 10.0.0.1"));
}

fn replace_key(text: &'static str) -> Box<dyn Fn(&Path)> {
    Box::new(move |to| std::fs::write(to.join("key.pem"), text).unwrap())
}

#[test]
fn plain_connections_stay_on_loopback_unless_asked_for_by_name() {
    let plain = Security::choose(None, false).unwrap();
    assert!(plain.may_listen("--listen", "127.0.0.2".parse().unwrap()).is_ok());
    assert!(plain.may_listen("--listen", "::1".parse().unwrap()).is_ok());
    for address in ["0.0.0.0", "::", "10.0.0.1", "::ffff:127.0.0.1"] {
        let error = plain.may_listen("--listen", address.parse().unwrap()).unwrap_err().to_string();
        assert!(["--listen", "cairn certs init", "--tls", "--insecure-plaintext"].iter().all(|w| error.contains(w)));
    }
    for good in ["localhost:1", "127.0.0.1:1", "[::1]:1"] {
        assert!(plain.may_connect("--coordinator", good).is_ok(), "{good}");
    }
    for bad in ["node:1", "10.0.0.1:1", "localhost.example:1", "[fe80::1]:1", "0.0.0.0:1"] {
        assert!(plain.may_connect("--coordinator", bad).is_err(), "{bad}");
    }
    let open = Security::choose(None, true).unwrap();
    assert!(open.may_listen("--listen", "0.0.0.0".parse().unwrap()).is_ok());
    assert!(open.may_connect("--coordinator", "node:1").is_ok());
    assert!(matches!(Security::choose(Some(Path::new("x")), true), Err(TlsError::Both)));
}

/// What a client is told that connects to a server; the server is told by what it takes in.
async fn connect(server: Security, client: Connector, host: &str) -> (Result<(), Refused>, Option<Identity>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        let mut sockets = std::pin::pin!(incoming(listener.into(), &server));
        let mut socket = sockets.next().await.unwrap().unwrap();
        // A gRPC server's settings come unasked, too.
        socket.write_all(b"hello").await.unwrap();
        socket.flush().await.unwrap();
        match socket {
            Socket::Tls(_, ref identity) => Some(identity.clone()),
            Socket::Plain(_) | Socket::Other(_) => None,
        }
    });
    let mut client = client;
    let outcome = client.call(format!("http://{host}:{port}").parse().unwrap()).await;
    let seen = if outcome.is_ok() { serving.await.unwrap() } else { None };
    (outcome.map(drop), seen)
}

const LEADERS: &[Role] = &[Role::Coordinator];

#[tokio::test]
async fn both_ends_know_each_other() {
    let lab = Lab::new("lab");
    let server = Security::Tls(lab.load(Role::Coordinator, "main"));
    let client = lab.load(Role::Agent, "a").connector(LEADERS);
    let (outcome, seen) = connect(server, client, "127.0.0.1").await;
    outcome.unwrap();
    assert_eq!(seen.unwrap().to_string(), "cairn://lab/agent/a");
}

#[tokio::test]
async fn a_server_turns_strangers_away_and_they_are_told_why() {
    let (lab, other) = (Lab::new("lab"), Lab::new("lab"));
    let server = || Security::Tls(lab.load_named(Role::Coordinator, "main"));
    // A client that trusts the server, and is not trusted.
    let ca = lab.folder.path().join("ca.pem");
    let stranger = other.issue(Role::Agent, "a", "127.0.0.1", 2);
    let trusting = |folder: &Path| {
        let both = format!(
            "{}{}",
            std::fs::read_to_string(folder.join("ca.pem")).unwrap(),
            std::fs::read_to_string(&ca).unwrap()
        );
        std::fs::write(folder.join("ca.pem"), both).unwrap();
        Credentials::load_at(folder, UnixTime::now()).unwrap().connector(LEADERS)
    };
    let (outcome, _) = connect(server(), trusting(&stranger), "127.0.0.1").await;
    expect(outcome, true, "another cluster");
    let old = lab.issue(Role::Agent, "a", "127.0.0.1", -2);
    let old = Credentials::load_at(&old, earlier_than(-2)).unwrap().connector(LEADERS);
    let (outcome, _) = connect(server(), old, "127.0.0.1").await;
    expect(outcome, true, "expired");
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&std::fs::read(&ca).unwrap()).unwrap()).unwrap();
    let nameless = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let nameless = Arc::new(nameless);
    let (outcome, _) = connect(server(), Connector::new(move || Ok(nameless.clone())), "127.0.0.1").await;
    expect(outcome, true, "was shown none");
}

#[tokio::test]
async fn a_client_turns_a_false_server_away_and_says_why() {
    let (lab, other) = (Lab::new("lab"), Lab::new("lab"));
    let client = || lab.load_named(Role::Operator, "me").connector(LEADERS);
    let foreign = Security::Tls(other.load(Role::Coordinator, "main"));
    expect(connect(foreign, client(), "127.0.0.1").await.0, true, "another cluster");
    // An agent's certificate is good for its host, and yet no coordinator's.
    let posing = Security::Tls(lab.load(Role::Agent, "a"));
    expect(connect(posing, client(), "127.0.0.1").await.0, true, "cairn://lab/agent/a");
    let old = lab.issue(Role::Coordinator, "old", "127.0.0.1", -2);
    let old = Security::Tls(Credentials::load_at(&old, earlier_than(-2)).unwrap());
    expect(connect(old, client(), "127.0.0.1").await.0, true, "expired on 20");
    let elsewhere = lab.issue(Role::Coordinator, "main", "10.0.0.1", 2);
    let elsewhere = Security::Tls(Credentials::load(&elsewhere).unwrap());
    expect(connect(elsewhere, client(), "127.0.0.1").await.0, true, "--host 127.0.0.1");
    expect(connect(Security::Loopback, client(), "127.0.0.1").await.0, false, "does not speak TLS");
    let unheard = client().call("http://127.0.0.1:1".parse().unwrap()).await.map(drop);
    expect(unheard, false, "tcp connect error");
}

impl Lab {
    /// As [`Lab::load`], as often as asked.
    fn load_named(&self, role: Role, name: &str) -> Credentials {
        let folder = self.folder.path().join(format!("{role}-{name}-127.0.0.1-2"));
        if folder.exists() { Credentials::load(&folder).unwrap() } else { self.load(role, name) }
    }
}

/// A moment at which what expired some days ago was valid.
fn earlier_than(days: i32) -> UnixTime {
    let then = UnixTime::now().as_secs() - u64::from(days.unsigned_abs()) * 86_400;
    UnixTime::since_unix_epoch(Duration::from_secs(then - 60))
}

fn expect(outcome: Result<(), Refused>, settled: bool, words: &str) {
    let refused = outcome.expect_err(words);
    assert_eq!(refused.is_settled(), settled, "{refused}");
    assert!(refused.to_string().contains(words), "{refused} lacks {words:?}");
}

/// Puts the files of one folder in the place of another's, one after the other.
fn replace(folder: &Path, by: &Path, names: &[&str]) {
    for name in names {
        std::fs::rename(by.join(name), folder.join(name)).unwrap();
    }
}

#[tokio::test]
async fn renewed_certificates_are_used_without_a_restart() {
    let lab = Lab::new("lab");
    // What both began with has expired since.
    let begin = |role, name| {
        let folder = lab.issue(role, name, "127.0.0.1", -2);
        (Credentials::load_at(&folder, earlier_than(-2)).unwrap(), folder)
    };
    let ((server, of_server), (client, of_client)) = (begin(Role::Coordinator, "main"), begin(Role::Agent, "a"));
    let try_both = async || {
        let (server, client) = (Security::Tls(server.clone()), client.connector(LEADERS));
        connect(server, client, "127.0.0.1").await
    };
    expect(try_both().await.0, true, "expired");
    let (fresh_server, fresh_client) =
        (lab.issue(Role::Coordinator, "main", "127.0.0.1", 3), lab.issue(Role::Agent, "a", "127.0.0.1", 3));
    replace(&of_server, &fresh_server, &["cert.pem"]);
    expect(try_both().await.0, true, "expired");
    replace(&of_server, &fresh_server, &["key.pem"]);
    replace(&of_client, &fresh_client, &["cert.pem", "key.pem"]);
    let (outcome, seen) = try_both().await;
    outcome.unwrap();
    assert_eq!(seen.unwrap().to_string(), "cairn://lab/agent/a");
    // What is no better than what is there is not taken: another's, and none.
    replace(&of_client, &lab.issue(Role::Agent, "b", "127.0.0.1", 3), &["cert.pem", "key.pem"]);
    assert_eq!(try_both().await.1.unwrap().to_string(), "cairn://lab/agent/a");
    std::fs::remove_file(of_server.join("ca.pem")).unwrap();
    assert!(try_both().await.0.is_ok());
}

#[tokio::test]
async fn another_authority_can_take_the_place_of_the_first_while_both_ends_run() {
    let (lab, next) = (Lab::new("lab"), Lab::new("lab"));
    let (of_server, of_client) =
        (lab.issue(Role::Coordinator, "main", "127.0.0.1", 2), lab.issue(Role::Agent, "a", "127.0.0.1", 2));
    let (server, client) = (Credentials::load(&of_server).unwrap(), Credentials::load(&of_client).unwrap());
    let try_both = async || connect(Security::Tls(server.clone()), client.connector(LEADERS), "127.0.0.1").await.0;
    try_both().await.unwrap();
    let names = ["ca.pem", "cert.pem", "key.pem"];
    replace(&of_server, &next.issue(Role::Coordinator, "main", "127.0.0.1", 2), &names);
    expect(try_both().await, true, "another cluster");
    replace(&of_client, &next.issue(Role::Agent, "a", "127.0.0.1", 2), &names);
    try_both().await.unwrap();
}

#[test]
fn a_gate_wants_the_role_and_the_token() {
    let lab = Lab::new("lab");
    let security = Security::Tls(lab.load(Role::Coordinator, "main"));
    let token = Token::read_or_create(&lab.folder.path().join("token"), [5; 32]).unwrap();
    let gate = Gate::new(token.clone(), &security, &[Role::Coordinator, Role::Operator], "command jobs");
    let call = |identity: Option<&str>, with_token: bool| {
        let mut request = Request::new(());
        let identity = identity.map(|text| text.parse().unwrap());
        request.extensions_mut().insert(Peer { identity });
        gate.check(if with_token { token.sign(request).unwrap() } else { request }).map(drop)
    };
    assert!(call(Some("cairn://lab/operator/me"), true).is_ok());
    assert!(call(Some("cairn://lab/coordinator/main"), true).is_ok());
    assert_eq!(call(Some("cairn://lab/operator/me"), false).unwrap_err().code(), tonic::Code::Unauthenticated);
    let denied = call(Some("cairn://lab/agent/a"), true).unwrap_err();
    assert_eq!(denied.code(), tonic::Code::PermissionDenied);
    assert!(denied.message().contains("--role operator"), "{denied}");
    assert_eq!(call(None, true).unwrap_err().code(), tonic::Code::Unauthenticated);
}
