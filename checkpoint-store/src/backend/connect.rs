//! The client of a bucket: Amazon S3 and its likes, Google Cloud Storage, Azure.
//!
//! Settings come from the cloud's usual environment variables, and options of the same names (in lower case) go before
//! them. The bucket is the URL's and conditional writes are always on: what would change either is refused, as is a
//! server spoken to in the clear off this machine, unless that was asked for.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{BackoffConfig, Error, ObjectStore, RetryConfig};
use url::{Host, Url};

use super::limits::{Limits, NAMES, nearest, unknown};
use crate::error::StoreError;

/// The longest a connection may take to be made.
const CONNECT: &str = "5s";

/// Names worth suggesting that all clouds share.
const SHARED: [&str; 8] = [
    "allow_http",
    "connect_timeout",
    "proxy_url",
    "proxy_excludes",
    "timeout",
    "user_agent",
    "skip_signature",
    "pool_max_idle_per_host",
];
const S3: [&str; 18] = [
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "aws_region",
    "aws_default_region",
    "aws_endpoint",
    "aws_endpoint_url",
    "aws_endpoint_url_s3",
    "aws_virtual_hosted_style_request",
    "aws_checksum_algorithm",
    "aws_unsigned_payload",
    "aws_skip_signature",
    "aws_allow_http",
    "aws_role_arn",
    "aws_web_identity_token_file",
    "aws_server_side_encryption",
    "aws_sse_kms_key_id",
    "aws_request_payer",
];
const GS: [&str; 6] = [
    "google_service_account",
    "google_service_account_key",
    "google_application_credentials",
    "google_bearer_token",
    "google_base_url",
    "google_skip_signature",
];
const AZ: [&str; 12] = [
    "azure_storage_account_name",
    "azure_storage_account_key",
    "azure_storage_sas_token",
    "azure_storage_token",
    "azure_storage_endpoint",
    "azure_storage_client_id",
    "azure_storage_client_secret",
    "azure_storage_tenant_id",
    "azure_federated_token_file",
    "azure_storage_use_emulator",
    "azure_use_azure_cli",
    "azure_skip_signature",
];

/// Builds the client of a bucket from the environment and the given options, of which those about limits are taken out
/// and set.
pub(super) fn connect(
    scheme: &str,
    url: &Url,
    options: &[(&str, &str)],
    limits: &mut Limits,
) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let mut rest = vec![];
    for (name, value) in options {
        if !limits.set(name, value)? {
            rest.push((name.to_ascii_lowercase(), *value));
        }
    }
    let wrong = |e: Error| StoreError::refused(format!("opening the store {url}"), e);
    let bucket = url.host_str().unwrap_or_default();
    let retry = RetryConfig {
        backoff: BackoffConfig { max_backoff: Duration::from_secs(5), ..BackoffConfig::default() },
        max_retries: limits.retries as usize,
        retry_timeout: limits.request_timeout,
    };
    let timeout = format!("{}s", limits.request_timeout.as_secs());
    let given = Given { scheme, timeout: &timeout, options: &rest };
    Ok(match scheme {
        "gs" => {
            let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
            for (key, value) in
                given.settings::<GoogleConfigKey>(&GS, "GOOGLE", |key| *key == GoogleConfigKey::Bucket)?
            {
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_retry(retry).build().map_err(wrong)?)
        }
        "az" => {
            let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket);
            let fixed = |key: &AzureConfigKey| *key == AzureConfigKey::ContainerName;
            for (key, value) in given.settings(&AZ, "AZURE", fixed)? {
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_retry(retry).build().map_err(wrong)?)
        }
        _ => {
            let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
            let fixed =
                |key: &AmazonS3ConfigKey| matches!(key, AmazonS3ConfigKey::Bucket | AmazonS3ConfigKey::ConditionalPut);
            for (key, value) in given.settings(&S3, "AWS", fixed)? {
                builder = builder.with_config(key, value);
            }
            let endpoint = builder.get_config_value(&AmazonS3ConfigKey::S3Endpoint);
            if let Some(endpoint) = endpoint.or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint)) {
                builder = builder.with_allow_http(in_the_clear(&endpoint, &given)?);
            }
            let builder = builder.with_conditional_put(S3ConditionalPut::ETagMatch).with_retry(retry);
            Arc::new(builder.build().map_err(wrong)?)
        }
    })
}

/// What is set beside the environment.
struct Given<'a> {
    scheme: &'a str,
    timeout: &'a str,
    options: &'a [(String, &'a str)],
}

impl<'a> Given<'a> {
    /// Our defaults, where the environment has no say, and then the options. `fixed` are the keys nobody may set.
    fn settings<Key: std::str::FromStr<Err = Error>>(
        &self,
        known: &[&str],
        prefix: &str,
        fixed: impl Fn(&Key) -> bool,
    ) -> Result<Vec<(Key, &'a str)>, StoreError> {
        let mut settings = vec![];
        for (name, value) in [("timeout", self.timeout), ("connect_timeout", CONNECT)] {
            let variable = format!("{prefix}_{}", name.to_ascii_uppercase());
            if std::env::var_os(variable).is_none()
                && let Ok(key) = name.parse()
            {
                settings.push((key, value));
            }
        }
        for (name, value) in self.options {
            let Ok(key) = name.parse() else {
                let all = [known, &SHARED, &NAMES].concat();
                let what = format!("store option {name:?} of {}://", self.scheme);
                return Err(StoreError::Input(unknown(&what, nearest(name, &all))));
            };
            if fixed(&key) {
                let why = "the bucket is the URL's, and conditional writes are always on";
                return Err(StoreError::Input(format!("store option {name:?} cannot be set: {why}")));
            }
            settings.push((key, *value));
        }
        Ok(settings)
    }

    /// What an option or else the environment says of plain HTTP.
    fn allows_http(&self) -> Option<bool> {
        let named = |(name, _): &&(String, &str)| name == "aws_allow_http" || name == "allow_http";
        let option = self.options.iter().rev().find(named).map(|(_, value)| (*value).to_owned());
        let value = option.or_else(|| std::env::var("AWS_ALLOW_HTTP").ok())?;
        Some(matches!(value.to_ascii_lowercase().as_str(), "true" | "1" | "yes" | "on"))
    }
}

/// Whether the endpoint may be spoken to without TLS: on this machine, or where the operator says so.
fn in_the_clear(endpoint: &str, given: &Given<'_>) -> Result<bool, StoreError> {
    let wrong = |why: &str| StoreError::Input(format!("the endpoint {endpoint:?} {why}"));
    let url = Url::parse(endpoint).map_err(|e| wrong(&format!("is not a URL ({e}); expected https://host:port")))?;
    if url.scheme() != "http" {
        return Ok(given.allows_http().unwrap_or(false));
    }
    let here = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    match given.allows_http() {
        Some(true) => Ok(true),
        None if here => Ok(true),
        _ => Err(wrong("is not encrypted and not on this machine; use https://, or set AWS_ALLOW_HTTP=true")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(url: &str, options: &[(&str, &str)]) -> Result<Limits, StoreError> {
        let mut limits = Limits::default();
        let parsed = Url::parse(url).unwrap();
        connect(url.split(':').next().unwrap(), &parsed, options, &mut limits).map(|_| limits)
    }

    fn message(url: &str, options: &[(&str, &str)]) -> String {
        open(url, options).unwrap_err().to_string()
    }

    #[test]
    fn unknown_options_are_answered_with_the_nearest() {
        assert!(message("s3://b/x", &[("aws_endpiont", "x")]).contains("did you mean aws_endpoint"));
        assert!(message("gs://b/x", &[("google_service_acount", "x")]).contains("did you mean google_service_account"));
        assert!(message("az://b/x", &[("azure_storage_acount_name", "x")]).contains("azure_storage_account_name"));
        assert!(message("s3://b/x", &[("request_timout", "9")]).contains("did you mean request_timeout"));
        assert!(message("s3://b/x", &[("qqq", "9")]).contains("docs/store.md"));
    }

    #[test]
    fn what_would_undo_the_stores_promises_is_refused() {
        assert!(message("s3://b/x", &[("aws_bucket", "other")]).contains("the bucket is the URL's"));
        assert!(message("gs://b/x", &[("bucket", "other")]).contains("the bucket is the URL's"));
        assert!(message("az://b/x", &[("container_name", "other")]).contains("the bucket is the URL's"));
        assert!(message("s3://b/x", &[("aws_conditional_put", "disabled")]).contains("conditional writes"));
        let clear = ("aws_endpoint", "http://10.0.0.1:9000");
        assert!(message("s3://b/x", &[clear]).contains("AWS_ALLOW_HTTP"));
        assert!(message("s3://b/x", &[("aws_endpoint", "10.0.0.1")]).contains("is not a URL"));
    }

    #[test]
    fn the_usual_options_are_taken() {
        let keys = [("aws_access_key_id", "a"), ("aws_secret_access_key", "b"), ("aws_region", "r")];
        let local = [&keys[..], &[("aws_endpoint", "http://127.0.0.1:9"), ("retries", "2")]].concat();
        assert_eq!(open("s3://b/x", &local).unwrap().retries, 2);
        let remote = [("aws_endpoint", "http://10.0.0.1:9"), ("aws_allow_http", "true")];
        let rest = [("aws_checksum_algorithm", "sha256"), ("aws_virtual_hosted_style_request", "false")];
        open("s3://b/x", &[&keys[..], &remote, &rest].concat()).unwrap();
        open("gs://b/x", &[("google_skip_signature", "true"), ("part_mib", "8")]).unwrap();
        let account = [("azure_storage_account_name", "n"), ("azure_storage_account_key", "a2V5")];
        open("az://b/x", &account).unwrap();
    }
}
