//! What there is at one moment: the store, the processes, and what may still go wrong.

use std::collections::BTreeSet;

use crate::chain::{Event, History, Manifest, Name, Object, RANKS, Record};

/// A file of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum File {
    Manifest(Name),
    Object(Object),
}

/// Where a collection stands: `retention::collect`, with each request to the store a step of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    /// `delete`: the next record is that of the first condemned.
    Record,
    /// `sweep`: the folder is to be listed, manifests first.
    List { objects: bool },
    /// `sweep`: these go, one by one.
    Remove { objects: bool, doomed: Vec<File> },
}

/// What a leader is doing for the job: at most one operation, as `Journal::perform` holds the job's page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Doing {
    #[default]
    Nothing,
    /// `Journal::append`: `Page::resolve` comes next; also when it is tried again after no clear answer.
    Resolving(Event),
    /// `Journal::append`: the chain is read, the create comes next.
    Appending(Event),
    /// `save::commit`: the manifest is to be created.
    Storing(Manifest),
    /// `save::commit`: its record is to be created.
    Committing(Manifest),
    /// `retention::collect`.
    Retaining { condemned: Vec<Name>, first_open: u8, phase: Phase },
    /// Crashed or stepped down. Whoever starts again is a new leader with a new epoch.
    Dead,
}

/// A coordinator; its epoch is its place in [`State::leaders`], from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Leader {
    /// `Chain::history`.
    pub(crate) history: History,
    /// `Chain::unclear`.
    pub(crate) unclear: bool,
    /// The machine's own view, learnt when the job is loaded, which is before `led` is appended: the generation, and
    /// the last step of it that is committed (`Gathering::committed`); older steps' receipts are not taken.
    pub(crate) generation: u8,
    pub(crate) floor: u8,
    /// Manifests made, for fresh names.
    pub(crate) attempts: u8,
    pub(crate) doing: Doing,
}

/// A rank's word that its part of a step is durable; kept for ever, because agents repeat it and messages are slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Receipt {
    pub(crate) generation: u8,
    pub(crate) step: u8,
    pub(crate) rank: u8,
    pub(crate) object: Object,
}

/// Someone who loads the newest checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reader {
    Waiting,
    /// `Chain::load` and `newest_good` have named it.
    Resolved(Manifest),
    /// `open_checkpoint` has read the manifest.
    Opened(Manifest),
    Done,
    /// A file was missing, though the checkpoint is not deleted.
    Torn,
}

/// What may still happen; each use takes one away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    /// Leaders that die.
    pub(crate) crashes: u8,
    /// Leaders that are only asleep when another takes over.
    pub(crate) pauses: u8,
    /// Creates without an answer.
    pub(crate) timeouts: u8,
    /// Generations beyond the first.
    pub(crate) generations: u8,
    /// Checkpoints found damaged.
    pub(crate) quarantines: u8,
    /// Receipts that refer to an older object.
    pub(crate) references: u8,
    /// Readers; at most one.
    pub(crate) readers: u8,
}

/// See the module header.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) records: Vec<Record>,
    pub(crate) manifests: BTreeSet<Manifest>,
    pub(crate) objects: BTreeSet<Object>,
    /// Record creates that timed out and may yet take effect: number and record.
    pub(crate) in_flight: Vec<(u8, Record)>,
    pub(crate) leaders: Vec<Leader>,
    pub(crate) receipts: BTreeSet<Receipt>,
    pub(crate) reader: Reader,
    pub(crate) left: Budget,
    /// Not a part of the system: the highest epoch that has taken the job over.
    pub(crate) fence: u8,
    /// Not a part of the system: a record of a lower epoch took effect after that.
    pub(crate) overtaken: bool,
    /// Not a part of the system: a file was removed that a checkpoint reaches.
    pub(crate) robbed: bool,
}

impl State {
    /// Leader 1 runs generation 1, whose first checkpoint, of step 1, is committed.
    pub(crate) fn first(ranks: u8, left: Budget) -> Self {
        let object = |rank| (rank < ranks).then_some(Object { generation: 1, step: 1, rank, attempt: 0 });
        let manifest = Manifest {
            name: Name { generation: 1, step: 1, epoch: 1, attempt: 0 },
            objects: std::array::from_fn::<_, RANKS, _>(|rank| object(rank as u8)),
        };
        let record = |generation, event| Record { epoch: 1, generation, event };
        let records = vec![
            record(0, Event::Led),
            record(1, Event::Generation { generation: 1, start: None }),
            record(1, Event::Committed(manifest)),
        ];
        let history = History::of(&records).expect("the first records follow one another");
        let leader = Leader { history, unclear: false, generation: 1, floor: 1, attempts: 0, doing: Doing::Nothing };
        Self {
            records,
            manifests: BTreeSet::from([manifest]),
            objects: manifest.objects().copied().collect(),
            in_flight: vec![],
            leaders: vec![leader],
            receipts: BTreeSet::new(),
            reader: if left.readers > 0 { Reader::Waiting } else { Reader::Done },
            left,
            fence: 1,
            overtaken: false,
            robbed: false,
        }
    }

    /// The chain as everyone must read it; `None` if it cannot be read any more.
    pub(crate) fn history(&self) -> Option<History> {
        History::of(&self.records)
    }

    /// Whether a checkpoint's manifest and all its objects are there.
    pub(crate) fn is_whole(&self, manifest: &Manifest) -> bool {
        self.manifests.contains(manifest) && manifest.objects().all(|o| self.objects.contains(o))
    }

    /// The store takes a record at `number`, which is free or, where creates overwrite, is not.
    pub(crate) fn take_effect(&mut self, number: u8, record: Record) {
        self.overtaken |= record.epoch < self.fence;
        if record.event == Event::Led {
            self.fence = self.fence.max(record.epoch);
        }
        match self.records.get_mut(usize::from(number)) {
            Some(place) => *place = record,
            None => self.records.push(record),
        }
    }

    /// Removes a file, and notes whether a checkpoint reaches it.
    pub(crate) fn remove(&mut self, file: File) {
        let live = self.history().map(|h| h.checkpoints).unwrap_or_default();
        self.robbed |= live.iter().filter(|c| !c.quarantined).any(|c| match file {
            File::Manifest(name) => c.manifest.name == name,
            File::Object(object) => c.manifest.objects().any(|o| *o == object),
        });
        match file {
            File::Manifest(name) => self.manifests.retain(|m| m.name != name),
            File::Object(object) => drop(self.objects.remove(&object)),
        }
    }
}
