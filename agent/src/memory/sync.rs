//! Telling one peer what this node holds: the newest state, until it is taken.

use std::time::Duration;

use proto::wire::GroupState;
use tokio::sync::watch;

use super::peers::Peers;

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(100);

/// Tells the peer at `address` every change of `state`; ends when nobody can change it any more.
pub(super) async fn tell(peers: Peers, address: String, mut state: watch::Receiver<GroupState>) {
    loop {
        let newest = state.borrow_and_update().clone();
        let taken = newest.steps.is_empty() || peers.sync(&address, newest).await.is_ok();
        if taken {
            if state.changed().await.is_err() {
                return;
            }
        } else {
            // A newer state is as good a reason to try as time.
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                changed = state.changed() => if changed.is_err() { return },
            }
        }
        if state.has_changed().is_err() {
            return;
        }
    }
}
