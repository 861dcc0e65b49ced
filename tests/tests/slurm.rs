//! A job under a real Slurm: two nodes of this machine, the batch script of `deploy/slurm`, the undisturbed digest.
//!
//! Needs Slurm and MUNGE (`apt-get install slurm-wlm munge`) and root; skipped without.

use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tests::job::Job;
use tests::run::{LIMIT, undisturbed};

/// A daemon of the cluster; killed with the test.
struct Daemon(Child);

impl Daemon {
    fn start(folder: &Path, words: &[&str]) -> Self {
        let log = fs::File::create(folder.join(format!("{}.out", words.join("-").replace('/', "_")))).expect("a log");
        let mut daemon = Command::new(words[0]);
        daemon.args(&words[1..]).stdin(Stdio::null()).stdout(log.try_clone().expect("the log")).stderr(log);
        Self(daemon.spawn().expect("the daemon starts"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Why there can be no cluster here.
fn missing() -> Option<String> {
    let has = |tool: &&str| {
        let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        places.iter().any(|place| Path::new(place).join(tool).exists())
    };
    let tools = ["munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun"];
    let root = fs::metadata("/proc/self").is_ok_and(|of| std::os::unix::fs::MetadataExt::uid(&of) == 0);
    match tools.iter().find(|tool| !has(tool)) {
        Some(tool) => Some(format!("no {tool}: apt-get install slurm-wlm munge")),
        None if !root => Some("Slurm's daemons are run as root".into()),
        None => None,
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

/// A cluster of two nodes, each on the loopback address with a port of its own.
fn cluster(folder: &Path) -> Vec<Daemon> {
    let shown = folder.display();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("a host name").trim().to_string();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("the folder is ours");
    let key = [7u8; 64];
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.join("key")).expect("a key");
    std::io::Write::write_all(&mut file, &key).expect("the key is written");
    let [control, one, two] = [free_port(), free_port(), free_port()];
    let conf = format!(
        "ClusterName=lab\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={control}\nSlurmUser=root\nSlurmdUser=root\n\
         AuthType=auth/munge\nAuthInfo=socket={shown}/munge\nStateSaveLocation={shown}/state\n\
         SlurmdSpoolDir={shown}/spool-%n\nSlurmctldPidFile={shown}/ctld.pid\nSlurmdPidFile={shown}/d-%n.pid\n\
         SlurmctldLogFile={shown}/ctld.log\nSlurmdLogFile={shown}/d-%n.log\nProctrackType=proctrack/pgid\n\
         TaskPlugin=task/none\nSlurmdParameters=config_overrides\nSelectType=select/cons_tres\nMpiDefault=none\n\
         ReturnToService=2\n\
         NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=2 RealMemory=1000\n\
         NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=2 RealMemory=1000\n\
         PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES\n"
    );
    fs::write(folder.join("slurm.conf"), conf).expect("the configuration is written");
    fs::create_dir(folder.join("state")).expect("a folder");
    let path = |name: &str| folder.join(name).display().to_string();
    let (conf, socket) = (path("slurm.conf"), path("munge"));
    let (key, pid, log, seed) = (path("key"), path("munge.pid"), path("munge.log"), path("munge.seed"));
    let munged = [
        "munged",
        "--foreground",
        "--force",
        &format!("--key-file={key}"),
        &format!("--socket={socket}"),
        &format!("--pid-file={pid}"),
        &format!("--log-file={log}"),
        &format!("--seed-file={seed}"),
    ];
    let mut daemons = vec![Daemon::start(folder, &munged)];
    wait(|| Path::new(&socket).exists(), "munged");
    daemons.push(Daemon::start(folder, &["slurmctld", "-D", "-f", &conf]));
    daemons.push(Daemon::start(folder, &["slurmd", "-D", "-N", "n1", "-f", &conf]));
    daemons.push(Daemon::start(folder, &["slurmd", "-D", "-N", "n2", "-f", &conf]));
    wait(|| slurm(folder, "sinfo", &["-h", "-o", "%T"]).trim() == "idle", "two idle nodes");
    daemons
}

fn wait(mut until: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + LIMIT;
    while !until() {
        assert!(Instant::now() < deadline, "no {what} within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn slurm(folder: &Path, tool: &str, words: &[&str]) -> String {
    let mut command = Command::new(tool);
    command.args(words).env("SLURM_CONF", folder.join("slurm.conf")).current_dir(folder);
    command.env("CAIRN", tests::cairn()).env("CAIRN_SLOTS", "1");
    let output = command.output().expect("the tool runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_job_runs_on_the_nodes_of_an_allocation() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let expected = undisturbed();
    let (job, folder) = (Job::new(), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    let _daemons = cluster(folder);
    let script = tests::root().join("deploy/slurm/cairn.sbatch").display().to_string();
    let file = job.file().display().to_string();
    let words = ["--parsable", "--nodes=2", "--time=5", "--output=out", &script, &file, "--workers", "2"];
    let id = slurm(folder, "sbatch", &words).trim().to_string();
    let of_job = || slurm(folder, "scontrol", &["show", "job", &id]);
    wait(
        || ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"].iter().any(|state| of_job().contains(state)),
        "end of the job",
    );
    let out = fs::read_to_string(folder.join("out")).unwrap_or_default();
    assert!(of_job().contains("JobState=COMPLETED"), "{}\n{out}", of_job());
    let digest = out.lines().rev().find_map(|line| line.strip_prefix("digest ")).unwrap_or_else(|| panic!("{out}"));
    assert_eq!(digest, expected);
    assert!(out.contains(": 2 workers"), "both nodes took part: {out}");
}
