//! Certificates and keys as files: read within bounds, keys only if nobody else can read them, nothing written over.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::TlsError;

/// More than any chain of certificates takes.
const MOST_BYTES: u64 = 256 << 10;
/// Everybody's to read.
pub(super) const PUBLIC: u32 = 0o644;
/// The owner's alone.
pub(super) const PRIVATE: u32 = 0o600;

/// Reads a small text file.
pub(super) fn read_bounded(path: &Path) -> Result<String, TlsError> {
    let io = |source| TlsError::Read { path: path.into(), source };
    let mut text = String::new();
    File::open(path).map_err(io)?.take(MOST_BYTES).read_to_string(&mut text).map_err(io)?;
    Ok(text)
}

/// Reads a private key, refusing one that others can read.
pub(super) fn read_private(path: &Path) -> Result<String, TlsError> {
    let metadata = std::fs::metadata(path).map_err(|source| TlsError::Read { path: path.into(), source })?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TlsError::Open { path: path.into(), mode });
    }
    read_bounded(path)
}

/// Writes new files, each with its mode, into a folder that is made if need be; none of them may be there.
pub(super) fn write_new(folder: &Path, files: &[(&PathBuf, u32, &str)]) -> Result<(), TlsError> {
    if let Some((path, ..)) = files.iter().find(|(path, ..)| std::fs::symlink_metadata(path).is_ok()) {
        return Err(TlsError::Exists { path: (*path).clone() });
    }
    let failed = |path: &Path, source| TlsError::Write { path: path.into(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| failed(folder, error))?;
    for (path, mode, text) in files {
        let written = OpenOptions::new().write(true).create_new(true).mode(*mode).open(path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(|error| failed(path, error))?;
    }
    Ok(())
}
