//! The token that opens the control plane on loopback (P6).
//!
//! A token file holds 64 hex digits and must be readable by its owner only. Clients send it as a bearer credential with
//! every call; servers compare it in constant time. Off loopback nothing listens in this release.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Status};

/// Why a token file is not usable.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file could not be read or made.
    #[error("token file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Others can read the file.
    #[error("token file {path} has mode {mode:04o}, so others can read it; run: chmod 600 {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file's content is no token.
    #[error("token file {path} does not hold 64 hex digits; delete it and start the coordinator to make a new one")]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

/// A secret shared by the coordinator, its agents and its operators.
#[derive(Clone)]
pub struct Token(MetadataValue<Ascii>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// Reads a token file, refusing one that others can read.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let io = |source| TokenError::Io { path: path.into(), source };
        let metadata = std::fs::metadata(path).map_err(io)?;
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(TokenError::Open { path: path.into(), mode });
        }
        if metadata.len() > 1024 {
            return Err(TokenError::Malformed { path: path.into() });
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        Self::from_hex(text.trim()).ok_or_else(|| TokenError::Malformed { path: path.into() })
    }

    /// Reads a token file, making it with the given random bytes if there is none.
    pub fn read_or_create(path: &Path, random: [u8; 32]) -> Result<Self, TokenError> {
        let io = |source| TokenError::Io { path: path.into(), source };
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(mut file) => {
                let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
                file.write_all(format!("{hex}\n").as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
                Self::from_hex(&hex).ok_or_else(|| TokenError::Malformed { path: path.into() })
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Self::read(path),
            Err(error) => Err(io(error)),
        }
    }

    fn from_hex(text: &str) -> Option<Self> {
        let good = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        good.then(|| format!("Bearer {text}").parse().ok()).flatten().map(Self)
    }

    /// Adds the credential to a request; a client's interceptor.
    pub fn sign(&self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }

    /// Refuses a request without the credential; a server's interceptor.
    pub fn check(&self, request: Request<()>) -> Result<Request<()>, Status> {
        let given = request.metadata().get("authorization").map_or(&[][..], |value| value.as_bytes());
        // Hashing first makes the comparison take the same time wherever the two differ.
        let same = blake3::hash(given) == blake3::hash(self.0.as_bytes());
        let advice = "this coordinator needs its token: pass --token-file with the file it was started with";
        if same { Ok(request) } else { Err(Status::unauthenticated(advice)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_and_nothing_else_does() {
        let folder = std::env::temp_dir().join(format!("cairn-token-{}", std::process::id()));
        let path = folder.join("token");
        let token = Token::read_or_create(&path, [7; 32]).unwrap();
        let again = Token::read_or_create(&path, [8; 32]).unwrap();
        assert!(token.check(again.sign(Request::new(())).unwrap()).is_ok());
        assert!(token.check(Request::new(())).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Token::read(&path), Err(TokenError::Open { .. })));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
