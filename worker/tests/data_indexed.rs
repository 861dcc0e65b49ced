//! Indexed datasets: another program's files read right, and every way a file can be wrong.

use std::fs;
use std::path::{Path, PathBuf};

use worker::data::{DataError, ElementType, Fingerprint, IndexedDataset, IndexedWriter};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn write(prefix: &Path, element: ElementType, documents: &[&[u32]]) {
    let mut writer = IndexedWriter::create(prefix, element).unwrap();
    for document in documents {
        writer.push(document).unwrap();
        writer.end_document();
    }
    writer.finish().unwrap();
}

fn all(data: &IndexedDataset, vocabulary: u32) -> Result<Vec<u32>, DataError> {
    let mut out = vec![0; data.len() as usize];
    data.read(0, vocabulary, &mut out).map(|()| out)
}

#[test]
fn files_of_another_writer_are_read() {
    for (name, element, clip) in [
        ("megatron_u8", ElementType::U8, 255),
        ("megatron_i16", ElementType::I16, 32767),
        ("megatron_i32", ElementType::I32, 50000),
        ("megatron_i64", ElementType::I64, 50000),
        ("megatron_u16", ElementType::U16, 50000),
    ] {
        let data = IndexedDataset::open(&fixture(name)).unwrap();
        assert_eq!((data.documents(), data.len(), data.element_type()), (3, 10, element));
        assert_eq!(all(&data, 50001).unwrap(), [1, 2, 3, 40, 41, 42, 7, clip, 9, 10]);
        data.check_vocabulary(50001).unwrap();
        // The second token of the third document is the large one.
        for error in [all(&data, 200).unwrap_err(), data.check_vocabulary(200).unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains(&format!("document 2, token 1: id {clip}")), "{text}");
            assert!(text.contains("200") && text.contains(&format!("{name}.bin")), "{text}");
        }
    }
}

#[test]
fn this_writer_writes_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("a.b");
    write(&prefix, ElementType::U16, &[&[1, 2, 3], &[40, 41, 42], &[], &[7, 50000, 9, 10]]);
    let data = IndexedDataset::open(&prefix).unwrap();
    assert_eq!((data.documents(), data.len(), data.is_empty()), (3, 10, false));
    assert_eq!(all(&data, 50001).unwrap(), [1, 2, 3, 40, 41, 42, 7, 50000, 9, 10]);
    let theirs = fs::read(fixture("megatron_u16.bin")).unwrap();
    assert_eq!(fs::read(folder.path().join("a.b.bin")).unwrap(), theirs);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file is left");
}

#[test]
fn an_unfinished_dataset_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = IndexedWriter::create(&folder.path().join("x"), ElementType::U8).unwrap();
    writer.push(&[1, 2]).unwrap();
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn negative_ids_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("x");
    write(&prefix, ElementType::I32, &[&[1, 2], &[3, u32::MAX]]);
    let error = IndexedDataset::open(&prefix).unwrap().check_vocabulary(100).unwrap_err().to_string();
    assert!(error.contains("document 1, token 1: id -1"), "{error}");
}

/// One way to break a dataset: what is changed, and what the message must contain.
type Damage = (&'static str, fn(&Path, &Path), &'static [&'static str]);

fn patch(path: &Path, at: usize, bytes: &[u8]) {
    let mut content = fs::read(path).unwrap();
    content[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(path, content).unwrap();
}

fn cut(path: &Path, by: usize) {
    let content = fs::read(path).unwrap();
    fs::write(path, &content[..content.len() - by]).unwrap();
}

fn grow(path: &Path, by: usize) {
    let mut content = fs::read(path).unwrap();
    content.resize(content.len() + by, 0);
    fs::write(path, content).unwrap();
}

#[test]
fn every_damage_is_an_error_that_names_file_and_place() {
    // Five sequences, four boundaries: lengths at 34, starts at 54, boundaries at 94, end at 126.
    let cases: &[Damage] = &[
        ("no index", |idx, _| fs::remove_file(idx).unwrap(), &["d.idx", "opening", "cairn data prepare"]),
        ("no tokens", |_, bin| fs::remove_file(bin).unwrap(), &["d.bin", "opening", "cairn data prepare"]),
        ("empty index", |idx, _| fs::write(idx, "").unwrap(), &["d.idx", "at byte 0", "empty"]),
        ("empty tokens", |_, bin| fs::write(bin, "").unwrap(), &["d.bin", "empty"]),
        ("foreign index", |idx, _| fs::write(idx, "PK\x03\x04 and more").unwrap(), &["d.idx", "at byte 0", "MMIDIDX"]),
        ("cut in header", |idx, _| cut(idx, 100), &["at byte 26", "truncated"]),
        ("version", |idx, _| patch(idx, 9, &[2]), &["at byte 9", "version 2"]),
        ("float", |idx, _| patch(idx, 17, &[7]), &["at byte 17", "floating point"]),
        ("type", |idx, _| patch(idx, 17, &[99]), &["at byte 17", "99"]),
        ("index cut", |idx, _| cut(idx, 8), &["at byte 118", "truncated"]),
        ("index grown", |idx, _| grow(idx, 5), &["at byte 126", "something else follows"]),
        ("huge count", |idx, _| patch(idx, 18, &[0xFF; 8]), &["truncated"]),
        ("no boundaries", |idx, _| patch(idx, 26, &[0; 8]), &["at byte 26"]),
        ("negative length", |idx, _| patch(idx, 38, &[0xFF; 4]), &["at byte 38", "-1 tokens"]),
        ("start", |idx, _| patch(idx, 62, &[5]), &["at byte 62", "starts at byte 5", "6"]),
        ("first boundary", |idx, _| patch(idx, 94, &[1]), &["at byte 94", "boundary 0 is 1"]),
        ("boundaries fall", |idx, _| patch(idx, 110, &[0]), &["at byte 110", "boundary 2 is 0"]),
        ("last boundary", |idx, _| patch(idx, 118, &[4]), &["at byte 118", "boundary 3 is 4"]),
        ("tokens cut", |_, bin| cut(bin, 1), &["d.bin", "at byte 19", "truncated", "d.idx"]),
        ("tokens grown", |_, bin| grow(bin, 2), &["d.bin", "at byte 20", "22 bytes", "describes 20"]),
    ];
    for (name, damage, wanted) in cases {
        let folder = tempfile::tempdir().unwrap();
        let (idx, bin) = (folder.path().join("d.idx"), folder.path().join("d.bin"));
        fs::copy(fixture("megatron_u16.idx"), &idx).unwrap();
        fs::copy(fixture("megatron_u16.bin"), &bin).unwrap();
        damage(&idx, &bin);
        let error = IndexedDataset::open(&folder.path().join("d")).expect_err(name).to_string();
        for part in *wanted {
            assert!(error.contains(part), "{name}: {error:?} should contain {part:?}");
        }
        assert!(error.contains("cairn data prepare"), "{name}: {error:?} should say what to do");
    }
}

#[test]
fn reading_outside_is_an_error() {
    let data = IndexedDataset::open(&fixture("megatron_u16")).unwrap();
    for start in [8, 10, u64::MAX, u64::MAX / 2] {
        assert!(matches!(data.read(start, 1 << 16, &mut [0; 3]), Err(DataError::Shape(_))), "{start}");
    }
}

#[test]
fn a_fingerprint_knows_one_dataset_from_another() {
    let folder = tempfile::tempdir().unwrap();
    let of = |documents: &[&[u32]]| {
        let prefix = folder.path().join("x");
        write(&prefix, ElementType::U8, documents);
        Fingerprint::of(&IndexedDataset::open(&prefix).unwrap())
    };
    let base = of(&[&[1, 2], &[3]]);
    assert_eq!(base, of(&[&[1, 2], &[3]]));
    assert_ne!(base, of(&[&[1], &[2, 3]]), "other documents");
    assert_ne!(base, of(&[&[1, 2], &[4]]), "other tokens");
    let large = vec![5; (4 << 20) + 100_000];
    let mut end = large.clone();
    *end.last_mut().unwrap() = 6;
    assert_ne!(of(&[&large]), of(&[&end]), "the last byte is always seen");
    let text = base.to_string();
    assert_eq!((text.len(), text.parse::<Fingerprint>().unwrap()), (64, base));
    let json = serde_json::to_string(&base).unwrap();
    assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), base);
    assert!(serde_json::from_str::<Fingerprint>("\"no\"").is_err());
}
