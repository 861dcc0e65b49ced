//! A network of namespaces: every host has one of its own, and nothing of it touches the machine's network.
//!
//! A hub namespace holds two bridges. The control plane's reaches every host; the data plane's reaches the nodes alone.
//! Links go down at the hub, as when a cable is pulled; packets are dropped where they come in (`nft`), since a drop on
//! the way out is told to the sender as an error, which no real network does; rates are token buckets (`tc`); delays
//! are a TUN device's (`tests/peers/delay.py`). Names carry the process id: what a killed run left behind is swept away
//! by the next one.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// How every namespace's and folder's name begins.
const MARK: &str = "cairn-chaos-";
/// Where namespaces are listed.
const NAMESPACES: &str = "/var/run/netns";
/// The namespace of the bridges.
const HUB: &str = "hub";

/// One of the two networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// Coordinators, operators and the store.
    Control,
    /// The workers' ring and the agents' snapshots.
    Data,
}

impl Plane {
    /// Its interface in every namespace.
    fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Data => "data",
        }
    }

    fn network(self) -> &'static str {
        match self {
            Self::Control => "10.213.0",
            Self::Data => "10.214.0",
        }
    }
}

/// A filter in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter(u64);

/// Why namespaces cannot be used here; `Ok` if they can.
pub fn usable() -> Result<(), String> {
    for (program, argument) in [("ip", "-V"), ("nft", "--version"), ("tc", "-V"), ("bash", "--version")] {
        let found = Command::new(program).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status();
        found.map_err(|error| format!("no {program}: {error} (apt-get install iproute2 nftables)"))?;
    }
    let probe = format!("{MARK}{}-probe", std::process::id());
    run("ip", &["netns", "add", &probe]).map_err(|error| format!("no network namespaces: {error}"))?;
    let filtered = run("ip", &["netns", "exec", &probe, "nft", "add", "table", "inet", "chaos"]);
    run("ip", &["netns", "del", &probe])?;
    filtered.map_err(|error| format!("no filters in a namespace: {error}"))
}

/// Runs a command; its standard error, if it fails.
fn run(program: &str, words: &[&str]) -> Result<(), String> {
    let done = Command::new(program).args(words).stdin(Stdio::null()).stdout(Stdio::null()).output();
    let done = done.map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() { Ok(()) } else { Err(format!("{program} {}: {}", words.join(" "), said.trim())) }
}

fn must(program: &str, words: &[&str]) {
    run(program, words).unwrap_or_else(|error| panic!("{error}"));
}

/// See the module header.
#[derive(Debug)]
pub struct Net {
    mark: String,
    /// The last part of each host's addresses.
    hosts: BTreeMap<String, u8>,
    /// Rules by host, in the order they were made.
    filters: BTreeMap<String, Vec<(Filter, String)>>,
    made: u64,
}

impl Net {
    /// Hosts on the control plane, of which `nodes` are on the data plane as well.
    pub fn new(nodes: &[String], others: &[String]) -> Self {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        sweep();
        let mark = format!("{MARK}{}-{}-", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
        let hosts = others.iter().zip(2..).chain(nodes.iter().zip(100..));
        let hosts = hosts.map(|(name, number)| (name.clone(), number)).collect();
        let net = Self { mark, hosts, filters: BTreeMap::new(), made: 0 };
        must("ip", &["netns", "add", &net.space(HUB)]);
        for plane in [Plane::Control, Plane::Data] {
            let bridge = format!("{}-bridge", plane.name());
            must("ip", &["-n", &net.space(HUB), "link", "add", "name", &bridge, "type", "bridge"]);
            must("ip", &["-n", &net.space(HUB), "link", "set", "dev", &bridge, "up"]);
        }
        for host in net.hosts.keys() {
            let space = net.space(host);
            must("ip", &["netns", "add", &space]);
            must("ip", &["-n", &space, "link", "set", "dev", "lo", "up"]);
            net.attach(host, Plane::Control);
            if nodes.contains(host) {
                net.attach(host, Plane::Data);
                must("ip", &["-n", &space, "rule", "add", "iif", "lo", "lookup", "101", "pref", "100"]);
            }
            net.filter(host, "add table inet chaos\nadd chain inet chaos in { type filter hook input priority 0; }\n");
        }
        net
    }

    /// A cable from a host to a plane's bridge.
    fn attach(&self, host: &str, plane: Plane) {
        let (space, hub, near) = (self.space(host), self.space(HUB), plane.name());
        let (far, bridge) = (format!("{host}-{near}"), format!("{near}-bridge"));
        let pair = ["link", "add", "name", &far, "netns", &hub, "type", "veth", "peer", "name", near, "netns", &space];
        must("ip", &pair);
        must("ip", &["-n", &hub, "link", "set", "dev", &far, "master", &bridge, "up"]);
        let address = format!("{}/24", self.address(host, plane));
        must("ip", &["-n", &space, "addr", "add", &address, "dev", near]);
        must("ip", &["-n", &space, "link", "set", "dev", near, "up"]);
    }

    fn space(&self, host: &str) -> String {
        format!("{}{host}", self.mark)
    }

    /// A name for this network's folder.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// A host's address on a plane.
    pub fn address(&self, host: &str, plane: Plane) -> String {
        let number = self.hosts.get(host).unwrap_or_else(|| panic!("there is no host {host}"));
        format!("{}.{number}", plane.network())
    }

    /// A command that runs on a host. The process that is started becomes the program itself.
    pub fn command(&self, host: &str, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space(host)]).arg(program);
        command
    }

    /// Plugs a host's cable in or out.
    pub fn plug(&self, host: &str, plane: Plane, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        let far = format!("{host}-{}", plane.name());
        must("ip", &["-n", &self.space(HUB), "link", "set", "dev", &far, state]);
    }

    /// Drops what comes in from another host.
    pub fn cut(&mut self, host: &str, from: &str, plane: Plane) -> Filter {
        let rule = format!("ip saddr {} drop", self.address(from, plane));
        self.add(host, rule)
    }

    /// Drops some of what comes in on a plane.
    pub fn lose(&mut self, host: &str, plane: Plane, percent: u32) -> Filter {
        let rule = format!("iifname {} numgen random mod 100 < {percent} drop", plane.name());
        self.add(host, rule)
    }

    fn add(&mut self, host: &str, rule: String) -> Filter {
        self.made += 1;
        self.filters.entry(host.into()).or_default().push((Filter(self.made), rule));
        self.apply(host);
        Filter(self.made)
    }

    /// Ends filters.
    pub fn remove(&mut self, ended: &[Filter]) {
        for host in self.filters.keys().cloned().collect::<Vec<_>>() {
            let rules = self.filters.entry(host.clone()).or_default();
            let before = rules.len();
            rules.retain(|(filter, _)| !ended.contains(filter));
            if rules.len() < before {
                self.apply(&host);
            }
        }
    }

    fn apply(&self, host: &str) {
        let rules = self.filters.get(host).into_iter().flatten();
        let rules = rules.map(|(_, rule)| format!("add rule inet chaos in {rule}\n"));
        self.filter(host, &format!("flush chain inet chaos in\n{}", rules.collect::<String>()));
    }

    /// Feeds a script to `nft`, which takes all of it or nothing.
    fn filter(&self, host: &str, script: &str) {
        let mut command = self.command(host, Path::new("nft"));
        let mut child = command.args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft starts");
        child.stdin.take().expect("nft reads").write_all(script.as_bytes()).expect("nft reads all");
        assert!(child.wait().expect("nft ends").success(), "nft on {host}:\n{script}");
    }

    /// Limits what a host sends on the data plane; `None` lifts the limit.
    pub fn limit(&self, host: &str, megabits: Option<u32>) {
        let space = self.space(host);
        let interface = Plane::Data.name();
        match megabits {
            Some(rate) => {
                let rate = format!("{rate}mbit");
                let bucket = ["tbf", "rate", &rate, "burst", "128kb", "latency", "300ms"];
                let words = ["-n", &space, "qdisc", "replace", "dev", interface, "root"];
                must("tc", &[&words[..], &bucket].concat());
            }
            // There may be none.
            None => drop(run("tc", &["-n", &space, "qdisc", "del", "dev", interface, "root"])),
        }
    }

    /// Delays what a node sends on the data plane, until the process is killed.
    pub fn delay(&self, node: &str, milliseconds: u32) -> Child {
        let script = crate::root().join("tests/peers/delay.py");
        let network = format!("{}.0/24", Plane::Data.network());
        let mut command = self.command(node, Path::new("python3"));
        command.arg(script).args([&network, &self.address(node, Plane::Data), &milliseconds.to_string()]);
        command.stdin(Stdio::null()).spawn().expect("the delay starts")
    }

    /// Bytes a host has sent on a plane.
    pub fn sent(&self, host: &str, plane: Plane) -> u64 {
        let mut command = self.command(host, Path::new("cat"));
        let told = command.arg(format!("/sys/class/net/{}/statistics/tx_bytes", plane.name())).output();
        let text = String::from_utf8_lossy(&told.expect("cat runs").stdout).trim().to_string();
        text.parse().unwrap_or_else(|_| panic!("no count of bytes: {text:?}"))
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        remove_spaces(&self.mark);
    }
}

/// The folder of this name, where everything of a run lies.
pub fn folder(mark: &str) -> PathBuf {
    std::env::temp_dir().join(mark.trim_end_matches('-'))
}

fn remove_spaces(mark: &str) {
    for entry in std::fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(mark) {
            // Another run may be sweeping as well.
            drop(run("ip", &["netns", "del", &name]));
        }
    }
}

/// Removes the namespaces and mounts of runs whose process is gone.
fn sweep() {
    let dead = |name: &str| {
        let id = name.strip_prefix(MARK).and_then(|rest| rest.split('-').next());
        id.filter(|id| id.parse::<u32>().is_ok() && !Path::new("/proc").join(id).exists()).map(str::to_string)
    };
    for entry in std::fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        if let Some(id) = dead(&entry.file_name().to_string_lossy()) {
            remove_spaces(&format!("{MARK}{id}-"));
        }
    }
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    for point in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        let of_dead = Path::new(point).iter().any(|part| dead(&part.to_string_lossy()).is_some());
        if of_dead {
            drop(run("umount", &["-l", point]));
        }
    }
}

/// Gives a folder a small memory file system of its own.
pub fn mount(folder: &Path, megabytes: u32) {
    std::fs::create_dir_all(folder).expect("a folder for the mount");
    let size = format!("size={megabytes}m");
    must("mount", &["-t", "tmpfs", "-o", &size, "cairn-chaos", &folder.display().to_string()]);
}

/// Takes it away, whoever uses it.
pub fn unmount(folder: &Path) {
    drop(run("umount", &["-l", &folder.display().to_string()]));
}
