//! TLS failures in words: what is likely wrong, and whether trying again can mend it.

use std::time::Duration;

use time::OffsetDateTime;
use tokio_rustls::rustls::{AlertDescription, CertificateError, Error};

/// When a certificate is out of its time.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Age {
    /// Since this day.
    Expired(String),
    /// Until this day.
    NotYet(String),
}

/// Whether an error is that a certificate is out of its time.
pub(super) fn age(error: &Error) -> Option<Age> {
    let Error::InvalidCertificate(error) = error else { return None };
    match error {
        CertificateError::ExpiredContext { not_after, .. } => Some(Age::Expired(day(not_after.as_secs()))),
        CertificateError::Expired => Some(Age::Expired("an unknown day".into())),
        CertificateError::NotValidYetContext { not_before, .. } => Some(Age::NotYet(day(not_before.as_secs()))),
        CertificateError::NotValidYet => Some(Age::NotYet("an unknown day".into())),
        _ => None,
    }
}

/// The day of a time, as year-month-day.
fn day(seconds: u64) -> String {
    let time = OffsetDateTime::UNIX_EPOCH.checked_add(time::Duration::seconds(seconds.min(1 << 40) as i64));
    time.map_or_else(|| "a day beyond the calendar".into(), |time| format!("{} (UTC)", time.date()))
}

/// Why a client's handshake failed, told from the client's side, and whether it is settled: certificates disagree, and
/// a person must act.
pub(super) fn of_client(error: &Error, host: &str) -> (bool, String) {
    match (age(error), error) {
        (Some(Age::Expired(on)), _) => (true, format!("its certificate expired on {on}: issue it a new one")),
        (Some(Age::NotYet(from)), _) => {
            (true, format!("its certificate is valid from {from} only: compare the clocks of both machines"))
        }
        (None, Error::AlertReceived(alert)) => of_alert(*alert),
        (None, Error::InvalidCertificate(error)) => (true, of_server_certificate(error, host)),
        (None, Error::NoCertificatesPresented) => (true, "it shows no certificate: start it with --tls".into()),
        (None, Error::InvalidMessage(_)) => (false, "it does not speak TLS: start it with --tls as well".into()),
        (None, error) => (false, format!("the TLS handshake failed: {error}")),
    }
}

fn of_server_certificate(error: &CertificateError, host: &str) -> String {
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is of another cluster: it was not signed by the CA in this process's ca.pem".into()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("its certificate does not name {host}: issue it one with --host {host}")
        }
        // The verifier's own words.
        CertificateError::Other(other) => other.0.to_string(),
        error => format!("its certificate is not accepted: {error}"),
    }
}

/// What a server means by an alert.
fn of_alert(alert: AlertDescription) -> (bool, String) {
    let words = match alert {
        AlertDescription::CertificateRequired => "it asks for a certificate and was shown none: use --tls",
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it refused this process's certificate as one of another cluster: its ca.pem lacks the CA that signed it"
        }
        AlertDescription::CertificateExpired => {
            "it refused this process's certificate as expired or not valid yet: issue a new one, and compare the clocks"
        }
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied => {
            return (
                true,
                format!("it refused this process's certificate ({alert:?}): issue one with `cairn certs issue`"),
            );
        }
        alert => return (false, format!("it broke the TLS handshake off ({alert:?})")),
    };
    (true, words.into())
}

/// Why a server turned a client away, for the server's log; `None` if it was no client of TLS at all.
pub(super) fn of_server(error: &Error) -> Option<String> {
    match (age(error), error) {
        (Some(Age::Expired(on)), _) => Some(format!("its certificate expired on {on}")),
        (Some(Age::NotYet(from)), _) => Some(format!("its certificate is valid from {from} only")),
        (None, Error::NoCertificatesPresented) => Some("it shows no certificate".into()),
        (None, Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            Some("its certificate is of another cluster".into())
        }
        (None, Error::AlertReceived(alert)) => {
            Some(format!("it does not accept this server's certificate ({alert:?})"))
        }
        (None, Error::InvalidMessage(_)) => None,
        (None, error) => Some(error.to_string()),
    }
}

/// A limit in words.
pub(super) fn seconds(limit: Duration) -> String {
    format!("{} s", limit.as_secs())
}
