//! The machine itself: processor, device, limits, and what two ranks on it can exchange.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use proto::ids::{Generation, JobName};
use rustix::process::{Resource, getrlimit};
use serde_json::json;
use worker::collective::{Collective, Ring, RingListener, RingMembership, RingTimeouts};
use worker::device::Device;
use worker::device::cpu::CpuDevice;
use worker::device::cuda::error::CudaError;
use worker::device::cuda::probe::{Found, Probe};

use super::Finding;
use super::job::Need;
use crate::failure::chain;
use crate::size;
use crate::train::random_bytes;

/// Files a part may have open: below the first it breaks, below the second a large job may be short of them.
const FILES: (u64, u64) = (256, 4096);
/// Bytes of the buffer two ranks exchange, and how often.
const RING: (usize, u32) = (32 << 20, 5);
/// What the arithmetic depends on: nodes of one job must agree in it.
pub(super) fn processor(cores: usize) -> Finding {
    let device = match CpuDevice::new(cores) {
        Ok(device) => device,
        Err(error) => return Finding::fail("processor", chain(&error), "raise the limit on processes (ulimit -u)"),
    };
    let identity = device.numeric_identity();
    let values = json!({"numeric_identity": identity});
    if identity.split(' ').any(|word| word == "portable") {
        let advice = "use a processor with AVX2; this one is many times slower, and cannot share a job with others";
        return Finding::warn("processor", identity, advice).with(values);
    }
    Finding::ok("processor", identity).with(values)
}

/// Whether each worker has a core of its own.
pub(super) fn cores(cores: usize, need: Option<&Need>) -> Finding {
    let values = json!({"cores": cores});
    let finding = match need.map(|need| need.ranks) {
        Some(ranks) if ranks as usize > cores => Finding::warn(
            "cores",
            format!("{cores} for {ranks} workers"),
            "workers share cores and are slower for it: lower resources.workers, or run on more nodes",
        ),
        Some(ranks) => Finding::ok("cores", format!("{cores} for {ranks} workers")),
        None => Finding::ok("cores", cores),
    };
    finding.with(values)
}

/// What workers can compute on. A machine without a GPU is not at fault; one whose GPU cannot be used is told why.
pub(super) fn device() -> Finding {
    const CHECK: &str = "device";
    const CPU: &str = "mend it, or set resources.device = \"cpu\" in jobs that are to run on this machine";
    let probe = Probe::new();
    let values = device_values(&probe);
    let usable = probe.usable(0);
    if let (Err(error), true) = (&probe.driver, probe.devices.is_empty()) {
        let found = match error {
            CudaError::LibraryAbsent { .. } => "no CUDA driver found: the CPU is used".to_string(),
            CudaError::NoDevice { .. } => "the CUDA driver sees no device: the CPU is used".to_string(),
            other => {
                return Finding::fail(CHECK, other, CPU).with(values);
            }
        };
        return Finding::ok(CHECK, found).with(values);
    }
    let devices: Vec<String> = probe.devices.iter().map(describe).collect();
    let driver = probe.driver.map_or_else(|_| "unknown".to_string(), |version| version.to_string());
    let libraries: Vec<String> = probe
        .libraries
        .iter()
        .map(|(name, path)| match path {
            Ok(path) => path.display().to_string(),
            Err(_) => format!("no {name}"),
        })
        .collect();
    let found = format!("{}; driver for CUDA {driver}; {}", devices.join(", "), libraries.join(", "));
    match usable {
        Ok(()) => Finding::ok(CHECK, found),
        Err(error) => Finding::fail(CHECK, format!("{found}; it cannot be used: {error}"), CPU),
    }
    .with(values)
}

fn describe(device: &Found) -> String {
    let (major, minor) = device.capability;
    let memory = device.memory.map_or_else(
        || "memory unknown".to_string(),
        |memory| format!("{} of {} free", size::show(memory.free), size::show(memory.total)),
    );
    format!("{} ({major}.{minor}, {memory})", device.name)
}

/// What was found, for tools.
fn device_values(probe: &Probe) -> serde_json::Value {
    let libraries: serde_json::Map<String, serde_json::Value> = probe
        .libraries
        .iter()
        .map(|(name, path)| ((*name).to_string(), json!(path.as_ref().ok().map(|path| path.display().to_string()))))
        .collect();
    let device = |device: &Found| {
        let (major, minor) = device.capability;
        json!({
            "name": device.name,
            "compute_capability": format!("{major}.{minor}"),
            "memory_free": device.memory.map(|memory| memory.free),
            "memory_total": device.memory.map(|memory| memory.total),
        })
    };
    let usable = probe.usable(0);
    json!({
        "device": if usable.is_ok() { "cuda" } else { "cpu" },
        "cuda": usable.is_ok(),
        "cuda_missing": usable.err().map(|error| error.to_string()),
        "driver": probe.driver.as_ref().ok().map(ToString::to_string),
        "libraries": libraries,
        "devices": probe.devices.iter().map(device).collect::<Vec<_>>(),
    })
}

/// What the system lets a process have.
pub(super) fn limits() -> [Finding; 2] {
    let files = getrlimit(Resource::Nofile);
    let shown = |limit: Option<u64>| limit.map_or("unlimited".to_string(), |limit| limit.to_string());
    let found = format!("{} (at most {})", shown(files.current), shown(files.maximum));
    let advice = format!("raise it: ulimit -n {}, or LimitNOFILE= in the service file", FILES.1);
    let open = match files.current.unwrap_or(u64::MAX) {
        few if few < FILES.0 => Finding::fail("open files", found, advice),
        few if few < FILES.1 => Finding::warn("open files", found, advice),
        _ => Finding::ok("open files", found),
    };
    let locked = getrlimit(Resource::Memlock).current;
    let found = format!("{}; nothing is locked in memory, so any limit will do", shown(locked));
    [open.with(json!({"limit": files.current})), Finding::ok("locked memory", found).with(json!({"limit": locked}))]
}

/// No decision here depends on the date: deadlines are monotonic, and age is counted in steps.
pub(super) fn clock() -> Finding {
    Finding::skip("clock", "nothing depends on the date but certificates, whose time is checked in the handshake")
}

/// What two ranks on this machine can exchange.
pub(super) fn ring() -> Finding {
    match exchange() {
        Ok(rate) => {
            let found = format!("{:.2} GB/s each way between two ranks", rate / 1e9);
            Finding::ok("loopback ring", found).with(json!({"bytes_per_second": rate}))
        }
        Err(error) => Finding::fail("loopback ring", error, "see that loopback is up and no firewall filters it"),
    }
}

/// Bytes a second that each of two ranks sends, in threads of this process.
fn exchange() -> Result<f64, String> {
    let said = |error: worker::collective::CollectiveError| chain(&error);
    let bound: Result<Vec<_>, _> = (0..2).map(|_| RingListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))).collect();
    let (listeners, addresses): (Vec<_>, Vec<_>) = bound.map_err(said)?.into_iter().unzip();
    let name = JobName::new("doctor").map_err(|error| error.to_string())?;
    let memberships = RingMembership::of_ring(&addresses, &name, Generation::new(1), random_bytes());
    let slowest = std::thread::scope(|scope| {
        let pairs = listeners.iter().zip(memberships);
        let ranks: Vec<_> =
            pairs.map(|(listener, membership)| scope.spawn(move || rank(listener, membership))).collect();
        ranks.into_iter().try_fold(Duration::ZERO, |slowest, rank| {
            let took = rank.join().map_err(|_| "a rank's thread panicked".to_string())?;
            Ok::<_, String>(slowest.max(took.map_err(said)?))
        })
    })?;
    Ok(RING.0 as f64 / 2.0 * f64::from(RING.1) / slowest.as_secs_f64().max(1e-9))
}

fn rank(listener: &RingListener, membership: RingMembership) -> worker::collective::Result<Duration> {
    let limits = RingTimeouts { connect: Duration::from_secs(10), operation: Duration::from_secs(30) };
    let mut ring = Ring::connect(listener, membership, limits)?;
    let mut floats = vec![1.0_f32; RING.0 / 4];
    let half = floats.len() / 2;
    let parts = [0..half, half..floats.len()];
    // The first round grows the sockets' buffers and maps the pages.
    ring.all_gather_f32(&mut floats, &parts)?;
    ring.barrier()?;
    let began = Instant::now();
    for _ in 0..RING.1 {
        ring.all_gather_f32(&mut floats, &parts)?;
    }
    ring.barrier()?;
    Ok(began.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn a_machine_without_a_gpu_is_well_and_says_what_is_used() {
        let finding = device();
        assert_ne!(finding.verdict, Verdict::Fail, "{finding:?}");
        if finding.values["driver"].is_null() {
            assert_eq!((finding.verdict, &finding.values["device"]), (Verdict::Ok, &"cpu".into()), "{finding:?}");
            assert!(finding.found.contains("the CPU is used"), "{finding:?}");
            assert!(finding.values["cuda_missing"].as_str().is_some_and(|missing| missing.contains("libcuda.so.1")));
        }
    }

    #[test]
    fn two_ranks_of_one_process_exchange() {
        let finding = ring();
        assert_eq!(finding.verdict, Verdict::Ok, "{finding:?}");
        assert!(finding.values["bytes_per_second"].as_f64() > Some(1e6), "{finding:?}");
    }
}
