//! The chain: a job's records in the store, and the one way to add to them.
//!
//! Appending is a conditional create of the next number. Who loses it has been overtaken and must read again; who gets
//! no clear answer has lost too, until a new reading shows what happened. There is no other lock, and nothing here
//! depends on a clock. Names count down, so one listed key finds the newest record, and from the nearest record that
//! holds the folded history the rest is read.

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use proto::ids::JobName;

use crate::backend::{Create, Store};
use crate::error::{Kind, StoreError};
use crate::history::{FoldError, History};
use crate::layout;
use crate::record::{FOLD_EVERY, MAX_RECORD, Record};

/// Names listed at once when looking for the newest record.
const PAGE: usize = 8;
/// Records read at once.
const READS_IN_FLIGHT: usize = 16;

/// Why a record was not appended.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// Someone else appended this number: stop acting on the job and read again.
    #[error("record {number} of job {job} was written by someone else")]
    Lost {
        /// The job.
        job: JobName,
        /// The number that was lost.
        number: u64,
    },
    /// The record cannot follow what the chain holds.
    #[error("job {job}: {source}")]
    Refused {
        /// The job.
        job: JobName,
        /// The rule it breaks.
        #[source]
        source: FoldError,
    },
    /// The store failed. After an indeterminate create the chain must be refreshed before the next append.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ChainError {
    /// What to do about it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Lost { .. } | Self::Refused { source: FoldError::Superseded { .. }, .. } => Kind::Fenced,
            Self::Refused { .. } => Kind::Bug,
            Self::Store(e) => e.kind(),
        }
    }
}

/// A job's chain as last read or written.
#[derive(Debug, Clone)]
pub struct Chain {
    store: Store,
    job: JobName,
    history: History,
    /// The mark of our last append, while it is unknown whether that took effect.
    unclear: Option<String>,
}

/// What a reading of a chain's new records found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refreshed {
    /// Records that are new here.
    pub added: u64,
    /// One of them is our append that had no clear answer: it took effect after all.
    pub landed: bool,
}

impl Chain {
    /// Starts a job's chain with its first record, a `submitted`. [`ChainError::Lost`] if the job exists.
    ///
    /// A create without a clear answer leaves no chain to refresh: the caller repeats this call with the same record.
    /// If the first try took effect after all, the repetition finds its own record and succeeds.
    pub async fn create(store: &Store, job: &JobName, first: Record) -> Result<Self, ChainError> {
        let history = History::default();
        let mut chain = Self { store: store.clone(), job: job.clone(), history, unclear: None };
        match chain.append(first.clone()).await {
            Ok(_) => Ok(chain),
            Err(ChainError::Lost { .. }) if chain.is_begun_with(&first).await? => Ok(chain),
            Err(e) => Err(e),
        }
    }

    /// Whether the stored chain is one record, of this opening of the store, that says the same as `first`; reads it.
    async fn is_begun_with(&mut self, first: &Record) -> Result<bool, StoreError> {
        let Some(found) = read(&self.store, &self.job, 0).await? else { return Ok(false) };
        let same = (found.epoch, found.generation, &found.event) == (first.epoch, first.generation, &first.event);
        Ok(same && self.store.made(&found.author) && self.refresh().await?.added == 1)
    }

    /// Reads a job's chain; `None` if the store does not hold the job.
    pub async fn load(store: &Store, job: &JobName) -> Result<Option<Self>, StoreError> {
        let number = |path: &str| layout::record_number(job, path);
        let Some(newest) = newest(store, &layout::records(job), number).await? else { return Ok(None) };
        let base = newest - newest % FOLD_EVERY;
        let mut records = stream::iter(base..=newest).map(|number| read(store, job, number)).buffered(READS_IN_FLIGHT);
        let mut history = History::default();
        while let Some(record) = records.try_next().await? {
            let Some(mut record) = record else {
                return Err(StoreError::Corrupt(format!(
                    "a record of job {job} before {} is missing",
                    layout::record(job, newest)
                )));
            };
            if record.number == base && base > 0 {
                let folded = record.folded.take().ok_or_else(|| {
                    StoreError::Corrupt(format!("{} lacks the folded history", layout::record(job, base)))
                })?;
                history = *folded;
            }
            fold(job, &mut history, &record)?;
        }
        drop(records);
        Ok(Some(Self { store: store.clone(), job: job.clone(), history, unclear: None }))
    }

    /// The job.
    pub fn job(&self) -> &JobName {
        &self.job
    }

    /// The store the chain lies in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What the chain says.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Appends a record; its number, author and folded history are filled in. Returns its number.
    pub async fn append(&mut self, mut record: Record) -> Result<u64, ChainError> {
        let number = self.history.records;
        if self.unclear.is_some() {
            let why = format!("job {}: an append had no clear answer; refresh the chain first", self.job);
            return Err(StoreError::Fenced(why).into());
        }
        let mut next = self.history.clone();
        next.apply(&record).map_err(|source| ChainError::Refused { job: self.job.clone(), source })?;
        record.number = number;
        record.author = self.store.token();
        record.folded = (number > 0 && number.is_multiple_of(FOLD_EVERY)).then(|| Box::new(self.history.clone()));
        let path = layout::record(&self.job, number);
        let bytes = encode(&path, &record)?;
        // Set first: if this future is dropped half-way, the outcome is unknown.
        self.unclear = Some(record.author);
        let outcome = self.store.create(&path, bytes).await;
        if outcome.as_ref().map_or_else(|e| e.kind() != Kind::Retry, |_| true) {
            self.unclear = None;
        }
        match outcome? {
            Create::Created => {
                self.history = next;
                Ok(number)
            }
            Create::AlreadyExists => Err(ChainError::Lost { job: self.job.clone(), number }),
        }
    }

    /// Reads what others, or an append without a clear answer, have added. An append is told by its own mark: one of
    /// ours that was given up before may land late, and must not be taken for it.
    pub async fn refresh(&mut self) -> Result<Refreshed, StoreError> {
        let mut found = Refreshed::default();
        while let Some(record) = read(&self.store, &self.job, self.history.records).await? {
            fold(&self.job, &mut self.history, &record)?;
            found.added += 1;
            found.landed |= self.unclear.as_ref() == Some(&record.author);
        }
        self.unclear = None;
        Ok(found)
    }
}

/// The jobs a store holds, by name.
pub async fn list_jobs(store: &Store) -> Result<Vec<JobName>, StoreError> {
    let folders = store.list_folders(layout::JOBS).await?;
    Ok(folders.into_iter().filter_map(|name| JobName::new(name).ok()).collect())
}

fn encode(path: &str, record: &Record) -> Result<Bytes, StoreError> {
    let bytes = serde_json::to_vec(record).map_err(|e| StoreError::Bug(format!("{path} cannot be written: {e}")))?;
    if bytes.len() as u64 > MAX_RECORD {
        return Err(StoreError::Bug(format!("{path} would have {} bytes, more than {MAX_RECORD}", bytes.len())));
    }
    Ok(bytes.into())
}

/// The number of the newest record in a folder. Names that are no records may come before it, but cannot hide it.
pub(crate) async fn newest(
    store: &Store,
    folder: &str,
    number: impl Fn(&str) -> Option<u64>,
) -> Result<Option<u64>, StoreError> {
    let mut after = None;
    loop {
        // Mostly the first name is the newest record; only a folder with strange names is read in large pages.
        let limit = if after.is_none() { PAGE } else { 1_000 };
        let page = store.list(folder, after.as_deref(), limit).await?;
        if let Some(number) = page.iter().find_map(|l| number(&l.path)) {
            return Ok(Some(number));
        }
        match page.last() {
            Some(last) if page.len() == limit => after = Some(last.path.clone()),
            _ => return Ok(None),
        }
    }
}

async fn read(store: &Store, job: &JobName, number: u64) -> Result<Option<Record>, StoreError> {
    let path = layout::record(job, number);
    match store.get(&path, MAX_RECORD).await {
        Ok(bytes) => Record::parse(&path, number, &bytes).map(Some),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

fn fold(job: &JobName, history: &mut History, record: &Record) -> Result<(), StoreError> {
    let path = layout::record(job, record.number);
    if history.records != record.number {
        return Err(StoreError::Corrupt(format!("{path} does not follow record {}", history.records)));
    }
    history.apply(record).map_err(|e| StoreError::Corrupt(format!("{path}: {e}")))
}
