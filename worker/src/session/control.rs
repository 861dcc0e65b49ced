//! How the session reaches into a running generation: a flag to stop after the step, a way to break off at once, and
//! the agent's answer to a request to restore.
//!
//! The training thread is blocked in computation, in the ring or in the store when it must be told something, so it
//! cannot be sent a message. It looks at these flags between micro-batches, the ring's sockets are shut down under it,
//! and its waiting for the store or the agent is woken.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::wire;
use tokio::sync::Notify;

use crate::collective::AbortHandle;

/// Shared by the session and the training thread for the length of one generation.
#[derive(Default)]
pub struct Control {
    stop: AtomicBool,
    aborted: AtomicBool,
    wake: Notify,
    ring: AbortHandle,
    restored: Mutex<Option<wire::Restored>>,
    answered: Condvar,
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
        let answer = self.answer();
        self.aborted.store(true, Ordering::SeqCst);
        drop(answer);
        self.wake.notify_one();
        self.answered.notify_all();
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

    /// The agent has filled the slot it was asked to fill, or could not.
    pub fn restored(&self, answer: wire::Restored) {
        *self.answer() = Some(answer);
        self.answered.notify_all();
    }

    /// Waits for the agent's answer; `None` once the generation is broken off or the time has passed.
    pub fn wait_restored(&self, within: Duration) -> Option<wire::Restored> {
        let deadline = Instant::now() + within;
        let mut answer = self.answer();
        loop {
            if self.is_aborted() {
                return None;
            }
            if let Some(answer) = answer.take() {
                return Some(answer);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            answer = self.answered.wait_timeout(answer, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What the generation's ring is formed with, so that [`Control::abort`] ends it too.
    pub fn ring(&self) -> &AbortHandle {
        &self.ring
    }

    fn answer(&self) -> MutexGuard<'_, Option<wire::Restored>> {
        self.restored.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
