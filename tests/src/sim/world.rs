//! What all parts of a simulation share: the time, the trace, the counts, the bucket and the oracle.
//!
//! Everything runs on one thread, so the lock is never waited for; it is there because the product's types ask for
//! values that could be sent to another thread.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::bucket::{Disk, Request};
use super::network::Wires;
use super::oracle::Oracle;
use super::plant::Plant;
use super::random::Random;

/// A host of the simulation, by name.
pub(crate) type Host = &'static str;

/// Cheap to clone; all clones are one world.
#[derive(Clone)]
pub(crate) struct World(Arc<Mutex<State>>);

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

/// What a host's processes are reached by while they live.
#[derive(Default)]
pub(crate) struct Life {
    /// Jumps of its clock.
    pub(crate) jumps: Option<mpsc::UnboundedSender<Duration>>,
    /// Dropped to end a worker as by a signal.
    pub(crate) workers: BTreeMap<String, oneshot::Sender<()>>,
    /// Connections to the coordinators opened so far: they take turns.
    pub(crate) turns: usize,
    /// How often it was started.
    pub(crate) lives: u32,
    pub(crate) wires: Wires,
}

pub(crate) struct State {
    /// Virtual time at the beginning of this tick.
    pub(crate) now: Duration,
    /// Chance of the store.
    pub(crate) random: Random,
    pub(crate) plant: Option<Plant>,
    /// The coordinators there are.
    pub(crate) coordinators: Vec<Host>,
    pub(crate) hosts: BTreeMap<Host, Life>,
    pub(crate) disk: Disk,
    /// Requests to the store under way, in the order in which they are due.
    pub(crate) requests: BTreeMap<(Duration, u64), Request>,
    pub(crate) issued: u64,
    /// Until when a host's requests to the store find it out of order.
    pub(crate) outages: BTreeMap<Host, Duration>,
    /// In how many thousandths of requests something goes wrong.
    pub(crate) roughness: u64,
    pub(crate) oracle: Oracle,
    /// Counts of what happened, by kind.
    pub(crate) events: BTreeMap<&'static str, u64>,
    pub(crate) faults: BTreeMap<&'static str, u64>,
    pub(crate) trace: String,
    /// What went wrong first.
    pub(crate) violation: Option<String>,
    /// The job's last state that the operator was told.
    pub(crate) told: String,
    pub(crate) finished: bool,
    /// Since when nothing is wrong, and no more faults come.
    pub(crate) quiet: Option<Duration>,
    /// The node whose port for snapshots is shut.
    pub(crate) shut: Option<IpAddr>,
}

impl World {
    pub(crate) fn new(seed: u64, plant: Option<Plant>, coordinators: Vec<Host>) -> Self {
        let mut random = Random::new(seed, 1);
        // The probe takes long: few runs begin with it, and none whose store would not pass it.
        let probed = plant == Some(Plant::Overwrites) || random.chance(950);
        Self(Arc::new(Mutex::new(State {
            now: Duration::ZERO,
            random,
            plant,
            coordinators,
            hosts: BTreeMap::new(),
            disk: Disk::new(plant == Some(Plant::Overwrites), probed),
            requests: BTreeMap::new(),
            issued: 0,
            outages: BTreeMap::new(),
            roughness: 0,
            oracle: Oracle::default(),
            events: BTreeMap::new(),
            faults: BTreeMap::new(),
            trace: String::new(),
            violation: None,
            told: String::new(),
            finished: false,
            quiet: None,
            shut: None,
        })))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happened that is worth a line of the trace.
    pub(crate) fn note(&self, host: Host, kind: &'static str, what: impl std::fmt::Display) {
        self.lock().note(host, kind, what);
    }

    /// Something happened that is only counted.
    pub(crate) fn count(&self, kind: &'static str) {
        *self.lock().events.entry(kind).or_default() += 1;
    }

    pub(crate) fn has(&self, plant: Plant) -> bool {
        self.lock().plant == Some(plant)
    }

    /// How often a host's software was started so far.
    pub(crate) fn lives(&self, host: Host) -> u32 {
        self.lock().hosts.get(&host).map_or(0, |life| life.lives)
    }

    /// A life of a host's software begins; its clock jumps when it is told.
    pub(crate) fn begin(&self, host: Host) -> mpsc::UnboundedReceiver<Duration> {
        let (jumps, told) = mpsc::unbounded_channel();
        let mut state = self.lock();
        let life = state.hosts.entry(host).or_default();
        life.jumps = Some(jumps);
        life.workers.clear();
        life.lives += 1;
        let lives = life.lives;
        state.note(host, "start", format_args!("life {lives}"));
        told
    }
}

impl State {
    pub(crate) fn note(&mut self, host: Host, kind: &'static str, what: impl std::fmt::Display) {
        *self.events.entry(kind).or_default() += 1;
        let seconds = self.now.as_millis() as f64 / 1000.0;
        writeln!(self.trace, "{seconds:>8.2} {host:<8} {kind}: {what}").expect("a string takes all that is written");
    }

    /// Keeps the first of what goes wrong.
    pub(crate) fn hold(&mut self, host: Host, kept: Result<(), String>) {
        if let Err(violation) = kept {
            self.note(host, "violation", &violation);
            self.violation.get_or_insert(violation);
        }
    }
}
