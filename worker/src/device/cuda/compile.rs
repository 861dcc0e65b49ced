//! Kernels from source to machine code: NVRTC, and a cache on disk so that each machine compiles a kernel once.
//!
//! The sources are in the binary. A cached cubin is named by the BLAKE3 of all that it was made from: source, headers,
//! options, architecture, compiler's version; so a changed kernel or compiler finds nothing, and nothing stale is ever
//! found. A file carries the hash of its cubin, is written beside its name and renamed, and one that is not whole is
//! compiled again. Without a writable cache folder everything works, and each start compiles anew.

use std::ffi::{CStr, CString, c_char};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::{env, fs, ptr};

use cudarc::nvrtc::sys;

use super::error::{CudaError, CudaResult};
use super::kernels::{HEADERS, Module};
use super::libraries::{self, Kind};

/// Bytes of a hash at the start of a cached file.
const HASH: usize = 32;

/// What the compiler made.
#[derive(Debug, Clone)]
pub(super) struct Compiled {
    /// Machine code.
    pub(super) cubin: Vec<u8>,
    /// What it said; empty for a cubin from the cache.
    pub(super) log: String,
}

/// The compiler, found and ready.
#[derive(Debug)]
pub(super) struct Compiler {
    version: (i32, i32),
    cache: Option<PathBuf>,
}

impl Compiler {
    /// Finds it. Cubins are kept in `cache`, if given.
    pub(super) fn new(cache: Option<PathBuf>) -> CudaResult<Self> {
        libraries::find(Kind::Nvrtc)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is loaded, and the call only writes the two numbers.
        let status = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(CudaError::Call { operation: "asking NVRTC's version".into(), code: said(status) });
        }
        Ok(Self { version: (major, minor), cache })
    }

    /// Its version, which the bits of kernels may depend on.
    pub(super) fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// The machine code of a module for an architecture such as `sm_90`, from the cache if it is there.
    pub(super) fn cubin(&self, module: &Module, architecture: &str) -> CudaResult<Vec<u8>> {
        let options = Self::options(module, architecture);
        let path = self.cache.as_ref().map(|folder| folder.join(format!("{}.cubin", self.key(module, &options))));
        if let Some(cubin) = path.as_deref().and_then(read) {
            return Ok(cubin);
        }
        let compiled = self.compile(module, architecture)?;
        tracing::debug!(file = module.file, architecture, log = compiled.log, "compiled kernels");
        if let Some(path) = path {
            // A cache that cannot be written costs time at the next start and nothing else.
            let _ = write(&path, &compiled.cubin);
        }
        Ok(compiled.cubin)
    }

    /// Compiles a module, whatever the cache has.
    #[allow(clippy::unused_self)] // a value of this type says that the library is loaded
    pub(super) fn compile(&self, module: &Module, architecture: &str) -> CudaResult<Compiled> {
        let failed = |log: String| CudaError::Compile { file: module.file, architecture: architecture.into(), log };
        let source = text(module.text)?;
        let file = text(module.file)?;
        let headers = HEADERS.iter().map(|(_, body)| text(body)).collect::<CudaResult<Vec<_>>>()?;
        let names = HEADERS.iter().map(|(name, _)| text(name)).collect::<CudaResult<Vec<_>>>()?;
        let options = Self::options(module, architecture);
        let options = options.iter().map(|option| text(option)).collect::<CudaResult<Vec<_>>>()?;
        let pointers = |list: &[CString]| list.iter().map(|text| text.as_ptr()).collect::<Vec<*const c_char>>();
        let (headers, names, options) = (pointers(&headers), pointers(&names), pointers(&options));

        let mut program = Program(ptr::null_mut());
        // SAFETY: all texts end in a zero and outlive the call; the counts are those of the lists.
        let status = unsafe {
            let count = headers.len() as i32;
            let (headers, names) = (headers.as_ptr(), names.as_ptr());
            sys::nvrtcCreateProgram(&raw mut program.0, source.as_ptr(), file.as_ptr(), count, headers, names)
        };
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(said(status)));
        }
        // SAFETY: the program was created; the options outlive the call.
        let status = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
        let log = program.log();
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(format!("{}\n{log}", said(status))));
        }
        program.cubin().map(|cubin| Compiled { cubin, log }).ok_or_else(|| failed("there is no cubin".into()))
    }

    /// No header of CUDA's is asked for: the kernels keep bfloat16 as bits, so that libnvrtc alone is enough.
    fn options(module: &Module, architecture: &str) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={architecture}"),
            "--std=c++17".into(),
            // Registers and spills, in the log.
            "--ptxas-options=-v".into(),
        ];
        options.extend(module.defines.iter().map(|define| format!("--define-macro={define}")));
        options
    }

    fn key(&self, module: &Module, options: &[String]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let mut part = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        part(&self.version());
        part(module.file);
        part(module.text);
        for (name, body) in HEADERS {
            part(name);
            part(body);
        }
        for option in options {
            part(option);
        }
        hasher.finalize()
    }
}

/// Where cubins are kept: `$XDG_CACHE_HOME/cairn/kernels`, or below `~/.cache`.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let named = |variable: &str| env::var_os(variable).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let base = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("cairn/kernels"))
}

/// A cached cubin, if it is whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let (hash, cubin) = bytes.split_at_checked(HASH)?;
    (blake3::hash(cubin).as_bytes() == hash).then(|| cubin.to_vec())
}

/// Puts a cubin in the cache; several processes may do so at once.
fn write(path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        // What is loaded from here runs on the device: nobody else may write to it.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    let bytes = [blake3::hash(cubin).as_bytes(), cubin].concat();
    fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path)).inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

/// A program being compiled; destroyed with this.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program is alive; the buffer has the size it asks for.
        let bytes = unsafe {
            let _ = sys::nvrtcGetProgramLogSize(self.0, &raw mut size);
            let mut bytes = vec![0u8; size];
            let _ = sys::nvrtcGetProgramLog(self.0, bytes.as_mut_ptr().cast());
            bytes
        };
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').trim_end().to_string()
    }

    fn cubin(&self) -> Option<Vec<u8>> {
        let mut size = 0;
        // SAFETY: as above.
        unsafe {
            let sized = sys::nvrtcGetCUBINSize(self.0, &raw mut size) == sys::nvrtcResult::NVRTC_SUCCESS;
            if !sized || size == 0 {
                return None;
            }
            let mut bytes = vec![0u8; size];
            let got = sys::nvrtcGetCUBIN(self.0, bytes.as_mut_ptr().cast()) == sys::nvrtcResult::NVRTC_SUCCESS;
            got.then_some(bytes)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: created and not yet destroyed.
            let _ = unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
        }
    }
}

fn said(status: sys::nvrtcResult) -> String {
    // SAFETY: the library is loaded; the text is its own and lives for ever.
    unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(status)) }.to_string_lossy().into_owned()
}

fn text(text: &str) -> CudaResult<CString> {
    CString::new(text)
        .map_err(|_| CudaError::Call { operation: "compiling".into(), code: "a text contains a zero".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_gives_back_whole_files_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernels/a.cubin");
        assert_eq!(read(&path), None);
        write(&path, b"machine code").unwrap();
        assert_eq!(read(&path).as_deref(), Some(&b"machine code"[..]));
        write(&path, b"other code").unwrap();
        assert_eq!(read(&path).as_deref(), Some(&b"other code"[..]));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");

        let whole = fs::read(&path).unwrap();
        for cut in [0, 5, HASH, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(read(&path), None, "cut at {cut}");
        }
        let mut flipped = whole;
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, flipped).unwrap();
        assert_eq!(read(&path), None);
    }
}
