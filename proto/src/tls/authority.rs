//! A cluster's certificate authority, as `cairn certs` keeps it in a folder: made, read back, and used to issue.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::str::FromStr;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use time::{Date, Duration, OffsetDateTime};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

use super::files::{PRIVATE, PUBLIC, read_bounded, read_private, write_new};
use super::{Identity, TlsError, server_name};
use crate::ids::ClusterName;

/// The files of an authority, and those of what it issues.
const CA_FILES: [&str; 2] = ["ca.pem", "ca-key.pem"];
/// Days until an authority expires.
const CA_DAYS: i32 = 3650;
/// How far the clocks of a cluster may differ.
const SKEW: Duration = Duration::hours(1);

/// Where a part is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// By address.
    Address(IpAddr),
    /// By name.
    Name(String),
}

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text.parse(), server_name(text)) {
            (Ok(address), _) => Ok(Self::Address(address)),
            (Err(_), Some(_)) => Ok(Self::Name(text.to_ascii_lowercase())),
            (Err(_), None) => Err(format!("{text:?} is neither an IP address nor a host name without a port")),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// The authority, with its key.
pub struct Authority {
    cluster: ClusterName,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

fn signing(error: rcgen::Error) -> TlsError {
    TlsError::Signing(error.to_string())
}

impl Authority {
    /// Makes a new one in a folder, which must hold none.
    pub fn create(folder: &Path, cluster: &ClusterName) -> Result<Self, TlsError> {
        let [certificate_file, key_file] = CA_FILES.map(|name| folder.join(name));
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(signing)?;
        let params = ca_params(cluster, &pair)?;
        let certificate = params.self_signed(&pair).map_err(signing)?.pem();
        write_new(folder, &[(&key_file, PRIVATE, &pair.serialize_pem()), (&certificate_file, PUBLIC, &certificate)])?;
        Ok(Self { cluster: cluster.clone(), certificate, issuer: Issuer::new(params, pair) })
    }

    /// Reads one that [`Authority::create`] made.
    pub fn read(folder: &Path) -> Result<Self, TlsError> {
        let [certificate_file, key_file] = CA_FILES.map(|name| folder.join(name));
        if !certificate_file.exists() && !key_file.exists() {
            return Err(TlsError::NoAuthority { folder: folder.into() });
        }
        let not_pem = |path: &Path, what| TlsError::NotPem { path: path.into(), what };
        let key = read_private(&key_file)?;
        let certificate = read_bounded(&certificate_file)?;
        let pair = KeyPair::from_pem(&key).map_err(|_| not_pem(&key_file, "an authority's key"))?;
        let no_certificate = || not_pem(&certificate_file, "an authority's certificate");
        let der = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|_| no_certificate())?;
        let cluster = Identity::cluster_of_ca(&der).ok_or_else(no_certificate)?;
        let anchor = webpki::anchor_from_trusted_cert(&der).map_err(|_| no_certificate())?;
        // An anchor's key is the inside of the sequence that the pair writes in full.
        if !pair.subject_public_key_info().ends_with(&anchor.subject_public_key_info) {
            return Err(TlsError::Mismatch { key: key_file, certificate: certificate_file });
        }
        let issuer = Issuer::new(ca_params(&cluster, &pair)?, pair);
        Ok(Self { cluster, certificate, issuer })
    }

    /// The cluster it is of.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// Issues a certificate, good for some days from now, and writes what its holder needs into a folder, which must
    /// hold none: `ca.pem`, `cert.pem` and `key.pem`, the key readable by its owner only. Returns its last day.
    pub fn issue(&self, folder: &Path, identity: &Identity, hosts: &[Host], days: i32) -> Result<Date, TlsError> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(signing)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished(&format!("{} {}", identity.role, identity.name));
        params.subject_alt_names = vec![SanType::URI(text(&identity.to_string())?)];
        for host in hosts {
            params.subject_alt_names.push(match host {
                Host::Address(address) => SanType::IpAddress(*address),
                Host::Name(name) => SanType::DnsName(text(name)?),
            });
        }
        (params.not_before, params.not_after) = validity(days)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let last = params.not_after.date();
        let signed = params.signed_by(&pair, &self.issuer).map_err(signing)?.pem();
        let [ca, certificate, key] = ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name));
        let secret = pair.serialize_pem();
        write_new(
            folder,
            &[(&key, PRIVATE, &secret), (&certificate, PUBLIC, &signed), (&ca, PUBLIC, &self.certificate)],
        )?;
        Ok(last)
    }
}

/// What an authority's certificate says: its names are a function of the cluster and the key, so that they can be made
/// again from the files to issue with.
fn ca_params(cluster: &ClusterName, pair: &KeyPair) -> Result<CertificateParams, TlsError> {
    // Two clusters of one name differ in this, so that a certificate of the other is not taken for a forged one.
    let mark: String = pair.public_key_raw().iter().rev().take(4).map(|byte| format!("{byte:02x}")).collect();
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished(&format!("Cairn CA of {cluster} {mark}"));
    params.subject_alt_names = vec![SanType::URI(text(&Identity::ca_name(cluster))?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = validity(CA_DAYS)?;
    Ok(params)
}

fn distinguished(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn text(text: &str) -> Result<Ia5String, TlsError> {
    Ia5String::try_from(text).map_err(signing)
}

/// From now until some days later; a past day makes what has expired already.
fn validity(days: i32) -> Result<(OffsetDateTime, OffsetDateTime), TlsError> {
    let now = OffsetDateTime::now_utc();
    let end = now.checked_add(Duration::days(days.into()));
    let end = end.ok_or_else(|| TlsError::Signing(format!("{days} days from now is beyond the calendar")))?;
    Ok((now.min(end) - SKEW, end))
}
