//! The probe: does this store create atomically?
//!
//! The chain is only as safe as the store's conditional create, and several S3-compatible servers accept the condition
//! and then overwrite, or let two writers win a race. So before a store is trusted, many writers create the same few
//! keys at once: each key must have exactly one winner, what is read back must be the winner's bytes, and a later
//! create must be refused.

use bytes::Bytes;
use futures::future::{join_all, try_join_all};

use crate::backend::{Create, Store};
use crate::error::StoreError;

/// Keys that are raced for.
const KEYS: usize = 20;
/// Writers that race for each.
const WRITERS: usize = 16;
/// How the operator accepts a store without atomic create.
const WAY_OUT: &str = "use a store with atomic conditional writes (a local disk, Amazon S3, Google Cloud Storage, \
                       Azure, Ceph), or accept one coordinator without fencing by \
                       `cairn coordinator --allow-single-coordinator`";

/// Races writers against each other and reports whether creation is atomic. Leaves nothing behind.
pub async fn probe_atomic_create(store: &Store) -> Result<(), StoreError> {
    let folder = format!("probe/{}", store.token());
    let verdict = race(store, &folder).await;
    let cleaned = clean(store, &folder).await;
    verdict.and(cleaned)
}

async fn race(store: &Store, folder: &str) -> Result<(), StoreError> {
    let refuse = |why: String| {
        StoreError::Input(format!("the store {} does not create objects atomically: {why}; {WAY_OUT}", store.url()))
    };
    for key in 0..KEYS {
        let path = format!("{folder}/{key:02}");
        let bid = |writer: usize| {
            let bytes = Bytes::from(format!("writer {writer} of {}", store.token()));
            let path = &path;
            async move { store.create(path, bytes.clone()).await.map(|outcome| (outcome, bytes)) }
        };
        let bids = join_all((0..WRITERS).map(bid)).await;
        let mut winners = vec![];
        for bid in bids {
            let (outcome, bytes) = bid?;
            if outcome == Create::Created {
                winners.push(bytes);
            }
        }
        let [winner] = winners.as_slice() else {
            let n = winners.len();
            return Err(refuse(format!(
                "of {WRITERS} writers that created one key at once, {n} were told they had won"
            )));
        };
        if store.get(&path, 4096).await? != *winner {
            return Err(refuse("a writer was told it had won, but another one's bytes were stored".into()));
        }
        if store.create(&path, Bytes::from_static(b"late")).await? == Create::Created {
            return Err(refuse("an existing object was overwritten".into()));
        }
    }
    Ok(())
}

async fn clean(store: &Store, folder: &str) -> Result<(), StoreError> {
    let left = store.list(folder, None, 2 * KEYS).await?;
    try_join_all(left.iter().map(|l| store.delete(&l.path))).await.map(|_| ())
}
