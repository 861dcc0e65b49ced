//! The bucket that all hosts share, and each host's way to it.
//!
//! Every call is a request that is under way for a while and then takes effect, or does not, and is answered, or is
//! not; all by chance. A request outlives its client: one that timed out, or whose process died, may still land later.
//! Whatever lands is seen by the oracle at once.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, Extensions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::sync::oneshot;

use super::oracle::Oracle;
use super::plant::Plant;
use super::world::{Host, State, World};

/// The bucket's URL, as the job and the coordinators know it.
pub(crate) const URL: &str = "s3://simulated";

/// The trait's methods return these.
type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// What is stored.
#[derive(Debug)]
pub(crate) struct Disk {
    memory: InMemory,
    /// A planted fault: the condition of a create is ignored.
    overwrites: bool,
}

/// The memory store never waits.
fn now<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    answer.now_or_never().unwrap_or_else(|| Err(failure("the memory store waited")))
}

fn failure(why: &'static str) -> Error {
    Error::Generic { store: "simulation", source: why.into() }
}

impl Disk {
    /// An empty bucket; `probed`: one whose atomic create was tried before.
    pub(crate) fn new(overwrites: bool, probed: bool) -> Self {
        let mut disk = Self { memory: InMemory::new(), overwrites };
        if probed {
            let passed = Bytes::from(format!("{{\"format\":1,\"atomic_create\":{URL:?}}}"));
            let put = disk.put(&Path::from("probe/passed.json"), &passed, PutOptions::default());
            put.expect("the memory store takes it");
        }
        disk
    }

    /// Puts an object; also says what of that name was there before.
    fn put(&mut self, path: &Path, bytes: &Bytes, mut options: PutOptions) -> Result<(PutResult, Option<Bytes>)> {
        let before = self.bytes(path);
        if self.overwrites {
            options.mode = PutMode::Overwrite;
        }
        let put = now(self.memory.put_opts(path, bytes.clone().into(), options))?;
        Ok((put, before))
    }

    /// An object's bytes.
    pub(crate) fn bytes(&self, path: &Path) -> Option<Bytes> {
        now(async { self.memory.get(path).await?.bytes().await }).ok()
    }

    fn list(&self, prefix: Option<&Path>, after: Option<&Path>) -> Vec<ObjectMeta> {
        let found = self.memory.list(prefix).collect::<Vec<_>>().now_or_never();
        let mut found: Vec<ObjectMeta> = found.into_iter().flatten().flatten().collect();
        found.retain(|meta| after.is_none_or(|after| meta.location > *after));
        found.sort_by(|a, b| a.location.cmp(&b.location));
        found
    }
}

/// What becomes of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fate {
    lands: bool,
    heard: Heard,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Answer,
    Error,
    Nothing,
}

/// Takes effect, if it is to, and answers.
type Act = Box<dyn FnOnce(&mut State, Fate) + Send>;

/// A request under way.
pub(crate) struct Request {
    host: Host,
    kind: &'static str,
    label: String,
    act: Act,
}

/// One host's way to the bucket.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) world: World,
    pub(crate) host: Host,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Way({})", self.host)
    }
}

impl Way {
    /// Sends a request and waits for its answer.
    fn call<T: Send + 'static, F: FnOnce(&mut State) -> Result<T> + Send + 'static>(
        &self,
        kind: &'static str,
        label: String,
        act: F,
    ) -> impl Future<Output = Result<T>> + Send + use<T, F> {
        let (answer, answered) = oneshot::channel();
        let host = self.host;
        let perform = move |state: &mut State, fate: Fate| {
            let done = if fate.lands { act(state) } else { Err(failure("out of order")) };
            match fate.heard {
                Heard::Answer => drop(answer.send(done)),
                Heard::Error => drop(answer.send(Err(failure("the answer was lost")))),
                // The client waits until it gives up: the sender must not be dropped.
                Heard::Nothing => std::mem::forget(answer),
            }
        };
        let mut state = self.world.lock();
        let delay = delay(&mut state);
        state.send(Request { host, kind, label, act: Box::new(perform) }, delay);
        async move { answered.await.unwrap_or_else(|_| Err(failure("the store is gone"))) }
    }
}

/// How long a request is under way.
fn delay(state: &mut State) -> Duration {
    let slow = state.roughness > 0 && state.random.chance(60);
    Duration::from_millis(if slow { state.random.within(200, 3_000) } else { state.random.within(5, 60) })
}

impl State {
    fn send(&mut self, request: Request, delay: Duration) {
        self.issued += 1;
        self.requests.insert((self.now + delay, self.issued), request);
    }

    /// Lets all requests that are due by now take effect.
    pub(crate) fn serve(&mut self) {
        while let Some(entry) = self.requests.first_entry() {
            if entry.key().0 > self.now {
                return;
            }
            let (_, request) = entry.remove_entry();
            *self.events.entry("store request").or_default() += 1;
            if let Some(until) = self.outages.get(request.host).copied().filter(|until| *until > self.now) {
                // Some fail at once, some are only answered when it is over.
                if self.random.chance(500) {
                    self.requests.insert((until, self.issued + 1), request);
                    self.issued += 1;
                } else {
                    (request.act)(self, Fate { lands: false, heard: Heard::Error });
                }
                continue;
            }
            let fate = self.fate(&request);
            (request.act)(self, fate);
        }
    }

    /// Decides what becomes of a request.
    fn fate(&mut self, request: &Request) -> Fate {
        let mut fate = Fate { lands: true, heard: Heard::Answer };
        if self.roughness == 0 || !self.random.chance(self.roughness) {
            return fate;
        }
        let (word, lands, heard) = match self.random.below(5) {
            0 | 1 => ("request failed", false, Heard::Error),
            2 | 3 => ("answer lost", true, Heard::Error),
            _ => ("request hung", self.random.chance(500), Heard::Nothing),
        };
        (fate.lands, fate.heard) = (lands, heard);
        *self.faults.entry(word).or_default() += 1;
        let what = format!("{word}: {} {}", request.kind, request.label);
        self.note(request.host, "store", what);
        fate
    }
}

impl ObjectStore for Way {
    fn put_opts<'a, 'b, 'c>(&'a self, path: &'b Path, payload: PutPayload, opts: PutOptions) -> Answer<'c, PutResult>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        let (path, bytes, host) = (path.clone(), Bytes::from(payload), self.host);
        if self.world.has(Plant::AcknowledgesEarly) && path.as_ref().contains("/records/") {
            let mut state = self.world.lock();
            let act = move |state: &mut State, _: Fate| drop(state.land(host, &path, &bytes, opts));
            let request = Request { host, kind: "late", label: String::new(), act: Box::new(act) };
            state.send(request, Duration::from_secs(2));
            let extensions = Extensions::default();
            return Box::pin(async { Ok(PutResult { e_tag: None, version: None, extensions }) });
        }
        let label = path.to_string();
        Box::pin(self.call("put", label, move |state| state.land(host, &path, &bytes, opts)))
    }

    fn put_multipart_opts<'a, 'b, 'c>(
        &'a self,
        _: &'b Path,
        _: PutMultipartOptions,
    ) -> Answer<'c, Box<dyn MultipartUpload>>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        // No object of the simulated job is as large.
        let (operation, implementer) = ("put_multipart".to_owned(), self.to_string());
        Box::pin(async { Err(Error::NotImplemented { operation, implementer }) })
    }

    fn get_opts<'a, 'b, 'c>(&'a self, path: &'b Path, options: GetOptions) -> Answer<'c, GetResult>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        let (kind, label, path) = (if options.head { "head" } else { "get" }, path.to_string(), path.clone());
        Box::pin(self.call(kind, label, move |state| now(state.disk.memory.get_opts(&path, options))))
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let way = self.clone();
        let delete = move |path: Result<Path>| {
            let way = way.clone();
            async move {
                let path = path?;
                let (at, host) = (path.clone(), way.host);
                way.call("delete", path.to_string(), move |state| state.remove(host, &at)).await?;
                Ok(path)
            }
        };
        paths.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_from(prefix.cloned(), None)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_from(prefix.cloned(), Some(offset.clone()))
    }

    fn list_with_delimiter<'a, 'b, 'c>(&'a self, prefix: Option<&'b Path>) -> Answer<'c, ListResult>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        let prefix = prefix.cloned();
        let label = prefix.as_ref().map(ToString::to_string).unwrap_or_default();
        let folders = move |state: &mut State| now(state.disk.memory.list_with_delimiter(prefix.as_ref()));
        Box::pin(self.call("list", label, folders))
    }

    fn copy_opts<'a, 'b, 'd, 'c>(&'a self, _: &'b Path, _: &'d Path, _: CopyOptions) -> Answer<'c, ()>
    where
        'a: 'c,
        'b: 'c,
        'd: 'c,
        Self: 'c,
    {
        let (operation, implementer) = ("copy".to_owned(), self.to_string());
        Box::pin(async { Err(Error::NotImplemented { operation, implementer }) })
    }
}

impl Way {
    fn list_from(&self, prefix: Option<Path>, after: Option<Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let label = prefix.as_ref().map(ToString::to_string).unwrap_or_default();
        let page = self.call("list", label, move |state| Ok(state.disk.list(prefix.as_ref(), after.as_ref())));
        let found = async move {
            let found: Vec<Result<ObjectMeta>> = match page.await {
                Ok(found) => found.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            stream::iter(found)
        };
        stream::once(found).flatten().boxed()
    }
}

impl State {
    /// A put takes effect.
    fn land(&mut self, host: Host, path: &Path, bytes: &Bytes, options: PutOptions) -> Result<PutResult> {
        let (put, before) = self.disk.put(path, bytes, options)?;
        if before.as_ref() != Some(bytes) {
            let seen = self.oracle.landed(path.as_ref(), bytes, before.is_some());
            if let Ok(Some(what)) = &seen {
                self.note(host, "record", what);
            }
            self.hold(host, seen.map(drop));
        }
        Ok(put)
    }

    /// A delete takes effect.
    fn remove(&mut self, host: Host, path: &Path) -> Result<()> {
        now(self.disk.memory.delete(path))?;
        let kept = Oracle::removed(path.as_ref());
        self.hold(host, kept);
        Ok(())
    }
}
