//! Finding and signalling the processes of one run, and of no other, by parentage.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

/// A process below a given one.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its id.
    pub id: u32,
    /// Its command line's words.
    pub words: Vec<String>,
}

impl Process {
    /// The part of Cairn it plays: `coordinator`, `agent`, `worker`.
    pub fn part(&self) -> &str {
        self.words.get(1).map_or("", String::as_str)
    }
}

/// All living descendants of a process.
pub fn descendants(root: u32) -> Vec<Process> {
    let mut parents = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // After the command in parentheses: state, parent.
        let mut fields = stat.rsplit(')').next().unwrap_or("").split_whitespace();
        let state = fields.next().unwrap_or("Z");
        let parent = fields.next().and_then(|text| text.parse::<u32>().ok());
        if let (true, Some(parent)) = (state != "Z", parent) {
            parents.insert(id, parent);
        }
    }
    let mut found = Vec::new();
    for &id in parents.keys() {
        let mut at = id;
        while let Some(&parent) = parents.get(&at) {
            if parent == root {
                let words = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
                let words = words.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
                found.push(Process { id, words });
                break;
            }
            at = parent;
        }
    }
    found
}

/// Sends a signal, such as `KILL` or `STOP`; false if the process is gone.
pub fn signal(id: u32, name: &str) -> bool {
    let mut kill = Command::new("kill");
    kill.args([&format!("-{name}"), &id.to_string()]).stderr(Stdio::null());
    kill.status().is_ok_and(|status| status.success())
}
