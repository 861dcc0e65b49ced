//! The store that processes of a simulation see: `object_store`'s interface, every call of which is a request to the
//! simulated network.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

use super::net::Net;

/// The trait's methods return these.
type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// One process's way to the bucket.
#[derive(Clone)]
pub(crate) struct Faulty {
    pub(crate) net: Arc<Net>,
    pub(crate) process: u32,
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({})", self.process)
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl ObjectStore for Faulty {
    fn put_opts<'a, 'b, 'c>(&'a self, path: &'b Path, payload: PutPayload, opts: PutOptions) -> Answer<'c, PutResult>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        let kind = if opts.mode == PutMode::Create { "create" } else { "put" };
        let (label, path) = (format!("{path} {}", payload.content_length()), path.clone());
        Box::pin(self.net.call(self.process, kind, label, move |disk| disk.put(&path, payload, opts)))
    }

    fn put_multipart_opts<'a, 'b, 'c>(
        &'a self,
        path: &'b Path,
        _: PutMultipartOptions,
    ) -> Answer<'c, Box<dyn MultipartUpload>>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        let (at, store) = (path.clone(), self.clone());
        let begun = self.net.call(self.process, "begin", path.to_string(), move |disk| disk.begin(&at));
        let path = path.clone();
        Box::pin(async move {
            let id = begun.await?;
            Ok(Box::new(Upload { store, path, id, parts: 0 }) as Box<dyn MultipartUpload>)
        })
    }

    fn get_opts<'a, 'b, 'c>(&'a self, path: &'b Path, options: GetOptions) -> Answer<'c, GetResult>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        let kind = if options.head { "head" } else { "get" };
        let range = options.range.as_ref().map(|range| format!(" {range}")).unwrap_or_default();
        let (label, path) = (format!("{path}{range}"), path.clone());
        Box::pin(self.net.call(self.process, kind, label, move |disk| disk.get(&path, options)))
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        let delete = move |path: Result<Path>| {
            let store = store.clone();
            async move {
                let path = path?;
                let at = path.clone();
                store.net.call(store.process, "delete", path.to_string(), move |disk| disk.delete(&at)).await?;
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
        Box::pin(self.net.call(self.process, "list", label, move |disk| disk.folders(prefix.as_ref())))
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

impl Faulty {
    fn list_from(&self, prefix: Option<Path>, after: Option<Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let label = prefix.as_ref().map(ToString::to_string).unwrap_or_default();
        let store = self.clone();
        let page = async move {
            let list = move |disk: &mut super::disk::Disk| Ok(disk.list(prefix.as_ref(), after.as_ref()));
            let found: Vec<Result<ObjectMeta>> = match store.net.call(store.process, "list", label, list).await {
                Ok(found) => found.into_iter().map(Ok).collect(),
                Err(e) => vec![Err(e)],
            };
            stream::iter(found)
        };
        stream::once(page).flatten().boxed()
    }
}

/// An upload in parts.
#[derive(Debug)]
struct Upload {
    store: Faulty,
    path: Path,
    id: MultipartId,
    parts: usize,
}

impl MultipartUpload for Upload {
    fn put_part(&mut self, payload: PutPayload) -> UploadPart {
        let (path, id, index) = (self.path.clone(), self.id.clone(), self.parts);
        self.parts += 1;
        let label = format!("{path} part {index}");
        let call =
            self.store.net.call(self.store.process, "part", label, move |disk| disk.part(&path, &id, index, payload));
        Box::pin(call)
    }

    fn complete<'a, 'c>(&'a mut self) -> Answer<'c, PutResult>
    where
        'a: 'c,
        Self: 'c,
    {
        let (path, id) = (self.path.clone(), self.id.clone());
        let label = path.to_string();
        Box::pin(self.store.net.call(self.store.process, "complete", label, move |disk| disk.complete(&path, &id)))
    }

    fn abort<'a, 'c>(&'a mut self) -> Answer<'c, ()>
    where
        'a: 'c,
        Self: 'c,
    {
        let (path, id) = (self.path.clone(), self.id.clone());
        let label = path.to_string();
        Box::pin(self.store.net.call(self.store.process, "abort", label, move |disk| disk.abort(&path, &id)))
    }
}
