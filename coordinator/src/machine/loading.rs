//! What having a generation's state cost, stage by stage, the slowest rank of each named.

use proto::event::{JobEvent, LoadedStage};

use super::live::Live;
use super::members::Members;

/// Tells it, once all members hold state; `None` if nothing was loaded.
pub(super) fn loaded(live: &Live, members: &Members) -> Option<JobEvent> {
    let mut stages: Vec<LoadedStage> = vec![];
    for (rank, member) in (0..).zip(&live.membership.members) {
        let worker = members.get(&member.node)?.workers.iter().find(|worker| worker.id == member.worker)?;
        for stage in &worker.load {
            let slow = LoadedStage {
                stage: stage.name.clone(),
                seconds: stage.seconds,
                rank,
                node: member.node.to_string(),
                bytes: stage.bytes,
            };
            match stages.iter_mut().find(|known| known.stage == slow.stage) {
                None => stages.push(slow),
                Some(known) => {
                    let bytes = known.bytes.saturating_add(slow.bytes);
                    if slow.seconds > known.seconds {
                        *known = slow;
                    }
                    known.bytes = bytes;
                }
            }
        }
    }
    let (generation, step) = (live.generation().get(), live.start().get());
    (!stages.is_empty()).then_some(JobEvent::Loaded { generation, step, stages })
}
