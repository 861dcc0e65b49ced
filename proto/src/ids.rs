//! The words of the system as types.
//!
//! A step is not a generation is not a rank: each counter has its own type, so that one cannot be passed where another
//! is meant, and none has a value that secretly means "absent" (`Option` says that).

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
        #[serde(transparent)]
        pub struct $name($inner);

        impl $name {
            /// The first value of the counter.
            pub const ZERO: Self = Self(0);

            /// Wraps a raw number, as read from the wire or from disk.
            pub const fn new(value: $inner) -> Self {
                Self(value)
            }

            /// The raw number, for the wire, for disk and for arithmetic at the edge.
            pub const fn get(self) -> $inner {
                self.0
            }

            /// The value after this one; `None` at the end of the number range.
            pub fn next(self) -> Option<Self> {
                self.0.checked_add(1).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// How many optimizer updates a state has seen. Step 0 is the freshly initialised state.
    Step(u64)
}
counter! {
    /// One membership of a job: a fencing number that only grows. The first generation is 1.
    Generation(u64)
}
counter! {
    /// One leadership of a store by a coordinator; only grows. The first epoch is 1.
    Epoch(u64)
}
counter! {
    /// The place of a worker within a generation, `0..world_size`.
    Rank(u32)
}

impl Rank {
    /// The rank as an index into a list that has one entry per rank.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The number of workers of a generation; at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorldSize(NonZeroU32);

impl WorldSize {
    /// One worker.
    pub const ONE: Self = Self(NonZeroU32::MIN);

    /// `None` for zero: a generation without workers does not exist.
    pub fn new(value: u32) -> Option<Self> {
        NonZeroU32::new(value).map(Self)
    }

    /// The number of workers.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// The number of workers as a length.
    pub const fn count(self) -> usize {
        self.0.get() as usize
    }

    /// All ranks of the world, in order.
    pub fn ranks(self) -> impl Iterator<Item = Rank> {
        (0..self.0.get()).map(Rank::new)
    }
}

impl fmt::Display for WorldSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{kind} {value:?} is not usable: 1 to 63 characters of a-z, A-Z, 0-9, '-', '_' and '.', \
     starting with a letter or digit"
)]
pub struct NameError {
    kind: &'static str,
    value: String,
}

fn check_name(kind: &'static str, value: &str) -> Result<(), NameError> {
    let good = !value.is_empty()
        && value.len() <= 63
        && value.as_bytes()[0].is_ascii_alphanumeric()
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if good {
        return Ok(());
    }
    let shown: String = value.chars().take(80).collect();
    Err(NameError { kind, value: shown })
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and wraps a name; it is safe to use as one path segment.
            pub fn new(value: impl Into<String>) -> Result<Self, NameError> {
                let value = value.into();
                check_name($kind, &value)?;
                Ok(Self(value))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(value: String) -> Result<Self, NameError> {
                Self::new(value)
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(value: &str) -> Result<Self, NameError> {
                Self::new(value)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// A job's name, which is also its id: a job is its name within a store.
    JobName, "job name"
}
name! {
    /// A node's name, unique within a cluster; by default the host name.
    NodeName, "node name"
}
name! {
    /// A cluster's name, in the certificates of all its parts.
    ClusterName, "cluster name"
}

/// One life of a worker process. A restarted process has a new id, so a message of the dead one cannot be taken for the
/// living one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(uuid::Uuid);

impl WorkerId {
    /// Wraps a number drawn by a driver; machines never draw one.
    pub const fn from_uuid(id: uuid::Uuid) -> Self {
        Self(id)
    }
}

impl FromStr for WorkerId {
    type Err = uuid::Error;
    fn from_str(value: &str) -> Result<Self, uuid::Error> {
        uuid::Uuid::parse_str(value).map(Self)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_safe_path_segment() {
        for good in ["tiny", "a.b-c_1", "7b"] {
            assert!(JobName::new(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-x", "naïve", "a b", &"x".repeat(64)] {
            assert!(JobName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn counters_end_instead_of_wrapping() {
        assert_eq!(Step::new(41).next(), Some(Step::new(42)));
        assert_eq!(Step::new(u64::MAX).next(), None);
        assert_eq!(WorldSize::new(0), None);
    }
}
