//! How the session reaches into a running generation: a flag to stop after the step, and a way to break off at once.
//!
//! The training thread is blocked in computation, in the ring or in the store when it must be told something, so it
//! cannot be sent a message. It looks at these flags between micro-batches, the ring's sockets are shut down under it,
//! and its waiting for the store is woken.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use crate::collective::AbortHandle;

/// Shared by the session and the training thread for the length of one generation.
#[derive(Default)]
pub struct Control {
    stop: AtomicBool,
    aborted: AtomicBool,
    wake: Notify,
    ring: AbortHandle,
}

impl Control {
    /// A generation that goes on; `stop` asks for an end after its first step.
    pub fn new(stop: bool) -> Self {
        Self { stop: AtomicBool::new(stop), ..Self::default() }
    }

    /// Asks for an end after the step in progress.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Whether an end was asked for.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Breaks the generation off: whatever the training thread waits for returns with an error.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        self.wake.notify_one();
        self.ring.abort();
    }

    /// Whether the generation was broken off.
    pub fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::SeqCst)
    }

    /// Returns once the generation is broken off. For one waiter at a time.
    pub async fn aborted(&self) {
        while !self.is_aborted() {
            self.wake.notified().await;
        }
    }

    /// What the generation's ring is formed with, so that [`Control::abort`] ends it too.
    pub fn ring(&self) -> &AbortHandle {
        &self.ring
    }
}
