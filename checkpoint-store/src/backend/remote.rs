//! A store in a bucket, or in memory, through the `object_store` crate.
//!
//! Requests are retried with backoff, bounded in time and in number at once (`limits`). The conditional create needs
//! more care than a retry: the answer to a request that took effect may be lost, and its repetition then says "already
//! exists". So every answer but a plain success is settled by reading the object back. An upload in parts is repeated
//! as a whole, and a completion without an answer is settled by looking.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use tokio::sync::Semaphore;

use super::limits::Limits;
use super::{Create, Listed};
use crate::error::{Kind, Source, StoreError};

/// Parts in flight at once for one object.
const PARTS_IN_FLIGHT: usize = 4;
/// Most parts of one object; S3 takes 10,000.
const MOST_PARTS: u64 = 9_000;
/// Attempts at a create whose outcome is not known, at least.
const CREATE_ATTEMPTS: u32 = 4;

#[derive(Debug)]
pub(super) struct RemoteBackend {
    url: String,
    prefix: String,
    client: Arc<dyn ObjectStore>,
    /// The longest one call of the client may take.
    patience: Duration,
    /// How often a call is made whose failure says nothing.
    attempts: u32,
    part_bytes: u64,
    requests: Semaphore,
}

impl RemoteBackend {
    /// A client that repeats nothing itself.
    pub(super) fn new(url: &str, prefix: &str, client: Arc<dyn ObjectStore>, limits: &Limits) -> Self {
        Self {
            url: url.trim_end_matches('/').to_owned(),
            prefix: prefix.to_owned(),
            client,
            patience: limits.request_timeout,
            attempts: limits.retries + 1,
            part_bytes: limits.part_bytes.max(1),
            requests: Semaphore::new(limits.requests_in_flight.clamp(1, Semaphore::MAX_PERMITS)),
        }
    }

    /// A client that repeats its requests: each call is made once here, and may take as long as the repetitions.
    pub(super) fn over_http(url: &str, prefix: &str, client: Arc<dyn ObjectStore>, limits: &Limits) -> Self {
        let patience = limits.request_timeout.saturating_mul(2);
        Self { patience, attempts: 1, ..Self::new(url, prefix, client, limits) }
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

    /// Makes a call whose repetition does no harm: bounded in time and in number, its error sorted.
    async fn within<T, F>(&self, doing: &str, path: &str, call: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut attempt = 1;
        loop {
            match self.once(doing, path, call()).await {
                Err(e) if e.kind() == Kind::Retry && attempt < self.attempts => {
                    tokio::time::sleep(Limits::pause(attempt)).await;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    /// Makes a call once, bounded in time, and sorts its error.
    async fn once<T>(
        &self,
        doing: &str,
        path: &str,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, StoreError> {
        let what = || format!("{doing} {}/{path}", self.url);
        match self.bounded(call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(e)) => Err(self.sort(path, what(), e)),
            Err(late) => Err(StoreError::unavailable(what(), late)),
        }
    }

    /// Waits for a free place among the requests in flight, which others give back in bounded time, then for the call.
    async fn bounded<T>(&self, call: impl Future<Output = T>) -> Result<T, Source> {
        let _place = self.requests.acquire().await.map_err(Source::from)?;
        tokio::time::timeout(self.patience, call).await.map_err(Source::from)
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
        let mut attempt = 1;
        loop {
            let put = self.client.put_opts(&location, PutPayload::from(bytes.clone()), PutMode::Create.into());
            let unclear: Source = match self.bounded(put).await {
                Ok(Ok(_)) => return Ok(Create::Created),
                Ok(Err(
                    e @ (Error::AlreadyExists { .. }
                    | Error::Precondition { .. }
                    | Error::Generic { .. }
                    | Error::JoinError { .. }),
                )) => e.into(),
                Ok(Err(e)) => return Err(self.put_failed(self.sort(path, format!("creating {}/{path}", self.url), e))),
                Err(late) => late,
            };
            match self.get(path, bytes.len() as u64).await {
                Ok((_, Some(found))) if found == bytes => return Ok(Create::Created),
                Ok(_) => return Ok(Create::AlreadyExists),
                // Not there: the request failed, or is still under way. Repeating it settles which.
                Err(_) if attempt < CREATE_ATTEMPTS.max(self.attempts) => {}
                Err(_) => return Err(StoreError::Indeterminate { path: path.to_owned(), source: unclear }),
            }
            tokio::time::sleep(Limits::pause(attempt)).await;
            attempt += 1;
        }
    }

    pub(super) async fn upload(&self, path: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let location = self.path(path);
        let total: u64 = parts.iter().map(|p| p.len() as u64).sum();
        if total <= self.part_bytes {
            let payload: PutPayload = parts.into_iter().collect();
            let put = self.within("uploading", path, || self.client.put(&location, payload.clone())).await;
            return put.map(|_| ()).map_err(|e| self.put_failed(e));
        }
        let mut attempt = 1;
        loop {
            match self.upload_parts(path, &location, parts.clone(), total).await {
                // A part cannot be sent twice in one upload, so all of it is; the name is ours alone.
                Err(e) if e.kind() == Kind::Retry && attempt < self.attempts => {
                    tokio::time::sleep(Limits::pause(attempt)).await;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    /// One upload in parts. Nothing of it can be seen before it is completed.
    async fn upload_parts(&self, path: &str, location: &Path, parts: Vec<Bytes>, total: u64) -> Result<(), StoreError> {
        let upload = self.within("uploading", path, || self.client.put_multipart(location)).await;
        let mut upload = upload.map_err(|e| self.put_failed(e))?;
        let part_size = self.part_bytes.max(total.div_ceil(MOST_PARTS));
        let mut sent = Ok(());
        let mut flight = FuturesUnordered::new();
        for payload in cut(parts, part_size) {
            if flight.len() == PARTS_IN_FLIGHT {
                sent = flight.next().await.unwrap_or(Ok(()));
            }
            if sent.is_err() {
                break;
            }
            flight.push(self.once("uploading a part of", path, upload.put_part(payload)));
        }
        if sent.is_ok() {
            sent = flight.try_collect::<()>().await;
        }
        if let Err(e) = sent {
            // The error that matters is the first one; an upload left open costs space until the bucket expires it.
            let _ = self.once("aborting the upload of", path, upload.abort()).await;
            return Err(e);
        }
        match self.once("completing", path, upload.complete()).await {
            Ok(_) => Ok(()),
            // It may have been completed and only the answer be lost; then the object is there, and whole.
            Err(e) if self.head(path).await.is_ok_and(|size| size == total) => {
                tracing::debug!(path, error = %e, "the answer to a completion was lost");
                Ok(())
            }
            Err(e) => {
                let _ = self.once("aborting the upload of", path, upload.abort()).await;
                Err(e)
            }
        }
    }

    pub(super) async fn get(&self, path: &str, limit: u64) -> Result<(u64, Option<Bytes>), StoreError> {
        let location = self.path(path);
        let read = || async {
            let result = self.client.get(&location).await?;
            let size = result.meta.size;
            if size > limit { Ok((size, None)) } else { Ok((size, Some(result.bytes().await?))) }
        };
        self.within("reading", path, read).await
    }

    pub(super) async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let location = self.path(path);
        let read = self.within("reading", path, || self.client.get_range(&location, range.clone())).await;
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
        self.within("reading", path, || self.client.head(&location)).await.map(|meta| meta.size)
    }

    pub(super) async fn list(
        &self,
        folder: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let location = self.path(folder);
        let page = || {
            let stream = match after {
                Some(after) => self.client.list_with_offset(Some(&location), &self.path(after)),
                None => self.client.list(Some(&location)),
            };
            stream.take(limit).try_collect::<Vec<_>>()
        };
        let found = self.within("listing", folder, page).await?;
        Ok(found.into_iter().map(|m| Listed { path: self.strip(&m.location), bytes: m.size }).collect())
    }

    pub(super) async fn list_folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let location = self.path(folder);
        let found = self.within("listing", folder, || self.client.list_with_delimiter(Some(&location))).await?;
        let names = found.common_prefixes.iter().filter_map(|p| p.filename().map(str::to_owned));
        Ok(names.collect())
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let location = self.path(path);
        match self.within("deleting", path, || self.client.delete(&location)).await {
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
