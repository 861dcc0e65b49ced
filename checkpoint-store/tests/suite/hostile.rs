//! Damage and malice: every one an error that names the place, none a panic.

use bytes::Bytes;
use checkpoint_store::record::Record;
use checkpoint_store::*;
use serde_json::{Value, json};

use crate::support::*;

async fn saved() -> (Store, Chain, CheckpointRef) {
    let store = Store::memory();
    let mut chain = running(&store, 3).await;
    let checkpoint = save(&mut chain, &medium(), 50).await;
    (store, chain, checkpoint)
}

async fn replace(store: &Store, path: &str, bytes: Vec<u8>) {
    store.delete(path).await.unwrap();
    store.create(path, bytes.into()).await.unwrap();
}

async fn load_all(store: &Store, checkpoint: &CheckpointRef) -> Result<(), StoreError> {
    let manifest = open_checkpoint(store, &job(), checkpoint).await?;
    for state in ["param", "exp_avg", "exp_avg_sq"] {
        let mut out = vec![0; 4 * medium().elements() as usize];
        read_range(store, &manifest, state, 0..medium().elements(), &mut out).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_flipped_byte_anywhere_is_found() {
    let (store, _, checkpoint) = saved().await;
    let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
    for object in &manifest.objects {
        let good = store.get(&object.path, 1 << 30).await.unwrap();
        let body = object.extents[0].offset as usize;
        for at in [0, 9, body / 2, body, body + 262_143, body + 262_144, good.len() / 2, good.len() - 1] {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            replace(&store, &object.path, bad).await;
            let report = verify(&store, &job(), &checkpoint).await.unwrap();
            let problem = report.first_problem().unwrap_or_else(|| panic!("byte {at} of {}", object.path));
            assert!(problem.contains(&object.path), "{problem}");
            let loaded = load_all(&store, &checkpoint).await;
            assert_eq!(loaded.is_err(), at >= body, "byte {at}: a load reads bodies only");
            if let Err(e) = loaded {
                assert_eq!(e.kind(), Kind::Corrupt);
                assert!(e.to_string().contains("model.layers."), "{e}");
            }
        }
        replace(&store, &object.path, good[..good.len() - 1].to_vec()).await;
        assert_eq!(load_all(&store, &checkpoint).await.unwrap_err().kind(), Kind::Corrupt);
        store.delete(&object.path).await.unwrap();
        let missing = load_all(&store, &checkpoint).await.unwrap_err();
        assert_eq!(missing.kind(), Kind::Corrupt);
        assert!(missing.to_string().contains("is missing"), "{missing}");
        assert!(!verify(&store, &job(), &checkpoint).await.unwrap().is_good());
        store.create(&object.path, good).await.unwrap();
    }
    load_all(&store, &checkpoint).await.unwrap();
    let path = layout::manifest(&job(), &checkpoint.manifest);
    let mut bytes = store.get(&path, 1 << 30).await.unwrap().to_vec();
    bytes[100] ^= 1;
    replace(&store, &path, bytes).await;
    let error = open_checkpoint(&store, &job(), &checkpoint).await.unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
    store.delete(&path).await.unwrap();
    assert_eq!(open_checkpoint(&store, &job(), &checkpoint).await.unwrap_err().kind(), Kind::Corrupt);
}

#[tokio::test]
async fn hostile_manifests_are_refused() {
    let (store, _, checkpoint) = saved().await;
    let mut manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
    // The JSON form has no times.
    manifest.timeline = Timeline::default();
    let text = manifest.to_json().unwrap();
    assert_eq!(Manifest::parse("m", &text).unwrap(), manifest);
    for cut in (0..text.len()).step_by(211) {
        assert_eq!(Manifest::parse("m", &text[..cut]).unwrap_err().kind(), Kind::Corrupt);
    }
    let deep = [b"[".repeat(1 << 20), br#"{"format":1,"job":"#.to_vec(), br#"{"a":"#.repeat(1 << 18)];
    for nested in deep {
        assert_eq!(Manifest::parse("m", &nested).unwrap_err().kind(), Kind::Corrupt);
    }
    let huge = u64::MAX;
    let changes: Vec<(&str, Value)> = vec![
        ("/format", json!(0)),
        ("/format", json!(-1)),
        ("/job", json!("../x")),
        ("/world_size", json!(0)),
        ("/step", json!(51)),
        ("/block_elements", json!(1)),
        ("/space/0/shape", json!([huge, huge])),
        ("/space/0/shape", json!([0])),
        ("/space/0/name", json!("other")),
        ("/states/0/name", json!("a/b")),
        ("/states/1/name", json!("param")),
        ("/states/0/dtype", json!("F99")),
        ("/hashes/0", json!("00")),
        ("/hashes/0", json!("")),
        ("/hashes/1", json!("g".repeat(64))),
        ("/digest", json!("0".repeat(64))),
        ("/scalar/cursor", json!(1)),
        ("/objects", json!([])),
        ("/objects/0/path", json!("jobs/tiny/objects/../../../etc/passwd")),
        ("/objects/0/path", json!("/etc/passwd")),
        ("/objects/0/path", json!("jobs/other/objects/00/a.safetensors")),
        ("/objects/0/bytes", json!(0)),
        ("/objects/0/extents", json!([])),
        ("/objects/0/extents/0/first", json!(huge)),
        ("/objects/0/extents/0/first", json!(1)),
        ("/objects/0/extents/0/elements", json!(huge)),
        ("/objects/0/extents/0/elements", json!(0)),
        ("/objects/0/extents/0/offset", json!(huge)),
        ("/objects/0/extents/0/offset", json!(0)),
        ("/objects/0/extents/1/offset", manifest.objects[0].extents[0].offset.into()),
        ("/objects/1/extents/0/first", json!(0)),
        ("/objects/0/extents/0/state", json!("none")),
        ("/objects/0/unknown", json!(1)),
    ];
    for (place, value) in changes {
        let mut changed: Value = serde_json::from_slice(&text).unwrap();
        match changed.pointer_mut(place) {
            Some(found) => *found = value.clone(),
            None => drop(changed["objects"][0].as_object_mut().unwrap().insert("unknown".into(), value.clone())),
        }
        let error = Manifest::parse("the/manifest.json", &serde_json::to_vec(&changed).unwrap());
        let error = error.expect_err(&format!("{place} = {value}"));
        assert_eq!(error.kind(), Kind::Corrupt, "{place}: {error}");
        assert!(error.to_string().contains("the/manifest.json"), "{place}: {error}");
    }
    let mut doubled: Value = serde_json::from_slice(&text).unwrap();
    let mut twin = doubled["objects"][0].clone();
    twin["path"] = json!("jobs/tiny/objects/00/other.safetensors");
    doubled["objects"].as_array_mut().unwrap().push(twin);
    let error = Manifest::parse("m", &serde_json::to_vec(&doubled).unwrap()).unwrap_err();
    assert!(error.to_string().contains("lie twice"), "{error}");
}

/// Puts a manifest in the store under a record that has the right hash of it: only the parser stands in the way.
async fn open_hostile(store: &Store, checkpoint: &CheckpointRef, bytes: Vec<u8>) -> StoreError {
    let hash = BlockHash::of(&bytes);
    replace(store, &layout::manifest(&job(), &checkpoint.manifest), bytes).await;
    let named = CheckpointRef { hash, ..checkpoint.clone() };
    let error = open_checkpoint(store, &job(), &named).await.expect_err("a hostile manifest");
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    assert!(error.to_string().contains(&checkpoint.manifest), "{error}");
    error
}

#[tokio::test]
async fn a_right_hash_does_not_make_a_manifest_right() {
    let (store, _, checkpoint) = saved().await;
    let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
    let good: Value = serde_json::from_slice(&manifest.to_json().unwrap()).unwrap();
    let (extents, block) = ("/objects/0/extents", manifest.block_elements);
    let first = &manifest.objects[0].extents;
    assert!(first[0].elements > block, "the first rank has several blocks");
    let changes: Vec<(String, Value, &str)> = vec![
        (format!("{extents}/1/offset"), json!(first[0].offset), "overlap"),
        (format!("{extents}/1/state"), json!("param"), "lie twice"),
        (format!("{extents}/0/elements"), json!(block), "are missing"),
        ("/objects".into(), json!([]), "are missing"),
        (format!("{extents}/0/elements"), json!(u64::MAX), "outside the space"),
        (format!("{extents}/0/offset"), json!(u64::MAX), "outside the object"),
        ("/objects/0/bytes".into(), json!((1u64 << 50) + 1), "more than"),
        ("/objects/0/bytes".into(), json!(u64::MAX), "more than"),
        ("/space/0/shape".into(), json!([1u64 << 40, 1u64 << 40]), "shape"),
        ("/states".into(), json!(vec![json!({"name": "s", "dtype": "F32"}); 1_000]), "1000 states"),
        ("/hashes".into(), json!(vec![""; 100_000]), "100000 lists"),
        ("/scalar/samples_left_out".into(), json!(vec![7; 100_000]), "digest"),
    ];
    for (place, value, wanted) in changes {
        let mut changed = good.clone();
        *changed.pointer_mut(&place).unwrap() = value;
        let error = open_hostile(&store, &checkpoint, serde_json::to_vec(&changed).unwrap()).await;
        assert!(error.to_string().contains(wanted), "{place}: {error}");
    }
    // Each object is small enough, but together they are not.
    let mut many = good.clone();
    let twin = |i: usize| {
        let mut object = good["objects"][0].clone();
        object["path"] = json!(format!("jobs/tiny/objects/00/{i}.safetensors"));
        object["bytes"] = json!(1u64 << 50);
        object
    };
    many["objects"] = (0..1 << 14).map(twin).collect();
    let error = open_hostile(&store, &checkpoint, serde_json::to_vec(&many).unwrap()).await;
    assert!(error.to_string().contains("2^64"), "{error}");
    let nested = |open: &str| format!(r#"{{"format":1,"job":{}"#, open.repeat(1 << 20)).into_bytes();
    for bytes in [nested("["), nested(r#"{"a":"#), b"[".repeat(1 << 20)] {
        open_hostile(&store, &checkpoint, bytes).await;
    }
}

#[tokio::test]
async fn a_newer_format_is_refused_naming_both() {
    let (store, chain, checkpoint) = saved().await;
    let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
    let mut newer: Value = serde_json::from_slice(&manifest.to_json().unwrap()).unwrap();
    newer["format"] = json!(7);
    newer["something"] = json!("new");
    let error = Manifest::parse("m", &serde_json::to_vec(&newer).unwrap()).unwrap_err();
    assert!(matches!(error, StoreError::NewerFormat { found: 7, known: 2, .. }), "{error}");
    let path = layout::record(&job(), chain.history().records);
    store.create(&path, Bytes::from_static(br#"{"format":7,"event":{"kind":"unheard of"}}"#)).await.unwrap();
    let error = Chain::load(&store, &job()).await.unwrap_err();
    assert!(error.to_string().contains("format 7"), "{error}");
}

#[tokio::test]
async fn hostile_records_are_refused() {
    let (store, chain, _) = saved().await;
    let number = chain.history().records;
    let path = layout::record(&job(), number);
    let record = |event: Value| {
        let mut record = json!({"format": 1, "epoch": 1, "generation": 1, "author": "x"});
        record["number"] = json!(number);
        record["event"] = event;
        record
    };
    let mut misnumbered = record(json!({"kind": "cancelled"}));
    misnumbered["number"] = json!(0);
    let mut superseded = record(json!({"kind": "cancelled"}));
    superseded["epoch"] = json!(0);
    let hostile = [
        b"".to_vec(),
        b"[".repeat(100_000),
        vec![b' '; (8 << 20) + 1],
        serde_json::to_vec(&record(json!({"kind": "no such event"}))).unwrap(),
        serde_json::to_vec(&record(json!({"kind": "deleted", "manifest": "none"}))).unwrap(),
        serde_json::to_vec(&misnumbered).unwrap(),
        serde_json::to_vec(&superseded).unwrap(),
    ];
    for bytes in hostile {
        replace(&store, &path, bytes.clone()).await;
        let error = Chain::load(&store, &job()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert!(error.to_string().contains(&path), "{error}");
    }
    store.delete(&path).await.unwrap();
    store.delete(&layout::record(&job(), 1)).await.unwrap();
    assert_eq!(Chain::load(&store, &job()).await.unwrap_err().kind(), Kind::Corrupt, "a gap in the chain");
    let escape = CheckpointRef { manifest: "../../x.json".into(), ..chain.history().newest_good().unwrap().clone() };
    assert_eq!(open_checkpoint(&store, &job(), &escape).await.unwrap_err().kind(), Kind::Corrupt);
    assert!(Record::parse("r", 0, b"null").is_err());
}
