//! The store: a small set of operations with the same meaning on every backend.
//!
//! Everything above this file is written against [`Store`] and its one promise: [`Store::create`] is put-if-absent, and
//! its outcome is either known or reported as unknown. A timed-out create is *indeterminate*: it is read back and
//! compared, tried again, and never assumed. On a local disk success means synced, on a bucket it means acknowledged.

mod connect;
pub(crate) mod file;
mod limits;
mod remote;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use object_store::ObjectStore;
use uuid::Uuid;

pub use self::file::{DiskOp, Witness};
pub use limits::Limits;

use crate::error::StoreError;
use crate::layout;
use crate::url::{Place, parse};

/// What became of a conditional create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Create {
    /// The object now exists with the given bytes, because of this call.
    Created,
    /// Someone else's object has that name.
    AlreadyExists,
}

/// One object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The path under the store's root.
    pub path: String,
    /// The size in bytes.
    pub bytes: u64,
}

/// A place where jobs are kept. Cheap to clone; all clones share connections.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    url: String,
    backend: Backend,
    writer: Uuid,
    counter: AtomicU64,
}

enum Backend {
    File(file::FileBackend),
    Remote(remote::RemoteBackend),
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.0.url)
    }
}

impl Store {
    /// Opens a store by its URL; a `file://` folder is made if it is missing and must be writable. Buckets take their
    /// credentials, region and endpoint from the usual environment variables and are first contacted by an operation.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, &[])
    }

    /// As [`Store::open`] with settings that override the environment, by the names of docs/store.md: the cloud's, such
    /// as `aws_endpoint` or `aws_access_key_id`, and those of [`Limits`]. An unknown name is an error.
    pub fn open_with(url: &str, options: &[(&str, &str)]) -> Result<Self, StoreError> {
        let backend = match parse(url)? {
            Place::Folder(root) => match options.first() {
                Some((name, _)) => {
                    return Err(StoreError::Input(format!("store option {name:?}: a local disk takes no options")));
                }
                None => Backend::File(file::FileBackend::make(root, draw_writer(), None)?),
            },
            place => Self::remote(place, options)?,
        };
        Ok(Self::with(url, backend))
    }

    /// Opens a store for reading: a `file://` folder must exist, and nothing is made.
    pub fn open_existing(url: &str) -> Result<Self, StoreError> {
        let backend = match parse(url)? {
            Place::Folder(root) => Backend::File(file::FileBackend::existing(root)?),
            place => Self::remote(place, &[])?,
        };
        Ok(Self::with(url, backend))
    }

    /// Opens a store on a local disk, and tells a witness of every operation that changes the disk: for the study of
    /// crashes.
    pub fn open_witnessed(url: &str, witness: Witness) -> Result<Self, StoreError> {
        let Place::Folder(root) = parse(url)? else {
            return Err(StoreError::Input(format!("only a file:// store can be witnessed, {url} is none")));
        };
        Ok(Self::with(url, Backend::File(file::FileBackend::make(root, draw_writer(), Some(witness))?)))
    }

    /// A store in this process's memory: for examples and tests.
    pub fn memory() -> Self {
        Self::from_object_store("memory://", Arc::new(object_store::memory::InMemory::new()))
    }

    /// A store over any `object_store` backend; the URL is used in messages only.
    pub fn from_object_store(url: &str, backend: Arc<dyn ObjectStore>) -> Self {
        Self::from_object_store_with(url, backend, &Limits::default())
    }

    /// As [`Store::from_object_store`] with limits of one's own. The backend is taken to repeat nothing itself.
    pub fn from_object_store_with(url: &str, backend: Arc<dyn ObjectStore>, limits: &Limits) -> Self {
        Self::with(url, Backend::Remote(remote::RemoteBackend::new(url, "", backend, limits)))
    }

    fn remote(place: Place, options: &[(&str, &str)]) -> Result<Backend, StoreError> {
        let mut limits = Limits::from_env()?;
        Ok(Backend::Remote(match place {
            Place::Bucket(scheme, url, prefix) => {
                let client = connect::connect(scheme, &url, options, &mut limits)?;
                remote::RemoteBackend::over_http(url.as_str(), &prefix, client, &limits)
            }
            _ => {
                let memory = Arc::new(object_store::memory::InMemory::new());
                remote::RemoteBackend::new("memory://", "", memory, &limits)
            }
        }))
    }

    fn with(url: &str, backend: Backend) -> Self {
        let inner = Inner { url: url.to_owned(), backend, writer: draw_writer(), counter: AtomicU64::new(0) };
        Self(Arc::new(inner))
    }

    /// The URL the store was opened by.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// A text no other writer of this or any store makes: it marks records, so that their author can tell them.
    pub fn token(&self) -> String {
        format!("{}-{}", self.0.writer.simple(), self.0.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// Whether a mark was made by [`Store::token`] of this opening of the store, or of a clone of it.
    pub(crate) fn made(&self, token: &str) -> bool {
        token.rsplit_once('-').is_some_and(|(writer, _)| writer == self.0.writer.simple().to_string())
    }

    /// The local disk this store lies on, if it does.
    pub(crate) fn local(&self) -> Option<&file::FileBackend> {
        match &self.0.backend {
            Backend::File(backend) => Some(backend),
            Backend::Remote(_) => None,
        }
    }

    /// Puts the object if there is none of that name. The bytes should hold a [`Store::token`] or the name a fresh
    /// UUID: after an unclear answer "my bytes are there" is how the caller's own success is told.
    pub async fn create(&self, path: &str, bytes: Bytes) -> Result<Create, StoreError> {
        self.check(path)?;
        match &self.0.backend {
            Backend::File(b) => b.create(path, vec![bytes], self.token()).await,
            Backend::Remote(b) => b.create(path, bytes).await,
        }
    }

    /// Puts a large object of a fresh name from its parts, in order, without copying them. Parts may be mapped memory
    /// (`Bytes::from_owner`). Buckets get a multipart upload with bounded concurrency.
    pub async fn upload(&self, path: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        self.check(path)?;
        match &self.0.backend {
            Backend::File(b) => match b.create(path, parts, self.token()).await? {
                Create::Created => Ok(()),
                Create::AlreadyExists => Err(StoreError::Bug(format!("{path} exists: uploads need a fresh name"))),
            },
            Backend::Remote(b) => b.upload(path, parts).await,
        }
    }

    /// The whole object, if it has at most `limit` bytes; a larger one is refused before it is read.
    pub async fn get(&self, path: &str, limit: u64) -> Result<Bytes, StoreError> {
        self.check(path)?;
        let (size, bytes) = match &self.0.backend {
            Backend::File(b) => b.get(path, limit, &self.0.url).await?,
            Backend::Remote(b) => b.get(path, limit).await?,
        };
        bytes.ok_or_else(|| {
            StoreError::Corrupt(format!("{path} has {size} bytes, more than the {limit} such an object may have"))
        })
    }

    /// A range of an object's bytes. An object that ends before the range does is [`StoreError::Corrupt`].
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.check(path)?;
        if range.start >= range.end {
            return Ok(Bytes::new());
        }
        let bytes = match &self.0.backend {
            Backend::File(b) => b.get_range(path, range.clone(), &self.0.url).await?,
            Backend::Remote(b) => b.get_range(path, range.clone()).await?,
        };
        if bytes.len() as u64 == range.end - range.start {
            return Ok(bytes);
        }
        let Range { start, end } = range;
        Err(StoreError::Corrupt(format!("{path} is short: bytes {start}..{end} were asked for, {} came", bytes.len())))
    }

    /// Several ranges of one object, in the order asked for.
    pub async fn get_ranges(&self, path: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, StoreError> {
        let mut out = Vec::with_capacity(ranges.len());
        for range in ranges {
            out.push(self.get_range(path, range.clone()).await?);
        }
        Ok(out)
    }

    /// The size of an object in bytes.
    pub async fn head(&self, path: &str) -> Result<u64, StoreError> {
        self.check(path)?;
        match &self.0.backend {
            Backend::File(b) => b.head(path, &self.0.url).await,
            Backend::Remote(b) => b.head(path).await,
        }
    }

    /// The first `limit` objects under a folder, in the order of their paths, after the path `after` if one is given.
    pub async fn list(&self, folder: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, StoreError> {
        self.check(folder)?;
        match &self.0.backend {
            Backend::File(b) => b.list(folder, after, limit).await,
            Backend::Remote(b) => b.list(folder, after, limit).await,
        }
    }

    /// The names of the folders directly under a folder, in order.
    pub async fn list_folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        self.check(folder)?;
        match &self.0.backend {
            Backend::File(b) => b.list_folders(folder).await,
            Backend::Remote(b) => b.list_folders(folder).await,
        }
    }

    /// Deletes an object; one that is not there counts as deleted.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        self.check(path)?;
        match &self.0.backend {
            Backend::File(b) => b.delete(path).await,
            Backend::Remote(b) => b.delete(path).await,
        }
    }

    /// Removes what crashed writers left under a folder of a local disk; returns how many files went. Writers at work
    /// hold a lock on theirs, so those stay. Buckets need a lifecycle rule for unfinished multipart uploads instead.
    pub async fn clear_leftovers(&self, folder: &str) -> Result<usize, StoreError> {
        self.check(folder)?;
        match &self.0.backend {
            Backend::File(b) => b.clear_leftovers(folder).await,
            Backend::Remote(_) => Ok(0),
        }
    }

    fn check(&self, path: &str) -> Result<(), StoreError> {
        if layout::is_safe(path) {
            return Ok(());
        }
        let shown: String = path.chars().take(120).collect();
        Err(StoreError::Bug(format!("{shown:?} is not a path under the store {}", self.0.url)))
    }
}

/// The one place of this library that draws a random number: it tells one opener's writes from all others'.
fn draw_writer() -> Uuid {
    proto::chance::uuid()
}
