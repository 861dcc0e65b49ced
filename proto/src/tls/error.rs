//! What can be wrong with a process's own certificates, and what would be right.

use std::path::PathBuf;

/// Why a process does not start with the certificates it was given, or without any.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// An address that others can reach, without TLS.
    #[error(
        "{what} is not a loopback address, and without TLS the token and every job would cross the network in clear: \
         make certificates with `cairn certs init` and `cairn certs issue` and give their folder with --tls, or use \
         127.0.0.1; --insecure-plaintext goes without, on a network that you trust altogether"
    )]
    Exposed {
        /// The flag and the address.
        what: String,
    },
    /// TLS and plaintext at once.
    #[error("--tls (or CAIRN_TLS) and --insecure-plaintext exclude each other: leave one out")]
    Both,
    /// A file cannot be read.
    #[error(
        "{path}: {source}; --tls needs a folder with ca.pem, cert.pem and key.pem, which `cairn certs issue` makes"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Others can read a private key.
    #[error("the private key {path} has mode {mode:04o}, so others can read it; run: chmod 600 {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A file does not hold what it should.
    #[error("{path} does not hold {what} in PEM, as `cairn certs` writes it")]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// Key and certificate do not belong together.
    #[error("the key {key} is not that of the certificate {certificate}: take both from one run of `cairn certs`")]
    Mismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The certificate is of another CA.
    #[error("the certificate {certificate} was not signed by the CA {ca}: take both from one `cairn certs issue`")]
    OtherCa {
        /// The certificate's file.
        certificate: PathBuf,
        /// The CA's file.
        ca: PathBuf,
    },
    /// The certificate is too old.
    #[error("the certificate {path} expired on {on}: issue a new one with `cairn certs issue`")]
    Expired {
        /// The file.
        path: PathBuf,
        /// The last day.
        on: String,
    },
    /// The certificate is not valid yet.
    #[error("the certificate {path} is valid from {from} only: see that this machine's clock is right")]
    NotYet {
        /// The file.
        path: PathBuf,
        /// The first day.
        from: String,
    },
    /// The certificate names nobody.
    #[error("the certificate {path} names no cluster, role and name: use one that `cairn certs issue` made")]
    Anonymous {
        /// The file.
        path: PathBuf,
    },
    /// The certificate is for something else.
    #[error("the certificate {path} is for {identity}, and this process needs one with --role {needs}")]
    Role {
        /// The file.
        path: PathBuf,
        /// Whom it is for.
        identity: String,
        /// The role it should be for.
        needs: &'static str,
    },
    /// The certificate does not name an address that others reach this process by.
    #[error("the certificate {path} does not name {host}, so nobody could connect: issue one with --host {host}")]
    Host {
        /// The file.
        path: PathBuf,
        /// The address.
        host: String,
    },
    /// The files were replaced by somebody else's.
    #[error("the certificate {path} is for {found} now, and this process began as {was}: restart it if that is meant")]
    Another {
        /// The file.
        path: PathBuf,
        /// Whom it is for.
        found: String,
        /// Whom the one before was for.
        was: String,
    },
    /// There is nothing to issue with.
    #[error("{folder} holds no authority: make one with `cairn certs init {folder}`")]
    NoAuthority {
        /// The folder.
        folder: PathBuf,
    },
    /// Something is there already.
    #[error("{path} exists already, and nothing is written over it: name another folder, or move it away")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file or folder cannot be written.
    #[error("{path} cannot be written: {source}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A certificate cannot be made.
    #[error("the certificate cannot be made: {0}")]
    Signing(String),
    /// Anything else.
    #[error("{path} cannot be used for TLS: {reason}")]
    Unusable {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}
