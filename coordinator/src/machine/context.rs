//! What a job sees of the rest of the cluster while it acts, and where its actions go.

use std::time::Duration;

use proto::event::JobEvent;
use proto::ids::{JobName, NodeName};
use proto::wire::ReceiptSettled;
use proto::wire::coordinator_message::Body;

use super::Settings;
use super::action::Action;
use super::changes::Look;
use super::commit::Settlement;
use super::members::Members;
use super::memory::Inventory;

/// See the module header.
pub(super) struct Context<'a> {
    pub(super) now: Duration,
    pub(super) settings: &'a Settings,
    pub(super) members: &'a Members,
    pub(super) look: Look<'a>,
    pub(super) out: &'a mut Vec<Action>,
}

impl Context<'_> {
    pub(super) fn log(&mut self, job: &JobName, text: String) {
        self.out.push(Action::Log { job: Some(job.clone()), text });
    }

    /// What each node holds of a job.
    pub(super) fn inventories(&self, job: &JobName) -> impl Iterator<Item = (&NodeName, &Inventory)> {
        self.members.iter().filter_map(move |(node, agent)| Some((node, agent.memory.get(job)?)))
    }

    pub(super) fn publish(&mut self, job: &JobName, event: JobEvent) {
        self.out.push(Action::Publish { job: job.clone(), event });
    }

    pub(super) fn settle(&mut self, job: &JobName, owed: Vec<Settlement>) {
        for (node, name, committed) in owed {
            let Some(connection) = self.members.get(&node).and_then(|agent| agent.connection) else { continue };
            let body = Body::Settled(ReceiptSettled {
                job: job.to_string(),
                generation: name.generation.get(),
                step: name.step.get(),
                rank: name.rank.get(),
                committed,
            });
            self.out.push(Action::Send { node, connection, body });
        }
    }
}
