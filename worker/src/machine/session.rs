//! Where a worker stands between its agent's commands and its trainer's events.
//!
//! The agent says which generation the worker should act in; the trainer thread says how far it is. Commands are
//! level-triggered: the same again changes nothing, one of a lower or a held generation is refused. The trainer does
//! one thing at a time, so a new generation waits for the old one to be broken off; [`Session`] keeps track of that and
//! of what the agent should be told ([`Session::state`]).

use proto::wire::{self, FailureKind, WorkerPhase};

use crate::collective::Moved;

/// A command of the agent or an event of the trainer.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Read the spec and the data, build the model, open the ring's port.
    Prepare(wire::Prepare),
    /// Act in a generation; again with `stop` set to end it.
    Run(wire::WorkerRun),
    /// Break off this generation and any lower one.
    Hold(u64),
    /// The trainer is prepared.
    Prepared(Identity),
    /// The trainer holds the state of `step` and its ring is formed.
    Joined {
        /// In this generation.
        generation: u64,
        /// The step it goes on from.
        step: u64,
        /// Where the state came from.
        source: String,
        /// What having it cost.
        load: Vec<wire::LoadStage>,
    },
    /// The trainer finished a step.
    Stepped {
        /// In this generation.
        generation: u64,
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
    },
    /// The trainer reached the step it should stop at; its state is captured. It is idle now.
    Stopped {
        /// In this generation.
        generation: u64,
        /// The step.
        step: u64,
        /// Its loss, if it took one.
        loss: Option<f64>,
    },
    /// The trainer gave up, while preparing or in a generation. It is idle now.
    Failed {
        /// The generation, if in one.
        generation: Option<u64>,
        /// What kind of trouble.
        kind: FailureKind,
        /// What happened, for people.
        reason: String,
        /// Of a broken exchange: how far it had come.
        moved: Option<Moved>,
    },
    /// The trainer was broken off. It is idle now.
    Left {
        /// The generation it left.
        generation: u64,
    },
}

/// What a prepared worker says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Where its ring listens.
    pub ring_address: String,
    /// What its arithmetic depends on.
    pub numeric_identity: String,
    /// What its data is.
    pub data_fingerprint: String,
}

/// What the driver must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Let the trainer prepare.
    Prepare(wire::Prepare),
    /// Let the trainer enter a generation.
    Start(wire::WorkerRun),
    /// Let the trainer stop after the step in progress.
    Stop(u64),
    /// Break the trainer off in this generation.
    Abort(u64),
    /// Tell the agent the new state.
    Report,
}

/// A generation the worker is or was in and has not been held since.
#[derive(Debug)]
struct Current {
    generation: u64,
    rank: u32,
    phase: WorkerPhase,
    step: Option<u64>,
    loss: Option<f64>,
    source: String,
    load: Vec<wire::LoadStage>,
    failure: Option<wire::Failure>,
    /// The trainer is at work in it.
    busy: bool,
    stopping: bool,
    aborting: bool,
}

/// The worker's state as the agent sees it.
#[derive(Debug, Default)]
pub struct Session {
    asked: bool,
    identity: Option<Identity>,
    /// Why preparing failed.
    broken: Option<wire::Failure>,
    /// Generations up to this one are refused.
    held: u64,
    current: Option<Current>,
    /// A newer generation, waiting for the trainer to leave the old one.
    next: Option<wire::WorkerRun>,
}

impl Session {
    /// Takes a command or event and returns what must be done, in order.
    pub fn handle(&mut self, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Prepare(prepare) => {
                if !std::mem::replace(&mut self.asked, true) {
                    actions.push(Action::Prepare(prepare));
                }
            }
            Input::Prepared(identity) => {
                self.identity = Some(identity);
                actions.push(Action::Report);
            }
            Input::Run(run) => self.run(run, &mut actions),
            Input::Hold(generation) => self.hold(generation, &mut actions),
            Input::Failed { generation: None, kind, reason, .. } => {
                self.broken = Some(wire::Failure { kind: kind.into(), reason, ..Default::default() });
                actions.push(Action::Report);
            }
            event => self.event(event, &mut actions),
        }
        actions
    }

    /// The whole state, for the agent. Identity of job, worker and process is added by the driver.
    pub fn state(&self) -> wire::WorkerState {
        let identity = self.identity.clone().unwrap_or_default();
        let mut state = wire::WorkerState {
            ring_address: identity.ring_address,
            numeric_identity: identity.numeric_identity,
            data_fingerprint: identity.data_fingerprint,
            ..Default::default()
        };
        if let Some(current) = &self.current {
            state.set_phase(current.phase);
            state.generation = Some(current.generation);
            state.rank = Some(current.rank);
            state.step = current.step;
            state.loss = current.loss;
            state.source.clone_from(&current.source);
            state.load.clone_from(&current.load);
            state.failure.clone_from(&current.failure);
        } else if let Some(failure) = &self.broken {
            state.set_phase(WorkerPhase::Failed);
            state.failure = Some(failure.clone());
        } else if self.identity.is_some() {
            state.set_phase(WorkerPhase::Ready);
        } else {
            state.set_phase(WorkerPhase::Starting);
        }
        state
    }

    fn run(&mut self, run: wire::WorkerRun, actions: &mut Vec<Action>) {
        let Some(announcement) = &run.announcement else { return };
        let generation = announcement.generation;
        if generation <= self.held || self.identity.is_none() {
            return;
        }
        if let Some(next) = &mut self.next
            && next.announcement.as_ref().is_some_and(|a| a.generation >= generation)
        {
            if next.announcement.as_ref().is_some_and(|a| a.generation == generation) {
                *next = run;
            }
            return;
        }
        match &mut self.current {
            Some(current) if current.generation > generation => {}
            Some(current) if current.generation == generation => {
                if announcement.stop && current.busy && !current.stopping && !current.aborting {
                    current.stopping = true;
                    actions.push(Action::Stop(generation));
                }
            }
            Some(current) if current.busy => {
                if !std::mem::replace(&mut current.aborting, true) {
                    actions.push(Action::Abort(current.generation));
                }
                self.next = Some(run);
            }
            _ => self.start(run, actions),
        }
    }

    fn start(&mut self, run: wire::WorkerRun, actions: &mut Vec<Action>) {
        let Some(announcement) = &run.announcement else { return };
        self.current = Some(Current {
            generation: announcement.generation,
            rank: run.rank,
            phase: WorkerPhase::Joining,
            step: None,
            loss: None,
            source: String::new(),
            load: vec![],
            failure: None,
            busy: true,
            stopping: announcement.stop,
            aborting: false,
        });
        actions.extend([Action::Start(run), Action::Report]);
    }

    fn hold(&mut self, generation: u64, actions: &mut Vec<Action>) {
        self.held = self.held.max(generation);
        if self.next.as_ref().and_then(|run| run.announcement.as_ref()).is_some_and(|a| a.generation <= self.held) {
            self.next = None;
        }
        let Some(current) = self.current.as_mut().filter(|current| current.generation <= self.held) else { return };
        if current.busy {
            if !std::mem::replace(&mut current.aborting, true) {
                actions.push(Action::Abort(current.generation));
            }
        } else {
            self.current = None;
            actions.push(Action::Report);
        }
    }

    /// An event of the trainer in a generation; one of a generation it has left says nothing.
    fn event(&mut self, event: Input, actions: &mut Vec<Action>) {
        let of = match &event {
            Input::Joined { generation, .. }
            | Input::Stepped { generation, .. }
            | Input::Stopped { generation, .. }
            | Input::Left { generation }
            | Input::Failed { generation: Some(generation), .. } => *generation,
            _ => return,
        };
        let Some(current) = self.current.as_mut().filter(|current| current.generation == of) else { return };
        match event {
            Input::Joined { step, source, load, .. } => {
                current.phase = WorkerPhase::Running;
                current.step = Some(step);
                (current.source, current.load) = (source, load);
            }
            Input::Stepped { step, loss, .. } => {
                current.step = Some(step);
                current.loss = Some(loss);
            }
            Input::Stopped { step, loss, .. } => {
                current.phase = WorkerPhase::Stopped;
                current.step = Some(step);
                current.loss = loss.or(current.loss);
                current.busy = false;
            }
            Input::Failed { kind, reason, moved, .. } => {
                current.phase = WorkerPhase::Failed;
                current.failure = Some(wire::Failure {
                    kind: kind.into(),
                    reason,
                    ring_sent: moved.map(|moved| moved.sent),
                    ring_received: moved.map(|moved| moved.received),
                    ..Default::default()
                });
                current.busy = false;
            }
            _ => current.busy = false,
        }
        if !current.busy {
            let (left, held) = (current.aborting, current.generation <= self.held);
            if let Some(run) = self.next.take() {
                return self.start(run, actions);
            }
            if held || left {
                self.current = None;
            }
        }
        actions.push(Action::Report);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared() -> Session {
        let mut session = Session::default();
        assert_eq!(session.handle(Input::Prepare(wire::Prepare::default())).len(), 1);
        assert!(session.handle(Input::Prepare(wire::Prepare::default())).is_empty());
        session.handle(Input::Prepared(Identity::default()));
        assert_eq!(session.state().phase(), WorkerPhase::Ready);
        session
    }

    fn run(generation: u64, stop: bool) -> wire::WorkerRun {
        let announcement = wire::Announcement { generation, stop, ..Default::default() };
        wire::WorkerRun { rank: 1, announcement: Some(announcement) }
    }

    #[test]
    fn a_generation_from_joining_to_stopped() {
        let mut session = prepared();
        assert_eq!(session.handle(Input::Run(run(3, false))), [Action::Start(run(3, false)), Action::Report]);
        assert!(session.handle(Input::Run(run(3, false))).is_empty(), "the same again is no news");
        session.handle(Input::Joined { generation: 3, step: 7, source: "store".into(), load: vec![] });
        assert_eq!(session.state().phase(), WorkerPhase::Running);
        assert_eq!(session.handle(Input::Run(run(3, true))), [Action::Stop(3)]);
        assert!(session.handle(Input::Run(run(3, true))).is_empty());
        session.handle(Input::Stopped { generation: 3, step: 9, loss: Some(0.5) });
        let state = session.state();
        assert_eq!(
            (state.phase(), state.step, state.loss, state.rank),
            (WorkerPhase::Stopped, Some(9), Some(0.5), Some(1))
        );
        assert_eq!(session.handle(Input::Hold(3)), [Action::Report]);
        assert_eq!(session.state().phase(), WorkerPhase::Ready);
        assert!(session.handle(Input::Run(run(3, false))).is_empty(), "held");
    }

    #[test]
    fn a_hold_breaks_off_and_waits_for_the_trainer() {
        let mut session = prepared();
        session.handle(Input::Run(run(1, false)));
        assert_eq!(session.handle(Input::Hold(1)), [Action::Abort(1)]);
        assert!(session.handle(Input::Hold(1)).is_empty());
        assert_eq!(session.state().phase(), WorkerPhase::Joining);
        // The ring's error may come first; it is the echo of the abort.
        let failed =
            Input::Failed { generation: Some(1), kind: FailureKind::Exchange, reason: "closed".into(), moved: None };
        assert_eq!(session.handle(failed), [Action::Report]);
        assert_eq!(session.state().phase(), WorkerPhase::Ready);
        assert!(
            session.handle(Input::Joined { generation: 1, step: 0, source: "store".into(), load: vec![] }).is_empty(),
            "too late"
        );
    }

    #[test]
    fn a_newer_generation_waits_for_the_older_to_be_left() {
        let mut session = prepared();
        session.handle(Input::Run(run(1, false)));
        assert_eq!(session.handle(Input::Run(run(2, false))), [Action::Abort(1)]);
        assert!(session.handle(Input::Run(run(2, true))).is_empty());
        assert!(session.handle(Input::Run(run(1, false))).is_empty(), "lower");
        assert_eq!(session.handle(Input::Left { generation: 1 }), [Action::Start(run(2, true)), Action::Report]);
        assert!(session.handle(Input::Run(run(1, false))).is_empty(), "lower");
        assert_eq!(session.state().generation, Some(2));
    }

    #[test]
    fn failures_keep_their_reason_until_held() {
        let mut session = prepared();
        session.handle(Input::Run(run(1, false)));
        session.handle(Input::Failed {
            generation: Some(1),
            kind: FailureKind::Fatal,
            reason: "overflow".into(),
            moved: None,
        });
        assert_eq!(session.state().failure.unwrap().reason, "overflow");
        assert_eq!(session.handle(Input::Hold(1)), [Action::Report]);
        assert_eq!(session.handle(Input::Run(run(2, false))).len(), 2);
        let mut broken = Session::default();
        broken.handle(Input::Failed {
            generation: None,
            kind: FailureKind::Input,
            reason: "no data".into(),
            moved: None,
        });
        assert_eq!((broken.state().phase(), broken.state().generation), (WorkerPhase::Failed, None));
        assert!(broken.handle(Input::Run(run(1, false))).is_empty(), "nothing to run with");
    }
}
