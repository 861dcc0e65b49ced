//! What must hold in every state, and what must be possible at all.
//!
//! The second kind keeps the first honest: a model in which nothing is ever committed, overtaken or collected has no
//! torn checkpoints either.

use stateright::{Model, Property};

use crate::chain::{Event, History};
use crate::protocol::Protocol;
use crate::state::{Doing, Reader, State};

pub(crate) const FOLDS: &str = "the chain can always be read";
pub(crate) const WHOLE: &str = "a committed checkpoint that is not deleted has its manifest and all its objects";
pub(crate) const LOADABLE: &str = "there is always a newest good checkpoint, and it loads";
pub(crate) const ONCE: &str = "no step of a generation is committed twice";
pub(crate) const FENCED: &str = "no record of a fenced leader is appended after its successor took over";
pub(crate) const KEPT: &str = "nothing that a checkpoint reaches is deleted";
pub(crate) const READ: &str = "a reader finds every file of a checkpoint that is not deleted";
pub(crate) const TIDY: &str = "at rest the last step is committed and nothing unreached is left";

/// Each must be reached in some run.
pub(crate) const POSSIBLE: [&str; 6] = [
    "a checkpoint refers to an object older than itself",
    "an object outlives the checkpoint that first named it",
    "a create takes effect after its author has read the chain again",
    "two leaders are awake",
    "a second leader commits",
    "everything comes to rest",
];

/// All properties.
pub(crate) fn all() -> Vec<Property<Protocol>> {
    vec![
        Property::always(FOLDS, |_, s: &State| s.history().is_some()),
        Property::always(WHOLE, |_, s: &State| is_whole(s)),
        Property::always(LOADABLE, |_, s: &State| is_loadable(s)),
        Property::always(ONCE, |_, s: &State| is_committed_once(s)),
        Property::always(FENCED, |_, s: &State| !s.overtaken),
        Property::always(KEPT, |_, s: &State| !s.robbed),
        Property::always(READ, |_, s: &State| s.reader != Reader::Torn),
        Property::always(TIDY, |model, s| !at_rest(model, s) || is_tidy(model, s)),
        Property::sometimes(POSSIBLE[0], |_, s: &State| refers_back(s)),
        Property::sometimes(POSSIBLE[1], |_, s: &State| outlives(s)),
        Property::sometimes(POSSIBLE[2], |_, s: &State| is_late(s)),
        Property::sometimes(POSSIBLE[3], |_, s: &State| {
            s.leaders.iter().filter(|l| l.doing == Doing::Nothing).count() > 1
        }),
        Property::sometimes(POSSIBLE[4], |_, s: &State| second_commits(s)),
        Property::sometimes(POSSIBLE[5], at_rest),
    ]
}

fn checkpoints(s: &State) -> History {
    s.history().unwrap_or_default()
}

/// A quarantined checkpoint is known to be damaged; the model's damage is that one.
fn is_whole(s: &State) -> bool {
    checkpoints(s).checkpoints.iter().filter(|c| !c.quarantined).all(|c| s.is_whole(&c.manifest))
}

fn is_loadable(s: &State) -> bool {
    let quarantined = s.records.iter().any(|r| matches!(r.event, Event::Quarantined(_)));
    checkpoints(s).newest_good().map_or(quarantined, |newest| s.is_whole(&newest.manifest))
}

fn is_committed_once(s: &State) -> bool {
    let committed = s.records.iter().filter_map(|r| match r.event {
        Event::Committed(m) => Some((m.name.generation, m.name.step)),
        _ => None,
    });
    let mut committed: Vec<_> = committed.collect();
    let all = committed.len();
    committed.sort_unstable();
    committed.dedup();
    committed.len() == all
}

/// The newest leader lives, and no process can do anything any more.
fn at_rest(model: &Protocol, s: &State) -> bool {
    let idle = |doing: &Doing| matches!(doing, Doing::Nothing | Doing::Dead);
    let settled = s.in_flight.is_empty() && s.leaders.iter().all(|l| idle(&l.doing));
    if !settled || s.leaders.last().is_none_or(|last| last.doing == Doing::Dead) {
        return false;
    }
    let mut actions = vec![];
    model.actions(s, &mut actions);
    actions.into_iter().all(|action| model.next_state(s, action).is_none_or(|next| next == *s))
}

fn is_tidy(model: &Protocol, s: &State) -> bool {
    let live = checkpoints(s).checkpoints;
    let objects = s.objects.iter().all(|o| live.iter().any(|c| c.manifest.objects().any(|k| k == o)));
    let manifests = s.manifests.iter().all(|m| live.iter().any(|c| c.manifest == *m));
    let quarantined = s.records.iter().any(|r| matches!(r.event, Event::Quarantined(_)));
    let last = live.iter().any(|c| c.step() == model.steps);
    objects && manifests && (last || quarantined)
}

fn refers_back(s: &State) -> bool {
    let back = |c: &crate::chain::Checkpoint| c.manifest.objects().any(|o| o.step < c.step());
    checkpoints(s).checkpoints.iter().any(back)
}

fn outlives(s: &State) -> bool {
    let live = checkpoints(s).checkpoints;
    let first_gone = |o: &crate::chain::Object| !live.iter().any(|c| c.step() == o.step);
    live.iter().any(|c| c.manifest.objects().any(|o| first_gone(o) && s.objects.contains(o)))
}

/// A create is still under way whose author is no longer in doubt, or gone.
fn is_late(s: &State) -> bool {
    let author = |epoch: u8| s.leaders.get(usize::from(epoch) - 1);
    s.in_flight.iter().any(|(_, r)| author(r.epoch).is_some_and(|leader| !leader.unclear))
}

fn second_commits(s: &State) -> bool {
    s.records.iter().any(|r| r.epoch > 1 && matches!(r.event, Event::Committed(_)))
}
