//! Telling peers what this node holds: the newest state, until each has taken it.

use std::time::Duration;

use proto::wire::{GroupHeld, GroupState, HeldStep};
use tokio::sync::watch;

use super::peers::Peers;

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(100);

/// What the members of a job's group are told; dropping it ends the telling.
#[derive(Debug)]
pub(super) struct Telling {
    state: GroupState,
    /// One channel for each peer: of several that wait at one, which is woken first would be a matter of chance.
    peers: Vec<watch::Sender<GroupState>>,
}

impl Telling {
    /// Tells the peers at these addresses.
    pub(super) fn start(peers: &Peers, addresses: impl Iterator<Item = String>, state: GroupState) -> Self {
        let start = |address| {
            let (sender, receiver) = watch::channel(state.clone());
            tokio::spawn(tell(peers.clone(), address, receiver));
            sender
        };
        let peers = addresses.map(start).collect();
        Self { state, peers }
    }

    /// The generation it is about.
    pub(super) fn generation(&self) -> u64 {
        self.state.generation
    }

    /// What it said last, without the descriptions.
    pub(super) fn held(&self) -> GroupHeld {
        let steps = self.state.steps.iter();
        let encoded = steps.clone().filter(|held| held.encoded).map(|held| held.step).collect();
        let steps = steps.map(|held| held.step).collect();
        GroupHeld { sequence: self.state.sequence, steps, encoded, complete: vec![] }
    }

    /// This node holds these steps now.
    pub(super) fn say(&mut self, steps: Vec<HeldStep>) {
        self.state.steps = steps;
        self.state.sequence += 1;
        for peer in &self.peers {
            peer.send_replace(self.state.clone());
        }
    }
}

/// Tells the peer at `address` every change of `state`; ends when nobody can change it any more.
async fn tell(peers: Peers, address: String, mut state: watch::Receiver<GroupState>) {
    let mut begun = false;
    loop {
        let newest = state.borrow_and_update().clone();
        // Whoever has never heard of a step need not hear that there is none.
        begun |= !newest.steps.is_empty();
        let taken = !begun || peers.sync(&address, newest).await.is_ok();
        if taken {
            if state.changed().await.is_err() {
                return;
            }
        } else {
            // A newer state is as good a reason to try as time.
            tokio::select! {
                biased;
                changed = state.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
        if state.has_changed().is_err() {
            return;
        }
    }
}
