//! What every backend must do, as one function.
//!
//! A new backend is right when [`check`] passes on it. Atomicity under races is the probe's business
//! ([`crate::probe_atomic_create`]); this is about meaning.

use bytes::Bytes;

use crate::backend::{Create, Store};
use crate::error::Kind;

/// Runs every operation against a store and panics with a message at the first difference. For tests.
pub async fn check(store: &Store) {
    let root = format!("probe/{}", store.token());
    creates_once(store, &root).await;
    reads_ranges(store, &root).await;
    lists_in_order(store, &root).await;
    uploads_large(store, &root).await;
    refuses_escapes(store).await;
    for left in store.list(&root, None, 1_000).await.expect("list") {
        store.delete(&left.path).await.expect("delete");
    }
    assert!(store.list(&root, None, 1).await.expect("list").is_empty(), "deleted objects are not listed");
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
    for past in [8..12, 10..11, 50..60] {
        let error = store.get_range(&path, past.clone()).await.expect_err("past the end");
        assert_eq!(error.kind(), Kind::Corrupt, "{past:?}: {error}");
    }
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
