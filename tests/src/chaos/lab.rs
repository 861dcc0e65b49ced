//! A whole cluster on a network of namespaces: an S3 server, two coordinators, agents, an operator.
//!
//! Coordinators and agents are supervised as a service manager does it: one that ends is started again after a moment.
//! Every process logs into a file of its own, which stays where something went wrong.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::net::{self, Net, Plane};
use crate::certs::Certs;
use crate::process::{descendants, signal};
use crate::run::{LIMIT, Outcome, Run};

/// A part that ended is started again after this.
const RESTART: Duration = Duration::from_millis(700);
/// The host of the S3 server, and its port.
const STORE: (&str, u16) = ("s0", 5000);
/// The host of operators.
const OPERATOR: &str = "op";
/// The coordinators' port.
const PORT: u16 = 7070;
/// Memory of each node, in MiB: enough for snapshots and parity of the jobs here.
const MEMORY: u32 = 96;
/// The store's disk, in MiB: enough for the checkpoints that are kept.
const DISK: u32 = 256;

/// A supervised process.
#[derive(Debug)]
struct Part {
    name: String,
    host: String,
    words: Vec<String>,
    child: Option<Child>,
    due: Option<Instant>,
}

/// What a cluster is made with.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Nodes, each with one worker.
    pub nodes: usize,
    /// Coordinators.
    pub coordinators: usize,
    /// Whether agents are told their address on the data plane; else they find one by themselves.
    pub planes: bool,
    /// Whether nodes are tested before they get work. A campaign cuts their network while they come back, and does
    /// without.
    pub admission: bool,
}

/// See the module header.
#[derive(Debug)]
pub struct Lab {
    /// The network.
    pub net: Net,
    folder: PathBuf,
    shape: Shape,
    certs: Option<Certs>,
    parts: Vec<Part>,
    server: Option<Child>,
    /// Ends of supervised parts, and how.
    pub ends: Vec<(String, String)>,
    /// Keep the folder with all logs.
    pub keep: bool,
}

/// The Python that has the S3 server's package; `None` where it is not installed.
pub fn server() -> Option<PathBuf> {
    let here = crate::root().join(".venv/bin/moto_server");
    let program = std::env::var_os("CAIRN_MOTO").map_or(here, PathBuf::from);
    program.exists().then(|| program.with_file_name("python"))
}

/// Why there can be no lab here; `Ok` if there can.
pub fn usable() -> Result<(), String> {
    net::usable()?;
    server().map(drop).ok_or_else(|| "no S3 server (./test installs moto; or set CAIRN_MOTO)".into())
}

fn named(letter: char, count: usize) -> Vec<String> {
    (0..count).map(|at| format!("{letter}{at}")).collect()
}

impl Lab {
    /// A cluster without a job, all of its nodes attached.
    pub fn new(shape: Shape) -> Self {
        let (nodes, coordinators) = (named('n', shape.nodes), named('c', shape.coordinators));
        let others = [&coordinators[..], &[STORE.0.to_string(), OPERATOR.to_string()]].concat();
        let net = Net::new(&nodes, &others);
        let folder = net::folder(net.mark());
        std::fs::create_dir_all(&folder).expect("a folder for the run");
        // Known from here on to be removed again, however far it comes.
        let mut lab = Self { net, folder, shape, certs: None, parts: vec![], server: None, ends: vec![], keep: false };
        let certs = Certs::new(&lab.folder.join("certs"));
        lab.serve();
        for name in &coordinators {
            let host = lab.net.address(name, Plane::Control);
            let tls = certs.issue_for("coordinator", name, &[&host]);
            let listen = format!("{host}:{PORT}");
            let words =
                ["coordinator", "--standby", "--store", "s3://bucket/cairn", "--listen", &listen, "--tls", &tls];
            let admission: &[&str] = if shape.admission { &[] } else { &["--no-admission"] };
            lab.start(name, &[&words[..], admission].concat());
        }
        let plane = if shape.planes { Plane::Data } else { Plane::Control };
        for name in &nodes {
            let host = lab.net.address(name, plane);
            let tls = certs.issue_for("agent", name, &[&host]);
            let memory = lab.memory(name);
            net::mount(&memory, MEMORY);
            let (memory, coordinators) = (memory.display().to_string(), lab.coordinators());
            let words = ["agent", "--coordinator", &coordinators, "--node", name, "--slots", "1", "--memory", &memory];
            let ring = if shape.planes { vec!["--ring-host", &host] } else { vec![] };
            lab.start(name, &[&words[..], &["--tls", &tls], &ring].concat());
        }
        lab.certs = Some(certs);
        lab.wait_for_nodes();
        lab
    }

    /// Starts the S3 server, unless it runs. What it has stored it still has.
    pub fn start_store(&mut self) {
        if self.server.as_mut().is_some_and(|server| matches!(server.try_wait(), Ok(None))) {
            return;
        }
        let program = server().expect("an S3 server, which the caller has looked for");
        let log = OpenOptions::new().create(true).append(true).open(self.log(STORE.0)).expect("a log file");
        let mut command = self.net.command(STORE.0, &program);
        command
            .arg(crate::root().join("tests/peers/s3.py"))
            .args(["0.0.0.0", &STORE.1.to_string()])
            .arg(self.disk())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        self.server = Some(command.stderr(log).spawn().expect("the S3 server starts"));
    }

    /// Starts the S3 server and makes its bucket.
    fn serve(&mut self) {
        net::mount(&self.disk(), DISK);
        self.start_store();
        let (host, port) = (self.net.address(STORE.0, Plane::Control), STORE.1);
        let request =
            format!("PUT /bucket HTTP/1.1\\r\\nHost: {host}\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n");
        let script = format!("exec 3<>/dev/tcp/{host}/{port} && printf '{request}' >&3 && head -1 <&3");
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut command = self.net.command(OPERATOR, Path::new("bash"));
            let asked = command.args(["-c", &script]).output().expect("bash starts");
            if String::from_utf8_lossy(&asked.stdout).contains("200") {
                return;
            }
            assert!(Instant::now() < deadline, "the S3 server does not answer");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Adds a supervised part and starts it.
    fn start(&mut self, name: &str, words: &[&str]) {
        let token = self.token();
        let words = words.iter().copied().chain(["--token-file", &token]).map(str::to_string).collect();
        let (name, host) = (name.to_string(), name.to_string());
        self.parts.push(Part { name, host, words, child: None, due: Some(Instant::now()) });
        self.tend();
    }

    fn token(&self) -> String {
        self.folder.join("token").display().to_string()
    }

    /// The coordinators' addresses, as agents and operators are given them.
    fn coordinators(&self) -> String {
        let listed = named('c', self.shape.coordinators);
        listed
            .iter()
            .map(|name| format!("{}:{PORT}", self.net.address(name, Plane::Control)))
            .collect::<Vec<_>>()
            .join(",")
    }

    fn environment(&self, command: &mut Command) {
        let endpoint = format!("http://{}:{}", self.net.address(STORE.0, Plane::Control), STORE.1);
        command.env("AWS_ENDPOINT_URL", endpoint).env("AWS_ALLOW_HTTP", "true").env("AWS_REGION", "us-east-1");
        command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
        command.env("CAIRN_LOG", "info").env("CAIRN_STORE_REQUEST_TIMEOUT", "10");
    }

    /// Starts again what has ended and waited for long enough. To be called often.
    pub fn tend(&mut self) {
        for at in 0..self.parts.len() {
            let part = &mut self.parts[at];
            if let Some(status) = part.child.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                self.ends.push((part.name.clone(), status.to_string()));
                (part.child, part.due) = (None, Some(Instant::now() + RESTART));
            }
            if self.parts[at].due.is_some_and(|due| Instant::now() >= due) {
                let part = &self.parts[at];
                let log = OpenOptions::new().create(true).append(true).open(self.log(&part.name)).expect("a log file");
                let mut command = self.net.command(&part.host, crate::cairn());
                self.environment(&mut command);
                command.args(&part.words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
                let child = command.spawn().expect("a part starts");
                (self.parts[at].child, self.parts[at].due) = (Some(child), None);
            }
        }
    }

    /// Whether every part runs.
    pub fn whole(&self) -> bool {
        self.parts.iter().all(|part| part.child.is_some())
    }

    /// The process of a part; `None` while it waits to be started again.
    pub fn process(&self, name: &str) -> Option<u32> {
        self.parts.iter().find(|part| part.name == name).and_then(|part| part.child.as_ref()).map(Child::id)
    }

    /// The S3 server's process.
    pub fn store(&self) -> (&'static str, u32) {
        (STORE.0, self.server.as_ref().map_or(0, Child::id))
    }

    /// The worker processes of a node.
    pub fn workers(&self, node: &str) -> Vec<u32> {
        let below = self.process(node).map(descendants).unwrap_or_default();
        below.iter().filter(|process| process.part() == "worker").map(|process| process.id).collect()
    }

    /// A part's log.
    pub fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// The memory file system of a node.
    pub fn memory(&self, node: &str) -> PathBuf {
        self.folder.join(format!("memory-{node}"))
    }

    /// The store's disk.
    pub fn disk(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// Where everything of this run lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The coordinator that leads, or did last: the one whose log tells of the highest epoch.
    pub fn leader(&self) -> String {
        let epoch = |name: &String| {
            let text = std::fs::read_to_string(self.log(name)).unwrap_or_default();
            let last = text.lines().rfind(|line| line.contains("this coordinator leads"));
            let words = last.into_iter().flat_map(str::split_whitespace);
            words.filter_map(|word| word.strip_prefix("epoch=")).find_map(|number| number.parse::<u64>().ok())
        };
        named('c', self.shape.coordinators).into_iter().max_by_key(epoch).expect("there is a coordinator")
    }

    /// The names of the nodes.
    pub fn nodes(&self) -> Vec<String> {
        named('n', self.shape.nodes)
    }

    /// The names of the coordinators.
    pub fn leaders(&self) -> Vec<String> {
        named('c', self.shape.coordinators)
    }

    /// Starts an operator's command.
    pub fn operate(&self, words: &[&str]) -> Run {
        let mut command = self.net.command(OPERATOR, crate::cairn());
        self.environment(&mut command);
        let certs = self.certs.as_ref().expect("certificates, made at the start");
        command.args(words).args(["--coordinator", &self.coordinators(), "--token-file", &self.token()]);
        command.args(["--output", "json", "--tls", certs.operator()]);
        Run::spawn(command)
    }

    /// Runs an operator's command to its end.
    pub fn call(&self, words: &[&str]) -> Outcome {
        self.operate(words).finish()
    }

    fn wait_for_nodes(&mut self) {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.tend();
            let nodes = self.call(&["nodes"]);
            if nodes.code == Some(0) && nodes.events.len() >= self.shape.nodes {
                return;
            }
            if Instant::now() >= deadline {
                self.keep = true;
                panic!("not all nodes came: {nodes:?}; logs in {}", self.folder.display());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let children: Vec<&mut Child> =
            self.parts.iter_mut().filter_map(|part| part.child.as_mut()).chain(self.server.as_mut()).collect();
        for child in children {
            // Paused workers do not notice that their agent is gone.
            for id in descendants(child.id()).iter().map(|process| process.id).chain([child.id()]) {
                signal(id, "KILL");
            }
            let _ = child.wait();
        }
        for node in self.nodes() {
            net::unmount(&self.memory(&node));
        }
        net::unmount(&self.disk());
        if self.keep || std::thread::panicking() {
            println!("logs are kept in {}", self.folder.display());
        } else {
            // What cannot be removed is in the system's folder for temporary files.
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}
