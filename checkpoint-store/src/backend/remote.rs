//! A store in a bucket, or in memory, through the `object_store` crate.
//!
//! Requests are retried with backoff and bounded in time. The conditional create needs more care than a retry: the
//! answer to a request that took effect may be lost, and its repetition then says "already exists". So every answer but
//! a plain success is settled by reading the object back.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, Error, ObjectStore, ObjectStoreExt, PutMode, PutPayload, RetryConfig,
};
use url::Url;

use super::{Create, Listed};
use crate::error::StoreError;

/// Objects up to this size are put in one request.
const SINGLE_PUT: u64 = 16 << 20;
/// Smallest part of a multipart upload; at most 10,000 parts are allowed by S3.
const MIN_PART: u64 = 16 << 20;
/// Parts in flight at once for one object.
const PARTS_IN_FLIGHT: usize = 4;
/// Attempts at a create whose outcome is not known.
const CREATE_ATTEMPTS: u32 = 4;
/// The longest any one operation of the store may take, retries included; an upload's parts count one by one.
const DEADLINE: Duration = Duration::from_mins(2);

#[derive(Debug)]
pub(super) struct RemoteBackend {
    url: String,
    prefix: String,
    client: Arc<dyn ObjectStore>,
}

/// Builds the client of a bucket from the environment and the given options.
pub(super) fn connect(scheme: &str, url: &Url, options: &[(&str, &str)]) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let retry = RetryConfig {
        backoff: BackoffConfig { max_backoff: Duration::from_secs(5), ..BackoffConfig::default() },
        max_retries: 6,
        retry_timeout: Duration::from_mins(1),
    };
    let client = ClientOptions::new()
        .with_timeout(Duration::from_mins(1))
        .with_connect_timeout(Duration::from_secs(5))
        .with_allow_http(true);
    let bucket = url.host_str().unwrap_or_default();
    let wrong = |e: Error| StoreError::refused(format!("opening the store {url}"), e);
    let option = |key: &str, e: Error| StoreError::refused(format!("store option {key:?}"), e);
    Ok(match scheme {
        "gs" => {
            let mut builder =
                GoogleCloudStorageBuilder::from_env().with_client_options(client).with_bucket_name(bucket);
            for (key, value) in options {
                builder = builder.with_config(key.parse().map_err(|e| option(key, e))?, *value);
            }
            Arc::new(builder.with_retry(retry).build().map_err(wrong)?)
        }
        "az" => {
            let mut builder = MicrosoftAzureBuilder::from_env().with_client_options(client).with_container_name(bucket);
            for (key, value) in options {
                builder = builder.with_config(key.parse().map_err(|e| option(key, e))?, *value);
            }
            Arc::new(builder.with_retry(retry).build().map_err(wrong)?)
        }
        _ => {
            let mut builder = AmazonS3Builder::from_env().with_client_options(client).with_bucket_name(bucket);
            for (key, value) in options {
                builder = builder.with_config(key.parse().map_err(|e| option(key, e))?, *value);
            }
            let builder = builder.with_conditional_put(S3ConditionalPut::ETagMatch).with_retry(retry);
            Arc::new(builder.build().map_err(wrong)?)
        }
    })
}

impl RemoteBackend {
    pub(super) fn new(url: &str, prefix: &str, client: Arc<dyn ObjectStore>) -> Self {
        Self { url: url.trim_end_matches('/').to_owned(), prefix: prefix.to_owned(), client }
    }

    fn path(&self, path: &str) -> Path {
        if self.prefix.is_empty() { Path::from(path) } else { Path::from(format!("{}/{path}", self.prefix)) }
    }

    /// The path below the store's root.
    fn strip(&self, path: &Path) -> String {
        let text = path.as_ref();
        let below = text.strip_prefix(Path::from(self.prefix.as_str()).as_ref()).unwrap_or(text);
        below.trim_start_matches('/').to_owned()
    }

    /// Bounds an operation in time and sorts its error.
    async fn within<T>(
        &self,
        doing: &str,
        path: &str,
        operation: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, StoreError> {
        let what = || format!("{doing} {}/{path}", self.url);
        match tokio::time::timeout(DEADLINE, operation).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(e)) => Err(self.sort(path, what(), e)),
            Err(e) => Err(StoreError::unavailable(what(), e)),
        }
    }

    fn sort(&self, path: &str, what: String, e: Error) -> StoreError {
        match e {
            Error::NotFound { .. } => StoreError::NotFound { path: path.to_owned(), url: self.url.clone() },
            Error::Generic { .. } | Error::JoinError { .. } | Error::Precondition { .. } => {
                StoreError::unavailable(what, e)
            }
            _ => StoreError::refused(what, e),
        }
    }

    /// A put that finds nothing there has found no bucket.
    fn put_failed(&self, e: StoreError) -> StoreError {
        match e {
            StoreError::NotFound { .. } => StoreError::Input(format!(
                "the store {} cannot be written to: its bucket or container does not exist; create it first",
                self.url
            )),
            other => other,
        }
    }

    pub(super) async fn create(&self, path: &str, bytes: Bytes) -> Result<Create, StoreError> {
        let location = self.path(path);
        let mut pause = Duration::from_millis(50);
        let mut attempt = 1;
        loop {
            let put = self.client.put_opts(&location, PutPayload::from(bytes.clone()), PutMode::Create.into());
            let unclear: crate::error::Source = match tokio::time::timeout(DEADLINE, put).await {
                Ok(Ok(_)) => return Ok(Create::Created),
                Ok(Err(
                    e @ (Error::AlreadyExists { .. }
                    | Error::Precondition { .. }
                    | Error::Generic { .. }
                    | Error::JoinError { .. }),
                )) => e.into(),
                Ok(Err(e)) => return Err(self.put_failed(self.sort(path, format!("creating {}/{path}", self.url), e))),
                Err(e) => e.into(),
            };
            match self.get(path, bytes.len() as u64).await {
                Ok((_, Some(found))) if found == bytes => return Ok(Create::Created),
                Ok(_) => return Ok(Create::AlreadyExists),
                // Not there: the request failed, or is still under way. Repeating it settles which.
                Err(_) if attempt < CREATE_ATTEMPTS => {}
                Err(_) => return Err(StoreError::Indeterminate { path: path.to_owned(), source: unclear }),
            }
            tokio::time::sleep(pause).await;
            pause *= 4;
            attempt += 1;
        }
    }

    pub(super) async fn upload(&self, path: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let location = self.path(path);
        let total: u64 = parts.iter().map(|p| p.len() as u64).sum();
        if total <= SINGLE_PUT {
            let payload: PutPayload = parts.into_iter().collect();
            let put = self.within("uploading", path, self.client.put(&location, payload)).await;
            return put.map(|_| ()).map_err(|e| self.put_failed(e));
        }
        let upload = self.within("uploading", path, self.client.put_multipart(&location)).await;
        let mut upload = upload.map_err(|e| self.put_failed(e))?;
        let part_size = MIN_PART.max(total.div_ceil(9_000));
        let mut sent = Ok(());
        let mut flight = FuturesUnordered::new();
        for payload in cut(parts, part_size) {
            if flight.len() == PARTS_IN_FLIGHT {
                sent = flight.next().await.unwrap_or(Ok(()));
            }
            if sent.is_err() {
                break;
            }
            flight.push(self.within("uploading a part of", path, upload.put_part(payload)));
        }
        if sent.is_ok() {
            sent = flight.try_collect::<()>().await;
        }
        if let Err(e) = sent {
            // The error that matters is the first one; an upload left open costs space until the bucket expires it.
            let _ = self.within("aborting the upload of", path, upload.abort()).await;
            return Err(e);
        }
        self.within("completing", path, upload.complete()).await.map(|_| ())
    }

    pub(super) async fn get(&self, path: &str, limit: u64) -> Result<(u64, Option<Bytes>), StoreError> {
        let location = self.path(path);
        let read = async {
            let result = self.client.get(&location).await?;
            let size = result.meta.size;
            if size > limit { Ok((size, None)) } else { Ok((size, Some(result.bytes().await?))) }
        };
        self.within("reading", path, read).await
    }

    pub(super) async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let location = self.path(path);
        let read = self.within("reading", path, self.client.get_range(&location, range.clone())).await;
        match read {
            Err(e @ (StoreError::Unavailable { .. } | StoreError::Refused { .. })) => {
                // Servers word an unsatisfiable range differently; the size tells.
                match self.head(path).await {
                    Ok(size) if size < range.end => Err(StoreError::Corrupt(format!(
                        "{path} is short: it has {size} bytes, {}..{} were asked for",
                        range.start, range.end
                    ))),
                    _ => Err(e),
                }
            }
            other => other,
        }
    }

    pub(super) async fn head(&self, path: &str) -> Result<u64, StoreError> {
        let location = self.path(path);
        self.within("reading", path, self.client.head(&location)).await.map(|meta| meta.size)
    }

    pub(super) async fn list(
        &self,
        folder: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let location = self.path(folder);
        let stream = match after {
            Some(after) => self.client.list_with_offset(Some(&location), &self.path(after)),
            None => self.client.list(Some(&location)),
        };
        let found = stream.take(limit).try_collect::<Vec<_>>();
        let found = self.within("listing", folder, found).await?;
        Ok(found.into_iter().map(|m| Listed { path: self.strip(&m.location), bytes: m.size }).collect())
    }

    pub(super) async fn list_folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let location = self.path(folder);
        let found = self.within("listing", folder, self.client.list_with_delimiter(Some(&location))).await?;
        let names = found.common_prefixes.iter().filter_map(|p| p.filename().map(str::to_owned));
        Ok(names.collect())
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let location = self.path(path);
        match self.within("deleting", path, self.client.delete(&location)).await {
            Err(StoreError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }
}

/// Cuts a sequence of buffers into payloads of `size` bytes, the last one shorter, without copying.
fn cut(parts: Vec<Bytes>, size: u64) -> Vec<PutPayload> {
    let (mut out, mut current, mut room) = (vec![], vec![], size as usize);
    for mut part in parts {
        while !part.is_empty() {
            let piece = part.split_to(part.len().min(room));
            room -= piece.len();
            current.push(piece);
            if room == 0 {
                out.push(std::mem::take(&mut current).into_iter().collect());
                room = size as usize;
            }
        }
    }
    if !current.is_empty() {
        out.push(current.into_iter().collect());
    }
    out
}
