//! What every backend must do, as one function.
//!
//! A new backend is right when [`check`] passes on it: create once and under races, reads of ranges, listings longer
//! than a page, large uploads, uploads broken off. The probe ([`crate::probe_atomic_create`]) is the short form of the
//! races, for a store about to be used; this is for tests.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use futures::stream::{self, StreamExt};

use crate::backend::{Create, Store};
use crate::error::Kind;

/// Creators that race for one name, and the names.
const CREATORS: usize = 16;
const RACES: usize = 4;
/// Objects of the long listing: more than servers put on one page.
const MANY: usize = 1_010;
/// Requests at once where many are made.
const AT_ONCE: usize = 32;

/// Runs every operation against a store and panics with a message at the first difference.
pub async fn check(store: &Store) {
    check_without_races(store).await;
    let root = format!("probe/{}", store.token());
    creates_once_under_races(store, &root).await;
    clear(store, &root).await;
}

/// As [`check`] without the races: for servers that are known not to create atomically.
pub async fn check_without_races(store: &Store) {
    let root = format!("probe/{}", store.token());
    creates_once(store, &root).await;
    reads_ranges(store, &root).await;
    lists_in_order(store, &root).await;
    lists_beyond_a_page(store, &root).await;
    uploads_large(store, &root).await;
    refuses_escapes(store).await;
    clear(store, &root).await;
    breaks_off_whole_or_not_at_all(store).await;
}

async fn clear(store: &Store, root: &str) {
    let left = store.list(root, None, 2 * MANY).await.expect("list");
    let deletes = left.iter().map(|l| async move { store.delete(&l.path).await.expect("delete") });
    stream::iter(deletes).buffer_unordered(AT_ONCE).collect::<Vec<_>>().await;
    assert!(store.list(root, None, 1).await.expect("list").is_empty(), "deleted objects are not listed");
}

/// Of many creators of one name one wins, and every loser reads the winner's bytes.
async fn creates_once_under_races(store: &Store, root: &str) {
    for race in 0..RACES {
        let path = format!("{root}/race/{race}");
        let bid = |creator: usize| {
            let (path, bytes) = (&path, Bytes::from(format!("creator {creator} of {}", store.token())));
            async move {
                let outcome = store.create(path, bytes.clone()).await.expect("create");
                (outcome, bytes, store.get(path, 4096).await.expect("what was created can be read at once"))
            }
        };
        let bids = join_all((0..CREATORS).map(bid)).await;
        let won: Vec<_> = bids.iter().filter(|(outcome, ..)| *outcome == Create::Created).collect();
        assert_eq!(won.len(), 1, "{path}: of {CREATORS} creators one wins");
        let winner = &won[0].1;
        assert!(bids.iter().all(|(_, _, read)| read == winner), "{path}: all read the winner's bytes");
    }
}

/// More objects than a page has, in order, resumed after any of them; and their folders.
async fn lists_beyond_a_page(store: &Store, root: &str) {
    let folder = format!("{root}/many");
    let path = |i: usize| format!("{folder}/{}/{i:05}", i % 3);
    let right: BTreeSet<String> = (0..MANY).map(path).collect();
    let creates = right.iter().map(|path| store.create(path, Bytes::from_static(b"x")));
    let created = stream::iter(creates).buffer_unordered(AT_ONCE).collect::<Vec<_>>().await;
    assert!(created.into_iter().all(|c| c.expect("create") == Create::Created));
    let all = store.list(&folder, None, 2 * MANY).await.expect("list");
    assert!(all.iter().map(|l| &l.path).eq(right.iter()), "{} objects, in order, once each", right.len());
    assert!(all.iter().all(|l| l.bytes == 1), "with their sizes");
    let mut paged: Vec<String> = vec![];
    loop {
        let page = store.list(&folder, paged.last().map(String::as_str), 400).await.expect("list");
        let last = page.len() < 400;
        paged.extend(page.into_iter().map(|l| l.path));
        if last {
            break;
        }
    }
    assert!(paged.iter().eq(right.iter()), "pages of 400 make up the same");
    let gone = format!("{folder}/1/00001x");
    let after = store.list(&folder, Some(&gone), 2 * MANY).await.expect("list");
    let right_after = right.range(gone..).collect::<Vec<_>>();
    assert!(after.iter().map(|l| &l.path).eq(right_after), "after a name that is not there");
    assert_eq!(store.list_folders(&folder).await.expect("folders"), ["0", "1", "2"]);
}

/// An upload that is given up half-way: nothing of it can be seen, or all of it.
async fn breaks_off_whole_or_not_at_all(store: &Store) {
    let root = format!("probe/{}", store.token());
    for patience in [0, 1, 5] {
        let path = format!("{root}/broken-off-{patience}");
        let parts = vec![Bytes::from(vec![1; 10 << 20]), Bytes::from(vec![2; 10 << 20])];
        let upload = tokio::time::timeout(Duration::from_millis(patience), store.upload(&path, parts)).await;
        match store.head(&path).await {
            Ok(size) => assert_eq!(size, 20 << 20, "a part of {path} can be seen"),
            Err(e) => assert!(e.is_not_found() && upload.is_err(), "{path}: {e}"),
        }
        store.delete(&path).await.expect("delete");
    }
}

async fn creates_once(store: &Store, root: &str) {
    let path = format!("{root}/once/a.json");
    let (mine, other) = (Bytes::from_static(b"mine"), Bytes::from_static(b"other"));
    assert_eq!(store.create(&path, mine.clone()).await.expect("create"), Create::Created);
    assert_eq!(store.create(&path, other).await.expect("create"), Create::AlreadyExists);
    assert_eq!(store.get(&path, 100).await.expect("get"), mine, "a create must not overwrite");
    let too_large = store.get(&path, 3).await.expect_err("limit");
    assert_eq!(too_large.kind(), Kind::Corrupt, "{too_large}");
    store.delete(&path).await.expect("delete");
    store.delete(&path).await.expect("deleting twice is fine");
    assert!(store.get(&path, 100).await.expect_err("gone").is_not_found());
    assert!(store.head(&path).await.expect_err("gone").is_not_found());
    assert!(store.get_range(&path, 0..1).await.expect_err("gone").is_not_found());
}

async fn reads_ranges(store: &Store, root: &str) {
    let path = format!("{root}/ranges");
    let parts = vec![Bytes::from_static(b"0123"), Bytes::new(), Bytes::from_static(b"456789")];
    store.upload(&path, parts).await.expect("upload");
    assert_eq!(store.head(&path).await.expect("head"), 10);
    assert_eq!(store.get_range(&path, 3..6).await.expect("range"), "345");
    assert_eq!(store.get_range(&path, 6..6).await.expect("range"), "");
    let two = store.get_ranges(&path, &[8..10, 0..1]).await.expect("ranges");
    assert_eq!(two, ["89", "0"]);
    assert_eq!(store.get_range(&path, 0..10).await.expect("range"), "0123456789");
    assert_eq!(store.get_range(&path, 3..5).await.expect("range over the seam"), "34");
    assert_eq!(store.get_range(&path, 9..10).await.expect("last byte"), "9");
    for past in [8..12, 10..11, 50..60] {
        let error = store.get_range(&path, past.clone()).await.expect_err("past the end");
        assert_eq!(error.kind(), Kind::Corrupt, "{past:?}: {error}");
    }
    let empty = format!("{root}/empty");
    assert_eq!(store.create(&empty, Bytes::new()).await.expect("create"), Create::Created);
    assert_eq!(store.get(&empty, 0).await.expect("get"), "");
    assert_eq!(store.head(&empty).await.expect("head"), 0);
    assert_eq!(store.get_range(&empty, 0..1).await.expect_err("past the end").kind(), Kind::Corrupt);
}

async fn lists_in_order(store: &Store, root: &str) {
    let folder = format!("{root}/list");
    for name in ["b", "a/2", "a/1", "c"] {
        let path = format!("{folder}/{name}");
        store.create(&path, Bytes::from_static(b"x")).await.expect("create");
    }
    let names = |listed: Vec<crate::backend::Listed>| {
        listed.into_iter().map(|l| l.path[folder.len() + 1..].to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(store.list(&folder, None, 10).await.expect("list")), ["a/1", "a/2", "b", "c"]);
    assert_eq!(names(store.list(&folder, None, 1).await.expect("list")), ["a/1"]);
    let after = format!("{folder}/a/2");
    assert_eq!(names(store.list(&folder, Some(&after), 10).await.expect("list")), ["b", "c"]);
    assert_eq!(store.list_folders(&folder).await.expect("folders"), ["a"]);
    let nowhere = format!("{root}/nowhere");
    assert!(store.list(&nowhere, None, 10).await.expect("list").is_empty());
    assert!(store.list_folders(&nowhere).await.expect("folders").is_empty());
}

/// Large enough for a multipart upload whose parts do not fall together with the buffers.
async fn uploads_large(store: &Store, root: &str) {
    let path = format!("{root}/large");
    let part = |n: u8, len: usize| Bytes::from(vec![n; len]);
    store.upload(&path, vec![part(1, 10 << 20), part(2, 10 << 20), part(3, 13)]).await.expect("upload");
    assert_eq!(store.head(&path).await.expect("head"), (20 << 20) + 13);
    let seam = (10 << 20) - 1..(10 << 20) + 1;
    assert_eq!(store.get_range(&path, seam).await.expect("range").as_ref(), [1, 2]);
    let end = (20 << 20) - 1..(20 << 20) + 13;
    assert_eq!(store.get_range(&path, end).await.expect("range").as_ref(), [&[2][..], &[3; 13]].concat());
}

async fn refuses_escapes(store: &Store) {
    for path in ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".hidden", "a\0b"] {
        assert!(store.get(path, 10).await.is_err(), "{path:?}");
        assert!(store.create(path, Bytes::new()).await.is_err(), "{path:?}");
    }
}
