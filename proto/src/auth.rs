//! The token that opens the control plane (P6).
//!
//! A token file holds 64 hex digits and must be readable by its owner only. Clients send it as a bearer credential with
//! every call; servers compare it in constant time. On loopback it is the credential; elsewhere it is asked for as
//! well, inside of mutual TLS (`tls`).

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
    ///
    /// It is written under another name and linked into place, which fails if the name is taken: of several makers one
    /// wins, all have the winner's token, and no reader ever sees a file that is empty or half written.
    pub fn read_or_create(path: &Path, random: [u8; 32]) -> Result<Self, TokenError> {
        let io = |source| TokenError::Io { path: path.into(), source };
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        if std::fs::symlink_metadata(path).is_ok() {
            return Self::read(path);
        }
        let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        // A name no other maker has, from which the token cannot be told.
        let mark = u64::from_le_bytes(*blake3::hash(&random).as_bytes().first_chunk().unwrap_or(&[0; 8]));
        let temporary = path.with_file_name(format!(".token-{}-{mark:016x}.tmp", std::process::id()));
        let linked = write_new(&temporary, &hex).and_then(|()| std::fs::hard_link(&temporary, path));
        let removed = std::fs::remove_file(&temporary);
        match linked.and(removed) {
            Ok(()) => Self::from_hex(&hex).ok_or_else(|| TokenError::Malformed { path: path.into() }),
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

/// Writes a new file that only its owner can read.
fn write_new(path: &Path, hex: &str) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(format!("{hex}\n").as_bytes())?;
    file.sync_all()
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

    #[test]
    fn of_many_makers_one_wins_and_all_have_its_token() {
        let folder = std::env::temp_dir().join(format!("cairn-token-race-{}", std::process::id()));
        let path = folder.join("token");
        let make = |seed: u8| {
            let path = path.clone();
            std::thread::spawn(move || Token::read_or_create(&path, [seed; 32]).unwrap())
        };
        let makers: Vec<_> = (0..8).map(make).collect();
        let tokens: Vec<_> = makers.into_iter().map(|maker| maker.join().unwrap()).collect();
        for token in &tokens {
            assert_eq!(token.0, tokens[0].0);
        }
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, ["token"], "no temporary file is left");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
