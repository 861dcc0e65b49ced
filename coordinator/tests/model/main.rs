//! Leadership and generations, checked over all their interleavings within small bounds.
//!
//! Leaders that sleep and wake at any moment, nodes that obey them, a network that loses, repeats and reorders every
//! message, and a store whose creates are atomic but may go unanswered. The model checker (stateright) walks every
//! reachable state; `protocol` says which function of the code each step stands for, `properties` what must hold. Each
//! built-in mistake of [`Bug`] must break the property that guards against it: a model that could not fail would prove
//! nothing. How a checkpoint is saved and collected is the store's model (`checkpoint-store/tests/model`).
//!
//! There is no time here: whoever could suspect somebody may, and whoever waits may wait for ever. So what holds here
//! holds whatever the timeouts are, and that work gets done is shown elsewhere (`tests`, on simulated hosts).

mod properties;
mod protocol;

use std::collections::BTreeSet;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::properties::{ASCEND, BACKED, FENCED, LED, LIVE, OBEY, ONCE, POSSIBLE};
use crate::protocol::{Bug, Protocol};

/// Two leaderships, a generation after the first, one unanswered create.
const TAKEOVER: Protocol = Protocol { epochs: 2, generations: 2, steps: 1, timeouts: 1, bugs: &[] };
/// Two steps, so that there is a checkpoint to start from.
const CHECKPOINT: Protocol = Protocol { steps: 2, timeouts: 0, ..TAKEOVER };
/// Three leaderships: two that were taken for dead at once.
const THREE: Protocol = Protocol { epochs: 3, generations: 2, timeouts: 0, ..TAKEOVER };

/// Explores all states; every property must hold, and all that is to be possible must happen.
fn check(name: &str, protocol: Protocol) {
    let begun = Instant::now();
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    let (all, unique, depth) = (checker.state_count(), checker.unique_state_count(), checker.max_depth());
    let seconds = begun.elapsed().as_secs_f64();
    println!("{name}: {unique} states, reached {all} times, at most {depth} steps deep, in {seconds:.1} s");
    for property in [ASCEND, LED, BACKED, FENCED, ONCE, OBEY, LIVE] {
        checker.assert_no_discovery(property);
    }
    for possible in POSSIBLE {
        checker.assert_any_discovery(possible);
    }
}

#[test]
fn leadership_and_generations_hold() {
    check("takeover", TAKEOVER);
    check("checkpoint", CHECKPOINT);
}

#[test]
fn each_mistake_is_found() {
    let mistakes: [(&[Bug], &str); 9] = [
        (&[Bug::Overwrite], BACKED),
        (&[Bug::Overwrite], LED),
        (&[Bug::NoLed], LED),
        (&[Bug::AnnounceFirst], BACKED),
        (&[Bug::AssumeLanded], BACKED),
        (&[Bug::CommitAny], FENCED),
        (&[Bug::CommitAgain], ONCE),
        (&[Bug::ObeyAnyone], OBEY),
        (&[Bug::JoinLower], LIVE),
    ];
    for (bugs, property) in mistakes {
        let finish = HasDiscoveries::AnyOf(BTreeSet::from([property]));
        let protocol = Protocol { bugs, ..TAKEOVER };
        let checker = protocol.checker().threads(2).finish_when(finish).spawn_bfs().join();
        let states = checker.unique_state_count();
        let found = checker.discovery(property);
        let path = found.unwrap_or_else(|| panic!("{bugs:?} goes unnoticed in {states} states: {property}"));
        println!("{bugs:?} breaks \"{property}\" after {states} states: {:?}", path.into_actions());
    }
}

/// Minutes: set `CAIRN_MODEL=large`.
#[test]
fn they_hold_within_wider_bounds() {
    if std::env::var("CAIRN_MODEL").as_deref() != Ok("large") {
        println!("skipped: set CAIRN_MODEL=large");
        return;
    }
    check("large: three leaderships", THREE);
    check("large: three generations", Protocol { generations: 3, timeouts: 0, ..TAKEOVER });
    check("large: two unanswered creates", Protocol { timeouts: 2, ..TAKEOVER });
}
