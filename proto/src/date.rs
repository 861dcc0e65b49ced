//! The date, which nothing here decides by: only whether two nodes agree on it is looked at.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds of the Unix epoch, if this machine's clock is after 1970.
pub fn unix_ms() -> Option<u64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_millis()).ok()
}
