//! Formats: what older builds wrote is read, what newer ones write is refused, and no bytes at all do harm.

use std::io::{Read, Write};
use std::path::Path;

use checkpoint_store::*;
use lz4_flex::frame::{FrameDecoder, FrameEncoder};
use proto::ids::Step;
use proto::incident::{Cause, Incidents, Outcome};

use crate::support::*;

/// What `examples/fixture.rs` printed when format 1 was the newest.
const DIGEST: &str = "08568a520a67101de549ff5bd34d1c5c307ee2a3879e434384f761b228630394";

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-1").join(name)
}

/// A record, or part of one, as builds since format 3 write it.
fn fixture_3(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-3").join(name);
    std::fs::read_to_string(path).unwrap()
}

fn fixture_values(state: usize) -> Vec<u8> {
    (0..841).flat_map(|i| (i as f32 + state as f32 * 0.5).to_le_bytes()).collect()
}

/// Chain, manifest, receipts and object of format 1, as the build before format 2 wrote them.
#[tokio::test]
async fn a_store_of_format_1_is_read_whole() {
    let store = Store::open_existing(&format!("file://{}", fixture("store").display())).unwrap();
    let chain = Chain::load(&store, &job()).await.unwrap().unwrap();
    let checkpoint = chain.history().newest_good().unwrap();
    assert_eq!((checkpoint.step, checkpoint.digest.to_string().as_str()), (Step::new(50), DIGEST));
    assert!(verify(&store, &job(), checkpoint).await.unwrap().is_good());
    let manifest = open_checkpoint(&store, &job(), checkpoint).await.unwrap();
    assert!(manifest.timeline.is_empty());
    for (state, name) in ["param", "exp_avg", "exp_avg_sq"].into_iter().enumerate() {
        let mut bytes = vec![0; 841 * 4];
        read_range(&store, &manifest, name, 0..841, &mut bytes).await.unwrap();
        assert!(bytes == fixture_values(state), "{name}");
    }
    let receipt = |rank| Receipt::from_bytes(&std::fs::read(fixture(&format!("receipt-{rank}"))).unwrap()).unwrap();
    let receipts: Vec<Receipt> = (0..2).map(receipt).collect();
    let again = Manifest::assemble(&manifest.space, manifest.scalar.clone(), receipts.clone()).unwrap();
    assert_eq!(again, manifest);
    // Both forms say the same, and both are read back.
    assert_eq!(Manifest::parse("m", &manifest.encode().unwrap().bytes).unwrap(), manifest);
    assert_eq!(Manifest::parse("m", &manifest.to_json().unwrap()).unwrap(), manifest);
    for receipt in receipts {
        assert_eq!(Receipt::from_bytes(&receipt.to_bytes().unwrap()).unwrap(), receipt);
    }
}

/// The record of an incident that is still open when a coordinator dies is for another build to read, as is its end's.
#[test]
fn an_open_incident_is_read_and_written_as_it_was() {
    let read = |name: &str, number| {
        let text = fixture_3(name);
        let record = Record::parse(name, number, text.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&record).unwrap(), text, "{name} is written in another form");
        record
    };
    let (open, over) = (read("incident-open.json", 41), read("incident-over.json", 43));
    let Event::Incident(incident) = &open.event else { panic!("{open:?}") };
    assert_eq!((incident.number, incident.cause, incident.outcome), (5, Cause::Collective, Outcome::Open));
    let (link, stages) = (incident.link.as_ref().unwrap(), (incident.abort_ms, incident.agree_ms, incident.restore_ms));
    assert_eq!(((link.0.as_str(), link.1.as_str()), stages), (("b", "c"), (Some(40), Some(210), None)));
    let folded = fixture_3("incidents-folded.json");
    let mut incidents: Incidents = serde_json::from_str(&folded).unwrap();
    assert_eq!(serde_json::to_string(&incidents).unwrap(), folded, "the fold is written in another form");
    assert_eq!(incidents.open(), Some(&**incident));
    let Event::Incident(incident) = over.event else { panic!("{over:?}") };
    incidents.add(*incident.clone());
    assert_eq!((incidents.total(), incidents.latest.len(), incidents.open()), (5, 1, None));
    assert_eq!((incident.steps_lost(), incident.total_ms()), (Some(1), 32_265));
}

#[tokio::test]
async fn the_binary_form_keeps_everything_and_is_small() {
    let (store, space) = (Store::memory(), space(&[65_536 * 40, 7]));
    let mut chain = running(&store, 3).await;
    let mut receipts = receipts(&store, &space, 1, 3, 50).await;
    receipts[1].stages.insert(0, Stage::new("hash", 0.0, 0.25, 1 << 20));
    receipts[1].scalar.exponents.clear();
    let mut manifest = Manifest::assemble(&space, scalar(50), receipts).unwrap();
    manifest.timeline.set_commit(0.5, 0);
    let encoded = manifest.encode().unwrap();
    let back = Manifest::parse("m", &encoded.bytes).unwrap();
    assert_eq!(back, manifest);
    assert_eq!(back.timeline.stages(proto::ids::Rank::new(1))[0].micros, 250_000);
    assert_eq!(encoded.hash, BlockHash::of(&encoded.bytes));
    // 41 blocks of three states are 3,936 bytes of hashes; JSON takes more than twice as much for them alone.
    assert!(encoded.bytes.len() < 3_936 + 1_000, "{}", encoded.bytes.len());
    assert!(manifest.to_json().unwrap().len() > 2 * 3_936);
    let reference = commit(&mut chain, &manifest, EPOCH, uuid::Uuid::new_v4()).await.unwrap();
    assert!(reference.manifest.ends_with(".manifest"));
    expect_loads(&store, &reference, &space, 4).await;
}

fn unpack(encoded: &[u8]) -> Vec<u8> {
    let mut body = vec![];
    FrameDecoder::new(&encoded[12..]).read_to_end(&mut body).unwrap();
    body
}

fn pack(head: &[u8], body: &[u8]) -> Vec<u8> {
    let mut frame = FrameEncoder::new(vec![]);
    frame.write_all(body).unwrap();
    [head, &frame.finish().unwrap()].concat()
}

fn harmless(what: &str, outcome: Result<(), StoreError>) {
    if let Err(error) = outcome {
        assert!(matches!(error.kind(), Kind::Corrupt | Kind::Input), "{what}: {error}");
    }
}

#[tokio::test]
async fn no_bytes_do_harm() {
    let (store, space) = (Store::memory(), medium());
    let receipts = receipts(&store, &space, 1, 3, 50).await;
    let wire = receipts[1].to_bytes().unwrap();
    let encoded = Manifest::assemble(&space, scalar(50), receipts).unwrap().encode().unwrap().bytes;
    let body = unpack(&encoded);
    assert_eq!(Manifest::parse("m", &pack(&encoded[..12], &body)).unwrap().encode().unwrap().bytes, encoded);
    // The last four bytes only mark the frame's end.
    for cut in 0..encoded.len() - 4 {
        assert_eq!(Manifest::parse("m", &encoded[..cut]).unwrap_err().kind(), Kind::Corrupt, "cut at {cut}");
    }
    for cut in 0..wire.len() {
        assert_eq!(Receipt::from_bytes(&wire[..cut]).unwrap_err().kind(), Kind::Corrupt, "cut at {cut}");
    }
    for at in 0..body.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff, body[at] ^ 4] {
            let mut bad = body.clone();
            bad[at] = value;
            let bad = pack(&encoded[..12], &bad);
            harmless(&format!("manifest byte {at} as {value}"), Manifest::parse("m", &bad).map(|_| ()));
        }
    }
    for at in 0..encoded.len() {
        let mut bad = encoded.to_vec();
        bad[at] ^= 0x41;
        harmless(&format!("packed byte {at}"), Manifest::parse("m", &bad).map(|_| ()));
    }
    for at in 0..wire.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff, wire[at] ^ 4] {
            let mut bad = wire.clone();
            bad[at] = value;
            harmless(&format!("receipt byte {at} as {value}"), Receipt::from_bytes(&bad).map(|_| ()));
        }
    }
    let error = Manifest::parse("m", &[&encoded[..], &[0]].concat()).unwrap_err();
    assert!(error.to_string().contains("follow its frame"), "{error}");
    let longer = [&body[..], &[0]].concat();
    let error = Manifest::parse("m", &pack(&encoded[..12], &longer)).unwrap_err();
    assert!(error.to_string().contains("follow its end"), "{error}");
    // A few megabytes that unpack to a gigabyte are read as far as a manifest goes, and no further.
    let mut bomb = FrameEncoder::new(vec![]);
    bomb.write_all(&body[..body.len() - 200]).unwrap();
    for _ in 0..1024 {
        bomb.write_all(&vec![0xff; 1 << 20]).unwrap();
    }
    let bomb = [&encoded[..12], &bomb.finish().unwrap()].concat();
    assert!(bomb.len() < 16 << 20);
    assert_eq!(Manifest::parse("m", &bomb).unwrap_err().kind(), Kind::Corrupt);
}

#[tokio::test]
async fn a_newer_binary_format_is_refused_naming_both() {
    let (store, space) = (Store::memory(), medium());
    let receipts = receipts(&store, &space, 1, 2, 50).await;
    let mut wire = receipts[0].to_bytes().unwrap();
    let mut manifest = Manifest::assemble(&space, scalar(50), receipts).unwrap().encode().unwrap().bytes.to_vec();
    for format in [0u32, 1, 3, 900] {
        wire[8..12].copy_from_slice(&format.to_le_bytes());
        manifest[8..12].copy_from_slice(&format.to_le_bytes());
        for error in [Receipt::from_bytes(&wire).unwrap_err(), Manifest::parse("m", &manifest).unwrap_err()] {
            let named = matches!(error, StoreError::NewerFormat { found, known: 2, .. } if found == format);
            assert_eq!(named, format > 2, "{error}");
        }
    }
}
