//! Each backend does what the others do, and a local disk survives what processes do not.

use std::path::Path;

use bytes::Bytes;
use checkpoint_store::*;

use crate::support::*;

fn open(folder: &Path) -> Store {
    Store::open(&normalize_url("a/b/store", folder).unwrap()).unwrap()
}

#[tokio::test]
async fn memory_conforms_and_is_atomic() {
    let store = Store::open("memory://").unwrap();
    conformance::check(&store).await;
    probe_atomic_create(&store).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_conforms_and_is_atomic() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    conformance::check(&store).await;
    // Of its own: on a disk an upload that is broken off may still end.
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    probe_atomic_create(&store).await.unwrap();
    assert!(store.list("probe", None, 10).await.unwrap().is_empty(), "the probe cleans up");
}

#[tokio::test]
async fn wrong_places_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let message = |url: &str| Store::open(url).unwrap_err().to_string();
    assert!(message("gcs://bucket/x").contains("did you mean gs"));
    std::fs::write(folder.path().join("file"), "x").unwrap();
    let url = normalize_url("file/store", folder.path()).unwrap();
    let error = Store::open(&url).unwrap_err();
    assert_eq!(error.kind(), Kind::Input);
    assert!(error.to_string().contains("file/store cannot be made"), "{error}");
    assert!(message("file:///proc/cairn").contains("/proc/cairn cannot be made"), "{}", message("file:///proc/cairn"));
    let local = normalize_url("store", folder.path()).unwrap();
    let option = Store::open_with(&local, &[("aws_region", "x")]).unwrap_err().to_string();
    assert!(option.contains("a local disk takes no options"), "{option}");
    let missing = normalize_url("nowhere", folder.path()).unwrap();
    assert!(Store::open_existing(&missing).unwrap_err().to_string().contains("does not exist"));
    assert!(!folder.path().join("nowhere").exists());
}

#[tokio::test]
async fn links_out_of_the_store_are_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let (inside, outside) = (open(folder.path()), folder.path().join("outside"));
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "s").unwrap();
    let root = folder.path().join("a/b/store");
    std::os::unix::fs::symlink(&outside, root.join("jobs")).unwrap();
    std::os::unix::fs::symlink(outside.join("secret"), root.join("direct")).unwrap();
    for path in ["jobs/secret", "direct"] {
        let error = inside.get(path, 10).await.unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
    }
    assert!(inside.create("jobs/new", Bytes::new()).await.is_err());
    assert!(inside.list("jobs", None, 10).await.unwrap().is_empty());
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
}

/// A crash may leave a half-written temporary file. It is never seen, stops no one, and is cleared when no writer holds
/// it.
#[tokio::test]
async fn leftovers_of_a_crash_are_invisible_and_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut chain = running(&store, 2).await;
    let checkpoint = save(&mut chain, &medium(), 10).await;
    let job_root = folder.path().join("a/b/store/jobs/tiny");
    for place in ["records", "checkpoints"] {
        std::fs::write(job_root.join(place).join(".cairn-dead-1.tmp"), "half").unwrap();
    }
    let reopened = open(folder.path());
    let again = Chain::load(&reopened, &job()).await.unwrap().unwrap();
    assert_eq!(again.history(), chain.history());
    expect_loads(&reopened, &checkpoint, &medium(), 3).await;
    assert_eq!(store.clear_leftovers("jobs").await.unwrap(), 2);
    assert_eq!(store.clear_leftovers("jobs").await.unwrap(), 0);
    expect_loads(&reopened, &checkpoint, &medium(), 1).await;
}

/// Whatever a save has written before its record, the checkpoint before it is what is found.
#[tokio::test]
async fn a_save_without_its_record_is_not_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (mut chain, space) = (running(&store, 2).await, medium());
    let first = save(&mut chain, &space, 10).await;
    let receipts = receipts(&store, &space, 1, 2, 20).await;
    let manifest = Manifest::assemble(&space, scalar(20), receipts).unwrap();
    let name = layout::manifest_name(manifest.step, manifest.generation, uuid::Uuid::new_v4());
    store.create(&layout::manifest(&job(), &name), manifest.encode().unwrap().bytes).await.unwrap();
    let found = Chain::load(&store, &job()).await.unwrap().unwrap();
    assert_eq!(found.history().newest_good(), Some(&first));
    expect_loads(&store, &first, &space, 3).await;
}

/// A job's folder may be removed by hand; many writers at once then make it again.
#[tokio::test(flavor = "multi_thread")]
async fn folders_that_were_removed_are_made_again_by_all_who_need_them() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for turn in 0..20 {
        let writes = (0..8).map(|i| {
            let (store, path) = (store.clone(), format!("jobs/again/objects/{i}/{turn}"));
            tokio::spawn(async move { store.create(&path, Bytes::from_static(b"x")).await })
        });
        for write in writes.collect::<Vec<_>>() {
            assert_eq!(write.await.unwrap().unwrap(), Create::Created);
        }
        std::fs::remove_dir_all(folder.path().join("a/b/store/jobs/again")).unwrap();
    }
}
