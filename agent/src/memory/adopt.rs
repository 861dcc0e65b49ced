//! What an earlier life of this agent left in its folder: snapshots and parity that may be all a job has of a step.
//!
//! Beside each snapshot's slot lies its capture, beside each parity its group and what the group's other members have
//! said of the step, written when they were whole. An agent
//! that starts takes the folder of a dead one of its own node, proves each snapshot by its hashes, and holds it as if
//! it had captured it itself. What does not prove is dropped: a slot may have been written to again.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use checkpoint_store::parity::MAX_GROUP;
use checkpoint_store::{Capture, Dtype, hash_blocks};
use memmap2::Mmap;
use prost::Message;
use proto::ids::{JobName, NodeName, WorkerId};
use proto::wire;
use serde::{Deserialize, Serialize};

use super::encode;
use super::vault::{Described, Held};
use super::{Memory, OfJob};
use crate::machine::keeper::StepKey;

/// The largest description read back.
const MOST_NOTE: u64 = 64 << 20;

/// What is noted beside a parity file.
#[derive(Debug, Serialize, Deserialize)]
struct ParityNote {
    job: JobName,
    generation: u64,
    step: u64,
    parities: u32,
    members: Vec<(String, String, Vec<u32>)>,
}

/// Notes a snapshot's capture beside its slot.
pub(super) fn note(slot: &Path, capture: &[u8]) -> std::io::Result<()> {
    std::fs::write(slot.with_extension("json"), capture)
}

/// A slot is free, and no snapshot any more.
pub(crate) fn unnote(slots: &Path, slot: u32) {
    // Absent where the snapshot was not kept.
    let _ = std::fs::remove_file(slots.join(format!("slot-{slot}.json")));
}

/// Notes the group of a step's parity beside its files, and the captures of its other members, by which a shard
/// restored from the parity is proved.
pub(super) fn note_parity(
    folder: &Path,
    job: &JobName,
    key: StepKey,
    group: &wire::ParityGroup,
    captures: Vec<Vec<u8>>,
) -> std::io::Result<()> {
    let member = |member: &wire::GroupMember| (member.node.clone(), member.snapshots.clone(), member.ranks.clone());
    let members = group.members.iter().map(member).collect();
    let note = ParityNote { job: job.clone(), generation: key.0, step: key.1, parities: group.parities, members };
    let json = serde_json::to_vec(&note).map_err(std::io::Error::other)?;
    // The note comes last: whoever finds it finds all.
    std::fs::write(encode::descriptions(folder, job, key), wire::StepDescription { captures }.encode_to_vec())?;
    std::fs::write(encode::note(folder, job, key), json)
}

/// Reads a note on parity back; `None` if it is none that an agent has written.
pub(super) fn parity_note(bytes: &[u8]) -> Option<(JobName, StepKey, wire::ParityGroup)> {
    let note: ParityNote = serde_json::from_slice(bytes).ok()?;
    let count = note.members.len();
    if !(2..=MAX_GROUP).contains(&count) || !(1..count).contains(&(note.parities as usize)) {
        return None;
    }
    let member = |(node, snapshots, ranks)| wire::GroupMember { node, snapshots, ranks };
    let members: Vec<wire::GroupMember> = note.members.into_iter().map(member).collect();
    if members.iter().any(|member| NodeName::new(&member.node).is_err()) {
        return None;
    }
    Some((note.job, (note.generation, note.step), wire::ParityGroup { members, parities: note.parities }))
}

/// Reads the captures of a step's members back; those that are none of this step's are left out.
pub(super) fn descriptions(bytes: &[u8], job: &JobName, key: StepKey) -> Vec<(u32, Described)> {
    let captures = wire::StepDescription::decode(bytes).map(|of| of.captures).unwrap_or_default();
    let of_step = |json: Vec<u8>| {
        let capture = Capture::from_json(&json).ok()?;
        let named = (&capture.job, (capture.generation.get(), capture.scalar.step.get()));
        let rank = capture.rank.get();
        (named == (job, key)).then(|| (rank, Described { capture: Arc::new(capture), json: json.into() }))
    };
    captures.into_iter().filter_map(of_step).collect()
}

fn read_note(path: &Path) -> Option<Vec<u8>> {
    let small = std::fs::metadata(path).ok().filter(|of| of.is_file() && of.len() <= MOST_NOTE);
    small.and_then(|_| std::fs::read(path).ok())
}

fn map(path: &Path) -> Option<Bytes> {
    let file = File::open(path).ok()?;
    // SAFETY: the file is of a dead agent's folder, which this agent has taken over; nobody writes to it.
    Some(Bytes::from_owner(unsafe { Mmap::map(&file) }.ok()?))
}

impl Memory {
    /// Takes over what lies in these folders; the workers whose slots are held now, with their folders.
    pub(crate) fn adopt(&mut self, folders: &[PathBuf]) -> BTreeMap<WorkerId, PathBuf> {
        let mut found = BTreeMap::new();
        for folder in folders {
            let Ok(entries) = std::fs::read_dir(folder) else { continue };
            for path in entries.flatten().map(|entry| entry.path()) {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                if let Ok(worker) = name.parse::<WorkerId>() {
                    if self.adopt_worker(worker, &path) {
                        found.insert(worker, path);
                    }
                } else if path.extension().is_some_and(|ending| ending == "json") {
                    self.adopt_parity(folder, &path);
                }
            }
        }
        found
    }

    fn adopt_worker(&mut self, worker: WorkerId, slots: &Path) -> bool {
        let Ok(entries) = std::fs::read_dir(slots) else { return false };
        let notes = entries.flatten().map(|entry| entry.path());
        let mut any = false;
        for note in notes.filter(|path| path.extension().is_some_and(|ending| ending == "json")) {
            any |= self.adopt_snapshot(worker, &note).is_some();
        }
        any
    }

    fn adopt_snapshot(&mut self, worker: WorkerId, note: &Path) -> Option<()> {
        let slot_path = note.with_extension("");
        let slot = slot_path.file_name()?.to_str()?.strip_prefix("slot-")?.parse().ok()?;
        let json = read_note(note)?;
        let capture = Capture::from_json(&json).ok()?;
        let payload = map(&slot_path)?;
        let source = capture.clone().source(payload.clone()).ok()?;
        let block = capture.space.block_elements();
        let right =
            |state: &checkpoint_store::ShardState| hash_blocks(&state.bytes, block, Dtype::F32) == state.hashes.0;
        if !source.states.iter().all(right) {
            return None;
        }
        let (job, key) = (capture.job.clone(), (capture.generation.get(), capture.scalar.step.get()));
        let rank = capture.rank.get();
        let length: usize = source.states.iter().map(|state| state.bytes.len()).sum();
        let described = Described { capture: Arc::new(capture), json: json.into() };
        self.vault.describe(&job, key, rank, described);
        let (source, payload) = (Arc::new(source), payload.slice(..length));
        self.vault.put(&job, key, rank, Held { worker, slot, source, payload, kept: true, uploading: false });
        self.jobs.entry(job.clone()).or_default().keeper.adopt(key, Some(rank));
        tracing::info!(%job, generation = key.0, step = key.1, rank, "a snapshot of an earlier agent is held again");
        Some(())
    }

    fn adopt_parity(&mut self, folder: &Path, path: &Path) -> Option<()> {
        let (job, key, group) = parity_note(&read_note(path)?)?;
        let of: &mut OfJob = self.jobs.entry(job.clone()).or_default();
        for stripe in 0..group.members.len() {
            let from = encode::file(folder, &job, key, stripe);
            if let Some(bytes) = map(&from) {
                self.vault.put_parity(&job, key, stripe, bytes);
                of.keeper.adopt(key, None);
                // Where later ones lie, so that it goes when they do.
                let _ = std::fs::rename(&from, encode::file(&self.folder, &job, key, stripe));
            }
        }
        let said = encode::descriptions(folder, &job, key);
        for (rank, described) in descriptions(&read_note(&said).unwrap_or_default(), &job, key) {
            self.vault.describe(&job, key, rank, described);
        }
        let _ = std::fs::rename(said, encode::descriptions(&self.folder, &job, key));
        let _ = std::fs::rename(path, encode::note(&self.folder, &job, key));
        of.parity_groups.insert(key, group);
        Some(())
    }
}
