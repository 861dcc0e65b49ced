//! Panics of the simulated processes: a task that panics must not go unnoticed, though the runtime catches it.

use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    /// Whether this thread simulates, and the first panic on it.
    static SEEN: RefCell<Option<Option<String>>> = const { RefCell::new(None) };
}

/// Notes this thread's panics from now on instead of printing them.
pub(crate) fn watch() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let simulates = SEEN.try_with(|seen| {
                let Ok(mut seen) = seen.try_borrow_mut() else { return false };
                let Some(first) = seen.as_mut() else { return false };
                first.get_or_insert_with(|| panic.to_string());
                true
            });
            if !simulates.unwrap_or(false) {
                before(panic);
            }
        }));
    });
    SEEN.set(Some(None));
}

/// The first panic since this was last asked.
pub(crate) fn take() -> Option<String> {
    SEEN.with_borrow_mut(|seen| seen.as_mut().and_then(Option::take))
}

/// Panics of this thread are its own again.
pub(crate) fn ignore() {
    SEEN.set(None);
}
