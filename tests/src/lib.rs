//! The harness of the workspace tests: real `cairn` processes, their events, and the means to kill them.
//!
//! Every test trains a small real model on the shipped corpus in a folder of its own. The oracle of all of them is the
//! digest: it must equal that of an undisturbed run. `sim` simulates a whole cluster instead, in virtual time.

pub mod certs;
pub mod chaos;
pub mod cluster;
pub mod job;
pub mod nodes;
pub mod process;
pub mod relay;
pub mod run;
pub mod s3;
pub mod sim;
pub mod source;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The root of the workspace.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        here.parent().expect("the tests crate lies in the workspace").to_path_buf()
    })
}

/// Says that a test is skipped for want of a tool; where tools are required (`CAIRN_REQUIRE_TOOLS`), fails instead.
pub fn skip(what: &str) {
    assert!(std::env::var_os("CAIRN_REQUIRE_TOOLS").is_none(), "{what}");
    println!("skipped: {what}");
}

/// The `cairn` binary: the one that `CAIRN_BINARY` names, or that of the profile the tests are built with, brought up
/// to date first.
pub fn cairn() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(binary) = std::env::var_os("CAIRN_BINARY") {
            return binary.into();
        }
        let test = std::env::current_exe().expect("a test knows its own file");
        // target/<profile>/deps/<test>, or target/<profile>/<program>
        let folder = test.parent().expect("a file lies in a folder");
        let folder = if folder.ends_with("deps") { folder.parent() } else { Some(folder) };
        let folder = folder.expect("tests lie in target/<profile>/deps").to_path_buf();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "cli"]).current_dir(root());
        if folder.ends_with("release") {
            build.arg("--release");
        }
        let status = build.status().expect("cargo runs");
        assert!(status.success(), "building the cairn binary failed");
        folder.join("cairn")
    })
}
