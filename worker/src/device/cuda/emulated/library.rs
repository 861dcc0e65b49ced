//! The kernels as a library for the CPU, built from their sources when first asked for.
//!
//! The library is named by the BLAKE3 of all files it is made from, so a changed kernel is built anew and an unchanged
//! one never twice; a lock file lets one process build while others wait. This is for development: sources and a C++
//! compiler have to be there.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fs};

use libloading::os::unix::Library;

use crate::device::cuda::driver::{Argument, Launch};

/// Where the sources lie, and where what is built goes.
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels");
const BUILT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/emulator");
/// How they are compiled, with the planted mistakes that tests look for. Contraction would make other bits than the
/// kernels ask for.
const FLAGS: [&str; 8] =
    ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-DCAIRN_EMULATOR", "-DCAIRN_PLANTED"];
/// Bytes for words about a launch that failed.
const WORDS: usize = 1 << 10;

/// `emulator_launch`, as `kernels/emulator` declares it.
type Run = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    usize,
    *const *const c_void,
    usize,
    u64,
    *mut c_char,
    usize,
) -> c_int;

/// The loaded library.
pub(super) struct Emulator {
    run: Run,
    /// Names what it was built from.
    pub(super) version: String,
    _library: Library,
}

/// The library, built and loaded once in a process.
pub(super) fn emulator() -> Result<&'static Emulator, String> {
    static EMULATOR: OnceLock<Result<Emulator, String>> = OnceLock::new();
    EMULATOR.get_or_init(load).as_ref().map_err(Clone::clone)
}

impl Emulator {
    /// Runs a kernel to its end; the seed decides the order of what has none.
    ///
    /// # Safety
    /// As for `Driver::launch`.
    pub(super) unsafe fn launch(&self, launch: &Launch<'_>, seed: u64) -> Result<(), String> {
        let name = CString::new(launch.kernel).map_err(|_| "its name contains a zero".to_string())?;
        let pointers: Vec<*const c_void> =
            launch.arguments.iter().map(|argument| std::ptr::from_ref::<Argument>(argument).cast()).collect();
        let mut words = [0u8; WORDS];
        // SAFETY: name and arguments outlive the call, and there is room for as many words as is said.
        let status = unsafe {
            let (grid, block) = (launch.grid.as_ptr(), launch.block.as_ptr());
            let (arguments, count) = (pointers.as_ptr(), pointers.len());
            let said = words.as_mut_ptr().cast();
            (self.run)(name.as_ptr(), grid, block, launch.shared, arguments, count, seed, said, WORDS)
        };
        if status == 0 {
            return Ok(());
        }
        let end = words.iter().position(|byte| *byte == 0).unwrap_or(WORDS);
        Err(String::from_utf8_lossy(&words[..end]).into_owned())
    }
}

fn load() -> Result<Emulator, String> {
    let mut sources = Vec::new();
    list(Path::new(SOURCES), &mut sources).map_err(|error| format!("{SOURCES} cannot be read: {error}"))?;
    sources.sort();
    let mut hasher = blake3::Hasher::new();
    hasher.update(FLAGS.join(" ").as_bytes());
    for path in &sources {
        let bytes = fs::read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        hasher.update(path.as_os_str().as_encoded_bytes()).update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
    }
    let version = hasher.finalize().to_hex()[..16].to_string();
    let path = Path::new(BUILT).join(format!("{version}.so"));
    build(&path)?;
    // SAFETY: the library is the project's own and runs nothing when loaded but the list of its kernels.
    let library = unsafe { Library::new(&path) }.map_err(|error| error.to_string())?;
    // SAFETY: the function has this type.
    let run = *unsafe { library.get::<Run>(b"emulator_launch\0") }.map_err(|error| error.to_string())?;
    Ok(Emulator { run, version, _library: library })
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let source =
            |path: &Path| path.extension().is_some_and(|e| ["cu", "cuh", "h", "cpp"].iter().any(|known| e == *known));
        if path.is_dir() {
            list(&path, files)?;
        } else if source(&path) {
            files.push(path);
        }
    }
    Ok(())
}

fn build(path: &Path) -> Result<(), String> {
    let said = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    fs::create_dir_all(BUILT).map_err(|error| said(BUILT, &error))?;
    let lock = fs::File::create(Path::new(BUILT).join("lock")).map_err(|error| said("the lock file", &error))?;
    // Until this process has it: a build takes a minute at most, and the lock goes with its process.
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|error| said("the lock file", &error))?;
    if path.is_file() {
        return Ok(());
    }
    let beside = path.with_extension("tmp");
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".into());
    let source = Path::new(SOURCES).join("emulator/library.cpp");
    let output = Command::new(&compiler).args(FLAGS).arg(&source).arg("-o").arg(&beside).output();
    let output = output.map_err(|error| said(&compiler, &error))?;
    if !output.status.success() {
        return Err(format!("{compiler} {}: {}", source.display(), String::from_utf8_lossy(&output.stderr)));
    }
    fs::rename(&beside, path).map_err(|error| said("renaming the library", &error))
}
