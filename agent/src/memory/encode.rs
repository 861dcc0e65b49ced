//! Making this node's parity of a step: the other members' parts are read range by range and summed.
//!
//! Ranges are a few megabytes, so memory is bounded by them and by the parity itself, and the next range is fetched
//! while this one is encoded. The result lies in a file of the agent's folder, so that it outlives this agent too.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use checkpoint_store::aside;
use checkpoint_store::parity::{Layout, MAX_GROUP, Shard};
use futures::{StreamExt, TryStreamExt};
use memmap2::MmapMut;
use proto::ids::JobName;
use proto::wire::ReadRequest;
use rustix::fs::FallocateFlags;
use tokio::time::Instant;

use super::peers::Peers;
use crate::machine::keeper::StepKey;

/// Bytes of one range of a stripe.
const RANGE: u64 = 4 << 20;
/// Ranges fetched ahead of the one that is encoded.
const AHEAD: usize = 2;

/// What is to be encoded.
#[derive(Debug, Clone)]
pub(crate) struct Encode {
    pub(crate) job: JobName,
    pub(crate) key: StepKey,
    pub(crate) layout: Layout,
    /// Which member this node is.
    pub(crate) me: usize,
    /// Where each member's snapshots are read.
    pub(crate) addresses: Vec<String>,
    /// The folder for parity files.
    pub(crate) folder: PathBuf,
}

/// A finished stripe: its number, its bytes and its file.
pub(crate) type Stripe = (usize, Bytes);

/// Makes all parity shards of this node; with them the processor seconds it took.
pub(crate) async fn encode(peers: &Peers, task: &Encode) -> Result<(Vec<Stripe>, f64), String> {
    let (mut out, mut seconds) = (vec![], 0.0);
    for (row, stripe) in task.layout.parity_stripes(task.me).enumerate() {
        let path = file(&task.folder, &task.job, task.key, stripe);
        let map = room(&path, task.layout.part()).map_err(|error| format!("{}: {error}", path.display()))?;
        let (map, took) = encode_stripe(peers, task, stripe, row, map).await?;
        let map = map.make_read_only().map_err(|error| format!("{}: {error}", path.display()))?;
        seconds += took;
        out.push((stripe, Bytes::from_owner(map)));
    }
    Ok((out, seconds))
}

async fn encode_stripe(
    peers: &Peers,
    task: &Encode,
    stripe: usize,
    row: usize,
    mut map: MmapMut,
) -> Result<(MmapMut, f64), String> {
    let (layout, part) = (task.layout, task.layout.part());
    let ranges = (0..part).step_by(RANGE as usize).map(|start| start..(start + RANGE).min(part));
    let mut fetched = futures::stream::iter(ranges)
        .map(|range| async move {
            let shards = (0..layout.parts()).map(|number| {
                let range = range.clone();
                async move {
                    let holder = layout.holder(stripe, Shard::Data(number));
                    let at = number as u64 * part;
                    let mut bytes = vec![0; (range.end - range.start) as usize];
                    let request = ReadRequest {
                        job: task.job.to_string(),
                        generation: task.key.0,
                        step: task.key.1,
                        stripe: None,
                        start: at + range.start,
                        end: at + range.end,
                    };
                    let address = &task.addresses[holder];
                    let read = peers.read(address, request, &mut bytes).await;
                    read.map(|()| bytes).map_err(|status| format!("reading from {address}: {}", status.message()))
                }
            });
            let shards = futures::future::try_join_all(shards).await?;
            Ok::<_, String>((range, shards))
        })
        .buffered(AHEAD);
    let mut seconds = 0.0;
    while let Some((range, shards)) = fetched.try_next().await? {
        let encoding = aside(move || {
            let began = Instant::now();
            let parts: Vec<&[u8]> = shards.iter().map(Vec::as_slice).collect();
            let out = &mut map[range.start as usize..range.end as usize];
            let done = layout.encode(row, &parts, out).map_err(|error| error.to_string());
            done.map(|()| (map, began.elapsed().as_secs_f64()))
        });
        let (back, took) = encoding.await.map_err(|error| error.to_string())??;
        map = back;
        seconds += took;
    }
    Ok((map, seconds))
}

/// The file of a stripe of a step.
pub(crate) fn file(folder: &Path, job: &JobName, key: StepKey, stripe: usize) -> PathBuf {
    folder.join(format!("parity-{job}-{}-{}-{stripe}", key.0, key.1))
}

/// The note of a step's parity.
pub(super) fn note(folder: &Path, job: &JobName, key: StepKey) -> PathBuf {
    folder.join(format!("parity-{job}-{}-{}.json", key.0, key.1))
}

/// What the other members have said of a step, beside its parity.
pub(super) fn descriptions(folder: &Path, job: &JobName, key: StepKey) -> PathBuf {
    note(folder, job, key).with_extension("descriptions")
}

/// Removes the files of a step's parity; mappings of them keep their bytes.
pub(super) fn remove(folder: &Path, job: &JobName, key: StepKey) {
    // Those that are not there, this node does not hold.
    let _ = std::fs::remove_file(note(folder, job, key));
    let _ = std::fs::remove_file(descriptions(folder, job, key));
    for stripe in 0..MAX_GROUP {
        let _ = std::fs::remove_file(file(folder, job, key, stripe));
    }
}

fn room(path: &Path, bytes: u64) -> std::io::Result<MmapMut> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
    // SAFETY: the file is this agent's own, in a folder of mode 0700; it is removed, never shortened.
    unsafe { MmapMut::map_mut(&file) }
}
