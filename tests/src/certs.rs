//! A cluster's certificates, made with `cairn certs` as an operator makes them.

use std::path::{Path, PathBuf};

use crate::run::cairn;

/// An authority in a folder, and what it issued below it.
#[derive(Debug)]
pub struct Certs {
    folder: PathBuf,
    operator: String,
}

impl Certs {
    /// Makes an authority, and an operator's certificate.
    pub fn new(folder: &Path) -> Self {
        let made = cairn(&["certs", "init", &folder.display().to_string(), "--cluster", "lab", "--output", "json"]);
        assert_eq!(made.code, Some(0), "{}", made.stderr);
        let mut certs = Self { folder: folder.to_path_buf(), operator: String::new() };
        certs.operator = certs.issue("operator", "me");
        certs
    }

    /// The folder of the authority.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of the operator's certificate.
    pub fn operator(&self) -> &str {
        &self.operator
    }

    /// The folder of a part's certificate for loopback, issued if there is none yet.
    pub fn issue(&self, role: &str, name: &str) -> String {
        self.issue_for(role, name, &[])
    }

    /// The same for a part that is reached at these addresses.
    pub fn issue_for(&self, role: &str, name: &str, hosts: &[&str]) -> String {
        let out = self.folder.join(format!("{role}-{name}"));
        if !out.exists() {
            let authority = self.folder.display().to_string();
            let words = ["certs", "issue", &authority, "--role", role, "--name", name, "--output", "json"];
            let hosts: Vec<&str> = hosts.iter().flat_map(|host| ["--host", *host]).collect();
            let issued = cairn(&[&words[..], &hosts].concat());
            assert_eq!(issued.code, Some(0), "{}", issued.stderr);
            assert_eq!(issued.events[0]["identity"], format!("cairn://lab/{role}/{name}"));
        }
        out.display().to_string()
    }
}
