//! Filling a worker's slot with its shard of a step that the nodes hold in memory.
//!
//! Each piece comes from the cheapest source that has it: this node's own snapshots, a peer's, the parity of the peers
//! of a lost node, and last a stored checkpoint of the same step. A piece counts only when the hashes of all its blocks
//! are right; if they are not, the next source is tried.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::PathBuf;

use bytes::Bytes;
use checkpoint_store::parity::{COLUMN, Layout, Shard};
use checkpoint_store::{
    Capture, CheckpointRef, Dtype, Manifest, Opener, Space, Store, hash_blocks, in_place, open_checkpoint, read_range,
};
use futures::{StreamExt, TryStreamExt};
use memmap2::MmapMut;
use proto::ids::{JobName, WorldSize};
use proto::wire::{self, FailureKind, ReadRequest, StepRequest};
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::peers::Peers;
use super::plan::{Piece, layout, payload_bytes, pieces, slot_bytes};
use super::vault::Vault;
use crate::machine::keeper::StepKey;

/// Pieces worked on at once.
const AT_ONCE: usize = 4;
/// Bytes of a stripe restored at once.
const RANGE: u64 = 4 << 20;

/// What is to be restored, and where to.
#[derive(Debug, Clone)]
pub(crate) struct Restore {
    pub(crate) job: JobName,
    pub(crate) space: Space,
    pub(crate) rank: u32,
    pub(crate) world: WorldSize,
    /// The step in memory.
    pub(crate) start: wire::MemoryStart,
    /// The slot's file.
    pub(crate) slot: PathBuf,
    /// A stored checkpoint, used if it is of the same step.
    pub(crate) checkpoint: Option<(String, CheckpointRef)>,
    /// This node's name.
    pub(crate) node: String,
    /// How stores are opened.
    pub(crate) stores: Opener,
}

/// How far away a source is; the most distant one that was needed is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    Memory,
    Peer,
    Parity,
    Store,
}

impl Source {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Peer => "peer",
            Self::Parity => "parity",
            Self::Store => "store",
        }
    }
}

/// A failure, as the worker is to report it.
pub(crate) type Failure = (FailureKind, String);

fn transient(reason: impl std::fmt::Display) -> Failure {
    (FailureKind::Transient, reason.to_string())
}

/// All that reading needs.
struct Reader<'a> {
    vault: &'a Vault,
    peers: &'a Peers,
    task: &'a Restore,
    key: StepKey,
    before: WorldSize,
    captures: BTreeMap<u32, std::sync::Arc<Capture>>,
    /// The stored checkpoint, once a piece was needed from it.
    stored: OnceCell<(Store, Manifest)>,
}

/// What a restore did.
#[derive(Debug)]
pub(crate) struct Restored {
    /// The most distant source that was needed.
    pub(crate) source: Source,
    /// Seconds and bytes of each source, and of verifying.
    pub(crate) stages: Vec<wire::LoadStage>,
    /// The grids the state's next step begins with, as [`wire::Restored`] carries them.
    pub(crate) exponents: Vec<u8>,
}

/// One piece's source, and the seconds that reading and verifying took.
struct Filled {
    source: Source,
    bytes: u64,
    reading: f64,
    verifying: f64,
}

/// Adds up what the pieces cost.
#[derive(Default)]
struct Costs(BTreeMap<Source, (f64, u64)>, f64, u64);

impl Costs {
    fn add(&mut self, filled: &Filled) {
        let of = self.0.entry(filled.source).or_default();
        (of.0, of.1) = (of.0 + filled.reading, of.1 + filled.bytes);
        (self.1, self.2) = (self.1 + filled.verifying, self.2 + filled.bytes);
    }

    fn done(self, exponents: Vec<u8>) -> Restored {
        let source = self.0.keys().next_back().copied().unwrap_or(Source::Memory);
        let stage = |name: &str, seconds, bytes| wire::LoadStage { name: name.into(), seconds, bytes };
        let sources = self.0.iter().map(|(source, (seconds, bytes))| stage(source.name(), *seconds, *bytes));
        Restored { source, stages: sources.chain([stage("verify", self.1, self.2)]).collect(), exponents }
    }
}

/// Fills the slot.
pub(crate) async fn restore(vault: &Vault, peers: &Peers, task: &Restore) -> Result<Restored, Failure> {
    let key = (task.start.generation, task.start.step);
    let before = WorldSize::new(task.start.world_size).ok_or_else(|| transient("the step in memory has no ranks"))?;
    let mut reader = Reader { vault, peers, task, key, before, captures: BTreeMap::new(), stored: OnceCell::new() };
    let pieces = pieces(&task.space, before, task.rank, task.world);
    // A rank without a shard needs the scalar state all the same.
    for rank in pieces.iter().map(|piece| piece.rank).chain(pieces.is_empty().then_some(0)) {
        reader.learn(rank).await?;
    }
    let exponents = reader.exponents()?;
    let open = || -> std::io::Result<MmapMut> {
        let file = OpenOptions::new().read(true).write(true).open(&task.slot)?;
        // SAFETY: the slot lies in this agent's folder of mode 0700; the worker waits until it is filled.
        unsafe { MmapMut::map_mut(&file) }
    };
    let mut map = open().map_err(|error| transient(format!("{}: {error}", task.slot.display())))?;
    if (map.len() as u64) < slot_bytes(&task.space, task.rank, task.world) {
        return Err((FailureKind::Fatal, format!("{} is smaller than the shard", task.slot.display())));
    }
    let reader = &reader;
    let work: Vec<_> = split(pieces, &mut map).into_iter().map(|(piece, out)| reader.fill(piece, out)).collect();
    let mut pieces = futures::stream::iter(work).buffer_unordered(AT_ONCE);
    let mut costs = Costs::default();
    while let Some(filled) = pieces.try_next().await? {
        costs.add(&filled);
    }
    Ok(costs.done(exponents))
}

/// Each piece with its place in the slot.
fn split(mut pieces: Vec<Piece>, mut rest: &mut [u8]) -> Vec<(Piece, &mut [u8])> {
    pieces.sort_by_key(|piece| piece.to.start);
    let (mut out, mut at) = (Vec::with_capacity(pieces.len()), 0);
    for piece in pieces {
        let (_, after) = rest.split_at_mut((piece.to.start - at) as usize);
        let (place, after) = after.split_at_mut((piece.to.end - piece.to.start) as usize);
        at = piece.to.end;
        rest = after;
        out.push((piece, place));
    }
    out
}

impl Reader<'_> {
    /// The group of a rank, and which member holds its shard.
    fn group(&self, rank: u32) -> Option<(&wire::ParityGroup, usize)> {
        self.task.start.groups.iter().find_map(|group| {
            let at = group.members.iter().position(|member| member.ranks.contains(&rank))?;
            Some((group, at))
        })
    }

    /// Learns a rank's capture: its hashes are what its bytes are proved by.
    async fn learn(&mut self, rank: u32) -> Result<(), Failure> {
        if self.captures.contains_key(&rank) {
            return Ok(());
        }
        let own = self.vault.captures(&self.task.job, self.key);
        for (rank, described) in own {
            if self.fits(&described.capture) {
                self.captures.insert(rank, described.capture);
            }
        }
        let members = self.group(rank).map(|(group, _)| group.members.clone()).unwrap_or_default();
        for member in members.iter().filter(|member| !member.snapshots.is_empty() && member.node != self.task.node) {
            if self.captures.contains_key(&rank) {
                return Ok(());
            }
            let (generation, step) = self.key;
            let request = StepRequest { job: self.task.job.to_string(), generation, step };
            let Ok(description) = self.peers.describe(&member.snapshots, request).await else { continue };
            for json in &description.captures {
                if let Ok(capture) = Capture::from_json(json)
                    && self.fits(&capture)
                {
                    self.captures.entry(capture.rank.get()).or_insert_with(|| capture.into());
                }
            }
        }
        if self.captures.contains_key(&rank) {
            return Ok(());
        }
        Err(transient(format!("nobody in reach can describe rank {rank}'s snapshot of step {}", self.key.1)))
    }

    /// The grids of the state, on which all its captures must agree.
    fn exponents(&self) -> Result<Vec<u8>, Failure> {
        let mut captures = self.captures.values();
        let Some(first) = captures.next() else { return Ok(vec![]) };
        if captures.any(|other| other.scalar.exponents != first.scalar.exponents) {
            return Err(transient(format!("the snapshots of step {} are of different scalar states", self.key.1)));
        }
        let bytes = first.scalar.exponents.iter().map(|e| i8::try_from(*e).map(i8::cast_unsigned));
        bytes.collect::<Result<_, _>>().map_err(|_| transient("a snapshot's grids are none"))
    }

    /// Whether a capture is of the step, and complete.
    fn fits(&self, capture: &Capture) -> bool {
        let place = (capture.generation.get(), capture.scalar.step.get());
        let blocks = self.task.space.shard_blocks(capture.rank, self.before);
        let count = (blocks.end - blocks.start) as usize;
        capture.job == self.task.job
            && place == self.key
            && capture.world_size == self.before
            && capture.space == self.task.space
            && capture.hashes.len() == 3
            && capture.hashes.iter().all(|list| list.0.len() == count)
    }

    /// Fills one piece from the first source whose bytes are right.
    async fn fill(&self, piece: Piece, out: &mut [u8]) -> Result<Filled, Failure> {
        let (piece, bytes) = (&piece, out.len() as u64);
        let mut reasons: Vec<String> = vec![];
        for source in [Source::Memory, Source::Peer, Source::Parity, Source::Store] {
            let began = Instant::now();
            let read = match source {
                Source::Memory => self.read_memory(piece, out),
                Source::Peer => self.read_peer(piece, out).await,
                Source::Parity => self.read_parity(piece, out).await,
                Source::Store => self.read_store(piece, out).await,
            };
            let reading = began.elapsed();
            match read {
                Ok(()) if self.is_right(piece, out) => {
                    let (reading, verifying) =
                        (reading.as_secs_f64(), began.elapsed().saturating_sub(reading).as_secs_f64());
                    return Ok(Filled { source, bytes, reading, verifying });
                }
                Ok(()) => reasons.push(format!("{}: the bytes do not have their hashes", source.name())),
                Err(reason) => reasons.push(format!("{}: {reason}", source.name())),
            }
        }
        let (rank, step) = (piece.rank, self.key.1);
        Err(transient(format!("rank {rank}'s snapshot of step {step} cannot be had: {}", reasons.join("; "))))
    }

    fn is_right(&self, piece: &Piece, bytes: &[u8]) -> bool {
        let Some(capture) = self.captures.get(&piece.rank) else { return false };
        let first = self.task.space.shard_blocks(capture.rank, self.before).start;
        let list = &capture.hashes[piece.state as usize].0;
        let (start, end) = ((piece.blocks.start - first) as usize, (piece.blocks.end - first) as usize);
        let block = self.task.space.block_elements();
        let found = in_place(|| hash_blocks(bytes, block, Dtype::F32));
        list.get(start..end).is_some_and(|right| right == found)
    }

    fn read_memory(&self, piece: &Piece, out: &mut [u8]) -> Result<(), String> {
        let held = self.vault.snapshot(&self.task.job, self.key, piece.rank).ok_or("not held here")?;
        let (from, to) = (piece.from.start as usize, piece.from.end as usize);
        out.copy_from_slice(held.payload.get(from..to).ok_or("the snapshot is too short")?);
        Ok(())
    }

    /// Where a rank's slot begins in its node's payload.
    fn base(&self, member: &wire::GroupMember, rank: u32) -> u64 {
        let before: Vec<u32> = member.ranks.iter().copied().filter(|other| *other < rank).collect();
        payload_bytes(&self.task.space, &before, self.before)
    }

    async fn read_peer(&self, piece: &Piece, out: &mut [u8]) -> Result<(), String> {
        let (group, at) = self.group(piece.rank).ok_or("no node had it")?;
        let member = &group.members[at];
        let base = self.base(member, piece.rank);
        self.read(member, None, base + piece.from.start..base + piece.from.end, out).await
    }

    /// Reads from another node, or from this one.
    async fn read(
        &self,
        member: &wire::GroupMember,
        stripe: Option<usize>,
        range: std::ops::Range<u64>,
        out: &mut [u8],
    ) -> Result<(), String> {
        if member.snapshots.is_empty() {
            return Err(format!("node {} is lost", member.node));
        }
        if member.node == self.task.node {
            let parts: Option<Vec<Bytes>> = match stripe {
                None => self.vault.payload(&self.task.job, self.key, range),
                Some(stripe) => self.vault.parity(&self.task.job, self.key, stripe, range).map(|bytes| vec![bytes]),
            };
            let mut rest = &mut *out;
            for part in parts.ok_or("not held here")? {
                let (place, after) = rest.split_at_mut_checked(part.len()).ok_or("more than was asked for")?;
                place.copy_from_slice(&part);
                rest = after;
            }
            return Ok(());
        }
        let request = ReadRequest {
            job: self.task.job.to_string(),
            generation: self.key.0,
            step: self.key.1,
            stripe: stripe.map(|stripe| stripe as u32),
            start: range.start,
            end: range.end,
        };
        let read = self.peers.read(&member.snapshots, request, out).await;
        read.map_err(|status| format!("node {}: {}", member.node, status.message()))
    }

    async fn read_parity(&self, piece: &Piece, out: &mut [u8]) -> Result<(), String> {
        let (group, lost) = self.group(piece.rank).ok_or("no node had it")?;
        let ranks: Vec<Vec<u32>> = group.members.iter().map(|member| member.ranks.clone()).collect();
        let layout = layout(&self.task.space, &ranks, self.before, group.parities as usize);
        let layout = layout.ok_or("the group has no parity")?;
        let base = self.base(&group.members[lost], piece.rank);
        let (mut at, end) = (base + piece.from.start, base + piece.from.end);
        let mut done = 0;
        while at < end {
            let part = at / layout.part();
            let start = at % layout.part() / COLUMN * COLUMN;
            let stop = (start + RANGE).min(layout.part());
            let stop = stop.min((end - part * layout.part()).div_ceil(COLUMN) * COLUMN);
            let bytes = self.restore_columns(group, layout, lost, part as usize, start..stop).await?;
            let skip = (at - part * layout.part() - start) as usize;
            let take = (bytes.len() - skip).min((end - at) as usize);
            out[done..done + take].copy_from_slice(&bytes[skip..skip + take]);
            done += take;
            at += take as u64;
        }
        Ok(())
    }

    /// A range of a lost node's part, from the other shards of its stripe.
    async fn restore_columns(
        &self,
        group: &wire::ParityGroup,
        layout: Layout,
        lost: usize,
        part: usize,
        range: std::ops::Range<u64>,
    ) -> Result<Vec<u8>, String> {
        let stripe = layout.stripe_of(lost, part);
        let length = (range.end - range.start) as usize;
        let mut have: Vec<(Shard, Vec<u8>)> = vec![];
        let mut reasons = vec![];
        for (other, member) in group.members.iter().enumerate().filter(|(other, _)| *other != lost) {
            if have.len() == layout.parts() {
                break;
            }
            let shard = layout.shard_on(other, stripe);
            let mut bytes = vec![0; length];
            let read = match shard {
                Shard::Data(number) => {
                    let at = number as u64 * layout.part();
                    self.read(member, None, at + range.start..at + range.end, &mut bytes).await
                }
                Shard::Parity(_) => self.read(member, Some(stripe), range.clone(), &mut bytes).await,
            };
            match read {
                Ok(()) => have.push((shard, bytes)),
                Err(reason) => reasons.push(reason),
            }
        }
        if have.len() < layout.parts() {
            return Err(format!("{} of {} shards are left ({})", have.len(), layout.parts(), reasons.join(", ")));
        }
        let shards: Vec<(Shard, &[u8])> = have.iter().map(|(shard, bytes)| (*shard, bytes.as_slice())).collect();
        let mut out = vec![0; length];
        let restored = in_place(|| layout.restore(part, &shards, &mut out));
        restored.map(|()| out).map_err(|error| error.to_string())
    }

    async fn read_store(&self, piece: &Piece, out: &mut [u8]) -> Result<(), String> {
        let Some((url, reference)) = &self.task.checkpoint else { return Err("not stored".into()) };
        if reference.step.get() != self.key.1 {
            return Err(format!("the newest stored checkpoint is of step {}", reference.step));
        }
        let read = async {
            let open = || async {
                let store = self.task.stores.open_existing(url)?;
                let manifest = open_checkpoint(&store, &self.task.job, reference).await?;
                Ok::<_, checkpoint_store::StoreError>((store, manifest))
            };
            let (store, manifest) = self.stored.get_or_try_init(open).await?;
            let range = self.task.space.blocks_to_elements(piece.blocks.clone());
            let state = ["param", "exp_avg", "exp_avg_sq"][piece.state as usize];
            read_range(store, manifest, state, range, out).await
        };
        read.await.map_err(|error: checkpoint_store::StoreError| error.to_string())
    }
}
