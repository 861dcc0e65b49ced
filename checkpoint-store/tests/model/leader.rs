//! One leader's part of a job, step by step as the code takes it.
//!
//! | Here | The code |
//! |---|---|
//! | [`Protocol::take_over`] | `leader::take`, then `Journal::load_job` (`Chain::load`), then the job's `Entry::Led` |
//! | [`Protocol::refresh`] | `Page::resolve` in `coordinator/src/journal.rs` over `Chain::refresh` |
//! | [`Protocol::append`] | `Chain::append`: the fold's check, then the conditional create of the next number |
//! | [`Protocol::begin_commit`] | `Gathering::complete`, `Journal::commit`, and `save::commit` up to its first create |
//! | [`Protocol::begin_retain`] | `Journal::retain` and the head of `retention::collect` |
//! | [`Protocol::advance`] | the requests to the store that follow, one at a time |
//! | [`Protocol::time_out`] | the same request, where no answer comes |

use crate::chain::{Checkpoint, Event, History, Manifest, Name, Object, RANKS, Record};
use crate::protocol::{Bug, Protocol};
use crate::state::{Doing, File, Leader, Phase, State};

/// What came of an append.
enum Appended {
    Done,
    /// The number was taken, or the fold refuses it: the leader steps down.
    Lost,
}

impl Protocol {
    /// A new leader wins the next epoch and reads the chain; it appends `led` before it acts on the job.
    pub(crate) fn take_over(&self, s: &mut State) {
        let Some(history) = s.history() else { return };
        let epoch = s.leaders.len() as u8 + 1;
        let generation = history.generation;
        let good = history.checkpoints.iter().filter(|c| c.is_good() && c.manifest.name.generation == generation);
        let floor = good.map(Checkpoint::step).max().unwrap_or(0);
        let doing = if self.has(Bug::NoLed) { Doing::Nothing } else { Doing::Resolving(Event::Led) };
        if self.has(Bug::NoLed) {
            s.fence = epoch;
        }
        s.leaders.push(Leader { history, unclear: false, generation, floor, attempts: 0, doing });
    }

    /// Reads what has been added. `None`: the leader is fenced or cannot read the chain, and is dead now; otherwise
    /// whether an append without a clear answer took effect.
    fn refresh(&self, s: &mut State, who: usize) -> Option<bool> {
        let epoch = who as u8 + 1;
        let leader = &mut s.leaders[who];
        let (before, was_unclear) = (leader.history.records, leader.unclear);
        let mut sound = true;
        for record in &s.records[usize::from(before).min(s.records.len())..] {
            if self.has(Bug::AssumeFailed) && was_unclear && record.epoch == epoch {
                leader.history.records += 1;
            } else {
                sound &= leader.history.apply(record);
            }
        }
        leader.unclear = false;
        let added = leader.history.records > before;
        // Others' records, and none of ours: what the machine knows of the job is from before them.
        let outdated = added && leader.history.epoch < epoch && !self.has(Bug::StaleView);
        if !sound || outdated || leader.history.epoch > epoch {
            leader.doing = Doing::Dead;
            return None;
        }
        Some(was_unclear && added && leader.history.epoch == epoch && !self.has(Bug::AssumeFailed))
    }

    fn record(s: &State, who: usize, event: Event) -> Record {
        let generation = match event {
            Event::Generation { generation, .. } => generation,
            Event::Committed(manifest) => manifest.name.generation,
            _ => s.leaders[who].history.generation,
        };
        Record { epoch: who as u8 + 1, generation, event }
    }

    fn append(&self, s: &mut State, who: usize, event: Event) -> Appended {
        let record = Self::record(s, who, event);
        let number = s.leaders[who].history.records;
        let mut next = s.leaders[who].history.clone();
        let taken = usize::from(number) < s.records.len();
        if !next.apply(&record) || (taken && !self.has(Bug::Overwrite)) {
            s.leaders[who].doing = Doing::Dead;
            return Appended::Lost;
        }
        s.take_effect(number, record);
        s.leaders[who].history = next;
        Appended::Done
    }

    /// Starts a commit of `step` from one receipt of each rank. `false`: nothing comes of it.
    pub(crate) fn begin_commit(&self, s: &mut State, who: usize, step: u8, objects: [Option<Object>; RANKS]) -> bool {
        let generation = s.leaders[who].generation;
        if self.refresh(s, who).is_none() {
            return true;
        }
        let history = &s.leaders[who].history;
        let same = |c: &&Checkpoint| (c.step(), c.manifest.name.generation) == (step, generation);
        if history.checkpoints.iter().any(|c| same(&c)) {
            s.leaders[who].floor = s.leaders[who].floor.max(step);
            return true;
        }
        if !self.has(Bug::AnyOrder) && step <= history.newest_of_generation() {
            return false;
        }
        let fresh = |o: &Object| (o.step, o.generation) == (step, generation);
        let reached = |o: &Object| history.checkpoints.iter().any(|c| c.manifest.objects().any(|other| other == o));
        if !self.has(Bug::TrustReferences) && !objects.iter().flatten().all(|o| fresh(o) || reached(o)) {
            return false;
        }
        let leader = &mut s.leaders[who];
        let name = Name { generation, step, epoch: who as u8 + 1, attempt: leader.attempts };
        leader.attempts += 1;
        let manifest = Manifest { name, objects };
        let record_first = self.has(Bug::RecordFirst);
        leader.doing = if record_first { Doing::Committing(manifest) } else { Doing::Storing(manifest) };
        true
    }

    /// Starts a collection.
    pub(crate) fn begin_retain(&self, s: &mut State, who: usize) {
        if self.refresh(s, who).is_none() {
            return;
        }
        let history = &s.leaders[who].history;
        let (condemned, first_open) = (self.condemned(history), history.newest_of_generation() + 1);
        let sweep = Phase::List { objects: false };
        let phase = if self.has(Bug::SweepFirst) || condemned.is_empty() { sweep } else { Phase::Record };
        s.leaders[who].doing = Doing::Retaining { condemned, first_open, phase };
    }

    /// Starts the append of a record that is not a commit.
    pub(crate) fn begin_append(
        &self,
        s: &mut State,
        who: usize,
        event: impl FnOnce(&History) -> Option<Event>,
    ) -> bool {
        if self.refresh(s, who).is_none() {
            return true;
        }
        let Some(event) = event(&s.leaders[who].history) else { return false };
        s.leaders[who].doing = Doing::Appending(event);
        true
    }

    fn condemned(&self, history: &History) -> Vec<Name> {
        history.condemned(usize::from(!self.has(Bug::KeepNone)))
    }

    /// Whether a collection would change anything, as this leader sees the job.
    pub(crate) fn has_waste(&self, s: &State, who: usize) -> bool {
        let history = &s.leaders[who].history;
        let first_open = history.newest_of_generation() + 1;
        let doomed = |objects| !self.doomed(s, history, &[], first_open, objects).is_empty();
        !self.condemned(history).is_empty() || doomed(false) || doomed(true)
    }

    /// `sweep`: the files of a folder that no checkpoint reaches and no open save may name.
    fn doomed(&self, s: &State, h: &History, condemned: &[Name], first_open: u8, objects: bool) -> Vec<File> {
        let kept: Vec<_> = h.checkpoints.iter().filter(|c| !condemned.contains(&c.manifest.name)).collect();
        let may_be_named = |step: u8, generation: u8| {
            let open = step >= first_open && !self.has(Bug::IgnoreOpenSaves);
            generation > h.generation || (generation == h.generation && open)
        };
        let named = |o: &Object| {
            let names = |r: &Record| matches!(r.event, Event::Committed(m) if m.objects().any(|k| k == o));
            s.records.iter().any(names)
        };
        if objects {
            // All kept manifests were read before the first folder was listed.
            let kept = |o: &Object| kept.iter().any(|c| c.manifest.objects().any(|k| k == o));
            let forgotten = |o: &Object| self.has(Bug::KeepOrphans) && !named(o);
            let goes = |o: &&Object| !kept(o) && !may_be_named(o.step, o.generation) && !forgotten(o);
            return s.objects.iter().filter(goes).map(|o| File::Object(*o)).collect();
        }
        let goes =
            |name: &Name| !kept.iter().any(|c| c.manifest.name == *name) && !may_be_named(name.step, name.generation);
        s.manifests.iter().map(|m| m.name).filter(goes).map(File::Manifest).collect()
    }

    /// The leader's next request is answered.
    pub(crate) fn advance(&self, s: &mut State, who: usize) {
        match s.leaders[who].doing.clone() {
            Doing::Nothing | Doing::Dead => {}
            Doing::Resolving(event) => match self.refresh(s, who) {
                None => {}
                Some(true) => Self::appended(s, who, event),
                Some(false) => s.leaders[who].doing = Doing::Appending(event),
            },
            Doing::Appending(event) => {
                if let Appended::Done = self.append(s, who, event) {
                    Self::appended(s, who, event);
                }
            }
            Doing::Storing(manifest) => {
                s.manifests.insert(manifest);
                let next = if self.has(Bug::RecordFirst) { Doing::Nothing } else { Doing::Committing(manifest) };
                s.leaders[who].doing = next;
            }
            Doing::Committing(manifest) => {
                if let Appended::Done = self.append(s, who, Event::Committed(manifest)) {
                    let leader = &mut s.leaders[who];
                    leader.floor = leader.floor.max(manifest.name.step);
                    let record_first = self.has(Bug::RecordFirst);
                    leader.doing = if record_first { Doing::Storing(manifest) } else { Doing::Nothing };
                }
            }
            Doing::Retaining { condemned, first_open, phase } => self.retain(s, who, condemned, first_open, phase),
        }
    }

    /// What follows once a record is known to be stored: `Job::after`.
    fn appended(s: &mut State, who: usize, event: Event) {
        let leader = &mut s.leaders[who];
        if let Event::Generation { generation, .. } = event {
            (leader.generation, leader.floor) = (generation, 0);
        }
        leader.doing = Doing::Nothing;
    }

    fn retain(&self, s: &mut State, who: usize, mut condemned: Vec<Name>, first_open: u8, phase: Phase) {
        let sweep_first = self.has(Bug::SweepFirst);
        let next = match phase {
            Phase::Record => {
                let Some(name) = condemned.first().copied() else { return s.leaders[who].doing = Doing::Nothing };
                let Appended::Done = self.append(s, who, Event::Deleted(name)) else { return };
                condemned.remove(0);
                match (condemned.is_empty(), sweep_first) {
                    (false, _) => Some(Phase::Record),
                    (true, false) => Some(Phase::List { objects: false }),
                    (true, true) => None,
                }
            }
            Phase::List { objects } => {
                let unreadable = |c: &Checkpoint| !c.quarantined && !s.manifests.contains(&c.manifest);
                if !objects && s.leaders[who].history.checkpoints.iter().any(unreadable) {
                    return s.leaders[who].doing = Doing::Nothing;
                }
                let doomed = self.doomed(s, &s.leaders[who].history, &condemned, first_open, objects);
                Some(Phase::Remove { objects, doomed })
            }
            Phase::Remove { objects, mut doomed } => {
                s.remove(doomed.remove(0));
                Some(Phase::Remove { objects, doomed })
            }
        };
        // What is empty is no request.
        let next = match next {
            Some(Phase::Remove { objects: false, doomed }) if doomed.is_empty() => Some(Phase::List { objects: true }),
            Some(Phase::Remove { objects: true, doomed }) if doomed.is_empty() => {
                (sweep_first && !condemned.is_empty()).then_some(Phase::Record)
            }
            other => other,
        };
        s.leaders[who].doing = match next {
            Some(phase) => Doing::Retaining { condemned, first_open, phase },
            None => Doing::Nothing,
        };
    }

    /// The leader's next create gets no answer. A record's may take effect later; a manifest's has.
    pub(crate) fn time_out(s: &mut State, who: usize) -> bool {
        let (event, next) = match &s.leaders[who].doing {
            Doing::Appending(event) => (*event, Doing::Resolving(*event)),
            Doing::Committing(manifest) => (Event::Committed(*manifest), Doing::Nothing),
            Doing::Retaining { condemned, phase: Phase::Record, .. } => match condemned.first() {
                Some(name) => (Event::Deleted(*name), Doing::Nothing),
                None => return false,
            },
            Doing::Storing(manifest) => {
                let manifest = *manifest;
                s.manifests.insert(manifest);
                s.leaders[who].doing = Doing::Nothing;
                return true;
            }
            _ => return false,
        };
        let record = Self::record(s, who, event);
        let mut folds = s.leaders[who].history.clone();
        if !folds.apply(&record) {
            return false;
        }
        s.in_flight.push((s.leaders[who].history.records, record));
        s.leaders[who].unclear = true;
        s.leaders[who].doing = next;
        true
    }
}
