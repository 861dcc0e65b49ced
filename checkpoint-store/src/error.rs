//! One error type for the store, sorted by what the caller should do about it.
//!
//! The message names the place (URL, object, tensor, offset), what is wrong and, where known, what would be right. The
//! kind says how to act: try again, tell the user, stop because someone newer leads, fall back to an older checkpoint,
//! or report a defect. The cause, where there is one, stays reachable through `source()`.

use std::error::Error as StdError;

/// The boxed cause of an error.
pub type Source = Box<dyn StdError + Send + Sync + 'static>;

/// What to do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The store did not answer or was busy: the same call may succeed later.
    Retry,
    /// The request cannot succeed as it is: a wrong URL, no permission, a name that does not exist.
    Input,
    /// Someone with a newer epoch, generation or record acts on this job: stop, and read again.
    Fenced,
    /// What is stored is damaged, incomplete or not what a record says.
    Corrupt,
    /// A caller broke a rule of this library.
    Bug,
}

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store could not be reached, timed out or reported an internal failure.
    #[error("{what}: {source}")]
    Unavailable {
        /// The operation and the object or URL.
        what: String,
        /// The backend's error.
        #[source]
        source: Source,
    },
    /// It cannot be told whether a conditional create took effect. The caller must read again before it acts.
    #[error("cannot tell whether {path} was created: {source}; read the store again before acting")]
    Indeterminate {
        /// The object whose fate is unknown.
        path: String,
        /// The last error seen.
        #[source]
        source: Source,
    },
    /// The object is not there.
    #[error("{path} is not in the store {url}")]
    NotFound {
        /// The missing object.
        path: String,
        /// The store.
        url: String,
    },
    /// The backend refuses the operation, whoever repeats it.
    #[error("{what}: {source}")]
    Refused {
        /// The operation and the object or URL.
        what: String,
        /// The backend's error.
        #[source]
        source: Source,
    },
    /// A wrong URL, path or argument from outside.
    #[error("{0}")]
    Input(String),
    /// Stored data is damaged.
    #[error("{0}")]
    Corrupt(String),
    /// A file of a newer format than this build knows.
    #[error("{path} has format {found}, but this build reads formats 1 to {known}; use a newer cairn")]
    NewerFormat {
        /// The object.
        path: String,
        /// Its format.
        found: u32,
        /// The newest format this build reads.
        known: u32,
    },
    /// A newer epoch, generation or record exists.
    #[error("{0}")]
    Fenced(String),
    /// A rule of this library was broken by its caller.
    #[error("{0}")]
    Bug(String),
}

impl StoreError {
    /// What the caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Unavailable { .. } | Self::Indeterminate { .. } => Kind::Retry,
            Self::NotFound { .. } | Self::Refused { .. } | Self::Input(_) | Self::NewerFormat { .. } => Kind::Input,
            Self::Fenced(_) => Kind::Fenced,
            Self::Corrupt(_) => Kind::Corrupt,
            Self::Bug(_) => Kind::Bug,
        }
    }

    /// Whether the object simply is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// A missing object that a record or manifest names is damage, not a wrong request.
    pub(crate) fn missing_is_corrupt(self, named_by: &str) -> Self {
        match self {
            Self::NotFound { path, url } => {
                Self::Corrupt(format!("{path} is missing from the store {url}, though {named_by} names it"))
            }
            other => other,
        }
    }

    pub(crate) fn refused(what: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Refused { what: what.into(), source: source.into() }
    }

    pub(crate) fn unavailable(what: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Unavailable { what: what.into(), source: source.into() }
    }
}

/// Refuses a format newer than the one this build writes; also 0, which no build ever wrote.
pub(crate) fn check_format(path: &str, found: u32, known: u32) -> Result<(), StoreError> {
    match found {
        0 => Err(StoreError::Corrupt(format!("{path}: format 0 does not exist"))),
        f if f > known => Err(StoreError::NewerFormat { path: path.to_owned(), found, known }),
        _ => Ok(()),
    }
}

/// Reads the `format` field first, so that a newer file is refused by name and not by its unknown fields.
pub(crate) fn parse_json<T: serde::de::DeserializeOwned>(
    path: &str,
    bytes: &[u8],
    known: u32,
) -> Result<T, StoreError> {
    #[derive(serde::Deserialize)]
    struct Head {
        format: u32,
    }
    let corrupt = |e: serde_json::Error| StoreError::Corrupt(format!("{path} is not valid: {e}"));
    let head: Head = serde_json::from_slice(bytes).map_err(corrupt)?;
    check_format(path, head.format, known)?;
    serde_json::from_slice(bytes).map_err(corrupt)
}
