//! The whole protocol as a transition system: who can do what in a state, and what comes of it.
//!
//! A step is one request to the store, or a decision that needs none. Between any two of them everyone else may act, a
//! leader may die, and one that only slept goes on where it was. Every run ends: each action moves a process forward
//! or uses up a budget.

use stateright::{Model, Property};

use crate::chain::{Event, Object, RANKS};
use crate::properties;
use crate::state::{Budget, Doing, Leader, Reader, Receipt, State};

/// A mistake that can be built in, to see that the properties find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A create replaces what is there.
    Overwrite,
    /// A new leader acts on the job without appending `led`.
    NoLed,
    /// A create without an answer is taken for one that failed.
    AssumeFailed,
    /// Files are deleted before the record says so.
    SweepFirst,
    /// A sweep does not spare the objects of saves that are not committed yet.
    IgnoreOpenSaves,
    /// A commit may name an object that no kept checkpoint reaches.
    TrustReferences,
    /// A step may be committed after a newer one of its generation.
    AnyOrder,
    /// A new leader does not mind that the chain has grown since it read the job.
    StaleView,
    /// The record comes before the manifest.
    RecordFirst,
    /// Retention does not spare the newest good checkpoint.
    KeepNone,
    /// A sweep looks only at what checkpoints have named.
    KeepOrphans,
}

/// The protocol within bounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protocol {
    /// Ranks that save; at most [`RANKS`].
    pub(crate) ranks: u8,
    /// The last step that is saved; step 1 is committed from the start.
    pub(crate) steps: u8,
    /// Leaders at most.
    pub(crate) leaders: usize,
    /// What may go wrong.
    pub(crate) budget: Budget,
    /// What is built wrong.
    pub(crate) bugs: &'static [Bug],
}

/// One step of one process, or of fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `save::upload_shard`, and its receipt.
    Upload {
        generation: u8,
        step: u8,
        rank: u8,
    },
    /// An upload that took effect without an answer, or whose agent died: its object is nobody's.
    UploadUnanswered {
        generation: u8,
        step: u8,
        rank: u8,
    },
    /// A receipt for a shard that has not changed since an older object.
    Refer {
        generation: u8,
        step: u8,
        object: Object,
    },
    TakeOver,
    Crash {
        leader: usize,
    },
    Commit {
        leader: usize,
        step: u8,
        objects: [Option<Object>; RANKS],
    },
    Retain {
        leader: usize,
    },
    /// `Entry::Generation` from the newest good checkpoint.
    Form {
        leader: usize,
    },
    /// `Entry::Quarantined` of the newest good checkpoint.
    Quarantine {
        leader: usize,
    },
    /// The leader's request is answered.
    Answer {
        leader: usize,
    },
    /// The leader's request is not answered.
    TimeOut {
        leader: usize,
    },
    /// A create that timed out takes effect after all.
    Land {
        place: usize,
    },
    /// It never will.
    Vanish {
        place: usize,
    },
    /// The reader goes on.
    Read,
}

impl Protocol {
    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.bugs.contains(&bug)
    }

    fn saves(&self, s: &State, actions: &mut Vec<Action>) {
        for record in &s.records {
            let Event::Generation { generation, start } = record.event else { continue };
            let first = start.map_or(1, |start| start.step) + 1;
            for (step, rank) in (first..=self.steps).flat_map(|step| (0..self.ranks).map(move |rank| (step, rank))) {
                let of_this = |r: &&Receipt| (r.generation, r.step, r.rank) == (generation, step, rank);
                let own = |r: &Receipt| (r.object.generation, r.object.step) == (generation, step);
                if !s.receipts.iter().filter(of_this).any(own) {
                    actions.push(Action::Upload { generation, step, rank });
                }
                let lost = Object { generation, step, rank, attempt: 1 };
                if s.left.timeouts > 0 && rank == 0 && !s.objects.contains(&lost) {
                    actions.push(Action::UploadUnanswered { generation, step, rank });
                }
                if s.left.references > 0 && rank == 0 && !s.receipts.iter().any(|r| of_this(&r)) {
                    Self::references(s, generation, step, actions);
                }
            }
        }
    }

    /// A rank may know the objects of any checkpoint that was ever committed, and not know that it has gone.
    fn references(s: &State, generation: u8, step: u8, actions: &mut Vec<Action>) {
        let mut known: Vec<Object> = vec![];
        for record in &s.records {
            if let Event::Committed(manifest) = &record.event {
                known.extend(manifest.objects().filter(|o| o.rank == 0 && o.step < step));
            }
        }
        known.sort_unstable();
        known.dedup();
        actions.extend(known.into_iter().map(|object| Action::Refer { generation, step, object }));
    }

    fn leads(&self, s: &State, leader: usize, actions: &mut Vec<Action>) {
        let it = &s.leaders[leader];
        if it.doing == Doing::Dead {
            return;
        }
        if s.left.crashes > 0 {
            actions.push(Action::Crash { leader });
        }
        if it.doing != Doing::Nothing {
            actions.push(Action::Answer { leader });
            if s.left.timeouts > 0 {
                actions.push(Action::TimeOut { leader });
            }
            return;
        }
        if it.unclear || usize::from(it.history.records) < s.records.len() || self.has_waste(s, leader) {
            actions.push(Action::Retain { leader });
        }
        let generation = it.generation;
        for step in it.floor + 1..=self.steps {
            let of = |rank: u8| {
                let of_this = move |r: &&Receipt| (r.generation, r.step, r.rank) == (generation, step, rank);
                s.receipts.iter().filter(of_this).map(|r| Some(r.object)).collect::<Vec<_>>()
            };
            let others = if self.ranks > 1 { of(1) } else { vec![None] };
            for object in of(0) {
                let sets = others.iter().map(|other| [object, *other]);
                actions.extend(sets.map(|objects| Action::Commit { leader, step, objects }));
            }
        }
        if s.left.generations > 0 {
            actions.push(Action::Form { leader });
        }
        if s.left.quarantines > 0 {
            actions.push(Action::Quarantine { leader });
        }
    }

    fn save(s: &mut State, generation: u8, step: u8, object: Object) {
        s.receipts.insert(Receipt { generation, step, rank: object.rank, object });
    }

    fn read(s: &mut State) -> bool {
        let deleted = |name| s.history().is_none_or(|h| h.find(name).is_none());
        let torn = |name| if deleted(name) { Reader::Done } else { Reader::Torn };
        s.reader = match s.reader {
            Reader::Waiting => match s.history().as_ref().and_then(|h| h.newest_good()) {
                Some(newest) => Reader::Resolved(newest.manifest),
                None => return false,
            },
            Reader::Resolved(m) if s.manifests.contains(&m) => Reader::Opened(m),
            Reader::Opened(m) if s.is_whole(&m) || m.objects().all(|o| s.objects.contains(o)) => Reader::Done,
            Reader::Resolved(m) | Reader::Opened(m) => torn(m.name),
            Reader::Done | Reader::Torn => return false,
        };
        true
    }

    /// Uses up one of a budget.
    fn spend(budget: &mut u8) -> bool {
        let left = budget.checked_sub(1);
        *budget = left.unwrap_or(0);
        left.is_some()
    }

    fn form(&self, s: &mut State, leader: usize) -> bool {
        let generation = s.leaders[leader].generation + 1;
        Self::spend(&mut s.left.generations)
            && self.begin_append(s, leader, |history| {
                let start = history.newest_good().map(|c| c.manifest.name);
                // The fold refuses a number that is not the next: "the store does not take a record; trying again".
                (generation > history.generation).then_some(Event::Generation { generation, start })
            })
    }

    fn quarantine(&self, s: &mut State, leader: usize) -> bool {
        Self::spend(&mut s.left.quarantines)
            && self
                .begin_append(s, leader, |history| history.newest_good().map(|c| Event::Quarantined(c.manifest.name)))
    }

    fn perform(&self, s: &mut State, action: Action) -> bool {
        match action {
            Action::Upload { generation, step, rank } => {
                let object = Object { generation, step, rank, attempt: 0 };
                s.objects.insert(object);
                Self::save(s, generation, step, object);
            }
            Action::UploadUnanswered { generation, step, rank } => {
                s.objects.insert(Object { generation, step, rank, attempt: 1 });
                return Self::spend(&mut s.left.timeouts);
            }
            Action::Refer { generation, step, object } => {
                Self::save(s, generation, step, object);
                return Self::spend(&mut s.left.references);
            }
            Action::TakeOver => {
                let asleep = s.leaders.last().is_some_and(|last| last.doing != Doing::Dead);
                if asleep && !Self::spend(&mut s.left.pauses) {
                    return false;
                }
                self.take_over(s);
            }
            Action::Crash { leader } => {
                s.leaders[leader].doing = Doing::Dead;
                return Self::spend(&mut s.left.crashes);
            }
            Action::Commit { leader, step, objects } => return self.begin_commit(s, leader, step, objects),
            Action::Retain { leader } => self.begin_retain(s, leader),
            Action::Form { leader } => return self.form(s, leader),
            Action::Quarantine { leader } => return self.quarantine(s, leader),
            Action::Answer { leader } => self.advance(s, leader),
            Action::TimeOut { leader } => return Self::time_out(s, leader) && Self::spend(&mut s.left.timeouts),
            Action::Land { place } => {
                let (number, record) = s.in_flight.remove(place);
                let taken = usize::from(number) < s.records.len();
                if !taken || self.has(Bug::Overwrite) {
                    s.take_effect(number, record);
                }
            }
            Action::Vanish { place } => drop(s.in_flight.remove(place)),
            Action::Read => return Self::read(s),
        }
        true
    }

    /// A leader that is dead has left nothing in its own mind that matters.
    fn forget(s: &mut State) {
        for leader in s.leaders.iter_mut().filter(|leader| leader.doing == Doing::Dead) {
            *leader = Leader { doing: Doing::Dead, ..Leader::default() };
        }
        // A create whose number is taken can only be answered "exists".
        let next = s.records.len();
        s.in_flight.retain(|(number, _)| usize::from(*number) >= next);
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::first(self.ranks, self.budget)]
    }

    fn actions(&self, s: &State, actions: &mut Vec<Action>) {
        self.saves(s, actions);
        (0..s.leaders.len()).for_each(|leader| self.leads(s, leader, actions));
        let asleep = s.leaders.last().is_some_and(|last| last.doing != Doing::Dead);
        if s.leaders.len() < self.leaders && (!asleep || s.left.pauses > 0) {
            actions.push(Action::TakeOver);
        }
        for place in 0..s.in_flight.len() {
            actions.extend([Action::Land { place }, Action::Vanish { place }]);
        }
        if !matches!(s.reader, Reader::Done | Reader::Torn) {
            actions.push(Action::Read);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = last.clone();
        if !self.perform(&mut next, action) {
            return None;
        }
        if !self.has(Bug::Overwrite) {
            Self::forget(&mut next);
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
