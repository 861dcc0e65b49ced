//! One generation of a simulated worker: load, form the ring, take steps, capture.

use std::sync::atomic::Ordering;
use std::time::Duration;

use checkpoint_store::{
    CAPTURE_FORMAT, Capture, CheckpointRef, Kind, StateDecl, StoreError, open_checkpoint, read_range,
};
use proto::ids::{Generation, Rank, WorldSize};
use proto::wire::{self, FailureKind, worker_message};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use worker::load::{Start as Load, scalar_state};
use worker::machine::cadence::{Cadence, Measured, Tier};
use worker::machine::kept::Verdicts;
use worker::machine::session::Input;

use super::oracle::job;
use super::plant::Plant;
use super::ring::{Place, Ring, Word};
use super::slots::Slots;
use super::truth::{self, STATES, Truth};
use super::worker::{Control, News, Prepared, Start, short};

/// The share of `fault.hang` that a restore may take.
const PATIENCE: f64 = 0.8;

/// How a generation ended that was told to stop, or is done.
pub(crate) struct Stopped {
    pub(crate) step: u64,
    pub(crate) loss: Option<f64>,
}

type Failure = (FailureKind, String);

fn transient(error: impl std::fmt::Display) -> Failure {
    (FailureKind::Transient, error.to_string())
}

/// A rank's part in one generation.
struct Member<'a> {
    start: &'a Start,
    prepared: &'a Prepared,
    control: &'a Control,
    slots: &'a Slots,
    news: &'a mpsc::Sender<News>,
    truth: std::sync::Arc<Truth>,
    generation: u64,
    rank: Rank,
    world: WorldSize,
    /// The slot of the live state.
    live: u32,
}

/// Joins a generation and takes steps until it should stop.
pub(crate) async fn run(
    start: &Start,
    prepared: &Prepared,
    run: &wire::WorkerRun,
    control: &Control,
    slots: &Slots,
    news: &mpsc::Sender<News>,
) -> Result<Stopped, Failure> {
    let announced = run.announcement.as_ref().ok_or_else(|| transient("the announcement is empty"))?;
    let world = WorldSize::new(announced.world_size).ok_or_else(|| transient("a world without workers"))?;
    let shift = u32::from(start.world.has(Plant::WrongRank));
    let rank = (run.rank + shift) % world.get();
    let next = announced.placements.iter().find(|placement| placement.rank == run.rank);
    let next = next.and_then(|placement| placement.next.parse().ok());
    let next = next.ok_or_else(|| transient("the next rank has no address"))?;
    slots.reserve();
    let live = slots.take().ok_or_else(|| transient("no slot is free"))?;
    let (truth, generation) = (Truth::get(), announced.generation);
    let mut member =
        Member { start, prepared, control, slots, news, truth, generation, rank: Rank::new(rank), world, live };
    member.acts();
    let (step, source) = member.load(announced).await?;
    let place = Place { generation, rank, world: world.get(), next, key: announced.key.clone() };
    let within = Duration::from_secs_f64(prepared.spec.fault.restart);
    let mut ring = Ring::form((&start.world, start.host), &prepared.listener, place, within).await.map_err(exchange)?;
    member.tell(Input::Joined { generation, step, source: source.clone(), load: vec![] }).await;
    let end = announced.stop_at.min(prepared.spec.training.steps);
    let stopped = member.train(&mut ring, step, end).await?;
    if stopped.step == step && source != Load::STORED {
        member.capture(step, member.truth.number(step), Tier::Store).await?;
    }
    Ok(stopped)
}

fn exchange(error: std::io::Error) -> Failure {
    (FailureKind::Exchange, error.to_string())
}

fn of_store(error: StoreError) -> Failure {
    let kind = match error.kind() {
        Kind::Retry | Kind::Fenced => FailureKind::Transient,
        Kind::Corrupt => FailureKind::Corrupt,
        Kind::Input => FailureKind::Input,
        Kind::Bug => FailureKind::Fatal,
    };
    (kind, error.to_string())
}

impl Member<'_> {
    /// Tells the oracle that this worker acts.
    fn acts(&self) {
        let mut state = self.start.world.lock();
        let kept = state.oracle.acts(self.generation, self.rank.get(), self.start.worker);
        state.hold(self.start.host, kept);
    }

    async fn tell(&self, event: Input) {
        // A session that is gone takes its trainer with it.
        let _ = self.news.send(News::Event(event)).await;
    }

    async fn say(&self, body: worker_message::Body) {
        let _ = self.news.send(News::Say(body)).await;
    }

    fn blocks(&self) -> std::ops::Range<u64> {
        self.truth.space.shard_blocks(self.rank, self.world)
    }

    /// The step this generation starts from, its shard being loaded and right, and where it came from.
    async fn load(&self, announced: &wire::Announcement) -> Result<(u64, String), Failure> {
        if let Some(memory) = &announced.memory {
            let source = self.restore().await?;
            return Ok((memory.step, source));
        }
        if announced.start.is_empty() {
            return Ok((0, Load::INITIALISED.into()));
        }
        let reference: CheckpointRef = serde_json::from_slice(&announced.start).map_err(transient)?;
        let store = self.start.stores.open_existing(&self.prepared.spec.checkpoint.store).map_err(of_store)?;
        let manifest = open_checkpoint(&store, &job(), &reference).await.map_err(of_store)?;
        let range = self.truth.space.shard(self.rank, self.world);
        let mut loaded = vec![];
        for state in STATES {
            let mut bytes = vec![0; 4 * (range.end - range.start) as usize];
            read_range(&store, &manifest, state, range.clone(), &mut bytes).await.map_err(of_store)?;
            loaded.extend(bytes);
        }
        let step = reference.step.get();
        self.loaded(step, &loaded);
        Ok((step, Load::STORED.into()))
    }

    fn loaded(&self, step: u64, bytes: &[u8]) {
        let right = bytes == self.truth.shard(self.truth.number(step), self.blocks());
        let mut state = self.start.world.lock();
        let kept = state.oracle.loaded(step, right);
        state.hold(self.start.host, kept);
    }

    /// Has the agent fill the live slot from the nodes' memory.
    async fn restore(&self) -> Result<String, Failure> {
        let length = self.truth.shard(0, self.blocks()).len();
        // A slot file has a page at least.
        self.slots.write(self.live, &vec![0; length.max(4096)]).map_err(transient)?;
        let (answer, answered) = oneshot::channel();
        *self.control.restored.lock().expect("no panic") = Some(answer);
        let restore = wire::Restore { generation: self.generation, slot: self.live };
        self.say(worker_message::Body::Restore(restore)).await;
        let within = Duration::from_secs_f64(self.prepared.spec.fault.hang * PATIENCE);
        let late = || transient("the agent did not restore the state from memory in time");
        let answer = timeout(within, answered).await.map_err(|_| late())?.map_err(|_| late())?;
        if let Some(failure) = answer.failure {
            return Err((failure.kind(), failure.reason));
        }
        let found = std::fs::read(self.slots.path(self.live)).map_err(transient)?;
        self.loaded(answer.step, found.get(..length).unwrap_or_default());
        Ok(answer.source)
    }

    /// Takes steps from `from` on, up to `end` or until a rank was asked to stop.
    async fn train(&mut self, ring: &mut Ring, from: u64, end: u64) -> Result<Stopped, Failure> {
        let within = Duration::from_secs_f64(self.prepared.spec.fault.collective);
        let mut cadence = Cadence::new(&self.prepared.spec.checkpoint, from);
        let (mut step, mut number, mut loss) = (from, self.truth.number(from), None);
        let (mut verdicts, mut told) = (Verdicts::default(), None::<Instant>);
        while step < end {
            step += 1;
            let sum = self.compute(step).await?;
            let kept = self.slots.kept(self.generation);
            let measured = Measured { step: 1.0, threads: 1, ..Measured::default() };
            let wish = cadence.wish(self.slots.ready(), kept, measured);
            let stop = self.control.stop.load(Ordering::Relaxed);
            let words = ring.exchange(Word { step, sum, stop, wish }, within).await.map_err(exchange)?;
            number = truth::advance(number, words.iter().fold(0u64, |sum, word| sum.wrapping_add(word.sum)));
            let last = step == end || words.iter().any(|word| word.stop);
            let wishes: Vec<_> = words.iter().map(|word| word.wish).collect();
            let decision = cadence.decide(step, last, &wishes);
            self.acts();
            self.start.world.count("step");
            let value = 1.0 / step as f64;
            loss = Some(value);
            if last || told.is_none_or(|at| at.elapsed() >= Duration::from_millis(100)) {
                told = Some(Instant::now());
                self.tell(Input::Stepped { generation: self.generation, step, loss: value }).await;
            }
            if self.rank == Rank::ZERO {
                let report = wire::StepReport { generation: self.generation, step, loss: value, ..Default::default() };
                self.say(worker_message::Body::Step(report)).await;
            }
            if let Some(tier) = decision.capture {
                self.capture(step, number, tier).await?;
            }
            if let Some(tier) = decision.skipped {
                self.skipped(step, tier).await;
            }
            if verdicts.follow(&decision.steps) {
                let (complete, given_up) = (verdicts.complete(), verdicts.given_up());
                let kept = wire::StepsKept { generation: self.generation, complete, given_up, seconds: 0.0 };
                self.say(worker_message::Body::Kept(kept)).await;
            }
            if last {
                break;
            }
        }
        Ok(Stopped { step, loss })
    }

    /// Computes this rank's micro-batches of a step.
    async fn compute(&self, step: u64) -> Result<u64, Failure> {
        let cut = |rank: u64| truth::MICRO_BATCHES * rank / u64::from(self.world.get());
        let mine = cut(u64::from(self.rank.get()))..cut(u64::from(self.rank.get()) + 1);
        sleep(self.start.pace * (mine.end - mine.start) as u32).await;
        if self.start.world.has(Plant::NeverThere) && step > 2 {
            return Err((FailureKind::Exchange, "planted".into()));
        }
        let sum = mine.fold(0u64, |sum, micro| sum.wrapping_add(truth::contribution(step, micro)));
        let impure = if self.start.world.has(Plant::Impure) { u64::from(self.world.get() != 4) } else { 0 };
        Ok(sum.wrapping_add(impure))
    }

    /// Freezes the state of a step in its slot and tells the agent of it.
    async fn capture(&mut self, step: u64, number: u64, tier: Tier) -> Result<(), Failure> {
        let (blocks, slot) = (self.blocks(), self.live);
        let mut bytes = self.truth.shard(number, blocks.clone());
        bytes.resize(bytes.len().max(4096), 0);
        self.slots.write(slot, &bytes).map_err(transient)?;
        self.slots.hand_over(slot);
        if let Some(free) = self.slots.take() {
            self.live = free;
        }
        let hashes = (0..STATES.len()).map(|state| self.truth.hashes(number, state, blocks.clone())).collect();
        let capture = Capture {
            format: CAPTURE_FORMAT,
            job: job(),
            generation: Generation::new(self.generation),
            rank: self.rank,
            world_size: self.world,
            space: self.truth.space.clone(),
            scalar: scalar_state(&self.prepared.spec, step, &[]),
            states: StateDecl::adamw(),
            hashes,
            stages: vec![],
        };
        let store = tier == Tier::Store;
        let what = format!("{} captured step {step} as rank {}", short(self.start.worker), self.rank);
        self.start.world.note(self.start.host, "capture", what);
        self.say(worker_message::Body::Captured(wire::Captured {
            job: job().to_string(),
            generation: self.generation,
            step,
            rank: self.rank.get(),
            world_size: self.world.get(),
            slot,
            capture: capture.to_json().map_err(of_store)?,
            stall_seconds: 0.0,
            store,
        }))
        .await;
        Ok(())
    }

    async fn skipped(&self, step: u64, tier: Tier) {
        {
            let mut state = self.start.world.lock();
            state.note(self.start.host, "capture skipped", format_args!("step {step} {tier:?}"));
            let quiet = state.quiet.map(|since| state.now.saturating_sub(since));
            let kept = state.oracle.skipped(step, tier, quiet);
            state.hold(self.start.host, kept);
        }
        self.say(worker_message::Body::Skipped(wire::SaveSkipped {
            job: job().to_string(),
            generation: self.generation,
            step,
            rank: self.rank.get(),
            reason: String::new(),
            memory: tier == Tier::Memory,
        }))
        .await;
    }
}
