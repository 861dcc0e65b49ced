//! What the simulated bucket holds, and how far behind its listings are.
//!
//! Reads, puts and deletes are consistent, as those of the great object stores are. A listing may miss the newest puts
//! and still show the latest deletes: some compatible servers do that, and nothing in the store may rely on better.

use std::collections::BTreeMap;

use futures::FutureExt;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetResult, ListResult, MultipartId, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutOptions, PutPayload, PutResult, Result,
};

use super::random::Random;

/// For how many operations a change may be missing from listings.
const LAG: u64 = 40;

/// What an operation changed.
#[derive(Debug, Clone)]
pub(crate) enum Effect {
    /// An object was put; `replaced` if another one of that name, with other bytes, was there.
    Put { path: String, replaced: bool },
    /// An object went.
    Deleted { path: String },
}

/// The bucket.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) memory: InMemory,
    /// Counts operations.
    pub(crate) now: u64,
    /// Whether listings lag.
    pub(crate) lags: bool,
    /// A planted fault: the condition of a create is ignored.
    pub(crate) overwrites: bool,
    effects: Vec<Effect>,
    /// The latest changes: when, and what was there before a delete.
    recent: BTreeMap<Path, (u64, Option<ObjectMeta>)>,
    random: Random,
}

/// The memory store never waits.
fn now<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || Error::Generic { store: "simulation", source: "the memory store waited".into() };
    answer.now_or_never().unwrap_or_else(|| Err(late()))
}

impl Disk {
    pub(crate) fn new(random: Random, lags: bool, overwrites: bool) -> Self {
        let (memory, effects, recent) = (InMemory::new(), vec![], BTreeMap::new());
        Self { memory, now: 0, lags, overwrites, effects, recent, random }
    }

    /// What changed since the last call.
    pub(crate) fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    pub(crate) fn put(&mut self, path: &Path, payload: PutPayload, mut options: PutOptions) -> Result<PutResult> {
        if self.overwrites {
            options.mode = PutMode::Overwrite;
        }
        let bytes = bytes::Bytes::from(payload);
        let before = self.bytes(path);
        let done = now(self.memory.put_opts(path, bytes.clone().into(), options))?;
        self.was_put(path, before.is_some_and(|before| before != bytes));
        Ok(done)
    }

    pub(crate) fn get(&mut self, path: &Path, options: GetOptions) -> Result<GetResult> {
        now(self.memory.get_opts(path, options))
    }

    pub(crate) fn delete(&mut self, path: &Path) -> Result<()> {
        let before = now(self.memory.head(path)).ok();
        now(self.memory.delete(path))?;
        if before.is_some() {
            self.recent.insert(path.clone(), (self.now, before));
            self.effects.push(Effect::Deleted { path: path.to_string() });
        }
        Ok(())
    }

    /// The objects under a folder and after a path, in order; perhaps not quite those there are.
    pub(crate) fn list(&mut self, prefix: Option<&Path>, after: Option<&Path>) -> Vec<ObjectMeta> {
        let found = futures::stream::StreamExt::collect::<Vec<_>>(self.memory.list(prefix)).now_or_never();
        let mut shown: BTreeMap<Path, ObjectMeta> =
            found.into_iter().flatten().flatten().map(|meta| (meta.location.clone(), meta)).collect();
        let below = |path: &Path| prefix.is_none_or(|prefix| path.prefix_match(prefix).is_some());
        if self.lags {
            let now = self.now;
            self.recent.retain(|_, (at, _)| *at + LAG > now);
            for (path, (_, ghost)) in self.recent.iter().filter(|(path, _)| below(path)) {
                match ghost {
                    Some(ghost) if self.random.chance(400) => {
                        shown.entry(path.clone()).or_insert_with(|| ghost.clone());
                    }
                    None if self.random.chance(400) => {
                        shown.remove(path);
                    }
                    _ => {}
                }
            }
        }
        shown.into_values().filter(|meta| after.is_none_or(|after| meta.location > *after)).collect()
    }

    pub(crate) fn folders(&mut self, prefix: Option<&Path>) -> Result<ListResult> {
        now(self.memory.list_with_delimiter(prefix))
    }

    pub(crate) fn begin(&mut self, path: &Path) -> Result<MultipartId> {
        now(self.memory.create_multipart(path))
    }

    pub(crate) fn part(&mut self, path: &Path, id: &MultipartId, index: usize, payload: PutPayload) -> Result<()> {
        now(self.memory.put_part(path, id, index, payload)).map(|_| ())
    }

    pub(crate) fn complete(&mut self, path: &Path, id: &MultipartId) -> Result<PutResult> {
        let before = self.bytes(path);
        let done = now(self.memory.complete_multipart(path, id, vec![]))?;
        self.was_put(path, before.is_some_and(|before| self.bytes(path) != Some(before)));
        Ok(done)
    }

    pub(crate) fn abort(&mut self, path: &Path, id: &MultipartId) -> Result<()> {
        now(self.memory.abort_multipart(path, id))
    }

    fn bytes(&self, path: &Path) -> Option<bytes::Bytes> {
        now(async { self.memory.get(path).await?.bytes().await }).ok()
    }

    fn was_put(&mut self, path: &Path, replaced: bool) {
        self.recent.insert(path.clone(), (self.now, None));
        self.effects.push(Effect::Put { path: path.to_string(), replaced });
    }
}
