//! Input from outside, one function for each kind: what the fuzzers and the hostile tests call.
//!
//! Each takes bytes that an attacker may choose, does with them what Cairn does before it believes them, and returns
//! whether they were accepted. Whatever the bytes are, a function returns: it must not panic, and must not take more
//! memory than a small multiple of their number. Of what was accepted it asserts what the rest of the library relies
//! on, so a fuzzer finds not only crashes but also input that should have been refused.

use std::path::Path;

use bytes::Bytes;
use proto::ids::{JobName, Rank, WorldSize};
use proto::spec::{JobSpec, Overrides};
use uuid::Uuid;

use crate::capture::Capture;
use crate::digest::StateDecl;
use crate::error::parse_json;
use crate::history::History;
use crate::layout;
use crate::leader::{LEADER_FORMAT, LeaderRecord};
use crate::manifest::Manifest;
use crate::node_book::NodesRecord;
use crate::object::{MAX_HEADER, ObjectEntry, check_header};
use crate::plan::plan;
use crate::receipt::Receipt;
use crate::record::{MAX_RECORD, Record};
use crate::retention::condemned;
use crate::space::{Dtype, Space, TensorDecl};
use crate::spec_file::MAX_SPEC;
use crate::url::{Place, normalize_url, parse};

/// Takes bytes from outside; `true` if they were accepted.
pub type Target = fn(&[u8]) -> bool;

/// All kinds by name, which is also the name of the fuzz target and of its folder of seeds.
pub const TARGETS: [(&str, Target); 10] = [
    ("capture", capture),
    ("header", header),
    ("leader", leader),
    ("manifest", manifest),
    ("nodes", nodes),
    ("path", path),
    ("receipt", receipt),
    ("record", record),
    ("specification", specification),
    ("url", url),
];

/// A record of a chain, and the folded history it may hold.
pub fn record(bytes: &[u8]) -> bool {
    let number = number_in(bytes);
    if bytes.len() as u64 > MAX_RECORD {
        return false;
    }
    let Ok(mut record) = Record::parse("record", number, bytes) else { return false };
    let again = serde_json::to_vec(&record).expect("an accepted record can be written");
    let again = Record::parse("record", number, &again).expect("and read back");
    // A loss of -0.0 and the like may change its spelling, but not its value.
    assert!(again == record, "a record that does not read back as itself");
    let mut history = record.folded.take().map_or_else(History::default, |folded| *folded);
    let before = history.clone();
    if history.apply(&record).is_err() {
        assert!(history == before, "a refused record has changed the history");
    }
    let _ = (history.newest_good(), condemned(&history, 1), history.last());
    true
}

/// The number that a hostile record is looked for under: the one it claims, as a writer of both would do.
fn number_in(bytes: &[u8]) -> u64 {
    #[derive(serde::Deserialize)]
    struct Claim {
        number: u64,
    }
    serde_json::from_slice(bytes).map_or(0, |claim: Claim| claim.number)
}

/// A leader's record.
pub fn leader(bytes: &[u8]) -> bool {
    parse_json::<LeaderRecord>("leader record", bytes, LEADER_FORMAT).is_ok()
}

/// A record of the nodes that are kept empty.
pub fn nodes(bytes: &[u8]) -> bool {
    NodesRecord::parse("record of nodes", number_in(bytes), bytes).is_ok()
}

/// A manifest. What was accepted can be planned with: every read lies in an object of the job.
pub fn manifest(bytes: &[u8]) -> bool {
    let Ok(manifest) = Manifest::parse("manifest", bytes) else { return false };
    check_manifest(&manifest);
    true
}

fn check_manifest(manifest: &Manifest) {
    for object in &manifest.objects {
        assert!(layout::is_object_of(&manifest.job, &object.path), "{} lies elsewhere", object.path);
    }
    let elements = manifest.space.elements();
    for state in 0..manifest.states.len() {
        for range in [0..1, elements / 2..elements, elements - 1..elements] {
            let mut next = range.start;
            for read in plan(manifest, state, range.clone()) {
                assert!(read.elements.start <= next && read.elements.end > next, "a plan with gaps");
                assert!(read.bytes.end <= manifest.objects[read.object].bytes, "a read past the object's end");
                assert!(read.blocks.end <= manifest.space.blocks(), "a read past the hashes");
                next = read.elements.end;
            }
            assert!(next >= range.end, "a plan that ends early");
        }
    }
}

/// A receipt from the wire, and the manifest it would make as the only rank's.
pub fn receipt(bytes: &[u8]) -> bool {
    let Ok(receipt) = Receipt::from_bytes(bytes) else { return false };
    let space = small_space();
    if let Ok(manifest) = Manifest::assemble(&space, receipt.scalar.clone(), vec![receipt]) {
        check_manifest(&manifest);
    }
    true
}

/// A capture, taken out of a slot of one mebibyte.
pub fn capture(bytes: &[u8]) -> bool {
    static SLOT: [u8; 1 << 20] = [0; 1 << 20];
    let Ok(capture) = Capture::from_json(bytes) else { return false };
    let Ok(source) = capture.source(Bytes::from_static(&SLOT)) else { return false };
    let held: u64 = source.states.iter().map(|state| state.bytes.len() as u64).sum();
    assert!(held <= SLOT.len() as u64, "a capture larger than its slot");
    let _ = source.layout(Uuid::nil());
    true
}

/// The safetensors header of an object of [`small_space`], as `verify` reads it.
pub fn header(bytes: &[u8]) -> bool {
    if bytes.len() as u64 > MAX_HEADER {
        return false;
    }
    let (space, states) = (small_space(), StateDecl::adamw());
    let Ok(object) = object_with_header_of(&space, &states, bytes.len() as u64) else { return false };
    check_header(&space, &states, &object, bytes).is_ok()
}

/// The only rank's object, as its manifest would describe it with a header of this length.
fn object_with_header_of(space: &Space, states: &[StateDecl], length: u64) -> Result<ObjectEntry, crate::StoreError> {
    let elements = space.shard(Rank::ZERO, WorldSize::ONE);
    let mut offset = 8 + length;
    let mut extents = vec![];
    for state in states {
        let (first, elements) = (elements.start, elements.end - elements.start);
        extents.push(crate::object::Extent { state: state.name.clone(), first, elements, offset });
        offset += elements * state.dtype.size();
    }
    let job = JobName::new("tiny").map_err(|e| crate::StoreError::Bug(e.to_string()))?;
    let path = layout::object(&job, proto::ids::Step::ZERO, proto::ids::Generation::ZERO, Rank::ZERO, Uuid::nil());
    Ok(ObjectEntry { path, bytes: offset, extents })
}

/// The space that the seeds of receipts, captures and headers are of: two tensors, one block.
pub fn small_space() -> Space {
    let tensor = |name: &str, shape: &[u64]| TensorDecl { name: name.into(), shape: shape.into(), dtype: Dtype::F32 };
    Space::new(vec![tensor("a.weight", &[3, 5]), tensor("b.bias", &[7])]).expect("two small tensors are a space")
}

/// A name found in a listing, or a path in a manifest.
pub fn path(bytes: &[u8]) -> bool {
    let (Ok(text), Ok(job)) = (std::str::from_utf8(bytes), JobName::new("tiny")) else { return false };
    if let Some(number) = layout::record_number(&job, text) {
        assert_eq!(layout::record(&job, number), text, "two names of one record");
    }
    let _ = layout::step_and_generation(text);
    let safe = layout::is_safe(text);
    if safe {
        let joined = Path::new("/store").join(text);
        let plain = |part: std::path::Component<'_>| !matches!(part, std::path::Component::ParentDir);
        assert!(joined.starts_with("/store/") && joined.components().all(plain), "{text:?} leaves the store");
    }
    if layout::is_object_of(&job, text) {
        assert!(safe && text.starts_with("jobs/tiny/objects/"), "{text:?} is no object of the job");
    }
    safe
}

/// A store's URL.
pub fn url(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(normal) = normalize_url(text, Path::new("/jobs")) else { return false };
    let place = parse(&normal);
    assert!(place.is_ok(), "{text:?} is accepted as {normal:?}, which is not");
    match &place {
        Ok(Place::Folder(folder)) => assert!(folder.is_absolute(), "{text:?} is no absolute folder"),
        Ok(Place::Bucket(_, _, prefix)) => assert!(prefix.split('/').all(|part| part != ".."), "{prefix:?} climbs"),
        _ => {}
    }
    let again = normalize_url(&normal, Path::new("/elsewhere"));
    assert!(again.is_ok_and(|again| again == normal), "{normal:?} has another normal form");
    true
}

/// A job file in TOML, and a stored specification in JSON.
pub fn specification(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    if bytes.len() as u64 > MAX_SPEC {
        return false;
    }
    let stored = serde_json::from_slice::<JobSpec>(bytes).ok().filter(|spec| spec.validate("stored").is_ok());
    let read = JobSpec::parse("job.toml", text, Path::new("/jobs"), &Overrides::new()).ok();
    let Some(spec) = stored.or(read) else { return false };
    let space = Space::of_model(&spec.model);
    let json = serde_json::to_vec(&spec).expect("an accepted specification can be written");
    let again: JobSpec = serde_json::from_slice(&json).expect("and read back");
    assert!(again.validate("again").is_ok(), "a specification that is refused when it is read back");
    space.is_ok()
}
