//! The parts of a cluster, started by hand, plain or with TLS.

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::certs::Certs;
use crate::job::Job;
use crate::run::{LIMIT, Outcome, cairn};

/// A part started by hand; killed when the test is done with it.
pub struct Part(Child);

impl Part {
    /// Starts a part.
    pub fn start(words: &[&str]) -> Self {
        Self::start_in(words, &[])
    }

    /// The same with further environment variables.
    pub fn start_in(words: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(crate::cairn());
        command.args(words).envs(environment.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().expect("cairn starts"))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.0.wait().expect("a child can be waited for")
    }

    /// Waits for it to end by itself, but no longer than any wait of a test; how it ended.
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "process {} did not end within {LIMIT:?}", self.id());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The parts of one job's cluster, all on this machine.
pub struct Cluster {
    /// Where the coordinator is reached: where it listens, unless a test puts something in between. Of several, with
    /// commas between them.
    pub address: String,
    listen: String,
    certs: Option<Certs>,
    /// The token file.
    pub token: String,
    /// The store, as a path.
    pub store: String,
    /// What its processes find in their environment.
    pub environment: Vec<(String, String)>,
    memory: String,
}

impl Cluster {
    /// A cluster whose store and memory lie in the job's folder.
    pub fn new(job: &Job) -> Self {
        let listen = Self::free_address();
        let path = |name: &str| job.folder().join(name).display().to_string();
        Self {
            address: listen.clone(),
            listen,
            certs: None,
            token: path("token"),
            store: path("cairn-store"),
            environment: Vec::new(),
            memory: path("m"),
        }
    }

    /// The folder in memory that all agents' folders lie in.
    pub fn memory(&self) -> &Path {
        Path::new(&self.memory)
    }

    /// The same with certificates for its parts.
    pub fn secured(job: &Job) -> Self {
        let certs = Certs::new(&job.folder().join("certs"));
        Self { certs: Some(certs), ..Self::new(job) }
    }

    /// Its certificates.
    pub fn certs(&self) -> &Certs {
        self.certs.as_ref().expect("a cluster with TLS")
    }

    /// The words that give a part its certificate.
    fn tls(&self, role: &str, name: &str) -> Vec<String> {
        let issued = self.certs.as_ref().map(|certs| certs.issue(role, name));
        issued.into_iter().flat_map(|folder| ["--tls".to_string(), folder]).collect()
    }

    /// Starts the coordinator and waits until it answers.
    pub fn coordinator(&self) -> Part {
        self.coordinator_with(&[])
    }

    /// The same with further words.
    pub fn coordinator_with(&self, more: &[&str]) -> Part {
        let words = ["coordinator", "--store", &self.store, "--listen", &self.listen, "--token-file", &self.token];
        let tls = self.tls("coordinator", "main");
        let tls: Vec<&str> = tls.iter().map(String::as_str).collect();
        let part = Part::start_in(&[&words[..], &tls, more].concat(), &self.variables());
        let deadline = Instant::now() + LIMIT;
        while self.call(&["jobs"]).code != Some(0) {
            assert!(Instant::now() < deadline, "the coordinator does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        part
    }

    /// Starts an agent with two slots.
    pub fn agent(&self, node: &str) -> Part {
        self.agent_with(node, 2)
    }

    /// Starts an agent.
    pub fn agent_with(&self, node: &str, slots: u32) -> Part {
        let words = ["agent", "--coordinator", &self.address, "--token-file", &self.token, "--node", node];
        let tls = self.tls("agent", node);
        let tls: Vec<_> = tls.iter().map(String::as_str).collect();
        let more = ["--memory", &self.memory, "--slots", &slots.to_string()];
        Part::start_in(&[&words[..], &more, &tls].concat(), &self.variables())
    }

    /// Starts a coordinator that stands by at an address, in an environment of its own.
    pub fn standby(&self, listen: &str, environment: &[(&str, &str)]) -> Part {
        let words = ["coordinator", "--standby", "--store", &self.store, "--listen", listen];
        let words = [&words[..], &["--token-file", &self.token]].concat();
        Part::start_in(&words, &[&self.variables()[..], environment].concat())
    }

    fn variables(&self) -> Vec<(&str, &str)> {
        self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    /// A command's words, with those that find this cluster.
    pub fn words<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        let mut all = words.to_vec();
        all.extend(["--coordinator", &self.address, "--token-file", &self.token, "--output", "json"]);
        if let Some(certs) = &self.certs {
            all.extend(["--tls", certs.operator()]);
        }
        all
    }

    /// Runs a command against this cluster.
    pub fn call(&self, words: &[&str]) -> Outcome {
        cairn(&self.words(words))
    }

    /// An address of loopback that nobody listens at.
    pub fn free_address() -> String {
        let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
        format!("127.0.0.1:{port}")
    }
}
