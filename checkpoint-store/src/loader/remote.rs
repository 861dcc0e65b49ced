//! Loading from a bucket: ranged requests in flight, each verified off the async threads and then put into place.

use std::time::Instant;

use futures::stream::{FuturesUnordered, StreamExt};

use super::{Job, LoadReport, Loader, REQUESTS};
use crate::aside::aside;
use crate::digest::BlockHash;
use crate::error::StoreError;

pub(super) async fn load(loader: &Loader<'_>, jobs: Vec<Job<'_>>, report: &mut LoadReport) -> Result<(), StoreError> {
    let (mut waiting, mut flight) = (jobs.into_iter(), FuturesUnordered::new());
    loop {
        while flight.len() < REQUESTS
            && let Some(job) = waiting.next()
        {
            flight.push(one(loader, job));
        }
        let Some(done) = flight.next().await else { break };
        report.add_work(&done?);
    }
    Ok(())
}

async fn one(loader: &Loader<'_>, job: Job<'_>) -> Result<LoadReport, StoreError> {
    let (manifest, mut report) = (loader.manifest, LoadReport::default());
    let path = &manifest.objects[job.object].path;
    let began = Instant::now();
    let bytes = loader.store.get_range(path, job.bytes.clone()).await;
    let bytes = bytes.map_err(|e| e.missing_is_corrupt("the manifest"))?;
    report.requests = 1;
    report.bytes_read = job.length();
    report.read.add(began.elapsed(), job.length());

    // What the hashing thread needs, as its own: where each block ends, and what its hash must be.
    let began = Instant::now();
    let mut expected = vec![];
    for piece in &job.pieces {
        let block = manifest.block_elements * manifest.states[piece.state].dtype.size();
        let run = piece.read.bytes.start - job.bytes.start..piece.read.bytes.end - job.bytes.start;
        let hashes = &manifest.hashes[piece.state].0[piece.read.blocks.start as usize..piece.read.blocks.end as usize];
        let starts = (run.start..run.end).step_by(block as usize);
        expected.extend(starts.zip(hashes).map(|(at, hash)| (at as usize..(at + block).min(run.end) as usize, *hash)));
    }
    let checked = bytes.clone();
    let good = aside(move || {
        expected.iter().all(|(range, hash)| checked.get(range.clone()).is_some_and(|b| BlockHash::of(b) == *hash))
    });
    let good = good.await.map_err(|e| StoreError::unavailable(format!("verifying {path}"), e))?;
    report.verify.add(began.elapsed(), job.length());
    if !good {
        // Once more, to say which block it is.
        return super::local::place(loader, job, &bytes, &mut report).map(|()| report);
    }
    for piece in job.pieces {
        let began = Instant::now();
        let from = (piece.read.bytes.start - job.bytes.start) as usize + piece.skip;
        let length = piece.to.len();
        piece.to.copy_from_slice(&bytes[from..from + length]);
        report.place.add(began.elapsed(), length as u64);
    }
    Ok(report)
}
