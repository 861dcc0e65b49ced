//! The plain side of the store benchmark: the same bytes with nothing done to them.
//!
//! On a local disk each rank's bytes go to a file of their own with direct output where the disk takes it, in writes of
//! 4 MiB from two threads, into room set aside, synced with their folder; they come back in reads of 1 MiB from four
//! threads, hashed as they come if asked for. In a bucket they are one multipart upload a rank, parts of 16 MiB, four
//! in flight, and come back in ranges of 8 MiB, eight in flight.

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use checkpoint_store::aligned::PAGE;
use checkpoint_store::{AlignedBuffer, BlockHash};
use futures::stream::{self, StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt, PutPayload};
use rustix::fs::{Advice, FallocateFlags, OFlags};

use super::ours::Shape;
use crate::failure::Failure;

const WRITE: usize = 4 << 20;
const WRITERS: usize = 2;
const READ: usize = 1 << 20;
const RANGE: usize = 8 << 20;
const BLOCK: usize = 256 << 10;
const READERS: usize = 4;
const PART: usize = 16 << 20;
const PARTS: usize = 4;
const RANGES: usize = 8;

/// Where the plain bytes go.
pub(super) enum Plain {
    Folder(PathBuf),
    Bucket(Box<dyn ObjectStore>, String),
}

/// The folder of a `file://` URL.
pub(super) fn folder(url: &str) -> Option<PathBuf> {
    url.strip_prefix("file://").map(PathBuf::from)
}

fn failed(what: &str, path: &Path) -> impl Fn(std::io::Error) -> Failure {
    let what = format!("{what} {}", path.display());
    move |e| Failure::job(format!("{what}: {e}"))
}

/// Puts a file out of the page cache, or into it.
pub(super) fn prepare(path: &Path, cold: bool) -> Result<(), Failure> {
    let file = File::open(path).map_err(failed("opening", path))?;
    if cold {
        let advised = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        return advised.map_err(|e| failed("dropping from the cache", path)(e.into()));
    }
    std::io::copy(&mut &file, &mut std::io::sink()).map(|_| ()).map_err(failed("reading", path))
}

impl Plain {
    pub(super) fn open(url: &str, run: &str) -> Result<Self, Failure> {
        if let Some(root) = folder(url) {
            return Ok(Self::Folder(root.join(format!("bench-plain-{run}"))));
        }
        if !url.starts_with("s3://") {
            return Err(Failure::request(format!("--store {url} must be a folder or an s3:// URL")));
        }
        let client = ClientOptions::new().with_allow_http(true);
        let built = AmazonS3Builder::from_env().with_url(url).with_client_options(client).build();
        let below = url.trim_start_matches("s3://").split_once('/').map_or("", |(_, path)| path.trim_matches('/'));
        let prefix = format!("{below}/bench-plain-{run}").trim_start_matches('/').to_owned();
        Ok(Self::Bucket(Box::new(built.map_err(Failure::request)?), prefix))
    }

    /// Whether reads can be cold or warm.
    pub(super) fn has_cache(&self) -> bool {
        matches!(self, Self::Folder(_))
    }

    fn files(&self, ranks: usize) -> Vec<PathBuf> {
        let Self::Folder(folder) = self else { return vec![] };
        (0..ranks).map(|rank| folder.join(rank.to_string())).collect()
    }

    /// Writes every rank's bytes anew. Returns the seconds.
    pub(super) async fn write(&self, shape: &Shape) -> Result<f64, Failure> {
        self.remove().await?;
        match self {
            Self::Folder(folder) => {
                std::fs::create_dir_all(folder).map_err(failed("making", folder))?;
                let files = self.files(shape.slots.len());
                tokio::task::block_in_place(|| {
                    let began = Instant::now();
                    each(files.iter().zip(&shape.slots), |(path, slot)| write_file(path, slot))?;
                    File::open(folder).and_then(|f| f.sync_all()).map_err(failed("syncing", folder))?;
                    Ok(began.elapsed().as_secs_f64())
                })
            }
            Self::Bucket(client, prefix) => {
                let began = Instant::now();
                let ranks = shape
                    .slots
                    .iter()
                    .enumerate()
                    .map(|(rank, slot)| put(client.as_ref(), format!("{prefix}/{rank}"), slot));
                futures::future::try_join_all(ranks).await.map_err(Failure::job)?;
                Ok(began.elapsed().as_secs_f64())
            }
        }
    }

    /// Reads every rank's bytes back into its memory; with `hashed` each block's BLAKE3 is taken on the way: the least
    /// that a reader who proves its bytes can do. Returns the seconds.
    pub(super) async fn read(&self, buffers: &mut [AlignedBuffer], cold: bool, hashed: bool) -> Result<f64, Failure> {
        match self {
            Self::Folder(_) => {
                let files = self.files(buffers.len());
                for path in &files {
                    prepare(path, cold)?;
                }
                tokio::task::block_in_place(|| {
                    let began = Instant::now();
                    each(files.iter().zip(buffers), |(path, buffer)| {
                        read_file(path, buffer.as_mut_slice(), cold, hashed)
                    })?;
                    Ok(began.elapsed().as_secs_f64())
                })
            }
            Self::Bucket(client, prefix) => {
                let began = Instant::now();
                let ranks = buffers
                    .iter_mut()
                    .enumerate()
                    .map(|(rank, to)| get(client.as_ref(), format!("{prefix}/{rank}"), to));
                futures::future::try_join_all(ranks).await.map_err(Failure::job)?;
                Ok(began.elapsed().as_secs_f64())
            }
        }
    }

    pub(super) async fn remove(&self) -> Result<(), Failure> {
        match self {
            Self::Folder(folder) => match std::fs::remove_dir_all(folder) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failed("removing", folder)(e)),
                _ => Ok(()),
            },
            Self::Bucket(client, prefix) => {
                let listed = client.list(Some(&prefix.as_str().into()));
                let gone = listed.try_for_each(|meta| async move { client.delete(&meta.location).await });
                gone.await.map_err(Failure::job)
            }
        }
    }
}

/// Runs the work for each item on a thread of its own.
fn each<T: Send>(
    items: impl Iterator<Item = T>,
    work: impl Fn(T) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = items.map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err(Failure::job("a thread panicked"))))
    })
}

/// Opens with direct input and output where the disk takes it.
fn open(options: &mut OpenOptions, path: &Path, direct: bool) -> std::io::Result<File> {
    if direct {
        let direct = options.clone().custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path);
        if direct.is_ok() {
            return direct;
        }
    }
    options.open(path)
}

/// Whole pages only: what is left over is less than one.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let bytes = &bytes[..bytes.len() / PAGE * PAGE];
    let work = || -> std::io::Result<()> {
        let file = open(OpenOptions::new().write(true).create_new(true), path, true)?;
        let _ = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes.len() as u64);
        let (chunks, next) = (bytes.chunks(WRITE).collect::<Vec<_>>(), AtomicUsize::new(0));
        let write = || -> std::io::Result<()> {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(chunk) = chunks.get(index) else { return Ok(()) };
                file.write_all_at(chunk, (index * WRITE) as u64)?;
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..WRITERS).map(|_| scope.spawn(write)).collect();
            threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into())))
        })?;
        file.sync_all()
    };
    work().map_err(failed("writing", path))
}

fn read_file(path: &Path, to: &mut [u8], direct: bool, hashed: bool) -> Result<(), Failure> {
    let length = to.len() / PAGE * PAGE;
    let mut work = || -> std::io::Result<()> {
        let file = open(OpenOptions::new().read(true), path, direct)?;
        let chunks = Mutex::new(to[..length].chunks_mut(READ).enumerate());
        let read = || -> std::io::Result<()> {
            loop {
                let next = chunks.lock().map_err(|_| std::io::ErrorKind::Other)?.next();
                let Some((index, chunk)) = next else { return Ok(()) };
                file.read_exact_at(chunk, (index * READ) as u64)?;
                if hashed {
                    chunk.chunks(BLOCK).for_each(|block| _ = black_box(BlockHash::of(block)));
                }
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
            threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into())))
        })
    };
    work().map_err(failed("reading", path))
}

async fn put(client: &dyn ObjectStore, path: String, slot: &Bytes) -> Result<(), object_store::Error> {
    let mut upload = client.put_multipart(&path.into()).await?;
    let parts = (0..slot.len()).step_by(PART).map(|at| slot.slice(at..slot.len().min(at + PART)));
    let sends: Vec<_> = parts.map(|part| upload.put_part(PutPayload::from(part))).collect();
    stream::iter(sends).buffer_unordered(PARTS).try_collect::<()>().await?;
    upload.complete().await.map(|_| ())
}

async fn get(client: &dyn ObjectStore, path: String, to: &mut AlignedBuffer) -> Result<(), object_store::Error> {
    let path = path.into();
    let path = &path;
    let reads = to.as_mut_slice().chunks_mut(RANGE).enumerate().map(|(index, chunk)| async move {
        let start = (index * RANGE) as u64;
        let bytes = client.get_range(path, start..start + chunk.len() as u64).await?;
        chunk[..bytes.len()].copy_from_slice(&bytes);
        Ok(())
    });
    stream::iter(reads).buffer_unordered(RANGES).try_collect::<()>().await
}
