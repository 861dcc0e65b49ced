//! Opening stores by their URLs: as the URL says, or as somebody else does.
//!
//! Coordinator and agents name stores by URL only and open them when they need them. A simulation answers with a bucket
//! of its own, in which what it likes goes wrong.

use std::fmt;
use std::sync::Arc;

use crate::backend::Store;
use crate::error::StoreError;

/// Opens a store by its URL.
type Open = dyn Fn(&str) -> Result<Store, StoreError> + Send + Sync;

/// How a process opens stores. The default takes the URL at its word.
#[derive(Clone, Default)]
pub struct Opener(Option<Arc<Open>>);

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Opener(other)" } else { "Opener(by URL)" })
    }
}

impl Opener {
    /// Opens all stores in a way of one's own.
    pub fn other(open: impl Fn(&str) -> Result<Store, StoreError> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(open)))
    }

    /// As [`Store::open`].
    pub fn open(&self, url: &str) -> Result<Store, StoreError> {
        self.0.as_ref().map_or_else(|| Store::open(url), |open| open(url))
    }

    /// As [`Store::open_existing`].
    pub fn open_existing(&self, url: &str) -> Result<Store, StoreError> {
        self.0.as_ref().map_or_else(|| Store::open_existing(url), |open| open(url))
    }
}
