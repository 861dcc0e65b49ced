//! What must hold in every state, and what must be possible.

use stateright::Property;

use crate::protocol::{Event, Protocol, State, committed, newest};

pub(crate) const ASCEND: &str = "generations ascend along the chain, each once";
pub(crate) const LED: &str = "epochs do not descend along the chain, and each begins with its led record";
pub(crate) const BACKED: &str = "what is announced, and what a leader relies on, is in the chain";
pub(crate) const FENCED: &str = "nothing of a generation is committed after a newer one was formed";
pub(crate) const ONCE: &str = "no step of a generation is committed twice";
pub(crate) const OBEY: &str = "no node carries out an order of an epoch lower than one it has obeyed";
pub(crate) const LIVE: &str = "a worker acts in the highest generation its node was told of, or in none";

/// What must be possible, or the properties hold for want of anything happening.
pub(crate) const POSSIBLE: [&str; 4] = [
    "a second leader commits what a generation of the first has saved: its loss was nothing",
    "a second leader forms a generation of its own, and commits of it",
    "a leader that slept learns from a node that another leads",
    "a node is left out of a generation, and its worker stops",
];

type Check = fn(&Protocol, &State) -> bool;

pub(crate) fn all() -> Vec<Property<Protocol>> {
    let always: [(&'static str, Check); 7] = [
        (ASCEND, ascend),
        (LED, led),
        (BACKED, backed),
        (FENCED, fenced),
        (ONCE, once),
        (OBEY, |_, state| !state.nodes.iter().any(|node| node.went_back)),
        (LIVE, |_, state| state.nodes.iter().all(|node| node.acting == 0 || node.acting == node.highest)),
    ];
    let sometimes: [Check; 4] =
        [taken_over, formed_again, |_, state| state.leaders.iter().any(|leader| leader.was_told), left_out];
    let always = always.into_iter().map(|(name, check)| Property::always(name, check));
    always.chain(POSSIBLE.into_iter().zip(sometimes).map(|(name, check)| Property::sometimes(name, check))).collect()
}

fn ascend(_: &Protocol, state: &State) -> bool {
    let numbers = state.chain.iter().filter_map(|record| match record.event {
        Event::Generation { number, .. } => Some(number),
        Event::Led | Event::Committed { .. } => None,
    });
    numbers.collect::<Vec<_>>().is_sorted_by(|a, b| a < b)
}

fn led(_: &Protocol, state: &State) -> bool {
    let mut epoch = 0;
    state.chain.iter().all(|record| {
        let begins = record.epoch > epoch && record.event == Event::Led;
        let goes_on = record.epoch == epoch && record.event != Event::Led;
        epoch = epoch.max(record.epoch);
        begins || goes_on
    })
}

fn backed(_: &Protocol, state: &State) -> bool {
    let announced = state.sent.iter().all(|desired| {
        let event = Event::Generation { number: desired.generation, members: desired.members, start: desired.start };
        state.chain.iter().any(|record| record.event == event)
    });
    announced && state.leaders.iter().all(|leader| leader.is_down || state.chain.starts_with(&leader.known))
}

fn fenced(_: &Protocol, state: &State) -> bool {
    let mut newest = 0;
    state.chain.iter().all(|record| match record.event {
        Event::Led => true,
        Event::Generation { number, .. } => {
            newest = number;
            true
        }
        Event::Committed { generation, .. } => generation == newest,
    })
}

fn once(_: &Protocol, state: &State) -> bool {
    let all: Vec<_> = committed(&state.chain).collect();
    all.iter().enumerate().all(|(at, of)| !all[..at].contains(of))
}

fn taken_over(_: &Protocol, state: &State) -> bool {
    let formed = |generation: u8, epoch: u8| {
        let of = |event| matches!(event, Event::Generation { number, .. } if number == generation);
        state.chain.iter().any(|record| record.epoch == epoch && of(record.event))
    };
    state.chain.iter().any(|record| match record.event {
        Event::Committed { generation, .. } => record.epoch == 2 && formed(generation, 1),
        Event::Led | Event::Generation { .. } => false,
    })
}

fn formed_again(_: &Protocol, state: &State) -> bool {
    let (generation, _) = newest(&state.chain);
    let of_two = |record: &&crate::protocol::Record| record.epoch == 2;
    let formed = state.chain.iter().filter(of_two);
    let formed = formed.filter(|of| matches!(of.event, Event::Generation { number, .. } if number == generation));
    formed.count() == 1 && committed(&state.chain).any(|(of, _)| of == generation)
}

fn left_out(_: &Protocol, state: &State) -> bool {
    state.nodes.iter().any(|node| node.highest > 1 && node.acting == 0)
}
