//! Leader epochs: who coordinates the jobs of a store.
//!
//! An epoch is won by conditional create of its record and is never won twice. Its leader then writes small numbered
//! beats and deletes old ones. Nothing here reads a clock: a watcher judges by whether the newest beat's number moves
//! while it watches, in its own monotonic time. Beats give liveness only. Safety is each job's chain, in which a new
//! leader's `led` record fences the old one.

use bytes::Bytes;
use proto::ids::Epoch;
use serde::{Deserialize, Serialize};

use crate::backend::{Create, Store};
use crate::error::{StoreError, parse_json};
use crate::layout;

/// The version of leader records.
pub const LEADER_FORMAT: u32 = 1;
/// A leader record or beat larger than this is refused.
const MAX_LEADER: u64 = 64 << 10;
/// Ended epochs whose records are kept. A candidate would have to sleep through this many leaderships to win an old
/// number again, and even then the chains refuse it.
const KEEP: u64 = 64;

/// Who leads an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderRecord {
    /// [`LEADER_FORMAT`].
    pub format: u32,
    /// The epoch.
    pub epoch: Epoch,
    /// Where the leader listens, as `host:port`; `None` for a command that leads for its own length.
    pub address: Option<String>,
    /// The host it runs on, for people.
    pub host: String,
    /// A token of this leader's: an agent that reads back another one looks at another store.
    pub token: String,
}

/// What a store says about its leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderView {
    /// The newest epoch.
    pub epoch: Epoch,
    /// Its leader.
    pub leader: LeaderRecord,
    /// The number of its newest beat, if it has any.
    pub newest_beat: Option<u64>,
    /// Whether it has stepped down.
    pub released: bool,
}

/// The outcome of a bid for an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// The caller leads.
    Won,
    /// Another one does; observe again.
    Lost,
}

#[derive(Debug, Serialize, Deserialize)]
struct Beat {
    format: u32,
    released: bool,
}

/// The newest epoch, its leader and its newest beat; `None` if the store never had a leader.
pub async fn observe(store: &Store) -> Result<Option<LeaderView>, StoreError> {
    let Some(epoch) = epochs(store).await?.pop() else {
        return Ok(None);
    };
    let Some(leader) = read(store, epoch).await? else {
        return Err(StoreError::Corrupt(format!("{} vanished while it was read", layout::leader(epoch))));
    };
    let beats = store.list(&layout::beats(epoch), None, 1_000).await?;
    let mut view = LeaderView { epoch, leader, newest_beat: None, released: false };
    if let Some((number, path)) = beats.iter().rev().find_map(|l| Some((beat_number(&l.path)?, &l.path))) {
        view.newest_beat = Some(number);
        view.released = match store.get(path, MAX_LEADER).await {
            Ok(bytes) => parse_json::<Beat>(path, &bytes, LEADER_FORMAT)?.released,
            // Deleted since it was listed: so a newer one was written, and the leader is alive.
            Err(e) if e.is_not_found() => false,
            Err(e) => return Err(e),
        };
    }
    Ok(Some(view))
}

/// The record of one epoch; `None` if there is none.
pub async fn read(store: &Store, epoch: Epoch) -> Result<Option<LeaderRecord>, StoreError> {
    let path = layout::leader(epoch);
    match store.get(&path, MAX_LEADER).await {
        Ok(bytes) => parse_json(&path, &bytes, LEADER_FORMAT).map(Some),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

/// Bids for an epoch: the one after the newest observed, or 1. Whether the old leader is gone is for the caller to
/// judge.
pub async fn take(store: &Store, epoch: Epoch, record: &LeaderRecord) -> Result<Take, StoreError> {
    if record.epoch != epoch || epoch == Epoch::ZERO {
        return Err(StoreError::Bug(format!("bid for epoch {epoch} with a record of epoch {}", record.epoch)));
    }
    if store.create(&layout::leader(epoch), to_json(record)?).await? == Create::AlreadyExists {
        return Ok(Take::Lost);
    }
    let all = epochs(store).await?;
    if all.last().is_some_and(|newest| *newest > epoch) {
        return Ok(Take::Lost);
    }
    for old in all.into_iter().filter(|old| *old < epoch) {
        for beat in store.list(&layout::beats(old), None, 1_000).await? {
            // The newest beat of the epoch before is left: its `released` says how that epoch ended.
            if old.next() != Some(epoch) {
                store.delete(&beat.path).await?;
            }
        }
        // Cannot overflow, whatever the names say: `old` is lower.
        if epoch.get() - old.get() > KEEP {
            store.delete(&layout::leader(old)).await?;
        }
    }
    Ok(Take::Won)
}

/// Writes beat `number`, which grows by one each time from 1, and deletes the one before the last. After an error the
/// next try takes the next number.
pub async fn beat(store: &Store, epoch: Epoch, number: u64) -> Result<(), StoreError> {
    put_beat(store, epoch, number, false).await
}

/// Steps down with a last beat, so that a successor need not wait.
pub async fn release(store: &Store, epoch: Epoch, number: u64) -> Result<(), StoreError> {
    put_beat(store, epoch, number, true).await
}

async fn put_beat(store: &Store, epoch: Epoch, number: u64, released: bool) -> Result<(), StoreError> {
    let path = layout::beat(epoch, number);
    if store.create(&path, to_json(&Beat { format: LEADER_FORMAT, released })?).await? == Create::AlreadyExists {
        return Err(StoreError::Fenced(format!("{path} was written by someone else")));
    }
    match number.checked_sub(2) {
        Some(old) => store.delete(&layout::beat(epoch, old)).await,
        None => Ok(()),
    }
}

/// All epochs of which the record is kept, oldest first.
async fn epochs(store: &Store) -> Result<Vec<Epoch>, StoreError> {
    let (mut found, mut after) = (vec![], None);
    loop {
        let page = store.list(layout::LEADER, after.as_deref(), 1_000).await?;
        found.extend(page.iter().filter_map(|l| epoch_number(&l.path)));
        match page.last() {
            Some(last) if page.len() == 1_000 => after = Some(last.path.clone()),
            _ => break,
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn epoch_number(path: &str) -> Option<Epoch> {
    let name = path.strip_prefix("leader/")?.strip_suffix(".json")?;
    name.parse().ok().map(Epoch::new).filter(|e| layout::leader(*e) == path)
}

fn beat_number(path: &str) -> Option<u64> {
    path.rsplit('/').next()?.parse().ok()
}

fn to_json(value: &impl Serialize) -> Result<Bytes, StoreError> {
    let bytes = serde_json::to_vec(value).map_err(|e| StoreError::Bug(format!("leader record: {e}")))?;
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(store: &Store, epoch: u64) -> LeaderRecord {
        let (epoch, token) = (Epoch::new(epoch), store.token());
        LeaderRecord { format: LEADER_FORMAT, epoch, address: Some("127.0.0.1:1".into()), host: "a".into(), token }
    }

    #[tokio::test]
    async fn an_epoch_is_won_once_beaten_and_released() {
        let store = Store::memory();
        assert_eq!(observe(&store).await.unwrap(), None);
        let first = record(&store, 1);
        assert_eq!(take(&store, Epoch::new(1), &first).await.unwrap(), Take::Won);
        assert_eq!(take(&store, Epoch::new(1), &record(&store, 1)).await.unwrap(), Take::Lost);
        for n in 1..=5 {
            beat(&store, Epoch::new(1), n).await.unwrap();
            let view = observe(&store).await.unwrap().unwrap();
            assert_eq!((view.newest_beat, view.released, &view.leader), (Some(n), false, &first));
        }
        assert_eq!(store.list(&layout::beats(Epoch::new(1)), None, 10).await.unwrap().len(), 2);
        release(&store, Epoch::new(1), 6).await.unwrap();
        assert!(observe(&store).await.unwrap().unwrap().released);
        for epoch in 2..80 {
            assert_eq!(take(&store, Epoch::new(epoch), &record(&store, epoch)).await.unwrap(), Take::Won);
        }
        let view = observe(&store).await.unwrap().unwrap();
        assert_eq!((view.epoch, view.newest_beat), (Epoch::new(79), None));
        assert_eq!(epochs(&store).await.unwrap().len(), 65);
    }

    #[tokio::test]
    async fn epochs_at_the_end_of_their_numbers_do_not_overflow() {
        let store = Store::memory();
        for epoch in [u64::MAX - 100, u64::MAX - 10, u64::MAX] {
            assert_eq!(take(&store, Epoch::new(epoch), &record(&store, epoch)).await.unwrap(), Take::Won);
        }
        assert_eq!(epochs(&store).await.unwrap(), [Epoch::new(u64::MAX - 10), Epoch::new(u64::MAX)]);
        assert_eq!(take(&store, Epoch::new(5), &record(&store, 5)).await.unwrap(), Take::Lost);
    }
}
