//! Opening connections: the server is checked, and what the server thinks of this process is waited for.

use std::error::Error as StdError;
use std::future::Future;
use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, SignatureScheme};
use tonic::codegen::http::Uri;

use super::words::{self, seconds};
use super::{Identity, Role, bare, server_name};
use crate::ids::ClusterName;

/// For a handshake, from the open connection to the server's first word.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For the server's first word alone; one that is silent that long has not said no.
const FIRST_WORD: Duration = Duration::from_secs(2);

/// Why no connection came about.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refused {
    /// Nobody listens, or the network is in the way.
    #[error("tcp connect error: {0}")]
    Unreachable(Arc<io::Error>),
    /// Certificates disagree; trying again cannot mend it.
    #[error("{0}")]
    Settled(String),
    /// The handshake broke; another try may do.
    #[error("{0}")]
    Broken(String),
}

impl Refused {
    /// Whether a person must act.
    pub fn is_settled(&self) -> bool {
        matches!(self, Self::Settled(_))
    }
}

/// The refusal behind an error of a channel or a call, if that is its cause.
pub fn refused<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Refused> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return Some(refused);
        }
        cause = error.source();
    }
    None
}

/// Checks that a server's certificate is of this cluster, names the host, and is for a role.
#[derive(Debug)]
pub(super) struct Verifier {
    trust: Arc<WebPkiServerVerifier>,
    cluster: ClusterName,
    roles: &'static [Role],
}

impl Verifier {
    pub(super) fn new(trust: Arc<WebPkiServerVerifier>, cluster: ClusterName, roles: &'static [Role]) -> Self {
        Self { trust, cluster, roles }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("its certificate is for {found}, and a certificate for {role} of cluster {cluster} is needed")]
struct WrongPart {
    found: String,
    role: Role,
    cluster: ClusterName,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.trust.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        // Without this an agent's certificate would do to pose as the coordinator on the agent's host.
        let identity = Identity::of(end_entity);
        if identity.as_ref().is_some_and(|i| i.cluster == self.cluster && self.roles.contains(&i.role)) {
            return Ok(verified);
        }
        let found = identity.map_or_else(|| "nobody".to_string(), |identity| identity.to_string());
        let role = self.roles.first().copied().unwrap_or(Role::Coordinator);
        let wrong = WrongPart { found, role, cluster: self.cluster.clone() };
        Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(wrong)))))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.trust.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.trust.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.supported_verify_schemes()
    }
}

/// What a connection is opened with, asked for anew each time.
type Configure = dyn Fn() -> Result<Arc<ClientConfig>, Error> + Send + Sync;

/// What tonic opens its connections with.
#[derive(Clone)]
pub(super) struct Connector(Arc<Configure>);

impl Connector {
    pub(super) fn new(configure: impl Fn() -> Result<Arc<ClientConfig>, Error> + Send + Sync + 'static) -> Self {
        Self(Arc::new(configure))
    }
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = Refused;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Refused>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let config = (self.0)();
        Box::pin(async move {
            let config = config.map_err(|error| Refused::Settled(format!("TLS cannot be set up: {error}")))?;
            open(config, &uri).await.map(TokioIo::new)
        })
    }
}

async fn open(config: Arc<ClientConfig>, uri: &Uri) -> Result<TlsStream<TcpStream>, Refused> {
    let host = bare(uri.host().unwrap_or_default()).to_string();
    let name = server_name(&host).ok_or_else(|| Refused::Settled(format!("{host:?} is no host's name or address")))?;
    let unreachable = |error| Refused::Unreachable(Arc::new(error));
    let stream = TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(443))).await.map_err(unreachable)?;
    stream.set_nodelay(true).map_err(unreachable)?;
    let handshake = async {
        let mut stream = TlsConnector::from(config).connect(name, stream).await?;
        confirmed(&mut stream).await?;
        Ok(stream)
    };
    match timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(explain(&error, &host)),
        Err(_) => Err(Refused::Broken(format!("no TLS handshake within {}", seconds(HANDSHAKE)))),
    }
}

/// Waits for the server's first word. In TLS 1.3 a client is done before the server has seen its certificate: a refusal
/// comes after that, and would otherwise be met by whoever uses the connection, as one that broke for no reason.
async fn confirmed(stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
    let first_word = async {
        loop {
            let (tcp, session) = stream.get_mut();
            if !session.wants_read() {
                return Ok(()); // something for the application is there
            }
            tcp.readable().await?;
            match session.read_tls(&mut Ready(tcp)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {
                    session.process_new_packets().map_err(invalid)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    };
    timeout(FIRST_WORD, first_word).await.unwrap_or(Ok(()))
}

/// What has arrived, without waiting for more.
struct Ready<'a>(&'a TcpStream);

impl Read for Ready<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn explain(error: &io::Error, host: &str) -> Refused {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(tls) => match words::of_client(tls, host) {
            (true, text) => Refused::Settled(text),
            (false, text) => Refused::Broken(text),
        },
        None => Refused::Broken(format!("the connection broke in the TLS handshake: {error}")),
    }
}
