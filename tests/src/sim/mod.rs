//! The deterministic simulation of the control plane: the product's coordinators and agents, with simulated workers, in
//! virtual time, on a network and a store on which everything goes wrong.
//!
//! `hosts` is what runs where (and `operator` who asks), over turmoil's network (`network`) and the simulation's bucket
//! (`bucket`); `worker` and `trainer` are workers that compute what `truth` knows in advance, in a `ring`; `faults`
//! plans what goes wrong, `oracle` holds what happens against the invariants, and `plant` has the mistakes that must be
//! noticed. Everything runs on one thread and follows from one seed: the same seed gives the same trace, byte for byte.

mod bucket;
mod faults;
mod hosts;
mod network;
mod operator;
mod oracle;
mod panics;
mod plant;
mod random;
mod ring;
mod slots;
mod totals;
mod trainer;
mod truth;
mod worker;
mod world;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use proto::auth::Token;
use proto::chance;
use turmoil::Sim;

pub use plant::Plant;
pub use totals::Totals;

use faults::{Cluster, Plan};
use hosts::Site;
use random::Random;
use world::{Host, World};

/// A step of time: what happens within one happens at once, as far as other hosts can tell.
const TICK: Duration = Duration::from_millis(50);
/// The longest quiet time in which the job must finish.
const PATIENCE: Duration = Duration::from_secs(150);
/// A process that has ended is started again after this.
const RESTART: Duration = Duration::from_millis(1_000);

const COORDINATORS: [Host; 2] = ["coord-1", "coord-2"];
const NODES: [Host; 5] = ["node-1", "node-2", "node-3", "node-4", "node-5"];
const OPERATOR: Host = "operator";

/// What to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What everything follows from.
    pub seed: u64,
    /// A mistake that must be noticed.
    pub plant: Option<Plant>,
    /// Nothing goes wrong but that the others get through no more to one node's port for snapshots.
    pub shut: bool,
}

impl Options {
    /// An ordinary run.
    pub fn of(seed: u64) -> Self {
        Self { seed, plant: None, shut: false }
    }
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was run.
    pub options: Options,
    /// How long it took, in virtual time.
    pub virtual_time: Duration,
    /// What happened, by kind.
    pub events: BTreeMap<&'static str, u64>,
    /// What went wrong, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// How often each invariant was checked.
    pub checks: BTreeMap<&'static str, u64>,
    /// Records, generations, commits and epochs.
    pub history: [u64; 4],
    /// Everything that happened, a line each.
    pub trace: String,
    /// The first invariant that was broken.
    pub violation: Option<String>,
}

impl Outcome {
    /// The message of a failed run: the last lines of its trace, what is wrong, and how to see it again.
    pub fn report(&self) -> String {
        let lines: Vec<&str> = self.trace.lines().collect();
        let last = lines[lines.len().saturating_sub(60)..].join("\n");
        let what = self.violation.as_deref().unwrap_or("nothing is wrong");
        format!("{last}\nseed {}: {what}\nto see it again: {}", self.options.seed, self.replay())
    }

    /// The command that repeats the run and prints its trace.
    pub fn replay(&self) -> String {
        let plant = self.options.plant.map(|plant| format!(" --plant {plant:?}")).unwrap_or_default();
        let shut = if self.options.shut { " --shut" } else { "" };
        format!("cargo run -p tests --bin campaign -- --first {} --seeds 1 --trace{plant}{shut}", self.options.seed)
    }
}

/// Runs a simulation to its end: the job's, or that of everybody's patience.
pub fn run(options: Options) -> Outcome {
    chance::follow(Some(options.seed));
    panics::watch();
    let mut random = Random::new(options.seed, 0);
    let nodes = NODES[..random.within(3, 5) as usize].to_vec();
    let coordinators = COORDINATORS[..random.within(1, 2) as usize].to_vec();
    let cluster = Cluster { coordinators: coordinators.clone(), nodes };
    let world = World::new(options.seed, options.plant, coordinators);
    let folder = memory_folder();
    let token = Token::read_or_create(&folder.path().join("token"), [7; 32]).expect("a token");
    let site = Site {
        world: world.clone(),
        host: OPERATOR,
        token,
        folder: folder.path().to_path_buf(),
        shape: if options.shut { truth::Shape::slow(&mut random) } else { truth::Shape::draw(&mut random) },
    };
    let mut sim = build(options.seed);
    let slots = random.within(1, 2) as u32;
    for host in cluster.all() {
        let (site, is_node) = (Site { host, ..site.clone() }, cluster.nodes.contains(&host));
        sim.host(host, move || {
            let site = site.clone();
            async move {
                if is_node {
                    site.agent(slots).await;
                } else {
                    site.coordinator().await;
                }
                Ok(())
            }
        });
    }
    let nodes = cluster.nodes.clone();
    sim.host(OPERATOR, move || {
        let (site, nodes) = (site.clone(), nodes.clone());
        async move {
            operator::work(site, options, nodes).await;
            Ok(())
        }
    });
    let plan = if options.shut { Plan::shut } else { Plan::new };
    let plan = plan(options.seed, cluster.clone());
    drive(&mut sim, &world, plan, &cluster, folder.path());
    drop(sim);
    panics::ignore();
    chance::follow(None);
    outcome(options, &world)
}

/// A folder on a memory file system, where there is one.
fn memory_folder() -> tempfile::TempDir {
    let shared = std::path::Path::new("/dev/shm");
    let made = if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() };
    made.expect("a folder for the agents' memory")
}

fn build(seed: u64) -> Sim<'static> {
    turmoil::Builder::new()
        .rng_seed(seed)
        .enable_random_order()
        .tick_duration(TICK)
        .simulation_duration(Duration::from_hours(24))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(faults::LATENCY)
        .tcp_capacity(4096)
        .epoch(SystemTime::UNIX_EPOCH + Duration::from_hours(24 * 365))
        .build()
}

/// Lets time pass, step by step.
fn drive(sim: &mut Sim<'_>, world: &World, mut plan: Plan, cluster: &Cluster, folder: &std::path::Path) {
    let mut ended: BTreeMap<Host, Duration> = BTreeMap::new();
    loop {
        let now = sim.elapsed();
        world.lock().now = now;
        let quiet = now >= plan.calm;
        if quiet && world.lock().quiet.is_none() {
            plan.calm(sim, world);
            world.lock().quiet = Some(now);
        }
        plan.advance(sim, world, folder);
        for host in cluster.all().filter(|host| !plan.keeps_down(host)) {
            if sim.is_host_running(host) {
                ended.remove(host);
            } else if *ended.entry(host).or_insert(now) + RESTART <= now {
                faults::start(sim, world, host);
            }
        }
        world.lock().serve();
        sim.step().expect("no host's software fails");
        let mut state = world.lock();
        if let Some(panic) = panics::take() {
            state.hold("panic", Err(format!("a process panicked: {panic}")));
        }
        let late = quiet && now > plan.calm + PATIENCE;
        if state.finished || late {
            let (finished, told) = (state.finished, state.told.clone());
            let kept = state.oracle.progress(finished, &told);
            state.hold(OPERATOR, kept);
        }
        if state.finished || late || state.violation.is_some() {
            return;
        }
    }
}

fn outcome(options: Options, world: &World) -> Outcome {
    let mut state = world.lock();
    Outcome {
        options,
        virtual_time: state.now,
        events: std::mem::take(&mut state.events),
        faults: std::mem::take(&mut state.faults),
        checks: std::mem::take(&mut state.oracle.checks),
        history: state.oracle.totals(),
        trace: std::mem::take(&mut state.trace),
        violation: state.violation.take(),
    }
}
