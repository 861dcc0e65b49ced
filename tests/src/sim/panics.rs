//! Panics of the simulated processes: a task that panics must not go unnoticed, though the runtime catches it.

use std::cell::RefCell;
use std::sync::Once;

/// What a thread knows of its panics.
#[derive(Default)]
struct Seen {
    /// It simulates: they are the simulated processes'.
    watched: bool,
    first: Option<String>,
}

thread_local! {
    static SEEN: RefCell<Seen> = RefCell::default();
}

/// Notes this thread's panics from now on instead of printing them.
pub(crate) fn watch() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let simulates = SEEN.try_with(|seen| {
                let Ok(mut seen) = seen.try_borrow_mut() else { return false };
                if seen.watched {
                    seen.first.get_or_insert_with(|| panic.to_string());
                }
                seen.watched
            });
            if !simulates.unwrap_or(false) {
                before(panic);
            }
        }));
    });
    SEEN.set(Seen { watched: true, first: None });
}

/// The first panic since this was last asked.
pub(crate) fn take() -> Option<String> {
    SEEN.with_borrow_mut(|seen| seen.first.take())
}

/// Panics of this thread are its own again.
pub(crate) fn ignore() {
    SEEN.take();
}
