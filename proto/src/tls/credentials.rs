//! A process's own certificate, key and CA, read from a folder and checked before anything is started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::ServerCertVerifier;
use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{CertificateError, ClientConfig, Error, RootCertStore, ServerConfig};

use super::client::Connector;
use super::files::{read_bounded, read_private};
use super::words::{Age, age};
use super::{Identity, Role, TlsError, server_name};

/// A certificate that expires within this is warned of at start.
const SOON: Duration = Duration::from_hours(24 * 7);
/// What runs inside: gRPC.
const PROTOCOL: &[u8] = b"h2";

/// What one process shows and demands; cheap to clone.
#[derive(Clone)]
pub struct Credentials(Arc<Inner>);

struct Inner {
    folder: PathBuf,
    identity: Identity,
    certificate: CertificateDer<'static>,
    key: Arc<CertifiedKey>,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.0.identity)
    }
}

impl Credentials {
    /// Reads `ca.pem`, `cert.pem` and `key.pem` of a folder and checks that they fit together and are valid today.
    pub fn load(folder: &Path) -> Result<Self, TlsError> {
        Self::load_at(folder, UnixTime::now())
    }

    /// The same for another day.
    pub(super) fn load_at(folder: &Path, now: UnixTime) -> Result<Self, TlsError> {
        let [ca, certificate, key] = ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name));
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        for root in certificates(&ca)? {
            roots.add(root).map_err(|error| TlsError::Unusable { path: ca.clone(), reason: error.to_string() })?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&certificate)?;
        let secret = PrivateKeyDer::from_pem_slice(read_private(&key)?.as_bytes())
            .map_err(|_| TlsError::NotPem { path: key.clone(), what: "a private key" })?;
        let unusable = |path: &Path, error: Error| TlsError::Unusable { path: path.into(), reason: error.to_string() };
        let held = CertifiedKey::from_der(chain.clone(), secret, &provider).map_err(|error| match error {
            Error::InconsistentKeys(_) => TlsError::Mismatch { key: key.clone(), certificate: certificate.clone() },
            error => unusable(&key, error),
        })?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| TlsError::Unusable { path: ca.clone(), reason: error.to_string() })?;
        check_own(&*verifier, &chain, now, &certificate, &ca)?;
        let leaf = chain[0].clone();
        let identity = Identity::of(&leaf).ok_or_else(|| TlsError::Anonymous { path: certificate.clone() })?;
        let held = Arc::new(held);
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(folder, error))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(held.clone())));
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        // A resumed session would not be asked for its certificate again.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let server = Arc::new(server);
        let folder = folder.to_path_buf();
        Ok(Self(Arc::new(Inner { folder, identity, certificate: leaf, key: held, provider, roots, server })))
    }

    /// Whom the certificate is for.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// Refuses a certificate that is for another role than the process plays.
    pub fn check_role(&self, role: Role) -> Result<(), TlsError> {
        let identity = &self.0.identity;
        if identity.role == role || identity.role == Role::Coordinator {
            return Ok(());
        }
        let path = self.0.folder.join("cert.pem");
        Err(TlsError::Role { path, identity: identity.to_string(), needs: role.as_str() })
    }

    /// Refuses a certificate that does not name the host others connect to.
    pub fn check_host(&self, host: &str) -> Result<(), TlsError> {
        let named = webpki::EndEntityCert::try_from(&self.0.certificate).ok().zip(server_name(host));
        if named.is_some_and(|(leaf, name)| leaf.verify_is_valid_for_subject_name(&name).is_ok()) {
            return Ok(());
        }
        Err(TlsError::Host { path: self.0.folder.join("cert.pem"), host: host.into() })
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        self.0.server.clone()
    }

    /// Opens connections to servers that play one of these roles in this cluster.
    pub(super) fn connector(&self, roles: &'static [Role]) -> Connector {
        Connector::new(self.client(roles))
    }

    fn client(&self, roles: &'static [Role]) -> Result<Arc<ClientConfig>, Error> {
        let inner = &self.0;
        let trust = WebPkiServerVerifier::builder_with_provider(inner.roots.clone(), inner.provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let verifier: Arc<dyn ServerCertVerifier> =
            Arc::new(super::client::Verifier::new(trust, inner.identity.cluster.clone(), roles));
        let mut config = ClientConfig::builder_with_provider(inner.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(inner.key.clone())));
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        config.resumption = tokio_rustls::rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// The certificates of a file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read_bounded(path)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match read {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) | Err(_) => Err(TlsError::NotPem { path: path.into(), what: "a certificate" }),
    }
}

/// Checks the own certificate as a peer will, and warns if that will soon fail.
fn check_own(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'_>],
    now: UnixTime,
    path: &Path,
    ca: &Path,
) -> Result<(), TlsError> {
    let Some((leaf, between)) = chain.split_first() else {
        return Err(TlsError::NotPem { path: path.into(), what: "a certificate" });
    };
    if let Err(error) = verifier.verify_client_cert(leaf, between, now) {
        return Err(match (age(&error), error) {
            (Some(Age::Expired(on)), _) => TlsError::Expired { path: path.into(), on },
            (Some(Age::NotYet(from)), _) => TlsError::NotYet { path: path.into(), from },
            (None, Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
                TlsError::OtherCa { certificate: path.into(), ca: ca.into() }
            }
            (None, error) => TlsError::Unusable { path: path.into(), reason: error.to_string() },
        });
    }
    let soon = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + SOON);
    if let Err(Some(Age::Expired(on))) = verifier.verify_client_cert(leaf, between, soon).map_err(|error| age(&error)) {
        tracing::warn!("the certificate {} expires on {on}: issue a new one before", path.display());
    }
    Ok(())
}
