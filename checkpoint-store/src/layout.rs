//! Where everything lies under a store URL. Every path of the store is made here, and read back here.
//!
//! ```text
//! jobs/<job>/spec.json                                    what was asked first
//! jobs/<job>/spec-<hash>.json                             what was asked later, if it differs
//! jobs/<job>/records/<2^64-1-n, 20 digits>.json           the chain
//! jobs/<job>/checkpoints/<step>-<generation>-<uuid>.manifest
//! jobs/<job>/objects/<entropy>/<step>-<generation>-<rank>-<uuid>.safetensors
//! leader/<epoch>.json, leader/<epoch>/<beat>
//! nodes/<2^64-1-n, 20 digits>.json                        which nodes are kept empty
//! probe/<token>/…                                         for the length of a probe
//! ```

use proto::ids::{Epoch, Generation, JobName, Rank, Step};
use uuid::Uuid;

/// The folder of all jobs.
pub const JOBS: &str = "jobs";
/// The folder of leader epochs.
pub const LEADER: &str = "leader";
/// The folder of what is recorded of nodes.
pub const NODES: &str = "nodes";

/// The specification a job was first submitted with.
pub fn spec(job: &JobName) -> String {
    format!("jobs/{job}/spec.json")
}

/// A later specification, by the hex hash of its bytes.
pub fn spec_by_hash(job: &JobName, hash: &str) -> String {
    format!("jobs/{job}/spec-{hash}.json")
}

/// The folder of a job's records.
pub fn records(job: &JobName) -> String {
    format!("jobs/{job}/records")
}

/// Record `number`. Names count down, so the newest record is the first in any listing.
pub fn record(job: &JobName, number: u64) -> String {
    format!("jobs/{job}/records/{:020}.json", u64::MAX - number)
}

/// The number of the record with this path; `None` if the path is not a record's.
pub fn record_number(job: &JobName, path: &str) -> Option<u64> {
    counted_down(path.strip_prefix(&records(job))?)
}

/// The number in `/<2^64-1-n, 20 digits>.json`.
fn counted_down(name: &str) -> Option<u64> {
    let name = name.strip_prefix('/')?.strip_suffix(".json")?;
    if name.len() != 20 || !name.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    name.parse::<u64>().ok().map(|n| u64::MAX - n)
}

/// Record `number` of the nodes; names count down as those of a job's records do.
pub fn nodes(number: u64) -> String {
    format!("{NODES}/{:020}.json", u64::MAX - number)
}

/// The number of the record of nodes with this path; `None` if the path is not one's.
pub fn nodes_number(path: &str) -> Option<u64> {
    counted_down(path.strip_prefix(NODES)?)
}

/// The folder of a job's manifests.
pub fn checkpoints(job: &JobName) -> String {
    format!("jobs/{job}/checkpoints")
}

/// The file name of a manifest. Padded, so that a listing is in the order of steps.
pub fn manifest_name(step: Step, generation: Generation, id: Uuid) -> String {
    format!("{:012}-{:06}-{id}.manifest", step.get(), generation.get())
}

/// The path of a manifest by its file name.
pub fn manifest(job: &JobName, name: &str) -> String {
    format!("jobs/{job}/checkpoints/{name}")
}

/// The folder of a job's objects.
pub fn objects(job: &JobName) -> String {
    format!("jobs/{job}/objects")
}

/// The path of one rank's object. The random folder spreads the names over a bucket's partitions.
pub fn object(job: &JobName, step: Step, generation: Generation, rank: Rank, id: Uuid) -> String {
    let entropy = id.as_bytes()[0];
    format!(
        "jobs/{job}/objects/{entropy:02x}/{:012}-{:06}-{:05}-{id}.safetensors",
        step.get(),
        generation.get(),
        rank.get()
    )
}

/// What the path of an object says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectName {
    /// The step it was stored for.
    pub step: Step,
    /// The generation that stored it.
    pub generation: Generation,
    /// The rank that stored it.
    pub rank: Rank,
    /// What makes the name its own.
    pub id: Uuid,
}

/// What a path that [`object`] made was made of; `None` for any other.
pub fn object_name(job: &JobName, path: &str) -> Option<ObjectName> {
    let (step, generation) = step_and_generation(path)?;
    let rest = path.rsplit('/').next()?.splitn(3, '-').nth(2)?.strip_suffix(".safetensors")?;
    let (rank, id) = rest.split_once('-')?;
    let (rank, id) = (Rank::new(rank.parse().ok()?), Uuid::try_parse(id).ok()?);
    (object(job, step, generation, rank, id) == path).then_some(ObjectName { step, generation, rank, id })
}

/// The step and generation in the file name of a manifest or object; `None` if it is not such a name.
pub fn step_and_generation(path: &str) -> Option<(Step, Generation)> {
    let name = path.rsplit('/').next()?;
    let mut parts = name.splitn(3, '-');
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
    let step = number(parts.next()?)?;
    let generation = number(parts.next()?)?;
    parts.next()?;
    Some((Step::new(step), Generation::new(generation)))
}

/// The record of a leader epoch.
pub fn leader(epoch: Epoch) -> String {
    format!("leader/{:020}.json", epoch.get())
}

/// The folder of an epoch's beats.
pub fn beats(epoch: Epoch) -> String {
    format!("leader/{:020}", epoch.get())
}

/// One beat of an epoch.
pub fn beat(epoch: Epoch, number: u64) -> String {
    format!("leader/{:020}/{number:020}", epoch.get())
}

/// Whether a text is usable as an object's path: plain segments that stay under the root and are not our temporaries.
pub fn is_safe(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 1000
        && path.split('/').all(|s| {
            !s.is_empty()
                && !s.starts_with('.')
                && s.len() <= 200
                && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        })
}

/// Whether a path names an object of this job, in the place where objects lie.
pub fn is_object_of(job: &JobName, path: &str) -> bool {
    let inside = path.strip_prefix(&objects(job)).and_then(|p| p.strip_prefix('/'));
    inside.is_some_and(|p| p.split('/').count() == 2 && p.ends_with(".safetensors")) && is_safe(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        let job = JobName::new("tiny").unwrap();
        for n in [0, 1, 255, u64::MAX] {
            assert_eq!(record_number(&job, &record(&job, n)), Some(n));
            assert_eq!(nodes_number(&nodes(n)), Some(n));
        }
        assert!(record(&job, 8) < record(&job, 7));
        assert_eq!(record_number(&job, "jobs/tiny/records/12.json"), None);
        let path = object(&job, Step::new(50), Generation::new(2), Rank::new(1), Uuid::nil());
        assert_eq!(step_and_generation(&path), Some((Step::new(50), Generation::new(2))));
        assert!(is_object_of(&job, &path), "{path}");
        let name = object_name(&job, &path).unwrap();
        assert_eq!((name.step.get(), name.generation.get(), name.rank.get(), name.id), (50, 2, 1, Uuid::nil()));
        for other in [path.replace("00/", "01/"), path.replace("-00001-", "-1-"), path.to_uppercase()] {
            assert_eq!(object_name(&job, &other), None, "{other}");
        }
        for bad in ["jobs/other/objects/00/a.safetensors", "jobs/tiny/objects/../a.safetensors", "jobs/tiny/objects"] {
            assert!(!is_object_of(&job, bad), "{bad}");
        }
    }
}
