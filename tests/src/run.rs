//! One `cairn` process: its JSON events as they come, its exit code, its standard error for the report of a failed
//! test.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::job::Job;
use crate::process::{self, Process};

/// No wait of a test is longer than this.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A running `cairn` command.
#[derive(Debug)]
pub struct Run {
    child: Child,
    lines: Receiver<Value>,
    /// Every event so far.
    pub events: Vec<Value>,
    stderr: Arc<Mutex<String>>,
}

/// A finished command.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Every event.
    pub events: Vec<Value>,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    /// Starts `cairn train` on a job with further arguments.
    pub fn train(job: &Job, arguments: &[&str]) -> Self {
        let file = job.file().display().to_string();
        let mut words = vec!["train", &file, "--output", "json"];
        words.extend(arguments);
        Self::start(&words)
    }

    /// Starts any `cairn` command that prints JSON lines.
    pub fn start(words: &[&str]) -> Self {
        Self::start_in(words, &[])
    }

    /// As [`Run::start`], with further environment variables.
    pub fn start_in(words: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(crate::cairn());
        command.args(words).env("CAIRN_LOG", "info").envs(environment.iter().copied());
        Self::spawn(command)
    }

    /// Starts a command that was put together elsewhere.
    pub fn spawn(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("cairn starts");
        let (sender, lines) = channel();
        let stdout = child.stdout.take().expect("stdout is piped");
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if sender.send(value).is_err() {
                    return;
                }
            }
        });
        let stderr = Arc::new(Mutex::new(String::new()));
        let (mut pipe, text) = (child.stderr.take().expect("stderr is piped"), stderr.clone());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                text.lock().expect("no reader panics").push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Self { child, lines, events: Vec::new(), stderr }
    }

    /// The command's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next event, if one comes within this time; `Err` when the command's output has ended.
    pub fn poll(&mut self, within: Duration) -> Result<Option<Value>, String> {
        match self.lines.recv_timeout(within) {
            Ok(event) => {
                self.events.push(event.clone());
                Ok(Some(event))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.report()),
        }
    }

    /// Waits for an event of a kind that satisfies a condition.
    pub fn wait_for(&mut self, kind: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(event) => {
                    self.events.push(event.clone());
                    if event["event"] == kind && condition(&event) {
                        return event;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {kind} event within {LIMIT:?}{}", self.report()),
                Err(RecvTimeoutError::Disconnected) => panic!("ended without a {kind} event{}", self.report()),
            }
        }
    }

    /// Waits until step `step` is done.
    pub fn wait_for_step(&mut self, step: u64) {
        self.wait_for("step", |event| event["step"].as_u64() >= Some(step));
    }

    /// The living processes below this one that play a part.
    pub fn parts(&self, part: &str) -> Vec<Process> {
        process::descendants(self.id()).into_iter().filter(|process| process.part() == part).collect()
    }

    /// Kills one process of a part with SIGKILL, waiting for one to exist; `pick` chooses among them.
    pub fn kill(&mut self, part: &str, pick: usize) -> u32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            let ended = self.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "ended before its {part} could be killed{}", self.report());
            let parts = self.parts(part);
            if !parts.is_empty() && process::signal(parts[pick % parts.len()].id, "KILL") {
                return parts[pick % parts.len()].id;
            }
            assert!(Instant::now() < deadline, "no {part} process to kill{}", self.report());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends the command itself a signal.
    pub fn signal(&self, name: &str) {
        assert!(process::signal(self.id(), name), "the command is gone{}", self.report());
    }

    /// Waits for the command to end.
    pub fn finish(mut self) -> Outcome {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                self.events.extend(self.lines.iter());
                // The reader of standard error ends with the pipe; give it the moment that takes.
                thread::sleep(Duration::from_millis(50));
                let stderr = self.stderr.lock().expect("no reader panics").clone();
                return Outcome { code: status.code(), events: std::mem::take(&mut self.events), stderr };
            }
            assert!(Instant::now() < deadline, "still running after {LIMIT:?}{}", self.report());
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn report(&self) -> String {
        let stderr = self.stderr.lock().expect("no reader panics");
        let tail: Vec<_> = self.events.iter().rev().take(8).map(ToString::to_string).collect();
        format!("\nlast events (newest first):\n{}\nstandard error:\n{stderr}", tail.join("\n"))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Outcome {
    /// The digest of the `finished` event; fails the test if the command did not finish well.
    pub fn digest(&self) -> String {
        let finished = self.events.iter().rev().find(|event| event["event"] == "finished");
        let digest = finished.and_then(|event| event["digest"].as_str());
        match digest {
            Some(digest) if self.code == Some(0) => digest.to_string(),
            _ => panic!("not finished (code {:?}): {:?}\n{}", self.code, self.events.last(), self.stderr),
        }
    }

    /// The bits of the last reported loss and norm of each step.
    pub fn losses(&self) -> std::collections::BTreeMap<u64, (u64, u64)> {
        let bits = |event: &Value, key: &str| event[key].as_f64().expect("a number").to_bits();
        let steps = self.events.iter().filter(|event| event["event"] == "step");
        steps
            .map(|event| (event["step"].as_u64().expect("a step"), (bits(event, "loss"), bits(event, "grad_norm"))))
            .collect()
    }

    /// All events of one kind.
    pub fn of(&self, kind: &str) -> Vec<&Value> {
        self.events.iter().filter(|event| event["event"] == kind).collect()
    }
}

/// Runs any `cairn` command to its end.
pub fn cairn(words: &[&str]) -> Outcome {
    Run::start(words).finish()
}

/// The digest of the standard job, undisturbed with one worker.
pub fn undisturbed() -> String {
    Run::train(&Job::new(), &["--workers", "1"]).finish().digest()
}
