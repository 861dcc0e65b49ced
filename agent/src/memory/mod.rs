//! The memory tier on this node (§8): snapshots in slots, parity among agents, and restoring from both.
//!
//! [`crate::machine::keeper`] decides what is kept; this file carries it out. `vault` holds the bytes, `service` and
//! `peers` are the two ends between agents, `group` is what members tell one another, `encode` makes parity, `restore`
//! fills a slot by the `plan` of where bytes lie, `adopt` takes over what an earlier life of this agent left.

pub(crate) mod adopt;
mod encode;
mod group;
mod heard;
pub(crate) mod hostile;
mod peers;
mod plan;
mod probe;
mod restore;
mod service;
mod sync;
#[cfg(test)]
mod tests;
mod times;
mod vault;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint_store::{BlockHash, Capture, CheckpointRef, Opener, ShardSource, Space, Stage, StoreError};
use memmap2::Mmap;
use proto::ids::{JobName, WorkerId, WorldSize};
use proto::spec::JobSpec;
use proto::wire;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use self::encode::{Encode, Stripe};
use self::heard::Heard;
use self::sync::Telling;
use self::vault::{Described, Held, Vault};
use crate::driver::Input;
use crate::machine::keeper::{Keep, Keeper, Membership, Shortage, StepKey};

pub(crate) use self::group::Holds;
pub(crate) use self::peers::Peers;
pub(crate) use self::service::{check_security, serve};
pub(crate) use self::times::ParityTimes;

/// What follows for the node's workers.
#[derive(Debug)]
pub(crate) enum Effect {
    /// A slot is free again.
    Free(WorkerId, u32),
    /// Which steps are complete in the job's parity group, or given up, has changed.
    Kept(JobName, wire::StepsKept),
}

/// This node's parity of a step is made, or could not be.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) job: JobName,
    pub(crate) key: StepKey,
    pub(crate) made: Result<(Vec<Stripe>, f64), String>,
}

/// Between two tries to make a step's parity.
const ENCODE_AGAIN: Duration = Duration::from_millis(250);

#[derive(Debug)]
struct OfJob {
    keeper: Keeper,
    space: Option<Space>,
    /// Snapshots outlive their upload.
    enabled: bool,
    /// Parity group of the present generation, and its size in ranks.
    group: wire::ParityGroup,
    world: Option<WorldSize>,
    /// The group each parity was made in.
    parity_groups: BTreeMap<StepKey, wire::ParityGroup>,
    /// What peers are told.
    telling: Option<Telling>,
    /// The step captured last, when it was heard of, and how long after its capture that was, in seconds.
    captured: (StepKey, Instant, f64),
    /// Processor seconds of the last parity, for each of this node's ranks.
    seconds: f64,
    /// Of steps that this node does not hold yet.
    heard: Heard,
    /// The step whose parity could not be made at the last try.
    unmade: Option<StepKey>,
    skipped: u64,
    /// Slots being filled, by worker.
    restoring: BTreeMap<WorkerId, AbortHandle>,
    /// What the present generation starts from, and where checkpoints are stored.
    start: Option<wire::MemoryStart>,
    reference: Vec<u8>,
    store: String,
}

impl Default for OfJob {
    fn default() -> Self {
        Self {
            keeper: Keeper::default(),
            space: None,
            enabled: false,
            group: wire::ParityGroup::default(),
            world: None,
            parity_groups: BTreeMap::new(),
            telling: None,
            captured: ((0, 0), Instant::now(), 0.0),
            seconds: 0.0,
            heard: Heard::default(),
            unmade: None,
            skipped: 0,
            restoring: BTreeMap::new(),
            start: None,
            reference: vec![],
            store: String::new(),
        }
    }
}

/// The memory tier of this node.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) times: ParityTimes,
    node: String,
    pub(crate) vault: Vault,
    peers: Peers,
    stores: Opener,
    folder: PathBuf,
    budget: u64,
    inputs: mpsc::Sender<Input>,
    jobs: BTreeMap<JobName, OfJob>,
}

impl Memory {
    pub(crate) fn new(
        node: String,
        peers: Peers,
        stores: Opener,
        folder: PathBuf,
        budget: u64,
        inputs: mpsc::Sender<Input>,
    ) -> Self {
        let (times, vault, jobs) = (ParityTimes::default(), Vault::default(), BTreeMap::new());
        Self { times, node, vault, peers, stores, folder, budget, inputs, jobs }
    }

    /// Bytes that snapshots and parity may take on this node.
    pub(crate) fn budget(&self) -> u64 {
        self.budget
    }

    /// Takes in what the coordinator wants of a job.
    pub(crate) fn desired(&mut self, job: &JobName, desired: &wire::Desired, spec: &JobSpec) -> Vec<Effect> {
        let of = self.jobs.entry(job.clone()).or_default();
        of.enabled = spec.checkpoint.memory;
        of.store.clone_from(&spec.checkpoint.store);
        of.space = Space::of_model(&spec.model).ok();
        let Some(run) = &desired.run else {
            of.keeper.fence(desired.fenced);
            return vec![];
        };
        of.keeper.fence(run.generation.saturating_sub(1));
        let alone = || wire::ParityGroup {
            parities: 0,
            members: vec![wire::GroupMember {
                node: self.node.clone(),
                snapshots: String::new(),
                ranks: run.placements.iter().map(|placement| placement.rank).collect(),
            }],
        };
        let group = run.group.clone().unwrap_or_else(alone);
        let Some(me) = group.members.iter().position(|member| member.node == self.node) else { return vec![] };
        let membership = Membership {
            generation: run.generation,
            members: group.members.iter().map(|member| member.ranks.clone()).collect(),
            me,
            parities: group.parities as usize,
            groups: run.groups,
            start: run.memory.as_ref().map(|start| (start.generation, start.step)),
        };
        let todo = of.keeper.announce(membership);
        if !todo.is_empty() {
            of.world = WorldSize::new(run.world_size);
            of.start.clone_from(&run.memory);
            of.reference.clone_from(&run.start);
            let state = wire::GroupState { job: job.to_string(), generation: run.generation, ..Default::default() };
            let others = group.members.iter().filter(|member| member.node != self.node);
            let addresses = others.map(|member| member.snapshots.clone());
            let state = wire::GroupState { node: self.node.clone(), ..state };
            of.telling = Some(Telling::start(&self.peers, addresses, state));
            of.group = group;
            of.heard.clear();
            // What still fills a slot for an earlier generation must not write into one that is used anew.
            for task in std::mem::take(&mut of.restoring).into_values() {
                task.abort();
            }
        }
        self.carry_out(job, todo)
    }

    /// Maps a slot that a worker has captured into; the shard and where its time has gone so far, for an upload.
    pub(crate) fn captured(
        &mut self,
        job: &JobName,
        worker: WorkerId,
        slots: &Path,
        captured: &wire::Captured,
    ) -> Result<(Arc<ShardSource>, Vec<Stage>), StoreError> {
        let path = slots.join(format!("slot-{}", captured.slot));
        let (capture, map) = open(&path, job, captured)?;
        let described = Described { capture: Arc::new(capture.clone()), json: captured.capture.clone().into() };
        let payload = Bytes::from_owner(map);
        let stages = capture.stages.clone();
        let source = Arc::new(capture.source(payload.clone())?);
        let length: usize = source.states.iter().map(|state| state.bytes.len()).sum();
        let of = self.jobs.entry(job.clone()).or_default();
        let key = (captured.generation, captured.step);
        let kept = of.enabled && of.keeper.captured(key, captured.rank);
        if kept {
            self.vault.describe(job, key, captured.rank, described);
            for (rank, described) in of.heard.take(key) {
                self.vault.describe(job, key, rank, described);
            }
            if let Err(error) = adopt::note(&path, &captured.capture) {
                tracing::warn!(path = %path.display(), %error, "a snapshot would not survive this agent");
            }
        }
        let payload = payload.slice(..length);
        let (slot, uploading) = (captured.slot, captured.store);
        let held = Held { worker, slot, source: source.clone(), payload, kept, uploading };
        self.vault.put(job, key, captured.rank, held);
        let so_far = stages.iter().map(|stage| stage.start_micros.saturating_add(stage.micros)).max().unwrap_or(0);
        of.keeper.hashed(Duration::from_micros(so_far));
        of.captured = (key, Instant::now(), so_far as f64 / 1e6);
        Ok((source, stages))
    }

    /// After any change, and as time goes by: what the keeper wants done. `now` is the agent's age.
    pub(crate) fn advance(&mut self, job: &JobName, now: Duration) -> Vec<Effect> {
        let todo = self.jobs.get_mut(job).map(|of| of.keeper.advance(now)).unwrap_or_default();
        self.carry_out(job, todo)
    }

    /// The jobs of which anything is held.
    pub(crate) fn jobs(&self) -> Vec<JobName> {
        self.jobs.keys().cloned().collect()
    }

    /// No upload reads a snapshot any more.
    pub(crate) fn uploaded(&mut self, job: &JobName, key: StepKey, rank: u32) -> Vec<Effect> {
        let free = self.vault.let_go(job, key, |of, held| held.uploading &= of != rank);
        free.into_iter().map(|held| Effect::Free(held.worker, held.slot)).collect()
    }

    /// This node's parity of a step is made, or could not be.
    pub(crate) fn encoded(&mut self, encoded: Encoded) {
        let Encoded { job, key, made } = encoded;
        let Some(of) = self.jobs.get_mut(&job).filter(|of| of.keeper.keeps(key)) else {
            // Released meanwhile.
            return encode::remove(&self.folder, &job, key);
        };
        match made {
            Ok((stripes, seconds)) => {
                let mine = of.group.members.iter().find(|member| member.node == self.node);
                let ranks = mine.map_or(&[][..], |member| &member.ranks);
                of.seconds = seconds / ranks.len().max(1) as f64;
                let said = self.vault.captures(&job, key).into_iter().filter(|(rank, _)| !ranks.contains(rank));
                let said = said.map(|(_, described)| described.json.to_vec()).collect();
                of.parity_groups.insert(key, of.group.clone());
                if let Err(error) = adopt::note_parity(&self.folder, &job, key, &of.group, said) {
                    tracing::warn!(%job, step = key.1, %error, "parity would not survive this agent");
                }
                for (stripe, bytes) in stripes {
                    self.vault.put_parity(&job, key, stripe, bytes);
                }
                of.keeper.encoded(key, true);
            }
            Err(reason) => {
                if of.unmade != Some(key) {
                    tracing::warn!(%job, generation = key.0, step = key.1, reason, "parity was not made; trying again");
                }
                of.unmade = Some(key);
                of.keeper.encoded(key, false);
            }
        }
    }

    /// What has become of steps in all groups.
    pub(crate) fn kept_everywhere(&mut self, job: &JobName, kept: &wire::StepsKept) -> Vec<Effect> {
        let Some(of) = self.jobs.get_mut(job) else { return vec![] };
        let newest = kept.complete.iter().max().map(|step| (kept.generation, *step));
        let todo = newest.map(|key| of.keeper.complete_everywhere(key)).unwrap_or_default();
        of.keeper.given_up_elsewhere(kept.generation, &kept.given_up);
        self.carry_out(job, todo)
    }

    /// What the node's workers are told of the steps of the present generation.
    fn kept(&self, job: &JobName) -> Option<Effect> {
        let of = self.jobs.get(job)?;
        let kept = wire::StepsKept {
            generation: of.telling.as_ref()?.generation(),
            complete: of.keeper.complete().collect(),
            given_up: of.keeper.given_up().collect(),
            seconds: of.seconds,
        };
        Some(Effect::Kept(job.clone(), kept))
    }

    /// A capture was due and found no slot; snapshots for memory alone are counted here.
    pub(crate) fn skipped(&mut self, job: &JobName, of: Shortage) {
        let job = self.jobs.entry(job.clone()).or_default();
        job.skipped += u64::from(of == Shortage::Memory);
        job.keeper.short(of);
    }

    /// Whether the memory tier needs a rank's snapshot of a step, or only its upload.
    pub(crate) fn keeps(&self, job: &JobName, key: StepKey, rank: u32) -> bool {
        self.vault.snapshot(job, key, rank).is_some_and(|held| held.kept)
    }

    /// Fills a worker's slot in the background; the answer comes as an input.
    pub(crate) fn restore(&mut self, job: &JobName, worker: WorkerId, rank: u32, slot: PathBuf, generation: u64) {
        let answer = move |step, result: Result<restore::Restored, restore::Failure>| {
            let answer = match result {
                Ok(restore::Restored { source, stages, exponents }) => {
                    let source = source.name().to_string();
                    wire::Restored { generation, step, source, stages, exponents, failure: None }
                }
                Err((kind, reason)) => {
                    let failure = Some(wire::Failure { kind: kind.into(), reason, ..Default::default() });
                    wire::Restored { generation, step, failure, ..Default::default() }
                }
            };
            Input::Restored { worker, answer }
        };
        let of = self.jobs.entry(job.clone()).or_default();
        let present = of.telling.as_ref().is_some_and(|telling| telling.generation() == generation);
        let known = of.start.clone().filter(|_| present).zip(of.space.clone()).zip(of.world);
        let inputs = self.inputs.clone();
        let Some(((start, space), world)) = known else {
            let failure = (wire::FailureKind::Transient, "there is no step in memory to restore".to_string());
            drop(inputs.try_send(answer(0, Err(failure))));
            return;
        };
        let step = start.step;
        let checkpoint = serde_json::from_slice::<CheckpointRef>(&of.reference).ok();
        let checkpoint = checkpoint.map(|reference| (of.store.clone(), reference));
        let (node, stores) = (self.node.clone(), self.stores.clone());
        let task = restore::Restore { job: job.clone(), space, rank, world, start, slot, checkpoint, node, stores };
        let (vault, peers) = (self.vault.clone(), self.peers.clone());
        let work = tokio::spawn(async move { restore::restore(&vault, &peers, &task).await });
        of.restoring.insert(worker, work.abort_handle());
        tokio::spawn(async move {
            let result = match work.await {
                // Another generation has begun: nobody waits for the answer.
                Err(error) if error.is_cancelled() => return,
                Err(error) => Err((wire::FailureKind::Fatal, format!("a defect in restoring: {error}"))),
                Ok(result) => result,
            };
            let _ = inputs.send(answer(step, result)).await;
        });
    }

    /// The job is gone from this node.
    pub(crate) fn forget(&mut self, job: &JobName) -> Vec<Effect> {
        if let Some(of) = self.jobs.remove(job) {
            of.parity_groups.keys().for_each(|key| encode::remove(&self.folder, job, *key));
        }
        self.vault.forget(job).into_iter().map(|held| Effect::Free(held.worker, held.slot)).collect()
    }

    /// What this node holds, for the coordinator.
    pub(crate) fn inventory(&self) -> Vec<wire::JobMemory> {
        let of_job = |(job, of): (&JobName, &OfJob)| {
            let snapshots = self.vault.inventory(job).into_iter().map(|(key, rank, source)| wire::HeldSnapshot {
                generation: key.0,
                step: key.1,
                rank,
                world_size: source.world_size.get(),
                hash: content_hash(&source).as_bytes().to_vec(),
            });
            let parity = of.parity_groups.iter().filter(|(key, _)| self.vault.stripes(job, **key) > 0);
            let parity = parity.map(|(key, group)| wire::HeldParity {
                generation: key.0,
                step: key.1,
                group: Some(group.clone()),
            });
            wire::JobMemory {
                job: job.to_string(),
                fenced: of.keeper.fenced(),
                snapshots: snapshots.collect(),
                parity: parity.collect(),
                skipped: of.skipped,
            }
        };
        self.jobs.iter().map(of_job).collect()
    }

    fn carry_out(&mut self, job: &JobName, todo: Vec<Keep>) -> Vec<Effect> {
        let (mut effects, mut news) = (vec![], false);
        for keep in todo {
            news |= matches!(keep, Keep::Complete(_) | Keep::GiveUp(_));
            match keep {
                Keep::Encode(key) => self.encode(job, key),
                Keep::Publish => self.publish(job),
                Keep::Ask => self.ask(job),
                Keep::GiveUp((generation, step)) => {
                    tracing::warn!(
                        %job, generation, step,
                        "a snapshot is given up: not every member of its parity group can hold it and make its parity"
                    );
                }
                Keep::Complete(_) => {}
                Keep::Release(key) => {
                    let free = self.vault.let_go(job, key, |_, held| held.kept = false);
                    effects.extend(free.into_iter().map(|held| Effect::Free(held.worker, held.slot)));
                    self.vault.forget_step(job, key);
                    if let Some(of) = self.jobs.get_mut(job) {
                        of.parity_groups.remove(&key);
                    }
                    encode::remove(&self.folder, job, key);
                }
            }
        }
        if let Some(kept) = self.kept(job).filter(|_| news) {
            // Before the slots that become free by it.
            effects.insert(0, kept);
        }
        effects
    }

    fn encode(&mut self, job: &JobName, key: StepKey) {
        let Some(of) = self.jobs.get_mut(job) else { return };
        let ranks: Vec<Vec<u32>> = of.group.members.iter().map(|member| member.ranks.clone()).collect();
        let shape = of.space.as_ref().zip(of.world);
        let layout = shape.and_then(|(space, world)| plan::layout(space, &ranks, world, of.group.parities as usize));
        let me = of.group.members.iter().position(|member| member.node == self.node);
        let (Some(layout), Some(me)) = (layout, me) else { return of.keeper.encoded(key, true) };
        let needed = self.vault.bytes().saturating_add(layout.parity_bytes());
        if self.budget > 0 && needed > self.budget {
            tracing::warn!(
                %job, step = key.1, needed, budget = self.budget,
                "no parity on this node: it would be over its memory budget; raise --memory-budget"
            );
            return of.keeper.encoded(key, true);
        }
        let addresses = of.group.members.iter().map(|member| member.snapshots.clone()).collect();
        let task = Encode { job: job.clone(), key, layout, me, addresses, folder: self.folder.clone() };
        let (peers, inputs, times) = (self.peers.clone(), self.inputs.clone(), self.times.clone());
        let (last, heard, after) = of.captured;
        let (began, bytes) = (Instant::now(), layout.parity_bytes());
        let start = if last == key { after + began.duration_since(heard).as_secs_f64() } else { 0.0 };
        tokio::spawn(async move {
            let job = task.job.clone();
            let work = tokio::spawn(async move { encode::encode(&peers, &task).await });
            let made = work.await.unwrap_or_else(|error| Err(format!("a defect in encoding: {error}")));
            match &made {
                Ok(_) => times.note(&job, key, Stage::new("parity", start, began.elapsed().as_secs_f64(), bytes)),
                // It is tried again as soon as this is known; whoever could not be reached is given time to come back.
                Err(_) => tokio::time::sleep(ENCODE_AGAIN).await,
            }
            let _ = inputs.send(Input::Encoded(Encoded { job, key, made })).await;
        });
    }
}

/// Equal for equal content.
fn content_hash(source: &ShardSource) -> BlockHash {
    let lists = source.states.iter().flat_map(|state| &state.hashes.0);
    let bytes: Vec<u8> = lists.flat_map(|hash| *hash.as_bytes()).collect();
    BlockHash::of(&bytes)
}

/// Maps a slot and checks that it holds what the worker says.
fn open(path: &Path, job: &JobName, captured: &wire::Captured) -> Result<(Capture, Mmap), StoreError> {
    let unusable = |error: std::io::Error| StoreError::Input(format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(unusable)?;
    // SAFETY: the slot is in this agent's folder of mode 0700, is never shortened (a worker removes a file rather than
    // resizing it), and is not written again before this agent frees it.
    let map = unsafe { Mmap::map(&file) }.map_err(unusable)?;
    let capture = Capture::from_json(&captured.capture)?;
    let named = (capture.generation.get(), capture.scalar.step.get(), capture.rank.get());
    if capture.job != *job || named != (captured.generation, captured.step, captured.rank) {
        return Err(StoreError::Input(format!("{} is announced as another save than it is", path.display())));
    }
    Ok((capture, map))
}
