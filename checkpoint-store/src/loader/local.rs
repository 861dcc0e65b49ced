//! Loading from a local disk: threads read into the caller's memory and verify what they read.
//!
//! A thread takes the next request, reads it, hashes it and takes another; with more threads than the disk needs, some
//! hash while others read. The threads are scoped: they borrow the caller's memory, so none outlives a step of the
//! load.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::{Job, LoadReport, Loader, THREADS};
use crate::aligned::{AlignedBuffer, PAGE};
use crate::aside::in_place;
use crate::backend::file::{EDGES, FileBackend, LargeFile};
use crate::error::StoreError;

/// The longest the polling thread works before the load may be dropped.
const STEP: Duration = Duration::from_millis(500);

/// What the threads of a load share.
struct Work<'m> {
    /// Taken from the end.
    jobs: Mutex<Vec<Job<'m>>>,
    /// Whether a look into the page cache has found nothing.
    is_cold: AtomicBool,
}

pub(super) async fn load(
    loader: &Loader<'_>,
    disk: &FileBackend,
    mut jobs: Vec<Job<'_>>,
    report: &mut LoadReport,
) -> Result<(), StoreError> {
    jobs.reverse();
    let work = Work { jobs: Mutex::new(jobs), is_cold: AtomicBool::new(false) };
    let mut done = LoadReport::default();
    while !lock(&work.jobs).is_empty() {
        done.add_work(&in_place(|| step(loader, disk, &work))?);
        tokio::task::yield_now().await;
    }
    report.add_work(&done);
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Works until the jobs are done or the step is over.
fn step(loader: &Loader<'_>, disk: &FileBackend, shared: &Work<'_>) -> Result<LoadReport, StoreError> {
    let until = Instant::now() + STEP;
    let count = THREADS.min(lock(&shared.jobs).len());
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..count).map(|_| scope.spawn(|| work(loader, disk, shared, until))).collect();
        let mut result = work(loader, disk, shared, until);
        for other in others {
            let joined = other.join();
            let joined = joined.unwrap_or_else(|_| Err(StoreError::Bug("a thread of a load panicked".into())));
            result = result.and_then(|mut sum| joined.map(|part| sum.add_work(&part)).map(|()| sum));
        }
        result
    })
}

fn work(loader: &Loader<'_>, disk: &FileBackend, shared: &Work<'_>, until: Instant) -> Result<LoadReport, StoreError> {
    let mut report = LoadReport::default();
    let mut open: Option<(usize, LargeFile<'_>)> = None;
    let mut memory = Memory { edges: AlignedBuffer::new(EDGES), request: None };
    while Instant::now() < until {
        let Some(job) = lock(&shared.jobs).pop() else { break };
        let path = &loader.manifest.objects[job.object].path;
        if open.as_ref().is_none_or(|(object, _)| *object != job.object) {
            let file = disk.open_large(path, loader.store.url(), &shared.is_cold);
            open = Some((job.object, file.map_err(|e| e.missing_is_corrupt("the manifest"))?));
        }
        let Some((_, file)) = &open else { continue };
        if let Err(error) = one(loader, file, job, &mut memory, &mut report) {
            // The others stop at once; what they were given is lost with the load.
            lock(&shared.jobs).clear();
            return Err(error);
        }
    }
    Ok(report)
}

/// What a thread reads into, where that is not the caller's memory.
struct Memory {
    edges: AlignedBuffer,
    /// Made when a request first needs it.
    request: Option<AlignedBuffer>,
}

/// Reads, verifies and places one request.
fn one(
    loader: &Loader<'_>,
    file: &LargeFile<'_>,
    mut job: Job<'_>,
    memory: &mut Memory,
    report: &mut LoadReport,
) -> Result<(), StoreError> {
    report.requests += 1;
    if job.is_in_place() && file.suits(job.pieces[0].to, job.bytes.start) {
        let (length, piece) = (job.length(), &mut job.pieces[0]);
        let began = Instant::now();
        let come = file.read_into(piece.to, job.bytes.start, &mut memory.edges)?;
        report.read.add(began.elapsed(), length);
        report.bytes_read += file.asked(piece.to.len(), job.bytes.start);
        whole(loader, &job, come as u64)?;
        let (began, piece) = (Instant::now(), &job.pieces[0]);
        loader.verify(piece.state, &piece.read, piece.to)?;
        report.verify.add(began.elapsed(), length);
        return Ok(());
    }
    // Whole pages around the request, which the disk reads fastest.
    let page = PAGE as u64;
    let (start, end) = (job.bytes.start / page * page, job.bytes.end.next_multiple_of(page));
    let (lead, length) = ((job.bytes.start - start) as usize, (end - start) as usize);
    let buffer = match memory.request.take().filter(|b| b.as_slice().len() >= length) {
        Some(large) => memory.request.insert(large),
        None => memory.request.insert(AlignedBuffer::new(length)),
    };
    let began = Instant::now();
    let come = file.read_into(&mut buffer.as_mut_slice()[..length], start, &mut memory.edges)?;
    report.read.add(began.elapsed(), come as u64);
    report.bytes_read += come as u64;
    whole(loader, &job, (come.saturating_sub(lead) as u64).min(job.length()))?;
    let bytes = &buffer.as_slice()[lead..lead + job.length() as usize];
    place(loader, job, bytes, report)
}

/// Verifies the runs of a request and copies what is wanted of them.
pub(super) fn place(
    loader: &Loader<'_>,
    job: Job<'_>,
    bytes: &[u8],
    report: &mut LoadReport,
) -> Result<(), StoreError> {
    for piece in job.pieces {
        let run = &piece.read.bytes;
        let run = &bytes[(run.start - job.bytes.start) as usize..(run.end - job.bytes.start) as usize];
        let began = Instant::now();
        loader.verify(piece.state, &piece.read, run)?;
        report.verify.add(began.elapsed(), run.len() as u64);
        let began = Instant::now();
        piece.to.copy_from_slice(&run[piece.skip..piece.skip + piece.to.len()]);
        report.place.add(began.elapsed(), piece.to.len() as u64);
    }
    Ok(())
}

fn whole(loader: &Loader<'_>, job: &Job<'_>, come: u64) -> Result<(), StoreError> {
    if come == job.length() {
        return Ok(());
    }
    let path = &loader.manifest.objects[job.object].path;
    let (start, end) = (job.bytes.start, job.bytes.end);
    Err(StoreError::Corrupt(format!("{path} is short: bytes {start}..{end} were asked for, {come} came")))
}
