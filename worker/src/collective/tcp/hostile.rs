//! What a stranger may send to a worker's ring port, for [`crate::hostile`].

use proto::ids::{Generation, JobName, Rank};

use super::frame::{HEADER, Header, Kind};
use super::handshake::Identity;

/// The header in front of a chunk. What is accepted is the very header that was expected.
pub(crate) fn frame(bytes: &[u8]) -> bool {
    let Some(raw) = bytes.first_chunk::<HEADER>() else { return false };
    let kinds = [Kind::ReduceI64, Kind::ReduceF32, Kind::GatherF32, Kind::GatherBytes, Kind::Barrier];
    let mut accepted = false;
    for kind in kinds {
        let ours = Header { kind, generation: 3, operation: 7, step: 1, bytes: 640 };
        if let Ok(length) = ours.accept(raw) {
            assert_eq!(Header { bytes: length, ..ours }.encode(), *raw, "a header with something else in it");
            assert_eq!(ours.accept_exactly(raw).is_ok(), length == 640, "a chunk of another length");
            accepted = true;
        }
    }
    accepted
}

/// The greeting of a new connection.
pub(crate) fn greeting(bytes: &[u8]) -> bool {
    let Ok(job) = JobName::new("tiny") else { return false };
    Identity::new(&job, Generation::new(3), Rank::ZERO, 2, [7; 32]).understands(bytes, Rank::new(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a member of the ring sends; `CAIRN_WRITE_SEEDS=1` puts it into `fuzz/seeds`.
    #[test]
    fn what_a_neighbour_sends_is_accepted() {
        let header = Header { kind: Kind::GatherBytes, generation: 3, operation: 7, step: 1, bytes: 640 };
        let job = JobName::new("tiny").unwrap();
        let neighbour = Identity::new(&job, Generation::new(3), Rank::new(1), 2, [7; 32]);
        let (header, hello) = (header.encode(), neighbour.greeting(Rank::ZERO, &[9; 32]));
        assert!(frame(&header) && greeting(&hello));
        assert!(!frame(&hello[..HEADER]) && !greeting(&hello[..95]));
        if std::env::var("CAIRN_WRITE_SEEDS").is_ok() {
            let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
            for (name, bytes) in [("frame", &header[..]), ("greeting", &hello[..])] {
                std::fs::create_dir_all(seeds.join(name)).unwrap();
                std::fs::write(seeds.join(name).join("valid-0"), bytes).unwrap();
            }
        }
    }
}
