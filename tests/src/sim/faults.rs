//! What goes wrong, when and for how long: a plan that follows from the seed, carried out between two steps of time.

use std::path::Path;
use std::time::Duration;

use turmoil::Sim;

use super::random::Random;
use super::world::{Host, World};

/// Message latency of an undisturbed link at most.
pub(crate) const LATENCY: Duration = Duration::from_millis(40);
/// The first fault comes no earlier, and the last ends no later than [`Plan::calm`].
const FIRST: u64 = 1_500;

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A process is killed; its host's kernel closes its connections. An agent takes its workers with it.
    Crash(Host),
    /// A node is gone from one moment to the next, with all it had in memory.
    Lose(Host),
    /// One of a node's workers is killed.
    CrashWorker(Host),
    /// Two hosts lose all that they send to one another.
    Cut(Host, Host),
    /// A host loses all that it sends to another.
    CutOneWay(Host, Host),
    /// What two hosts send to one another arrives when it is over: a partition that TCP outlives.
    Hold(Host, Host),
    /// A host is cut off from all others and from the store for a while; then its clock jumps.
    Isolate(Host),
    /// Messages between two hosts take longer, and overtake those of other connections.
    Slow(Host, Host),
    /// A host's clock jumps: its processes were not run.
    Jump(Host),
    /// The store is out of order for one host.
    Outage(Host),
    /// The store is out of order for everybody.
    OutageForAll,
    /// Requests to the store fail, hang, or lose their answers.
    RoughStore,
    /// Nobody gets through to a node's port for snapshots; all else works.
    Shut(Host),
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Crash(_) => "crash",
            Self::Lose(_) => "lost node",
            Self::CrashWorker(_) => "worker crash",
            Self::Cut(..) => "partition",
            Self::CutOneWay(..) => "one-way partition",
            Self::Hold(..) => "held messages",
            Self::Isolate(_) => "isolation and clock jump",
            Self::Slow(..) => "slow link",
            Self::Jump(_) => "clock jump",
            Self::Outage(_) | Self::OutageForAll => "store outage",
            Self::RoughStore => "rough store",
            Self::Shut(_) => "shut port",
        }
    }
}

/// A fault and its time.
#[derive(Debug, Clone, Copy)]
struct Fault {
    at: Duration,
    until: Duration,
    kind: Kind,
}

impl Fault {
    fn lasts(&self) -> Duration {
        self.until.saturating_sub(self.at)
    }
}

/// The hosts that faults may hit.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    pub(crate) coordinators: Vec<Host>,
    pub(crate) nodes: Vec<Host>,
}

impl Cluster {
    pub(crate) fn all(&self) -> impl Iterator<Item = Host> + Clone + '_ {
        self.coordinators.iter().chain(&self.nodes).copied()
    }
}

/// All faults of a run.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Not yet begun, the next one last.
    coming: Vec<Fault>,
    active: Vec<Fault>,
    /// From here on nothing is wrong.
    pub(crate) calm: Duration,
    cluster: Cluster,
    random: Random,
}

impl Plan {
    pub(crate) fn new(seed: u64, cluster: Cluster) -> Self {
        let mut random = Random::new(seed, 2);
        let focus = match random.below(4) {
            0 => Focus::Coordinators,
            1 => Focus::Nodes,
            2 => Focus::Store,
            _ => Focus::Anything,
        };
        let count = random.below(15);
        let calm = random.within(12_000, 26_000);
        let mut coming: Vec<Fault> = (0..count)
            .map(|_| {
                let at = random.within(FIRST, calm - 1_000);
                // Mostly short; some outlast every deadline.
                let most = if random.chance(250) { 14_000 } else { 4_000 };
                let until = (at + random.within(100, most)).min(calm);
                let kind = draw(&mut random, &cluster, focus);
                Fault { at: Duration::from_millis(at), until: Duration::from_millis(until), kind }
            })
            .collect();
        coming.sort_by_key(|fault| std::cmp::Reverse(fault.at));
        Self { coming, active: vec![], calm: Duration::from_millis(calm), cluster, random }
    }

    /// A node's port for snapshots is shut while the job is at work, and stays so.
    pub(crate) fn shut(seed: u64, cluster: Cluster) -> Self {
        let mut random = Random::new(seed, 2);
        let (at, until) = (Duration::from_millis(random.within(5_000, 14_000)), Duration::MAX);
        let coming = vec![Fault { at, until, kind: Kind::Shut(cluster.nodes[0]) }];
        Self { coming, active: vec![], calm: Duration::from_mins(5), cluster, random }
    }

    /// Ends and begins what is due.
    pub(crate) fn advance(&mut self, sim: &mut Sim<'_>, world: &World, folder: &Path) {
        let now = world.lock().now;
        let (over, active) = self.active.iter().partition(|fault| fault.until <= now);
        self.active = active;
        for fault in over {
            self.end(sim, world, fault.kind);
        }
        while self.coming.last().is_some_and(|fault| fault.at <= now) {
            if let Some(fault) = self.coming.pop() {
                self.begin(sim, world, folder, fault);
            }
        }
    }

    fn begin(&mut self, sim: &mut Sim<'_>, world: &World, folder: &Path, fault: Fault) {
        let name = fault.kind.name();
        {
            let mut state = world.lock();
            *state.faults.entry(name).or_default() += 1;
            let milliseconds = fault.lasts().as_millis();
            state.note("fault", "begins", format_args!("{:?} for {milliseconds} ms", fault.kind));
        }
        match fault.kind {
            Kind::Crash(host) => crash(sim, world, folder, host, true),
            Kind::Lose(host) => {
                self.others(host).for_each(|other| sim.partition(host, other));
                crash(sim, world, folder, host, false);
            }
            Kind::CrashWorker(host) => self.crash_worker(world, host),
            Kind::Cut(one, other) => sim.partition(one, other),
            Kind::CutOneWay(from, to) => sim.partition_oneway(from, to),
            Kind::Hold(one, other) => sim.hold(one, other),
            Kind::Isolate(host) => {
                self.others(host).for_each(|other| sim.hold(host, other));
                world.lock().outages.insert(host, fault.until);
            }
            Kind::Slow(one, other) => sim.set_link_max_message_latency(one, other, Duration::from_millis(1_500)),
            Kind::Jump(host) => world.jump(host, fault.lasts()),
            Kind::Outage(host) => drop(world.lock().outages.insert(host, fault.until)),
            Kind::OutageForAll => {
                let outages = self.cluster.all().map(|host| (host, fault.until));
                world.lock().outages.extend(outages);
            }
            Kind::RoughStore => world.lock().roughness = self.random.within(20, 250),
            Kind::Shut(host) => world.lock().shut = Some(sim.lookup(host)),
        }
        self.active.push(fault);
    }

    fn end(&self, sim: &mut Sim<'_>, world: &World, kind: Kind) {
        match kind {
            Kind::Crash(host) => start(sim, world, host),
            Kind::Lose(host) => {
                self.others(host).for_each(|other| sim.repair(host, other));
                start(sim, world, host);
            }
            Kind::Cut(one, other) => sim.repair(one, other),
            Kind::CutOneWay(from, to) => sim.repair_oneway(from, to),
            Kind::Hold(one, other) => sim.release(one, other),
            Kind::Isolate(host) => {
                self.others(host).for_each(|other| sim.release(host, other));
                world.jump(host, Duration::from_secs(4));
            }
            Kind::Slow(one, other) => sim.set_link_max_message_latency(one, other, LATENCY),
            Kind::RoughStore => world.lock().roughness = 0,
            Kind::Shut(_) => world.lock().shut = None,
            Kind::CrashWorker(_) | Kind::Jump(_) | Kind::Outage(_) | Kind::OutageForAll => {}
        }
    }

    /// Mends everything.
    pub(crate) fn calm(&mut self, sim: &mut Sim<'_>, world: &World) {
        for fault in std::mem::take(&mut self.active) {
            self.end(sim, world, fault.kind);
        }
        self.coming.clear();
        let hosts: Vec<Host> = self.cluster.all().collect();
        for (index, one) in hosts.iter().enumerate() {
            for other in &hosts[index + 1..] {
                sim.release(*one, *other);
            }
        }
        let mut state = world.lock();
        state.outages.clear();
        state.roughness = 0;
        state.note("fault", "calm", "from here on nothing is wrong");
    }

    fn others(&self, host: Host) -> impl Iterator<Item = Host> + '_ {
        self.cluster.all().filter(move |other| *other != host)
    }

    fn crash_worker(&mut self, world: &World, host: Host) {
        let mut state = world.lock();
        let workers = state.hosts.get_mut(host).map(|life| std::mem::take(&mut life.workers)).unwrap_or_default();
        let which = if workers.is_empty() { 0 } else { self.random.below(workers.len() as u64) as usize };
        // The one that is left out of what stays is dropped, which ends it.
        let stays = workers.into_iter().enumerate().filter(|(index, _)| *index != which).map(|(_, worker)| worker);
        state.hosts.entry(host).or_default().workers = stays.collect();
    }

    /// Whether a host is to stay down for now.
    pub(crate) fn keeps_down(&self, host: Host) -> bool {
        self.active.iter().any(|fault| matches!(fault.kind, Kind::Crash(down) | Kind::Lose(down) if down == host))
    }
}

/// Ends a host's processes; the folder of a node's agent stays where the agent alone has died.
fn crash(sim: &mut Sim<'_>, world: &World, folder: &Path, host: Host, stays: bool) {
    let (at, aside) = (folder.join(host), folder.join(format!("{host}-kept")));
    // An agent that ends in good order removes its folder; one that is killed cannot.
    let kept = stays && std::fs::rename(&at, &aside).is_ok();
    world.felling(host, || sim.crash(host));
    if kept {
        std::fs::rename(&aside, &at).expect("a folder of this simulation alone");
    }
}

/// Starts a host's software, unless it runs already.
pub(crate) fn start(sim: &mut Sim<'_>, world: &World, host: Host) {
    if !sim.is_host_running(host) {
        // What its last life has left goes now.
        world.felling(host, || sim.bounce(host));
    }
}

/// What a run's faults hit most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Focus {
    Anything,
    Coordinators,
    Nodes,
    Store,
}

fn draw(random: &mut Random, cluster: &Cluster, focus: Focus) -> Kind {
    fn one_of(random: &mut Random, hosts: &[Host]) -> Host {
        hosts[random.below(hosts.len() as u64) as usize]
    }
    let all: Vec<Host> = cluster.all().collect();
    let (coordinator, node) = (one_of(random, &cluster.coordinators), one_of(random, &cluster.nodes));
    let aimed = random.chance(700);
    let host = match focus {
        Focus::Coordinators if aimed => coordinator,
        Focus::Nodes if aimed => node,
        _ => one_of(random, &all),
    };
    let others: Vec<Host> = all.iter().copied().filter(|other| *other != host).collect();
    let other = one_of(random, &others);
    if focus == Focus::Store && aimed {
        return match random.below(4) {
            0 => Kind::Outage(host),
            1 => Kind::OutageForAll,
            _ => Kind::RoughStore,
        };
    }
    match random.below(16) {
        0..=2 => Kind::Crash(host),
        3 => Kind::Lose(host),
        4 | 5 => Kind::CrashWorker(node),
        6 => Kind::Cut(host, other),
        7 => Kind::CutOneWay(host, other),
        8 => Kind::CutOneWay(other, host),
        9 => Kind::Hold(host, other),
        10 => Kind::Isolate(host),
        11 => Kind::Slow(host, other),
        12 => Kind::Jump(host),
        13 => Kind::Outage(host),
        14 => Kind::OutageForAll,
        _ => Kind::RoughStore,
    }
}

impl World {
    /// Has a host's clock jump.
    fn jump(&self, host: Host, by: Duration) {
        let state = self.lock();
        if let Some(jumps) = state.hosts.get(host).and_then(|life| life.jumps.as_ref()) {
            // One whose processes are down has no clock.
            let _ = jumps.send(by);
        }
    }
}
