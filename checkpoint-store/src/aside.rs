//! Work that would hold up the other tasks of an async thread: hashing, coding, reading from a disk.
//!
//! On a runtime of many threads it goes to another one. A runtime of a single thread has none to give it to, and does
//! the work at once: so a simulation of many processes on one thread has but one order of events.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::JoinError;

fn has_threads() -> bool {
    Handle::try_current().is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::MultiThread)
}

/// Does work off the async threads and waits for it; an error is a panic in it.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    if has_threads() { tokio::task::spawn_blocking(work).await } else { Ok(work()) }
}

/// Does work that borrows on this thread, and tells the runtime, where there is one that can do something about it,
/// that the thread is taken.
pub fn in_place<T>(work: impl FnOnce() -> T) -> T {
    if has_threads() { tokio::task::block_in_place(work) } else { work() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_on_any_runtime_and_on_one_thread_at_once() {
        let many = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let here = std::thread::current().id();
        let at = || std::thread::current().id();
        assert_ne!(many.block_on(async { tokio::spawn(aside(at)).await.unwrap().unwrap() }), here);
        let one = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(one.block_on(async { (aside(at).await.unwrap(), in_place(at)) }), (here, here));
        assert_eq!(in_place(at), here, "and outside of one");
    }
}
