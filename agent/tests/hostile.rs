//! What comes to an agent from its peers and from what an earlier life has left, under attack; see the harness.
//!
//! `CAIRN_WRITE_SEEDS=1` makes the seeds anew.

#[macro_use]
#[path = "../../checkpoint-store/tests/hostile/harness.rs"]
mod harness;

use agent::hostile;
use harness::{Allowance, Counting, folder, seeds};
use prost::Message;
use proto::wire::{Chunk, GroupState, HeldStep};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A description names each block's hash: 64 digits of text become 32 bytes, and the text is kept too.
const USUAL: Allowance = Allowance { fixed: 256 << 10, each: 64 };

targets! {
    group: USUAL, 20_000;
    note: USUAL, 20_000;
    parity: USUAL, 20_000;
}

#[test]
fn the_seeds_are_made_anew_if_asked() {
    for (name, _) in hostile::TARGETS {
        write_seeds(name);
    }
}

fn chunks(asked: u8, chunks: &[&[u8]]) -> Vec<u8> {
    let mut out = vec![asked];
    for data in chunks {
        let message = Chunk { data: data.to_vec().into() }.encode_to_vec();
        out.extend(u16::try_from(message.len()).unwrap().to_le_bytes());
        out.extend(message);
    }
    out
}

fn written(name: &str) -> Vec<(&'static str, Vec<u8>)> {
    match name {
        "group" => {
            let (captures, _) = seeds("capture");
            let described = |rank: u32| {
                let mut json: serde_json::Value = serde_json::from_slice(&captures[0]).unwrap();
                json["rank"] = rank.into();
                serde_json::to_vec(&json).unwrap()
            };
            let step = HeldStep { step: 5, captures: (0..4).map(described).collect(), encoded: true };
            let state = GroupState {
                job: "tiny".into(),
                generation: 1,
                node: "a".into(),
                sequence: 1,
                steps: vec![step.clone()],
            };
            let fewer = HeldStep { captures: step.captures[1..].to_vec(), ..step };
            vec![
                ("valid-step", state.encode_to_vec()),
                ("hostile-rank-missing", GroupState { steps: vec![fewer], ..state.clone() }.encode_to_vec()),
                ("hostile-length", state.encode_to_vec().into_iter().take(40).chain([0xff; 9]).collect()),
            ]
        }
        "note" => {
            let note = |members: &str, parities: u32| {
                let text =
                    format!(r#"{{"job":"t","generation":1,"step":5,"parities":{parities},"members":[{members}]}}"#);
                text.into_bytes()
            };
            let two = r#"["a","127.0.0.1:1",[0]],["b","127.0.0.1:2",[1]]"#;
            let many = [r#"["a","",[0]]"#; 9].join(",");
            vec![
                ("valid-two", note(two, 1)),
                ("hostile-all-parity", note(two, 2)),
                ("hostile-many", note(&many, 1)),
                ("hostile-node", note(r#"["a","",[0]],["../b","",[1]]"#, 1)),
                ("hostile-job", br#"{"job":"../t","generation":1,"step":5,"parities":1,"members":[]}"#.to_vec()),
            ]
        }
        _ => vec![
            ("valid-two-chunks", chunks(2, &[&[1; 20], &[2; 12]])),
            ("hostile-short", chunks(2, &[&[1; 20]])),
            ("hostile-long", chunks(1, &[&[1; 20]])),
            ("hostile-length", [&[1u8, 0xff, 0xff][..], &[7; 30]].concat()),
        ],
    }
}

fn write_seeds(name: &str) {
    if std::env::var_os("CAIRN_WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(folder(name)).unwrap();
        for (file, bytes) in written(name) {
            std::fs::write(folder(name).join(file), bytes).unwrap();
        }
    }
}
