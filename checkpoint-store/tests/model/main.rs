//! The commit and collection protocol, checked over all its interleavings within small bounds.
//!
//! Savers, leaders that die, sleep and wake, a collector in each leader's queue, a reader, and a store whose creates
//! are atomic but may go unanswered and take effect late. The model checker (stateright) walks every reachable state;
//! `leader` says which function of the code each step stands for, `properties` what must hold. Each built-in mistake
//! of [`Bug`] must break the property that guards against it: a model that could not fail would prove nothing.
//!
//! Where the code decides by time or by message, the model lets anything happen: receipts arrive in any order, at any
//! leader, at any later time; a collection or a new generation may begin whenever a leader has nothing else to do.
//!
//! `CAIRN_MODEL=large` explores wider bounds: a quarter of an hour on two busy cores, and up to 4 GB of memory.

mod chain;
mod leader;
mod properties;
mod protocol;
mod state;

use std::collections::BTreeSet;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::properties::{FENCED, FOLDS, KEPT, LOADABLE, ONCE, POSSIBLE, READ, TIDY, WHOLE};
use crate::protocol::{Bug, Protocol};
use crate::state::Budget;

/// Two leaders, of which the first may sleep or die at any moment.
const fn bounds(ranks: u8, steps: u8, left: Budget) -> Protocol {
    Protocol { ranks, steps, leaders: 2, budget: Budget { crashes: 1, pauses: 1, ..left }, bugs: &[] }
}

const NONE: Budget =
    Budget { crashes: 0, pauses: 0, timeouts: 0, generations: 0, quarantines: 0, references: 0, readers: 0 };
/// Everything that one sleeping leader, one unanswered create and a second generation can do to two saves.
const TAKEOVER: Protocol = bounds(1, 2, Budget { timeouts: 1, generations: 1, references: 1, ..NONE });
/// A reader beside all that, but for the unanswered create.
const READER: Protocol = bounds(1, 2, Budget { generations: 1, references: 1, readers: 1, ..NONE });
/// As [`TAKEOVER`], with saves of two ranks.
const TWO_RANKS: Protocol = bounds(2, 2, Budget { timeouts: 1, generations: 1, references: 1, ..NONE });
/// Three steps: saves overtake one another, and checkpoints are deleted that others refer to.
const THREE_STEPS: Protocol = bounds(1, 3, Budget { timeouts: 1, references: 1, ..NONE });
/// Three steps in two generations.
const ABANDONED: Protocol = bounds(1, 3, Budget { generations: 1, ..NONE });
/// The newest checkpoint may turn out to be damaged.
const DAMAGE: Protocol = bounds(1, 3, Budget { quarantines: 1, ..NONE });
/// Damage, a generation formed after it, and an unanswered create.
const DAMAGE_AND_RESTART: Protocol = bounds(1, 2, Budget { quarantines: 1, generations: 1, timeouts: 1, ..NONE });

/// Explores all states; every property must hold, and what `never` does not list must be possible.
fn check(name: &str, protocol: Protocol, never: &[&str]) {
    let begun = Instant::now();
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    let (all, unique, depth) = (checker.state_count(), checker.unique_state_count(), checker.max_depth());
    let seconds = begun.elapsed().as_secs_f64();
    println!("{name}: {unique} states, reached {all} times, at most {depth} steps deep, in {seconds:.1} s");
    for property in [FOLDS, WHOLE, LOADABLE, ONCE, FENCED, KEPT, READ, TIDY] {
        checker.assert_no_discovery(property);
    }
    for possible in POSSIBLE.iter().filter(|name| !never.contains(name)) {
        checker.assert_any_discovery(possible);
    }
}

#[test]
fn the_protocol_holds() {
    let [refers, outlives, late, ..] = POSSIBLE;
    check("takeover", TAKEOVER, &[]);
    check("reader", READER, &[late]);
    check("two ranks", TWO_RANKS, &[]);
    check("three steps", THREE_STEPS, &[]);
    check("abandoned", ABANDONED, &[refers, outlives, late]);
    check("damage", DAMAGE, &[refers, outlives, late]);
    check("damage and restart", DAMAGE_AND_RESTART, &[refers, outlives]);
}

#[test]
fn each_mistake_is_found() {
    let mistakes: [(&[Bug], Protocol, &str); 15] = [
        (&[Bug::Overwrite], TAKEOVER, FENCED),
        (&[Bug::Overwrite], TAKEOVER, FOLDS),
        (&[Bug::NoLed], TAKEOVER, FENCED),
        (&[Bug::AssumeFailed], TAKEOVER, ONCE),
        (&[Bug::SweepFirst], THREE_STEPS, KEPT),
        (&[Bug::SweepFirst], READER, READ),
        (&[Bug::IgnoreOpenSaves], TAKEOVER, WHOLE),
        (&[Bug::TrustReferences], THREE_STEPS, WHOLE),
        (&[Bug::AnyOrder], DAMAGE, WHOLE),
        (&[Bug::AnyOrder], THREE_STEPS, WHOLE),
        (&[Bug::StaleView], DAMAGE_AND_RESTART, TIDY),
        (&[Bug::RecordFirst], TAKEOVER, WHOLE),
        (&[Bug::RecordFirst], TAKEOVER, LOADABLE),
        (&[Bug::KeepNone], TAKEOVER, LOADABLE),
        (&[Bug::KeepOrphans], TAKEOVER, TIDY),
    ];
    for (bugs, bounds, property) in mistakes {
        let finish = HasDiscoveries::AnyOf(BTreeSet::from([property]));
        let protocol = Protocol { bugs, ..bounds };
        let checker = protocol.checker().threads(2).finish_when(finish).spawn_bfs().join();
        let states = checker.unique_state_count();
        let found = checker.discovery(property);
        let path = found.unwrap_or_else(|| panic!("{bugs:?} goes unnoticed in {states} states: {property}"));
        println!("{bugs:?} breaks \"{property}\" after {states} states: {:?}", path.into_actions());
    }
}

/// Minutes: set `CAIRN_MODEL=large`.
#[test]
fn the_protocol_holds_within_wider_bounds() {
    if std::env::var("CAIRN_MODEL").as_deref() != Ok("large") {
        println!("skipped: set CAIRN_MODEL=large");
        return;
    }
    let all = Budget { timeouts: 1, generations: 1, references: 1, quarantines: 1, readers: 1, ..NONE };
    check("large: damage, reader and references", bounds(1, 2, all), &[]);
    let twice = Budget { timeouts: 2, generations: 1, references: 1, ..NONE };
    check("large: two unanswered creates", bounds(1, 2, twice), &[]);
    let three = bounds(1, 2, Budget { timeouts: 1, generations: 1, references: 1, ..NONE });
    check("large: three leaders", Protocol { leaders: 3, ..three }, &[]);
    let steps = Budget { timeouts: 1, generations: 1, references: 1, ..NONE };
    check("large: three steps in two generations", bounds(1, 3, steps), &[]);
}
