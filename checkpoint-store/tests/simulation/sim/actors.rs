//! The processes: workers that save, leaders that commit and collect, readers that load.
//!
//! Each runs the product's code against its own way to the bucket, keeps no memory beyond its life, and may die at any
//! of its requests. They do what the coordinator and the agents do: refresh before acting, stop when fenced, read again
//! after an unclear answer, resend what is not settled.

use std::sync::Arc;
use std::time::Duration;

use checkpoint_store::leader::{LEADER_FORMAT, observe, take};
use checkpoint_store::{
    Chain, ChainError, CheckpointRef, Kind, LeaderRecord, Receipt, Store, StoreError, Take, open_checkpoint, verify,
};
use proto::ids::{Epoch, Rank, WorldSize};

use super::cluster::{Cluster, Formed};
use super::net::Net;
use super::product::{self, Plant, job};
use super::random::Random;

/// The steps of a generation, at most.
const STEPS: u64 = 12;
/// Tries at something the store does not answer.
const TRIES: u32 = 5;

/// What a process has.
pub(crate) struct Context {
    pub(crate) store: Store,
    pub(crate) net: Arc<Net>,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) process: u32,
    pub(crate) random: Random,
    pub(crate) plant: Option<Plant>,
}

impl Context {
    async fn nap(&mut self, least: u64, most: u64) {
        let pause = self.random.within(least, most);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    fn violated(&self, by: &str, error: &dyn std::fmt::Display) {
        self.net.fail(format!("{by}: {error}"));
    }

    async fn true_epoch(&self) -> Epoch {
        self.net.oracle.lock().await.history().epoch
    }
}

/// A worker's life: a shard for each step, until its generation is over and a little longer.
pub(crate) async fn work(mut cx: Context, formed: Formed, rank: Rank) -> &'static str {
    for step in formed.start + 1..=formed.start + STEPS {
        cx.nap(10, 300).await;
        if cx.cluster.generation() > formed.generation && cx.random.chance(600) {
            return "its generation is over";
        }
        let torn = cx.plant == Some(Plant::SlotReused) && cx.random.chance(100);
        let source = product::shard(formed.generation, formed.world, rank, step, torn);
        let mut tries = 0;
        loop {
            let id = cx.random.uuid();
            if cx.plant == Some(Plant::ReceiptBeforeObject) {
                match product::receipt_alone(&source, id).await {
                    Ok(receipt) => cx.cluster.report(receipt),
                    Err(e) => cx.violated("a worker", &e),
                }
            }
            tries += 1;
            match product::save(&cx.store, &source, id).await {
                Ok(receipt) => {
                    cx.cluster.report(receipt);
                    break;
                }
                // The step's checkpoint is given up; training goes on.
                Err(e) if e.kind() == Kind::Retry && tries == TRIES => break,
                Err(e) if e.kind() == Kind::Retry => cx.nap(10, 100).await,
                Err(e) => {
                    cx.violated("a worker", &e);
                    return "broken";
                }
            }
        }
    }
    "its steps are done"
}

/// A reader's life: find the newest good checkpoint, load parts of it, or prove all of it.
pub(crate) async fn read(mut cx: Context) -> &'static str {
    loop {
        cx.nap(100, 2_500).await;
        let checkpoint = match Chain::load(&cx.store, &job()).await {
            Ok(chain) => chain.and_then(|chain| chain.history().newest_good().cloned()),
            Err(e) if e.kind() == Kind::Retry => continue,
            Err(e) => {
                cx.violated("a reader of the chain", &e);
                return "broken";
            }
        };
        let Some(checkpoint) = checkpoint else { continue };
        let Err(e) = load(&mut cx, &checkpoint).await else { continue };
        let oracle = cx.net.oracle.lock().await;
        // What retention has let go meanwhile may be gone; what is still visible may not.
        let excused = match e.kind() {
            Kind::Retry => true,
            Kind::Corrupt => !oracle.is_visible(&checkpoint.manifest),
            _ => false,
        };
        drop(oracle);
        if !excused {
            cx.violated("a reader of a visible checkpoint", &e);
            return "broken";
        }
    }
}

async fn load(cx: &mut Context, checkpoint: &CheckpointRef) -> Result<(), StoreError> {
    if cx.random.chance(250) {
        let report = verify(&cx.store, &job(), checkpoint).await?;
        return match report.first_problem() {
            Some(problem) => Err(StoreError::Corrupt(problem.to_owned())),
            None => Ok(()),
        };
    }
    let manifest = open_checkpoint(&cx.store, &job(), checkpoint).await?;
    for _ in 0..cx.random.within(1, 3) {
        let first = cx.random.below(manifest.space.elements());
        let end = cx.random.within(first + 1, manifest.space.elements());
        if !product::loads_truly(&cx.store, &manifest, first..end).await? {
            cx.violated("a reader", &format!("elements {first}..{end} of {} are wrong", checkpoint.manifest));
        }
    }
    Ok(())
}

/// A leader's life, until it is superseded.
pub(crate) async fn lead(mut cx: Context) -> &'static str {
    let Some(epoch) = win(&mut cx).await else { return "not elected" };
    let Some(chain) = open(&mut cx, epoch).await else { return "the chain did not open" };
    let mut leader = Leader { cx, epoch, chain };
    match leader.announce_itself().await {
        Ok(()) => {}
        Err(why) => return why,
    }
    loop {
        // A long sleep now and then: it wakes up and does not know what has happened.
        let most = if leader.cx.random.chance(30) { 20_000 } else { 150 };
        leader.cx.nap(5, most).await;
        if let Err(error) = leader.act().await
            && let Err(why) = leader.after(error).await
        {
            return why;
        }
    }
}

/// Takes the next epoch.
async fn win(cx: &mut Context) -> Option<Epoch> {
    for _ in 0..4 * TRIES {
        cx.nap(5, 50).await;
        let view = match observe(&cx.store).await {
            Ok(view) => view,
            Err(e) if e.kind() == Kind::Retry => continue,
            Err(e) => {
                cx.violated("a candidate", &e);
                return None;
            }
        };
        let epoch = Epoch::new(view.map_or(0, |view| view.epoch.get()) + 1);
        let token = format!("process {} draws {:016x}", cx.process, cx.random.draw());
        let record = LeaderRecord { format: LEADER_FORMAT, epoch, address: None, host: "simulated".into(), token };
        match take(&cx.store, epoch, &record).await {
            Ok(Take::Won) => {
                cx.net.oracle.lock().await.leads(cx.process, epoch);
                return Some(epoch);
            }
            Ok(Take::Lost) => {}
            Err(e) if e.kind() == Kind::Retry => {}
            Err(e) => {
                cx.violated("a candidate", &e);
                return None;
            }
        }
    }
    None
}

/// Reads the job's chain, or begins it.
async fn open(cx: &mut Context, epoch: Epoch) -> Option<Chain> {
    for _ in 0..TRIES {
        match Chain::load(&cx.store, &job()).await {
            Ok(Some(chain)) => return Some(chain),
            Ok(None) => match Chain::create(&cx.store, &job(), product::submitted(epoch)).await {
                Ok(chain) => return Some(chain),
                // Its listing was behind, or someone else was first, or nobody knows.
                Err(e) if matches!(e.kind(), Kind::Fenced | Kind::Retry) => {}
                Err(e) => {
                    cx.violated("a leader that begins a chain", &e);
                    return None;
                }
            },
            Err(e) if e.kind() == Kind::Retry => {}
            Err(e) => {
                cx.violated("a leader that opens a chain", &e);
                return None;
            }
        }
        cx.nap(10, 200).await;
    }
    None
}

/// One that leads.
pub(crate) struct Leader {
    pub(crate) cx: Context,
    pub(crate) epoch: Epoch,
    pub(crate) chain: Chain,
}

impl Leader {
    /// Appends `led`, after which no predecessor can append.
    async fn announce_itself(&mut self) -> Result<(), &'static str> {
        for _ in 0..4 * TRIES {
            let history = self.chain.history();
            if history.epoch > self.epoch {
                return Err("superseded before it began");
            }
            if history.epoch == self.epoch && self.epoch > Epoch::new(1) {
                return Ok(());
            }
            let record = product::led(self.epoch, history);
            match self.chain.append(record).await {
                Ok(_) => return Ok(()),
                Err(e) if matches!(e.kind(), Kind::Fenced | Kind::Retry) => {}
                Err(e) => {
                    self.cx.violated("a leader that announces itself", &e);
                    return Err("broken");
                }
            }
            self.cx.nap(5, 50).await;
            // Without an answer the next round finds out.
            let _ = self.chain.refresh().await;
        }
        Err("the store is away")
    }

    /// One round of a leader's queue.
    async fn act(&mut self) -> Result<(), ChainError> {
        self.chain.refresh().await?;
        let history = self.chain.history();
        if history.epoch > self.epoch && self.cx.plant != Some(Plant::IgnoresFencing) {
            return Err(StoreError::Fenced(format!("the chain is at epoch {}", history.epoch)).into());
        }
        self.epoch = self.epoch.max(history.epoch);
        let generation = history.generation.get();
        if generation > self.cx.cluster.generation() {
            let start = history.start.as_ref().map_or(0, |start| start.step.get());
            let world = history.world_size.unwrap_or(WorldSize::ONE);
            self.cx.cluster.announce(Formed { generation, world, start });
        }
        if generation == 0 || self.cx.cluster.is_broken() || self.cx.random.chance(10) {
            return self.form().await;
        }
        for (step, receipts) in self.cx.cluster.complete(generation) {
            self.commit(generation, step, receipts).await?;
        }
        if self.cx.random.chance(200) {
            product::retain(&mut self.chain, self.epoch, self.cx.plant).await?;
        }
        Ok(())
    }

    pub(crate) async fn form(&mut self) -> Result<(), ChainError> {
        let world = WorldSize::new(self.cx.random.within(1, 3) as u32).unwrap_or(WorldSize::ONE);
        let record = product::formed(self.epoch, self.chain.history(), world);
        self.chain.append(record).await.map(|_| ())
    }

    async fn commit(&mut self, generation: u64, step: u64, receipts: Vec<Receipt>) -> Result<(), ChainError> {
        let past = step < product::newest_here(self.chain.history());
        let id = self.cx.random.uuid();
        match product::commit_set(&mut self.chain, self.epoch, receipts, id, self.cx.plant).await {
            Ok(done) => {
                let told = self.cx.net.oracle.lock().await.acknowledged(&done);
                if let Err(violation) = told {
                    self.cx.net.fail(violation);
                }
            }
            // Its time is past: a collection may have taken its objects.
            Err(e) if past && e.kind() == Kind::Bug => {}
            Err(e) => return Err(e),
        }
        // The answer may be lost, and the receipts be sent again.
        if self.cx.random.chance(700) {
            self.cx.cluster.settle(generation, step);
        }
        Ok(())
    }

    /// What to do after an error; `Err` says why it stops.
    async fn after(&mut self, error: ChainError) -> Result<(), &'static str> {
        match error.kind() {
            Kind::Retry => {
                for _ in 0..TRIES {
                    self.cx.nap(10, 500).await;
                    if self.chain.refresh().await.is_ok() {
                        return Ok(());
                    }
                }
                Err("the store is away")
            }
            Kind::Fenced if self.cx.plant == Some(Plant::IgnoresFencing) => Ok(()),
            Kind::Fenced => Err("superseded"),
            // Its successor has let go what it still believes kept.
            Kind::Corrupt if self.cx.true_epoch().await > self.epoch => Err("superseded, and found bytes gone"),
            _ => {
                self.cx.violated("a leader", &error);
                Err("broken")
            }
        }
    }
}

/// The last leader: nothing goes wrong any more, no one else is there. Closes all open saves and collects.
pub(crate) async fn tidy_up(mut cx: Context) -> Result<(), String> {
    let epoch = win(&mut cx).await.ok_or("nobody was elected, though all is quiet")?;
    let chain = open(&mut cx, epoch).await.ok_or("the chain does not open, though all is quiet")?;
    let mut leader = Leader { cx, epoch, chain };
    leader.announce_itself().await?;
    leader.form().await.map_err(|e| e.to_string())?;
    product::retain(&mut leader.chain, epoch, leader.cx.plant).await.map_err(|e| e.to_string())
}
