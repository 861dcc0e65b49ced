//! Records and their fold, small enough to enumerate. Stands for `record.rs` and `history.rs`.
//!
//! Names keep what the real names say (step, generation, who made it); hashes and scalars are left out, because no rule
//! of the protocol depends on them. The first record, `submitted`, is left out too: every chain begins with `led`.

/// The most ranks a model has.
pub(crate) const RANKS: usize = 2;

/// A rank's object: step, generation and rank as in its path, and which upload of them it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Object {
    pub(crate) generation: u8,
    pub(crate) step: u8,
    pub(crate) rank: u8,
    pub(crate) attempt: u8,
}

/// A manifest's file name: unique, so it says who made it and at which try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name {
    pub(crate) generation: u8,
    pub(crate) step: u8,
    pub(crate) epoch: u8,
    pub(crate) attempt: u8,
}

/// A manifest. A record names it with its hash, so the content is part of the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Manifest {
    pub(crate) name: Name,
    pub(crate) objects: [Option<Object>; RANKS],
}

impl Manifest {
    pub(crate) fn objects(&self) -> impl Iterator<Item = &Object> {
        self.objects.iter().flatten()
    }
}

/// The kinds of records that the commit and collection protocol knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    Led,
    Generation { generation: u8, start: Option<Name> },
    Committed(Manifest),
    Quarantined(Name),
    Deleted(Name),
}

/// One link of the chain; its number is its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Record {
    pub(crate) epoch: u8,
    pub(crate) generation: u8,
    pub(crate) event: Event,
}

/// A checkpoint that was committed and not deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Checkpoint {
    pub(crate) manifest: Manifest,
    pub(crate) record: u8,
    pub(crate) abandoned: bool,
    pub(crate) quarantined: bool,
}

impl Checkpoint {
    pub(crate) fn is_good(&self) -> bool {
        !self.abandoned && !self.quarantined
    }

    pub(crate) fn step(&self) -> u8 {
        self.manifest.name.step
    }
}

/// `History`: the fold of the records read so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct History {
    pub(crate) records: u8,
    pub(crate) epoch: u8,
    pub(crate) generation: u8,
    pub(crate) checkpoints: Vec<Checkpoint>,
}

impl History {
    /// Folds a whole chain; `None` if a record cannot follow those before it.
    pub(crate) fn of(records: &[Record]) -> Option<Self> {
        let mut history = Self::default();
        records.iter().all(|record| history.apply(record)).then_some(history)
    }

    /// `History::apply`; `false` where the code refuses the record, and nothing has changed.
    pub(crate) fn apply(&mut self, record: &Record) -> bool {
        if record.epoch < self.epoch || record.generation < self.generation || !self.may_follow(record) {
            return false;
        }
        match &record.event {
            Event::Led => {}
            Event::Generation { generation, start } => {
                let from = start.map_or(0, |start| start.step);
                for c in &mut self.checkpoints {
                    c.abandoned |= c.manifest.name.generation < *generation && c.step() > from;
                }
            }
            Event::Committed(manifest) => {
                let record = self.records;
                let checkpoint = Checkpoint { manifest: *manifest, record, abandoned: false, quarantined: false };
                self.checkpoints.push(checkpoint);
            }
            Event::Quarantined(name) => {
                self.checkpoints.iter_mut().filter(|c| c.manifest.name == *name).for_each(|c| c.quarantined = true);
            }
            Event::Deleted(name) => self.checkpoints.retain(|c| c.manifest.name != *name),
        }
        (self.epoch, self.generation) = (record.epoch, record.generation);
        self.records += 1;
        true
    }

    /// `History::check`, as far as it concerns the events here.
    fn may_follow(&self, record: &Record) -> bool {
        match &record.event {
            Event::Generation { generation, start } => {
                let good = |name: &Name| self.find(*name).is_some_and(Checkpoint::is_good);
                *generation == record.generation && *generation > self.generation && start.iter().all(good)
            }
            _ if record.generation != self.generation => false,
            Event::Led => true,
            Event::Committed(m) => m.name.generation == self.generation && self.find(m.name).is_none(),
            Event::Quarantined(name) | Event::Deleted(name) => self.find(*name).is_some(),
        }
    }

    pub(crate) fn find(&self, name: Name) -> Option<&Checkpoint> {
        self.checkpoints.iter().find(|c| c.manifest.name == name)
    }

    /// `History::newest_good`.
    pub(crate) fn newest_good(&self) -> Option<&Checkpoint> {
        self.checkpoints.iter().filter(|c| c.is_good()).max_by_key(|c| (c.step(), c.record))
    }

    /// The newest step the present generation has committed; 0 if none. `Journal::retain` and `commit` reckon with it.
    pub(crate) fn newest_of_generation(&self) -> u8 {
        let of_this = self.checkpoints.iter().filter(|c| c.manifest.name.generation == self.generation);
        of_this.map(Checkpoint::step).max().unwrap_or(0)
    }

    /// `retention::condemned` with `keep_last` of `keep`.
    pub(crate) fn condemned(&self, keep: usize) -> Vec<Name> {
        let newer = |c: &Checkpoint, than: &Checkpoint| {
            if than.is_good() { c.step() > than.step() } else { c.record > than.record }
        };
        let is_condemned =
            |c: &&Checkpoint| self.checkpoints.iter().filter(|o| o.is_good() && newer(o, c)).count() >= keep;
        self.checkpoints.iter().filter(is_condemned).map(|c| c.manifest.name).collect()
    }
}
