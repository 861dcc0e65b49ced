//! The project's own source files, for the tests that hold its rules.

use std::path::{Path, PathBuf};

/// One Rust file.
pub struct Source {
    /// Its path from the workspace root.
    pub path: String,
    /// Its text.
    pub text: String,
}

/// Every Rust file of the workspace, generated code and build output left out.
pub fn rust_files() -> Vec<Source> {
    let mut paths = Vec::new();
    for room in ["proto", "checkpoint-store", "worker", "agent", "coordinator", "cli", "tests"] {
        walk(&crate::root().join(room), &mut paths);
    }
    paths.sort();
    let read = |path: PathBuf| Source {
        path: path.strip_prefix(crate::root()).expect("below the root").display().to_string(),
        text: std::fs::read_to_string(&path).expect("source files are text"),
    };
    paths.into_iter().map(read).collect()
}

fn walk(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("rooms are folders").flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("target") {
            walk(&path, paths);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            paths.push(path);
        }
    }
}

impl Source {
    /// Whether the file holds only tests.
    pub fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.contains("/tests/") || self.path.ends_with("tests.rs")
    }

    /// The lines before the unit tests at the end of the file, numbered from 1.
    pub fn product_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.take_while(|(_, line)| line.trim() != "#[cfg(test)]")
    }
}
