//! What a job needs of a node, and whether it is there: its data, memory, and the folder its snapshots lie in.
//!
//! The arithmetic is that of the parts: a worker sets aside three slots of its shard (12 bytes for each element, of
//! parameters and two moments), within its share of the agent's budget; an agent keeps the parity of two steps, the
//! newest complete one and the one in progress. Activations come on top and are not counted, so what does not fit here
//! will not run; what fits narrowly may not.

use std::path::Path;

use checkpoint_store::Space;
use proto::spec::{JobSpec, Reduction};
use rustix::fs::{Access, access, statfs, statvfs};
use serde_json::json;
use worker::slots::SLOTS;

use super::Finding;
use crate::failure::chain;
use crate::size;

/// Bytes of an element's parameter and two moments.
const STATE: u64 = 12;
/// Steps whose parity an agent holds at once.
const PARITIES: u64 = 2;
/// Nodes of a parity group.
const GROUP: u32 = 8;
/// Memory file systems, by the numbers the kernel knows them by.
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;

/// What one node needs of memory, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Need {
    /// Workers on this node.
    pub(super) ranks: u32,
    /// Slots of one worker.
    pub(super) slots: u64,
    /// Parity of other nodes' snapshots.
    pub(super) parity: u64,
    /// Parameters and gradients of one worker, outside of the memory folder.
    pub(super) private: u64,
    /// The least budget of an agent that can run so many workers at once.
    pub(super) budget: u64,
}

impl Need {
    /// For the largest share a node can get if the job runs on `nodes` of them, its agent of `slots` workers at once.
    pub(super) fn of(spec: &JobSpec, nodes: u32, slots: u32) -> Self {
        // The job file was checked to have a space.
        let elements = Space::of_model(&spec.model).map_or(0, |space| space.elements());
        let world = spec.resources.workers.max.max(1);
        let ranks = world.div_ceil(nodes.max(1));
        let shard = elements.div_ceil(u64::from(world)).saturating_mul(STATE);
        let group = nodes.min(GROUP);
        let parities = if spec.checkpoint.memory { spec.checkpoint.parity.min(group - 1) } else { 0 };
        let snapshot = shard.saturating_mul(u64::from(ranks));
        let shares = snapshot.saturating_mul(u64::from(parities)).div_ceil(u64::from(group - parities));
        let parity = PARITIES.saturating_mul(shares);
        let sums = if spec.training.reduction == Reduction::Exact { 8 } else { 4 };
        let slots_bytes = shard.saturating_mul(SLOTS as u64);
        // An agent shares its budget out by its slots, whether they are used or not.
        let shares = slots_bytes.saturating_mul(u64::from(slots.max(ranks)));
        let budget = shares.max(slots_bytes.saturating_mul(u64::from(ranks)).saturating_add(parity));
        Self { ranks, slots: slots_bytes, parity, private: elements.saturating_mul(4 + 4 + sums), budget }
    }

    /// In the memory folder.
    fn held(&self) -> u64 {
        self.slots.saturating_mul(u64::from(self.ranks)).saturating_add(self.parity)
    }
}

/// Whether the job's datasets can be read here.
pub(super) fn data(spec: &JobSpec) -> Finding {
    match worker::dataset::open(spec) {
        Ok(_) => Finding::ok("data", format!("{} can be read", spec.data.train)),
        Err(error) => Finding::fail("data", chain(&error), "make it with `cairn data prepare`, or correct [data]"),
    }
}

/// The machine's memory.
pub(super) fn memory(need: Option<&Need>) -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = available(&text) else {
        return Finding::skip("memory", "/proc/meminfo does not say what is available");
    };
    let free = size::show(available);
    let Some(need) = need else {
        return Finding::ok("memory", format!("{free} available")).with(json!({"available": available}));
    };
    let wanted = need.private.saturating_mul(u64::from(need.ranks)).saturating_add(need.held());
    let found = format!("{free} available; the job needs {} here, and its activations", size::show(wanted));
    let advice = "run on more nodes, give the machine more memory, or train a smaller model";
    let finding = match wanted {
        wanted if wanted > available => Finding::fail("memory", found, advice),
        wanted if wanted > available / 5 * 4 => Finding::warn("memory", found, advice),
        _ => Finding::ok("memory", found),
    };
    finding.with(json!({"available": available, "needed": wanted}))
}

/// What the kernel says could be had without swapping.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The folder of the snapshots: what it lies on, and whether slots and parity have room in it.
pub(super) fn folder(path: &Path, budget: Option<u64>, need: Option<&Need>) -> Finding {
    const CHECK: &str = "memory folder";
    let shown = path.display();
    let usable = access(path, Access::WRITE_OK | Access::EXEC_OK).and_then(|()| Ok((statfs(path)?, statvfs(path)?)));
    let (kind, room) = match usable {
        Ok(usable) => usable,
        Err(error) => {
            let advice = "name a folder on a memory file system that this user may write to: --memory DIR";
            return Finding::fail(CHECK, format!("{shown} cannot be used: {error}"), advice);
        }
    };
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    let budget = budget.unwrap_or(room.f_blocks.saturating_mul(room.f_frsize) / 2);
    let in_memory = [TMPFS, RAMFS].contains(&kind.f_type);
    let mut found = format!("{shown}: {} free, budget {}", size::show(free), size::show(budget));
    let mut values = json!({"free": free, "budget": budget, "memory_file_system": in_memory});
    if let Some(need) = need {
        let (held, least) = (need.held(), need.budget);
        let needed = format!(
            "; needed are {SLOTS} slots of {} for each of {} workers and {} of parity",
            size::show(need.slots / SLOTS as u64),
            need.ranks,
            size::show(need.parity)
        );
        found.push_str(&needed);
        values["needed"] = json!(held);
        values["needed_budget"] = json!(least);
        if least > budget {
            let advice = format!(
                "raise --memory-budget to {least} bytes ({}), lower --slots, or run on more nodes",
                size::show(least)
            );
            return Finding::fail(CHECK, found, advice).with(values);
        }
        if held > free {
            let advice = format!("free {} there, or enlarge it (mount -o remount,size=…)", size::show(held - free));
            return Finding::fail(CHECK, found, advice).with(values);
        }
    }
    if !in_memory {
        let advice = "snapshots would be written to a disk: name a folder on a memory file system with --memory";
        return Finding::warn(CHECK, found, advice).with(values);
    }
    Finding::ok(CHECK, found).with(values)
}

#[cfg(test)]
mod tests {
    use proto::spec::Overrides;

    use super::*;
    use crate::doctor::Verdict;

    fn spec(keys: &str) -> JobSpec {
        let text = format!(
            "name = \"a\"\nmodel.preset = \"tiny\"\ndata.train = \"d\"\ntraining.steps = 2\n\
             training.global_batch = 16\n{keys}"
        );
        JobSpec::parse("job", &text, Path::new("/"), &Overrides::new()).unwrap()
    }

    #[test]
    fn needs_follow_from_shards_slots_and_parity() {
        let spec = spec("resources.workers = 4\ncheckpoint.parity = 1");
        let elements = Space::of_model(&spec.model).unwrap().elements();
        let shard = elements.div_ceil(4) * 12;
        let alone = Need::of(&spec, 1, 2);
        assert_eq!((alone.ranks, alone.slots, alone.parity, alone.private), (4, 3 * shard, 0, 16 * elements));
        assert_eq!(alone.budget, 4 * alone.slots, "more workers than slots");
        // One parity in a group of two is a mirror: of both steps, as large as the node's own snapshots.
        let two = Need::of(&spec, 2, 8);
        assert_eq!((two.ranks, two.parity, two.budget), (2, 2 * 2 * shard, 8 * two.slots));
        assert_eq!(Need::of(&spec, 4, 1).parity, 2 * shard.div_ceil(3));
        assert_eq!(two.held(), 2 * two.slots + two.parity);
    }

    #[test]
    fn what_does_not_fit_is_said_with_what_would() {
        let need = Need::of(&spec("resources.workers = 2"), 1, 2);
        let folder = |budget| folder(Path::new("/dev/shm"), Some(budget), Some(&need));
        let short = folder(need.budget - 1);
        assert_eq!(short.verdict, Verdict::Fail, "{short:?}");
        assert!(short.advice.contains(&format!("--memory-budget to {} bytes", need.budget)), "{short:?}");
        assert_ne!(folder(need.budget).verdict, Verdict::Fail);
        let missing = super::folder(Path::new("/no/such"), None, None);
        assert!(missing.verdict == Verdict::Fail && missing.advice.contains("--memory DIR"), "{missing:?}");
    }

    #[test]
    fn available_memory_is_read_as_the_kernel_writes_it() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   12 kB\n"), Some(12 << 10));
        for bad in ["", "MemAvailable: 12", "MemAvailable: x kB", "MemAvailable: 99999999999999999999 kB"] {
            assert_eq!(available(bad), None, "{bad}");
        }
    }
}
