//! A process's own certificate, key and CA, read from a folder and checked before anything is started.
//!
//! They are read again when the files have changed, as each connection is about to be made or taken in: what was
//! renewed is used without a restart, and connections that are open stay. What cannot be used, such as half of what
//! is being written, is left for the next connection to look at, and the one before serves until then.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
pub struct Credentials {
    folder: PathBuf,
    identity: Identity,
    kept: Arc<Mutex<Kept>>,
}

/// What was read last.
struct Kept {
    inner: Arc<Inner>,
    /// The files as they were then.
    stamp: Stamp,
    /// Files that could not be used: said once.
    refused: Option<Stamp>,
}

/// What tells files from others of the same names; none where there is no file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp([Option<(u64, u64, i64, i64)>; 3]);

impl Stamp {
    fn of(folder: &Path) -> Self {
        Self(FILES.map(|name| {
            let found = std::fs::metadata(folder.join(name)).ok()?;
            Some((found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
        }))
    }
}

/// The files of a folder: the authority, the certificate, its key.
const FILES: [&str; 3] = ["ca.pem", "cert.pem", "key.pem"];

struct Inner {
    identity: Identity,
    certificate: CertificateDer<'static>,
    key: Arc<CertifiedKey>,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.identity)
    }
}

impl Credentials {
    /// Reads `ca.pem`, `cert.pem` and `key.pem` of a folder and checks that they fit together and are valid today.
    pub fn load(folder: &Path) -> Result<Self, TlsError> {
        Self::load_at(folder, UnixTime::now())
    }

    /// The same for another day.
    pub(super) fn load_at(folder: &Path, now: UnixTime) -> Result<Self, TlsError> {
        // Looked at first: what changes from here on is read again.
        let stamp = Stamp::of(folder);
        let inner = Arc::new(Inner::load(folder, now)?);
        let identity = inner.identity.clone();
        let kept = Arc::new(Mutex::new(Kept { inner, stamp, refused: None }));
        Ok(Self { folder: folder.to_path_buf(), identity, kept })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Every change leaves it whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be used for a new connection.
    fn current(&self) -> Arc<Inner> {
        let stamp = Stamp::of(&self.folder);
        let mut kept = self.kept();
        if stamp != kept.stamp {
            match Inner::load(&self.folder, UnixTime::now()).and_then(|inner| self.check_same(inner)) {
                Ok(inner) => {
                    tracing::info!(folder = %self.folder.display(), "renewed certificates are used from now on");
                    (kept.inner, kept.stamp, kept.refused) = (Arc::new(inner), stamp, None);
                }
                Err(error) if kept.refused != Some(stamp) => {
                    tracing::warn!("changed certificates are not used, those before are: {error}");
                    kept.refused = Some(stamp);
                }
                Err(_) => {}
            }
        }
        kept.inner.clone()
    }

    /// Refuses to become somebody else.
    fn check_same(&self, inner: Inner) -> Result<Inner, TlsError> {
        if inner.identity == self.identity {
            return Ok(inner);
        }
        let (found, was) = (inner.identity.to_string(), self.identity.to_string());
        Err(TlsError::Another { path: self.folder.join("cert.pem"), found, was })
    }

    /// Whom the certificate is for.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Refuses a certificate that is for another role than the process plays.
    pub fn check_role(&self, role: Role) -> Result<(), TlsError> {
        let identity = &self.identity;
        if identity.role == role || identity.role == Role::Coordinator {
            return Ok(());
        }
        let path = self.folder.join("cert.pem");
        Err(TlsError::Role { path, identity: identity.to_string(), needs: role.as_str() })
    }

    /// Refuses a certificate that does not name the host others connect to.
    pub fn check_host(&self, host: &str) -> Result<(), TlsError> {
        let inner = self.current();
        let named = webpki::EndEntityCert::try_from(&inner.certificate).ok().zip(server_name(host));
        if named.is_some_and(|(leaf, name)| leaf.verify_is_valid_for_subject_name(&name).is_ok()) {
            return Ok(());
        }
        Err(TlsError::Host { path: self.folder.join("cert.pem"), host: host.into() })
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        self.current().server.clone()
    }

    /// Opens connections to servers that play one of these roles in this cluster.
    pub(super) fn connector(&self, roles: &'static [Role]) -> Connector {
        let credentials = self.clone();
        Connector::new(move || credentials.current().client(roles))
    }
}

impl Inner {
    fn load(folder: &Path, now: UnixTime) -> Result<Self, TlsError> {
        let [ca, certificate, key] = FILES.map(|name| folder.join(name));
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
        Ok(Self { identity, certificate: leaf, key: held, provider, roots, server })
    }

    fn client(&self, roles: &'static [Role]) -> Result<Arc<ClientConfig>, Error> {
        let trust = WebPkiServerVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let verifier: Arc<dyn ServerCertVerifier> =
            Arc::new(super::client::Verifier::new(trust, self.identity.cluster.clone(), roles));
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.key.clone())));
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
