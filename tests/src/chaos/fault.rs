//! The faults: drawn from a seed, begun on a lab, and ended.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use super::lab::Lab;
use super::net::{Filter, Plane};
use crate::process::signal;

/// What the data plane's links carry while nothing is done to them, in Mbit/s: so a job's steps wait for the network,
/// and the machine's cores have time to spare for everything else.
pub const LINK: u32 = 100;

/// The sorts of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// SIGKILL to a worker.
    KillWorker,
    /// SIGKILL to an agent; its workers end with it.
    KillAgent,
    /// SIGKILL to the coordinator that leads.
    KillLeader,
    /// SIGKILL to the one that stands by.
    KillStandby,
    /// SIGSTOP of a worker for less than any deadline.
    StopWorkerBriefly,
    /// SIGSTOP of a worker beyond `fault.collective`.
    StopWorker,
    /// SIGSTOP of an agent for less than the suspicion.
    StopAgentBriefly,
    /// SIGSTOP of an agent beyond it.
    StopAgent,
    /// SIGSTOP of the leader for less than a takeover needs.
    StopLeaderBriefly,
    /// SIGSTOP of the leader until another one leads, and longer.
    StopLeader,
    /// Both cables of a node are pulled.
    NodeOff,
    /// A node's data cable is pulled.
    DataOff,
    /// Nothing gets from one node to another on the data plane.
    RingOneWay,
    /// Nothing gets through between two nodes on the data plane.
    RingCut,
    /// Nothing gets through between a node and the coordinators.
    ControlCut,
    /// The leader's cable is pulled.
    LeaderOff,
    /// Nothing gets through between the leader and the store.
    LeaderStoreCut,
    /// The leader is stopped, and before it wakes its cable is pulled.
    LeaderStopAndOff,
    /// A node loses some of what reaches it on the data plane.
    Loss,
    /// A node's data link is slower.
    Slow,
    /// What a node sends on the data plane is late.
    Latency,
    /// SIGSTOP of the store.
    StoreStop,
    /// The store's cable is pulled.
    StoreOff,
    /// SIGKILL to the store; it is started again later, with all that it has acknowledged.
    StoreKill,
    /// The store's disk is full.
    FullStore,
    /// The file system of a node's folder is full.
    FullMemory,
}

/// All of them, with their names and how long they last, in milliseconds.
pub const KINDS: [(Kind, &str, (u64, u64)); 26] = [
    (Kind::KillWorker, "kill worker", (0, 0)),
    (Kind::KillAgent, "kill agent", (0, 0)),
    (Kind::KillLeader, "kill coordinator", (0, 0)),
    (Kind::KillStandby, "kill standby", (0, 0)),
    (Kind::StopWorkerBriefly, "pause worker, short", (300, 2000)),
    (Kind::StopWorker, "pause worker, long", (9000, 11000)),
    (Kind::StopAgentBriefly, "pause agent, short", (300, 1500)),
    (Kind::StopAgent, "pause agent, long", (5000, 8000)),
    (Kind::StopLeaderBriefly, "pause coordinator, short", (300, 3000)),
    (Kind::StopLeader, "pause coordinator, long", (8000, 14000)),
    (Kind::NodeOff, "node's links down", (6000, 9000)),
    (Kind::DataOff, "node's data link down", (9000, 11000)),
    (Kind::RingOneWay, "ring cut one way", (9000, 11000)),
    (Kind::RingCut, "ring cut both ways", (9000, 11000)),
    (Kind::ControlCut, "node cut from coordinators", (5000, 9000)),
    (Kind::LeaderOff, "coordinator's link down", (8000, 14000)),
    (Kind::LeaderStoreCut, "coordinator cut from store", (8000, 14000)),
    (Kind::LeaderStopAndOff, "coordinator paused and cut", (9000, 14000)),
    (Kind::Loss, "packet loss", (4000, 7000)),
    (Kind::Slow, "bandwidth cap", (4000, 7000)),
    (Kind::Latency, "latency", (4000, 7000)),
    (Kind::StoreStop, "store paused", (3000, 12000)),
    (Kind::StoreOff, "store cut off", (3000, 12000)),
    (Kind::StoreKill, "store killed", (2000, 8000)),
    (Kind::FullStore, "store's disk full", (3000, 12000)),
    (Kind::FullMemory, "node's disk full", (4000, 8000)),
];

impl Kind {
    /// Its name in the report.
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(kind, ..)| *kind == self).map_or("", |(_, name, _)| name)
    }
}

/// Numbers that depend on a seed alone (splitmix64).
#[derive(Debug, Clone)]
pub struct Draw(pub u64);

impl Draw {
    /// A number below a bound.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound.max(1)
    }

    /// One of several, from the first to the last.
    pub fn between(&mut self, (first, last): (u64, u64)) -> u64 {
        first + self.below(last - first + 1)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

/// One fault.
#[derive(Debug, Clone)]
pub struct Fault {
    /// What.
    pub kind: Kind,
    /// Which node, where one is concerned.
    pub node: String,
    /// The other node, where two are.
    pub other: String,
    /// From its begin to its end.
    pub length: Duration,
    /// Percent of loss, Mbit/s, milliseconds of delay.
    pub strength: u32,
}

/// A number of faults: every sort in turn, in an order that is drawn anew each time.
pub fn draw(seed: u64, count: usize, nodes: &[String], only: &[Kind]) -> Vec<Fault> {
    let mut draw = Draw(seed);
    let mut faults = Vec::new();
    while faults.len() < count {
        let mut kinds: Vec<_> =
            KINDS.iter().filter(|(kind, ..)| only.is_empty() || only.contains(kind)).copied().collect();
        draw.shuffle(&mut kinds);
        for (kind, _, length) in kinds {
            let node = draw.below(nodes.len() as u64) as usize;
            let other = (node + 1 + draw.below(nodes.len() as u64 - 1) as usize) % nodes.len();
            let strength = match kind {
                Kind::Loss => (2, 15),
                Kind::Slow => (10, 30),
                Kind::Latency => (10, 50),
                _ => (0, 0),
            };
            let length = Duration::from_millis(draw.between(length));
            let strength = draw.between(strength) as u32;
            faults.push(Fault { kind, node: nodes[node].clone(), other: nodes[other].clone(), length, strength });
        }
    }
    faults.truncate(count);
    faults
}

/// What ends a fault.
#[derive(Debug)]
enum Undo {
    Nothing,
    Wake(u32),
    Plug(String, Vec<Plane>),
    Unfilter(Vec<Filter>),
    Unlimit(String),
    Undelay(Child),
    Empty(PathBuf),
    Serve,
}

/// A fault under way.
#[derive(Debug)]
pub struct Active {
    /// Which.
    pub fault: Fault,
    undo: Vec<Undo>,
}

/// Begins a fault. What it is to strike may be away just now: then nothing happens, and it says so with `None`.
pub fn begin(fault: &Fault, lab: &mut Lab) -> Option<Active> {
    let (node, other, leader) = (fault.node.as_str(), fault.other.as_str(), lab.leader());
    let standby = lab.leaders().into_iter().find(|name| *name != leader);
    let stop = |process: u32| signal(process, "STOP").then_some(vec![Undo::Wake(process)]);
    let kill = |process: u32| signal(process, "KILL").then_some(vec![Undo::Nothing]);
    let undo = match fault.kind {
        Kind::KillWorker => kill(*lab.workers(node).first()?)?,
        Kind::KillAgent => kill(lab.process(node)?)?,
        Kind::KillLeader => kill(lab.process(&leader)?)?,
        Kind::KillStandby => kill(lab.process(&standby?)?)?,
        Kind::StopWorkerBriefly | Kind::StopWorker => stop(*lab.workers(node).first()?)?,
        Kind::StopAgentBriefly | Kind::StopAgent => stop(lab.process(node)?)?,
        Kind::StopLeaderBriefly | Kind::StopLeader => stop(lab.process(&leader)?)?,
        Kind::StoreStop => stop(lab.store().1)?,
        Kind::NodeOff => unplug(lab, node, &[Plane::Control, Plane::Data]),
        Kind::DataOff => unplug(lab, node, &[Plane::Data]),
        Kind::LeaderOff => unplug(lab, &leader, &[Plane::Control]),
        Kind::StoreOff => unplug(lab, lab.store().0, &[Plane::Control]),
        Kind::LeaderStopAndOff => {
            // Undone in this order: it wakes while it is still cut off.
            let mut undo = stop(lab.process(&leader)?)?;
            undo.extend(unplug(lab, &leader, &[Plane::Control]));
            undo
        }
        Kind::RingOneWay => vec![Undo::Unfilter(vec![lab.net.cut(other, node, Plane::Data)])],
        Kind::RingCut => vec![Undo::Unfilter(apart(lab, node, other, Plane::Data))],
        Kind::ControlCut => {
            let coordinators = lab.leaders();
            let cuts = coordinators.iter().flat_map(|name| apart(lab, node, name, Plane::Control));
            vec![Undo::Unfilter(cuts.collect())]
        }
        Kind::LeaderStoreCut => {
            let store = lab.store().0;
            vec![Undo::Unfilter(apart(lab, &leader, store, Plane::Control))]
        }
        Kind::Loss => vec![Undo::Unfilter(vec![lab.net.lose(node, Plane::Data, fault.strength)])],
        Kind::Slow => {
            lab.net.limit(node, Some(fault.strength));
            vec![Undo::Unlimit(node.into())]
        }
        Kind::Latency => vec![Undo::Undelay(lab.net.delay(node, fault.strength))],
        Kind::StoreKill => signal(lab.store().1, "KILL").then_some(vec![Undo::Serve])?,
        Kind::FullStore => vec![fill(&lab.disk())],
        Kind::FullMemory => vec![fill(&lab.memory(node))],
    };
    Some(Active { fault: fault.clone(), undo })
}

fn unplug(lab: &Lab, host: &str, planes: &[Plane]) -> Vec<Undo> {
    for plane in planes {
        lab.net.plug(host, *plane, false);
    }
    vec![Undo::Plug(host.into(), planes.to_vec())]
}

fn apart(lab: &mut Lab, one: &str, other: &str, plane: Plane) -> Vec<Filter> {
    vec![lab.net.cut(one, other, plane), lab.net.cut(other, one, plane)]
}

/// Writes to a file system until there is no room left.
fn fill(folder: &Path) -> Undo {
    let path = folder.join("filler");
    let mut file = File::create(&path).expect("a file in a memory file system");
    let zeros = vec![0; 1 << 16];
    while file.write_all(&zeros).is_ok() {}
    Undo::Empty(path)
}

/// Between the parts of ending a fault that has two.
const BETWEEN: Duration = Duration::from_secs(2);

impl Active {
    /// Ends the fault, or its next part. `Some`: the rest is to be ended after this time.
    pub fn end(&mut self, lab: &mut Lab) -> Option<Duration> {
        match self.undo.remove(0) {
            Undo::Nothing => {}
            // It may have been killed meanwhile.
            Undo::Wake(process) => drop(signal(process, "CONT")),
            Undo::Plug(host, planes) => planes.iter().for_each(|plane| lab.net.plug(&host, *plane, true)),
            Undo::Unfilter(filters) => lab.net.remove(&filters),
            Undo::Unlimit(host) => lab.net.limit(&host, Some(LINK)),
            Undo::Undelay(mut child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Undo::Empty(path) => drop(std::fs::remove_file(path)),
            Undo::Serve => lab.start_store(),
        }
        (!self.undo.is_empty()).then_some(BETWEEN)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        for undo in &mut self.undo {
            if let Undo::Undelay(child) = undo {
                let _ = child.kill();
            }
        }
    }
}
