//! The two ends between agents, over TLS and without: who may read, and what a wire in between can.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use proto::auth::Token;
use proto::ids::{ClusterName, NodeName};
use proto::tls::{Authority, Credentials, Identity, Role, Security};
use proto::wire::{GroupState, ReadRequest, StepRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tonic::Code;

use super::vault::Vault;
use super::{Peers, check_security, serve};
use crate::Options;
use crate::driver::Input;

const JOB: &str = "wire-tapped-job";
const NODE: &str = "wire-tapped-node";

struct Lab(tempfile::TempDir, Authority);

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path(), &ClusterName::new("lab").unwrap()).unwrap();
        Self(folder, authority)
    }

    fn security(&self, role: Role) -> Security {
        let out = self.0.path().join(format!("{role}-{}", uuid::Uuid::new_v4()));
        let name = NodeName::new(NODE).unwrap();
        let identity = Identity { cluster: self.1.cluster().clone(), role, name };
        self.1.issue(&out, &identity, &["127.0.0.1".parse().unwrap()], 1).unwrap();
        Security::Tls(Credentials::load(&out).unwrap())
    }
}

fn token(folder: &Path) -> Token {
    Token::read_or_create(&folder.join("token"), [9; 32]).unwrap()
}

fn options(folder: &Path, security: Security) -> Options {
    Options {
        coordinator: "127.0.0.1:1".into(),
        token: token(folder),
        security,
        node: NodeName::new(NODE).unwrap(),
        slots: 1,
        cores: 1,
        memory_dir: folder.into(),
        memory_budget: 0,
        domain: String::new(),
        executable: "cairn".into(),
        ring_host: "127.0.0.1".parse().unwrap(),
    }
}

/// A node that takes in what it is told; its address, which is that of a recorded wire in front of it, and the record.
async fn node(options: &Options) -> (String, Arc<Mutex<Vec<u8>>>) {
    let (inputs, mut heard) = mpsc::channel(8);
    let target = serve(options, Vault::default(), inputs).await.unwrap();
    tokio::spawn(async move {
        while let Some(input) = heard.recv().await {
            if let Input::Peer(_, taken) = input {
                taken.send(true).unwrap();
            }
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let record = Arc::new(Mutex::new(vec![]));
    tokio::spawn(relay(listener, target, record.clone()));
    (address, record)
}

async fn relay(listener: TcpListener, target: SocketAddr, record: Arc<Mutex<Vec<u8>>>) {
    while let Ok((near, _)) = listener.accept().await {
        let far = TcpStream::connect(target).await.unwrap();
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        for (mut from, mut to) in [(near_in, far_out), (far_in, near_out)] {
            let record = record.clone();
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = from.read(&mut buffer).await {
                    record.lock().unwrap().extend_from_slice(&buffer[..count]);
                    if to.write_all(&buffer[..count]).await.is_err() {
                        return;
                    }
                }
            });
        }
    }
}

fn state() -> GroupState {
    GroupState { job: JOB.into(), generation: 1, node: NODE.into(), sequence: 1, steps: vec![] }
}

#[tokio::test]
async fn what_agents_tell_one_another_cannot_be_read_on_the_wire() {
    let lab = Lab::new();
    for (security, readable) in [(Security::Loopback, true), (lab.security(Role::Agent), false)] {
        let (address, record) = node(&options(lab.0.path(), security.clone())).await;
        Peers::new(token(lab.0.path()), security).sync(&address, state()).await.unwrap();
        let record = record.lock().unwrap();
        assert!(record.len() > 100);
        for word in [JOB, NODE] {
            let seen = record.windows(word.len()).any(|window| window == word.as_bytes());
            assert_eq!(seen, readable, "{word}");
        }
    }
}

#[tokio::test]
async fn only_agents_of_the_cluster_read_snapshots() {
    let lab = Lab::new();
    let (address, _) = node(&options(lab.0.path(), lab.security(Role::Agent))).await;
    let peers = |security| Peers::new(token(lab.0.path()), security);
    let request = StepRequest { job: JOB.into(), generation: 1, step: 1 };
    for role in [Role::Agent, Role::Coordinator] {
        assert!(peers(lab.security(role)).describe(&address, request.clone()).await.is_ok(), "{role}");
    }
    let operator = peers(lab.security(Role::Operator));
    assert_eq!(operator.describe(&address, request.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(operator.sync(&address, state()).await.unwrap_err().code(), Code::PermissionDenied);
    let read = ReadRequest { job: JOB.into(), generation: 1, step: 1, stripe: None, start: 0, end: 1 };
    assert_eq!(operator.read(&address, read, &mut [0]).await.unwrap_err().code(), Code::PermissionDenied);
    let stranger = peers(Lab::new().security(Role::Agent)).describe(&address, request.clone()).await.unwrap_err();
    let refused = proto::tls::refused(&stranger).expect("the handshake says why");
    assert!(refused.is_settled() && refused.to_string().contains("another cluster"), "{refused}");
    assert!(peers(Security::Loopback).describe(&address, request).await.is_err(), "no certificate");
}

#[tokio::test]
async fn a_connection_that_breaks_at_once_is_opened_again() {
    let lab = Lab::new();
    let (target, record) = node(&options(lab.0.path(), Security::Loopback)).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        // As one that is older than the peer that stands behind it now.
        drop(listener.accept().await.unwrap());
        relay(listener, target.parse().unwrap(), record).await;
    });
    let peers = Peers::new(token(lab.0.path()), Security::Loopback);
    let request = StepRequest { job: JOB.into(), generation: 1, step: 1 };
    assert_eq!(peers.describe(&address, request).await.unwrap().captures.len(), 0);
}

#[test]
fn a_node_does_not_offer_its_snapshots_where_it_must_not_or_cannot() {
    let lab = Lab::new();
    let checked = |host: &str, security| {
        let options = Options { ring_host: host.parse().unwrap(), ..options(lab.0.path(), security) };
        check_security(&options).map_err(|error| error.to_string())
    };
    assert!(checked("127.0.0.1", Security::Loopback).is_ok());
    assert!(checked("192.0.2.1", Security::Loopback).unwrap_err().contains("--tls"));
    assert!(checked("192.0.2.1", Security::Plaintext).is_ok());
    assert!(checked("0.0.0.0", Security::Plaintext).unwrap_err().contains("--ring-host"));
    assert!(checked("127.0.0.1", lab.security(Role::Agent)).is_ok());
    assert!(checked("192.0.2.1", lab.security(Role::Agent)).unwrap_err().contains("--host 192.0.2.1"));
    assert!(checked("127.0.0.1", lab.security(Role::Operator)).unwrap_err().contains("--role agent"));
}
