//! What the members of a parity group tell one another: each says what it holds on every change, and one that waits for
//! the others in vain asks them.

use proto::ids::JobName;
use proto::wire::{self, GroupHeld, GroupQuery};

use super::sync::Telling;
use super::{Memory, heard};
use crate::driver::Input;
use crate::machine::keeper::PeerStep;

/// A member's answer to the question which steps it holds.
#[derive(Debug)]
pub(crate) struct Holds {
    job: JobName,
    generation: u64,
    /// Where it was asked.
    address: String,
    held: GroupHeld,
}

impl Memory {
    /// A peer says what it holds. `false`: not of the generation this node is in; it is to say it again.
    pub(crate) fn peer(&mut self, state: &wire::GroupState) -> bool {
        let Ok(job) = JobName::new(state.job.as_str()) else { return true };
        let Some(of) = self.jobs.get_mut(&job) else { return false };
        let current = of.telling.as_ref().map_or(0, Telling::generation);
        if state.generation != current {
            // One of a generation that is over has nothing more to say.
            return state.generation < current;
        }
        let Some(member) = of.group.members.iter().position(|member| member.node == state.node) else { return true };
        let ranks = of.group.members[member].ranks.clone();
        let (steps, described) = heard::read_state(state, &ranks);
        let (now, ahead): (Vec<_>, Vec<_>) = described.into_iter().partition(|(key, ..)| of.keeper.keeps(*key));
        if !of.keeper.peer(member, state.generation, state.sequence, steps) {
            // A newer word has overtaken it.
            return true;
        }
        for (key, rank, described) in now {
            self.vault.describe(&job, key, rank, described);
        }
        of.heard.hear(member, ahead);
        true
    }

    /// Tells the members what this node holds.
    pub(super) fn publish(&mut self, job: &JobName) {
        let Some(of) = self.jobs.get_mut(job) else { return };
        let Some(telling) = &mut of.telling else { return };
        let generation = telling.generation();
        let ranks = of.group.members.iter().find(|member| member.node == self.node).map(|member| &member.ranks);
        let mine = |rank: &u32| ranks.is_some_and(|ranks| ranks.contains(rank));
        let steps = of.keeper.holds().map(|held| {
            let captures = self.vault.captures(job, (generation, held.step)).into_iter();
            let captures = captures.filter(|(rank, _)| mine(rank)).map(|(_, described)| described.json.to_vec());
            wire::HeldStep { step: held.step, captures: captures.collect(), encoded: held.encoded }
        });
        let steps = steps.collect();
        telling.say(steps);
    }

    /// Asks the members which steps they hold; answers come as inputs.
    pub(super) fn ask(&self, job: &JobName) {
        let Some((of, telling)) = self.jobs.get(job).and_then(|of| Some((of, of.telling.as_ref()?))) else { return };
        let generation = telling.generation();
        for member in of.group.members.iter().filter(|member| member.node != self.node) {
            let (peers, inputs) = (self.peers.clone(), self.inputs.clone());
            let (job, address) = (job.clone(), member.snapshots.clone());
            tokio::spawn(async move {
                let query = GroupQuery { job: job.to_string(), generation };
                // One that cannot be reached is asked again, as long as that is of interest.
                if let Ok(held) = peers.ask(&address, query).await {
                    let _ = inputs.send(Input::Holds(Holds { job, generation, address, held })).await;
                }
            });
        }
    }

    /// A member has answered. Returns its job.
    pub(crate) fn answered(&mut self, holds: Holds) -> JobName {
        let Holds { job, generation, address, held } = holds;
        if let Some(of) = self.jobs.get_mut(&job)
            && let Some(member) = of.group.members.iter().position(|member| member.snapshots == address)
        {
            let step = |step: &u64| PeerStep { step: *step, encoded: held.encoded.contains(step) };
            let steps: Vec<PeerStep> = held.steps.iter().map(step).collect();
            of.keeper.answered(member, generation, held.sequence, &steps, &held.complete);
        }
        job
    }

    /// What this node holds whole of a generation; `None`: it is not in it.
    pub(crate) fn asked(&self, query: &GroupQuery) -> Option<GroupHeld> {
        let of = self.jobs.get(&JobName::new(query.job.as_str()).ok()?)?;
        let telling = of.telling.as_ref().filter(|telling| telling.generation() == query.generation)?;
        let complete = of.keeper.complete().collect();
        Some(GroupHeld { complete, ..telling.held() })
    }
}
