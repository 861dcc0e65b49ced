//! Ending an exchange from another thread.
//!
//! A blocked socket call cannot be told to stop, but its socket can be shut down under it: every call blocked on it
//! returns at once, here and at the other end. That is the whole abort; it needs no message and no peer's cooperation.

use std::fmt;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Ends one collective from any thread: every operation, blocked or later, returns `CollectiveError::Aborted`.
#[derive(Clone, Default)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    aborted: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
}

impl AbortHandle {
    /// A handle of nothing yet; a ring that is formed with it can be aborted while it forms.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the collective. Prompt, idempotent, and final.
    pub fn abort(&self) {
        // The flag is set under the lock: a socket is either shut down here, or refused by `watch`.
        let sockets = self.sockets();
        self.shared.aborted.store(true, Ordering::SeqCst);
        shut_down(&sockets);
    }

    /// Whether `abort` was called.
    pub fn is_aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::SeqCst)
    }

    /// Adds a socket to those shut down. False if it is too late: the collective is aborted already.
    pub(super) fn watch(&self, socket: TcpStream) -> bool {
        let mut sockets = self.sockets();
        if self.is_aborted() {
            return false;
        }
        sockets.push(socket);
        true
    }

    /// Closes the sockets without calling it an abort: after a failure, so that the news travels.
    pub(super) fn close(&self) {
        shut_down(&self.sockets());
    }

    /// Forgets the sockets, so that they can close.
    pub(super) fn release(&self) {
        self.sockets().clear();
    }

    fn sockets(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.shared.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shut_down(sockets: &[TcpStream]) {
    for socket in sockets {
        // A socket that the peer closed already has nothing left to shut down.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").field("aborted", &self.is_aborted()).finish_non_exhaustive()
    }
}
