//! The simulated network: one request of all that wait takes effect at a time, and chance says which, whether it takes
//! effect, and what the client hears of it.
//!
//! Time is tokio's paused clock. It moves only when every process waits, so between two requests all that can happen
//! has happened, and a run follows from its seed alone. A request outlives its client: one that timed out, or whose
//! process died, may still land later.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use object_store::{Error, Result};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::disk::{Disk, Effect};
use super::faulty::Faulty;
use super::oracle::Oracle;
use super::random::Random;

/// How often in a thousand requests something goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Faults {
    /// An error, and no effect.
    pub(crate) failed: u64,
    /// An error, though it took effect.
    pub(crate) lost: u64,
    /// No answer for long; it may take effect late.
    pub(crate) hung: u64,
    /// Every request of this kind goes wrong: without effect, or with its answer lost.
    pub(crate) always: Option<(&'static str, bool)>,
}

impl Faults {
    pub(crate) const NONE: Self = Self { failed: 0, lost: 0, hung: 0, always: None };
    pub(crate) const USUAL: Self = Self { failed: 25, lost: 25, hung: 15, always: None };
}

/// What became of the requests of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) operations: u64,
    pub(crate) failed: u64,
    pub(crate) lost: u64,
    pub(crate) hung: u64,
    /// Took effect after its client had given up or died.
    pub(crate) late: u64,
    /// Process deaths before and after the effect.
    pub(crate) deaths_before: u64,
    pub(crate) deaths_after: u64,
}

/// Delivers the answer.
type Deliver = Box<dyn FnOnce() + Send>;
/// Takes effect, if it is to, and returns how the answer is delivered.
type Act = Box<dyn FnOnce(&mut Disk, Fate) -> Deliver + Send>;

/// What becomes of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fate {
    lands: bool,
    heard: Heard,
    word: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Answer,
    Error,
    Nothing,
}

struct Request {
    process: u32,
    kind: &'static str,
    label: String,
    not_before: Instant,
    held: bool,
    client: Weak<()>,
    act: Act,
}

struct Process {
    name: String,
    dead: bool,
    /// Operations until it dies.
    fuse: Option<u64>,
    died: Arc<Notify>,
}

struct State {
    random: Random,
    disk: Disk,
    waiting: Vec<Request>,
    processes: Vec<Process>,
    faults: Faults,
    operations: u64,
    limit: u64,
    crash_at: Option<(u64, bool)>,
    tallies: BTreeMap<&'static str, Tally>,
    trace: String,
    violation: Option<String>,
}

/// The network, the bucket behind it, and who watches both.
pub(crate) struct Net {
    state: Mutex<State>,
    pub(crate) oracle: tokio::sync::Mutex<Oracle>,
    arrived: Notify,
    over: Notify,
}

fn dropped(what: &'static str) -> Error {
    Error::Generic { store: "simulation", source: what.into() }
}

impl Net {
    pub(crate) fn new(
        random: Random,
        disk: Disk,
        oracle: Oracle,
        faults: Faults,
        limit: u64,
        crash_at: Option<(u64, bool)>,
    ) -> Arc<Self> {
        let state = State {
            random,
            disk,
            waiting: vec![],
            processes: vec![],
            faults,
            operations: 0,
            limit,
            crash_at,
            tallies: BTreeMap::new(),
            trace: String::new(),
            violation: None,
        };
        let (state, oracle) = (Mutex::new(state), tokio::sync::Mutex::new(oracle));
        Arc::new(Self { state, oracle, arrived: Notify::new(), over: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new process: its way to the bucket, and what tells its death, which comes after `fuse` operations.
    pub(crate) fn start(self: &Arc<Self>, name: String, fuse: Option<u64>) -> (Faulty, Arc<Notify>) {
        let mut state = self.state();
        let (process, died) = (state.processes.len() as u32, Arc::new(Notify::new()));
        state.processes.push(Process { name, dead: false, fuse, died: Arc::clone(&died) });
        (Faulty { net: Arc::clone(self), process }, died)
    }

    /// Writes a line into the trace.
    pub(crate) fn note(&self, line: &str) {
        self.state().write(format_args!("{line}"));
    }

    /// Ends the run: what must never happen has happened.
    pub(crate) fn fail(&self, violation: String) {
        let mut state = self.state();
        state.write(format_args!("VIOLATION {violation}"));
        state.violation.get_or_insert(violation);
        state.limit = state.operations;
        drop(state);
        self.over.notify_one();
    }

    pub(crate) fn violation(&self) -> Option<String> {
        self.state().violation.clone()
    }

    /// Until the run has had its operations, or failed. No request is served from there to the calm.
    pub(crate) async fn over(&self) {
        self.over.notified().await;
    }

    /// From here on nothing goes wrong.
    pub(crate) fn calm(&self) {
        let mut state = self.state();
        (state.faults, state.limit, state.crash_at) = (Faults::NONE, u64::MAX, None);
        state.disk.lags = false;
        state.processes.iter_mut().for_each(|process| process.fuse = None);
        let now = Instant::now();
        state.waiting.iter_mut().for_each(|request| request.not_before = now);
    }

    /// Requests under way.
    pub(crate) fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    /// Until no request is under way.
    pub(crate) async fn drained(&self) {
        while self.waiting() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Counts and the trace.
    pub(crate) fn totals(&self) -> (u64, BTreeMap<&'static str, Tally>, String) {
        let state = self.state();
        (state.operations, state.tallies.clone(), state.trace.clone())
    }

    /// Makes a request and waits for its answer, which may never come.
    pub(crate) fn call<T: Send + 'static>(
        self: &Arc<Self>,
        process: u32,
        kind: &'static str,
        label: String,
        effect: impl FnOnce(&mut Disk) -> Result<T> + Send + 'static,
    ) -> impl Future<Output = Result<T>> + Send + 'static {
        let net = Arc::clone(self);
        async move {
            let (sender, receiver) = oneshot::channel();
            let client = Arc::new(());
            let act = move |disk: &mut Disk, fate: Fate| {
                let done = fate.lands.then(|| effect(disk));
                let answer = match fate.heard {
                    Heard::Answer => done,
                    Heard::Error => Some(Err(dropped("the connection was lost"))),
                    Heard::Nothing => None,
                };
                let deliver = move || {
                    // A client that has gone is not told.
                    let _ = answer.map(|answer| sender.send(answer));
                };
                Box::new(deliver) as Deliver
            };
            let request = Request {
                process,
                kind,
                label,
                not_before: Instant::now(),
                held: false,
                client: Arc::downgrade(&client),
                act: Box::new(act),
            };
            net.state().waiting.push(request);
            net.arrived.notify_one();
            let answer = receiver.await;
            drop(client);
            match answer {
                Ok(answer) => answer,
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// Serves requests for as long as it is polled.
    pub(crate) async fn serve(&self) {
        loop {
            let (idle, pause) = {
                let mut state = self.state();
                (state.waiting.is_empty(), state.random.within(1, 9))
            };
            if idle {
                self.arrived.notified().await;
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
            // Whose time came at the same moment makes its request before one is chosen.
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
            let Some((process, deliver, effects)) = self.step() else { continue };
            for effect in &effects {
                let seen = self.oracle.lock().await.saw(process, effect).await;
                if let Err(violation) = seen {
                    self.fail(violation);
                }
            }
            deliver();
        }
    }

    /// One request takes effect, or does not.
    fn step(&self) -> Option<(u32, Deliver, Vec<Effect>)> {
        let mut state = self.state();
        if state.operations >= state.limit {
            return None;
        }
        let request = state.choose()?;
        state.operations += 1;
        state.disk.now = state.operations;
        if state.operations == state.limit {
            self.over.notify_one();
        }
        let Some(fate) = state.decide(&request) else {
            let until = state.random.within(1_000, 20_000);
            let not_before = Instant::now() + Duration::from_millis(until);
            state.record(&request, "held");
            state.waiting.push(Request { not_before, held: true, ..request });
            return None;
        };
        state.record(&request, fate.word);
        let deliver = (request.act)(&mut state.disk, fate);
        let effects = state.disk.effects();
        Some((request.process, deliver, effects))
    }
}

impl State {
    /// One of the requests whose time has come, by chance, whatever the order in which they were made.
    fn choose(&mut self) -> Option<Request> {
        let now = Instant::now();
        self.waiting.sort_by(|a, b| (a.process, a.kind, &a.label).cmp(&(b.process, b.kind, &b.label)));
        let ready: Vec<usize> = (0..self.waiting.len()).filter(|&i| self.waiting[i].not_before <= now).collect();
        if ready.is_empty() {
            return None;
        }
        let at = ready[self.random.below(ready.len() as u64) as usize];
        Some(self.waiting.remove(at))
    }

    /// `None`: it is held up.
    fn decide(&mut self, request: &Request) -> Option<Fate> {
        let tally = self.tallies.entry(request.kind).or_default();
        let process = &mut self.processes[request.process as usize];
        if process.dead || request.client.strong_count() == 0 {
            let lands = self.random.chance(500);
            tally.late += u64::from(lands);
            let word = if lands { "late" } else { "gone" };
            return Some(Fate { lands, heard: Heard::Nothing, word });
        }
        tally.operations += 1;
        let burnt = match &mut process.fuse {
            Some(0 | 1) => Some(self.random.chance(500)),
            Some(left) => {
                *left -= 1;
                None
            }
            None => None,
        };
        let pointed = self.crash_at.filter(|(at, _)| *at == self.operations).map(|(_, after)| after);
        if let Some(after) = pointed.or(burnt) {
            process.dead = true;
            process.died.notify_one();
            *(if after { &mut tally.deaths_after } else { &mut tally.deaths_before }) += 1;
            let word = if after { "death after" } else { "death before" };
            return Some(Fate { lands: after, heard: Heard::Nothing, word });
        }
        let Faults { failed, lost, hung, always } = self.faults;
        let (failed, lost) = match always.filter(|(kind, _)| *kind == request.kind) {
            Some((_, true)) => (0, 1_000),
            Some((_, false)) => (1_000, 0),
            None => (failed, lost),
        };
        let dice = self.random.below(1_000);
        Some(if dice < failed {
            tally.failed += 1;
            Fate { lands: false, heard: Heard::Error, word: "failed" }
        } else if dice < failed + lost {
            tally.lost += 1;
            Fate { lands: true, heard: Heard::Error, word: "answer lost" }
        } else if dice < failed + lost + hung && !request.held {
            tally.hung += 1;
            return None;
        } else {
            Fate { lands: true, heard: Heard::Answer, word: "done" }
        })
    }

    fn record(&mut self, request: &Request, word: &str) {
        let (number, name) = (self.operations, self.processes[request.process as usize].name.clone());
        self.write(format_args!("{number} {name} {} {}: {word}", request.kind, request.label));
    }

    /// Adds a line to the trace.
    fn write(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a text cannot fail.
        let _ = writeln!(self.trace, "{line}");
    }
}
