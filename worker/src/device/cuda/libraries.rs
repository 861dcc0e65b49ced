//! Finding NVIDIA's libraries on a machine that may have none, one, or several copies of them.
//!
//! The driver's library belongs to the system. The compiler (NVRTC) and cuBLASLt come with a toolkit or as Python
//! wheels, often in folders the loader does not search. Each is looked for in folders first and loaded from there; a
//! library that is loaded once is what every later request for its name gets, cudarc's too. So nobody has to set
//! LD_LIBRARY_PATH, and nothing is asked of cudarc, which panics where a library is missing, before it is there.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::error::{CudaError, CudaResult};

/// Variables that name folders of libraries, searched in this order.
const FOLDERS: [&str; 3] = ["CAIRN_CUDA_LIBRARIES", "CAIRN_NVRTC", "LD_LIBRARY_PATH"];
/// Variables that name the folder of a toolkit.
const TOOLKITS: [&str; 2] = ["CUDA_HOME", "CUDA_PATH"];
/// Where toolkits lie by default.
const DEFAULTS: [&str; 3] = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda"];
/// Where the system's own libraries lie; the loader knows these, they are named for those who read what was searched.
const SYSTEM: [&str; 4] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib"];

/// A library of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The driver, `libcuda`.
    Driver,
    /// The compiler of kernels.
    Nvrtc,
    /// Matrix products.
    CublasLt,
}

impl Kind {
    /// All of them, in the order in which they are needed.
    pub const ALL: [Self; 3] = [Self::Driver, Self::Nvrtc, Self::CublasLt];

    /// File names, the newest first.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &["libcuda.so.1"],
            Self::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12"],
            Self::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12"],
        }
    }

    /// What it loads by itself, by a name the loader may not find: loaded before it, from the same folder.
    fn companion(self) -> Option<&'static str> {
        (self == Self::Nvrtc).then_some("libnvrtc-builtins.so")
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Driver => "install the NVIDIA driver",
            Self::Nvrtc => {
                "install the wheel nvidia-cuda-nvrtc or a CUDA toolkit, or name its folder in CAIRN_CUDA_LIBRARIES"
            }
            Self::CublasLt => {
                "install the wheel nvidia-cublas or a CUDA toolkit, or name its folder in CAIRN_CUDA_LIBRARIES"
            }
        }
    }

    /// Its usual file name.
    pub fn name(self) -> &'static str {
        self.files()[0]
    }
}

/// A library that is loaded, and stays so for the life of the process.
#[derive(Debug)]
struct Loaded {
    path: PathBuf,
    /// Held so that it is not unloaded.
    _library: Library,
}

/// The file a library was loaded from.
pub fn find(kind: Kind) -> CudaResult<&'static Path> {
    static LIBRARIES: [OnceLock<Option<Loaded>>; 3] = [const { OnceLock::new() }; 3];
    let loaded = LIBRARIES[kind as usize].get_or_init(|| load(kind));
    let absent = || CudaError::LibraryAbsent { library: kind.name(), searched: searched(kind), advice: kind.advice() };
    let loaded = loaded.as_ref().ok_or_else(absent)?;
    // SAFETY: these only open a library by name, and what they find is loaded already.
    let known = unsafe {
        match kind {
            Kind::Driver => cudarc::driver::sys::is_culib_present(),
            Kind::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
            Kind::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
        }
    };
    if known { Ok(&loaded.path) } else { Err(absent()) }
}

fn toolkits() -> impl Iterator<Item = PathBuf> {
    let named = TOOLKITS.into_iter().filter_map(env::var_os).filter(|name| !name.is_empty()).map(PathBuf::from);
    named.chain(DEFAULTS.map(PathBuf::from))
}

/// Folders to search, but for the loader's own.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = FOLDERS
        .into_iter()
        .filter_map(env::var_os)
        .flat_map(|list| env::split_paths(&list).collect::<Vec<_>>())
        .collect();
    for toolkit in toolkits() {
        folders.extend(
            ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|way| toolkit.join(way)),
        );
    }
    // Wheels of an active virtual environment.
    for packages in
        env::var_os("VIRTUAL_ENV").map(PathBuf::from).iter().flat_map(|folder| children(&folder.join("lib")))
    {
        folders.extend(children(&packages.join("site-packages/nvidia")).map(|package| package.join("lib")));
    }
    folders.retain(|folder| !folder.as_os_str().is_empty());
    folders
}

fn children(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    names.sort();
    names.into_iter()
}

fn load(kind: Kind) -> Option<Loaded> {
    let folders = folders();
    for file in kind.files() {
        for folder in &folders {
            let path = folder.join(file);
            if !path.is_file() {
                continue;
            }
            if let Some(companion) = kind.companion() {
                let named =
                    |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(companion));
                // It must outlive the process's use of the library, so it is never closed.
                children(folder).filter(named).filter_map(|path| open(&path)).for_each(std::mem::forget);
            }
            if let Some(library) = open(&path) {
                return Some(Loaded { path, _library: library });
            }
        }
        if let Some(library) = open(Path::new(file)) {
            return Some(Loaded { path: mapped(file).unwrap_or_else(|| file.into()), _library: library });
        }
    }
    None
}

fn open(path: &Path) -> Option<Library> {
    // SAFETY: NVIDIA's libraries run nothing but their own set-up when loaded, and stay loaded.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.ok()
}

/// Where the loader found a library, from the process's own maps.
fn mapped(file: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let stem = file.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    let path = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let mut matching = path.filter(|path| path.rsplit('/').next().is_some_and(|name| name.starts_with(stem)));
    matching.next().map(PathBuf::from)
}

/// For errors: where a library was looked for.
fn searched(kind: Kind) -> String {
    let mut folders: Vec<PathBuf> = folders().into_iter().filter(|folder| folder.is_dir()).collect();
    if kind == Kind::Driver || folders.is_empty() {
        folders.extend(SYSTEM.map(PathBuf::from).into_iter().filter(|folder| folder.is_dir()));
    }
    list(&folders)
}

fn list(folders: &[PathBuf]) -> String {
    let names: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    if names.is_empty() {
        "the loader's folders".into()
    } else {
        format!("{} and the loader's folders", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_is_named_with_where_it_was_looked_for_and_what_brings_it() {
        for kind in Kind::ALL {
            match find(kind) {
                Ok(path) => assert!(path.to_string_lossy().contains(kind.name().split(".so").next().unwrap())),
                Err(error) => {
                    let said = error.to_string();
                    let parts = [kind.name(), "looked in", "loader's folders", "install"];
                    assert!(parts.iter().all(|part| said.contains(part)), "{said}");
                }
            }
        }
    }

    #[test]
    fn a_loaded_library_is_found_in_the_maps() {
        let libc = mapped("libc.so.6").expect("every process here has it");
        assert!(libc.is_absolute() && libc.is_file(), "{}", libc.display());
        assert_eq!(mapped("libno-such.so.1"), None);
    }
}
