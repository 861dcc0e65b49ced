//! The worker processes.
//!
//! Each is a child that a future of its own watches and ends when told; when it has ended, that future says how. Output
//! of a worker is passed on to the agent's log line by line. A child never outlives the agent's runtime
//! (`kill_on_drop`), and should the agent be killed outright, the worker sees its socket close and exits.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use proto::ids::{JobName, WorkerId};
use proto::wire::{Failure, FailureKind};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};

use crate::driver::Input;
use crate::launch::{Door, Launch, Launched};

/// Longer output lines are cut.
const LONGEST_LINE: u64 = 8 << 10;

/// Starts workers as processes.
#[derive(Debug)]
pub(crate) struct Processes {
    executable: PathBuf,
}

impl Processes {
    pub(crate) fn of(executable: PathBuf) -> Self {
        Self { executable }
    }
}

impl Launch for Processes {
    fn launch(&mut self, job: &JobName, worker: WorkerId, door: Door) -> std::io::Result<Launched> {
        let mut child = Command::new(&self.executable)
            .arg("worker")
            .arg("--agent")
            .arg(door.socket())
            .args(["--id", &worker.to_string(), "--job", job.as_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A signal to the agent's group is the agent's to answer: it saves first.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let process = child.id().unwrap_or(0);
        if let Some(output) = child.stdout.take() {
            tokio::spawn(pass_on(output, worker));
        }
        if let Some(output) = child.stderr.take() {
            tokio::spawn(pass_on(output, worker));
        }
        let (kill, killed) = oneshot::channel();
        Ok(Launched { process, kill, ended: Box::pin(watch(child, killed)) })
    }
}

/// The running workers.
pub(crate) struct Children {
    launch: Box<dyn Launch>,
    door: Door,
    inputs: mpsc::Sender<Input>,
    kills: BTreeMap<WorkerId, oneshot::Sender<()>>,
}

impl Children {
    pub(crate) fn new(launch: Box<dyn Launch>, door: Door, inputs: mpsc::Sender<Input>) -> Self {
        Self { launch, door, inputs, kills: BTreeMap::new() }
    }

    /// Starts a worker and returns its process id. Its end is reported as [`Input::Exited`].
    pub(crate) fn spawn(&mut self, job: &JobName, worker: WorkerId) -> std::io::Result<u32> {
        let Launched { process, kill, ended } = self.launch.launch(job, worker, self.door.clone())?;
        self.kills.insert(worker, kill);
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let failure = ended.await;
            // A closed channel means that the agent itself is ending.
            let _ = inputs.send(Input::Exited { worker, failure }).await;
        });
        Ok(process)
    }

    /// Ends a process at once.
    pub(crate) fn kill(&mut self, worker: WorkerId) {
        self.kills.remove(&worker);
    }

    /// A process has ended.
    pub(crate) fn ended(&mut self, worker: WorkerId) {
        self.kills.remove(&worker);
    }

    /// Ends all processes at once; returns how many are to end.
    pub(crate) fn kill_all(&mut self) -> usize {
        std::mem::take(&mut self.kills).len()
    }
}

/// Waits for a child to end, and says how it did; kills it when the sender of `killed` is dropped.
async fn watch(mut child: Child, killed: oneshot::Receiver<()>) -> Failure {
    let status = tokio::select! {
        status = child.wait() => status,
        _ = killed => match child.start_kill() {
            Ok(()) => child.wait().await,
            Err(error) => Err(error),
        },
    };
    let (exit_code, signal) = status.as_ref().map_or((None, None), |status| (status.code(), status.signal()));
    let reason = match status {
        Ok(status) => describe(status),
        Err(error) => format!("the worker process cannot be watched: {error}"),
    };
    Failure { kind: FailureKind::Exit.into(), reason, exit_code, signal, ..Default::default() }
}

/// How a process ended, in words.
fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("the worker process ended with exit code {code}"),
        (None, Some(9)) => "the worker process was killed (signal 9)".into(),
        (None, Some(signal)) => format!("the worker process was ended by signal {signal}"),
        (None, None) => "the worker process ended".into(),
    }
}

/// Logs a child's output, line by line.
async fn pass_on(output: impl AsyncRead + Unpin, worker: WorkerId) {
    let name: String = worker.to_string().chars().take(8).collect();
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                tracing::info!(target: "cairn::worker", worker = name, "{}", String::from_utf8_lossy(&line).trim_end());
            }
        }
    }
}
