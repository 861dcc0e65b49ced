//! Who may attach, and as whom: the coordinator's edge with mutual TLS.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use coordinator::{CoordinatorError, Options, Scope, run};
use proto::auth::Token;
use proto::ids::{ClusterName, NodeName};
use proto::tls::{Authority, Credentials, Identity, Role, Security, refused};
use proto::wire::agent_message::Body as Say;
use proto::wire::cluster_client::ClusterClient;
use proto::wire::coordinator_message::Body as Hear;
use proto::wire::jobs_client::JobsClient;
use proto::wire::{AgentHello, AgentMessage, BUILD, ListRequest, NodeReport};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

struct Lab {
    folder: tempfile::TempDir,
    authority: Authority,
    address: SocketAddr,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path(), &ClusterName::new("lab").unwrap()).unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Self { folder, authority, address }
    }

    fn security(&self, role: Role, name: &str) -> Security {
        let out = self.folder.path().join(uuid::Uuid::new_v4().to_string());
        let name = NodeName::new(name).unwrap();
        let identity = Identity { cluster: self.authority.cluster().clone(), role, name };
        self.authority.issue(&out, &identity, &["127.0.0.1".parse().unwrap()], 1).unwrap();
        Security::Tls(Credentials::load(&out).unwrap())
    }

    fn options(&self, security: Security) -> Options {
        Options {
            scope: Scope::All,
            store_url: format!("file://{}", self.folder.path().join("store").display()),
            listen: self.address,
            token: token(self.folder.path()),
            security,
            host: "host/boot".into(),
            standby: false,
            allow_single_coordinator: false,
            admission: false,
            metrics: None,
        }
    }

    async fn channel(&self, security: &Security) -> Result<Channel, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        security.connect(&endpoint, &[Role::Coordinator]).await
    }

    /// Attaches as a node; welcome, or why not.
    async fn attach(&self, security: &Security, node: &str) -> Result<(), String> {
        let token = token(self.folder.path());
        let channel = self.channel(security).await.unwrap();
        let mut client = ClusterClient::with_interceptor(channel, move |request| token.sign(request));
        let (say, said) = mpsc::channel(4);
        let hello = AgentHello {
            snapshots: "127.0.0.1:1".into(),
            node: node.into(),
            incarnation: "i".into(),
            slots: 1,
            build: BUILD.into(),
            report: Some(NodeReport::default()),
            ..AgentHello::default()
        };
        say.send(AgentMessage { body: Some(Say::Hello(hello)) }).await.unwrap();
        let stream = client.attach(ReceiverStream::new(said)).await;
        let mut stream = stream.map_err(|status| format!("{:?}: {}", status.code(), status.message()))?.into_inner();
        match stream.message().await.unwrap().unwrap().body {
            Some(Hear::Welcome(_)) => Ok(()),
            Some(Hear::Refused(reason)) => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    async fn list(&self, security: &Security, with_token: bool) -> Result<(), Code> {
        let token = token(self.folder.path());
        let mut client = JobsClient::new(self.channel(security).await.unwrap());
        let (metadata, extensions, ()) = token.sign(Request::new(())).unwrap().into_parts();
        let request = Request::from_parts(metadata, extensions, ListRequest {});
        let asked = client.list(if with_token { request } else { Request::new(ListRequest {}) }).await;
        asked.map(drop).map_err(|status| status.code())
    }
}

fn token(folder: &Path) -> Token {
    Token::read_or_create(&folder.join("token"), [3; 32]).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_role_may_do_its_own_and_a_node_is_who_its_certificate_says() {
    let lab = Lab::new();
    let coordinator = lab.security(Role::Coordinator, "main");
    let running = tokio::spawn(run(lab.options(coordinator.clone()), std::future::pending()));
    // Until it leads it says that it stands by.
    while lab.channel(&coordinator).await.is_err() || lab.list(&coordinator, true).await.is_err() {
        assert!(!running.is_finished(), "the coordinator ended");
        sleep(Duration::from_millis(20)).await;
    }
    let (agent, operator) = (lab.security(Role::Agent, "a"), lab.security(Role::Operator, "me"));
    assert_eq!(lab.attach(&agent, "a").await, Ok(()));
    let other = lab.attach(&agent, "b").await.unwrap_err();
    assert!(other.contains("cairn://lab/agent/a") && other.contains("--node a"), "{other}");
    assert_eq!(lab.attach(&coordinator, "b").await, Ok(()));
    let denied = lab.attach(&operator, "me").await.unwrap_err();
    assert!(denied.starts_with("PermissionDenied") && denied.contains("--role agent"), "{denied}");
    assert_eq!(lab.list(&operator, true).await, Ok(()));
    assert_eq!(lab.list(&coordinator, true).await, Ok(()));
    assert_eq!(lab.list(&agent, true).await, Err(Code::PermissionDenied));
    // A certificate does not stand for the token.
    assert_eq!(lab.list(&operator, false).await, Err(Code::Unauthenticated));
    let stranger = lab.channel(&Lab::new().security(Role::Agent, "a")).await.unwrap_err();
    assert!(refused(&stranger).is_some_and(|why| why.is_settled() && why.to_string().contains("another cluster")));
    running.abort();
}

#[tokio::test]
async fn a_coordinator_does_not_start_in_the_open_or_with_another_parts_certificate() {
    let lab = Lab::new();
    let open = Options { listen: "0.0.0.0:0".parse().unwrap(), ..lab.options(Security::Loopback) };
    let error = run(open, std::future::pending()).await.unwrap_err();
    assert!(matches!(error, CoordinatorError::Tls(_)) && error.exit_code() == 2, "{error}");
    assert!(error.to_string().contains("--insecure-plaintext"), "{error}");
    let agents = run(lab.options(lab.security(Role::Agent, "a")), std::future::pending()).await.unwrap_err();
    assert!(agents.to_string().contains("--role coordinator"), "{agents}");
}
