//! A job on several nodes of this machine, a worker on each.

use std::path::PathBuf;
use std::time::Duration;

use crate::cluster::{Cluster, Part};
use crate::job::Job;
use crate::run::Run;

/// A cluster with a job on it.
pub struct Nodes {
    /// The cluster.
    pub cluster: Cluster,
    /// The agents, of nodes `n0`, `n1`, and so on.
    pub agents: Vec<Part>,
    _coordinator: Part,
}

/// Submits a job to run on a worker on each of `count` nodes, and watches it.
pub fn nodes(job: &Job, count: u32, keys: &[&str]) -> (Nodes, Run) {
    let cluster = Cluster::new(job);
    let coordinator = cluster.coordinator();
    let agents = (0..count).map(|at| cluster.agent_with(&format!("n{at}"), 1)).collect();
    let file = job.file().display().to_string();
    let workers = format!("resources.workers={{ min = 1, max = {count} }}");
    let mut words = vec!["submit", &file, "--set", &workers];
    for key in keys {
        words.extend(["--set", key]);
    }
    // Starts at its full size, whatever agent comes first.
    std::thread::sleep(Duration::from_secs(2));
    let submitted = cluster.call(&words);
    assert_eq!(submitted.code, Some(0), "{}", submitted.stderr);
    let watch = Run::start(&cluster.words(&["watch", "t"]));
    (Nodes { cluster, agents, _coordinator: coordinator }, watch)
}

impl Nodes {
    /// The folder in memory of a node's agent.
    pub fn folder(&self, node: &str) -> PathBuf {
        let entries = std::fs::read_dir(self.cluster.memory()).expect("agents have folders");
        let folders = entries.flatten().map(|entry| entry.path());
        let mine = |path: &PathBuf| std::fs::read_to_string(path.join("node")).is_ok_and(|name| name == node);
        folders.into_iter().find(mine).unwrap_or_else(|| panic!("no folder of node {node}"))
    }
}
