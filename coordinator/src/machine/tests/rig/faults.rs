//! What goes wrong on a rig: workers that end or give up, and a coordinator that another one follows.

use super::*;

impl Rig {
    /// The coordinator dies, and another one takes over in the next epoch; the agents attach to it.
    pub(in crate::machine::tests) fn successor(mut self) -> Self {
        let nodes = std::mem::take(&mut self.nodes);
        let mut next = Self::new();
        next.cluster = Pair::new(Settings { epoch: Epoch::new(2), ..settings() });
        next.ledger.clone_from(&self.ledger);
        next.handle(Event::Loaded { job: job_name(), ledger: Box::new(self.ledger.clone().unwrap()) });
        assert_eq!(next.pending.front(), Some(&(job_name(), Operation::Append(Entry::Led))));
        next.settle();
        for (name, fake) in nodes {
            let (connection, slots, workers) = (fake.connection, fake.slots, fake.workers.clone());
            next.nodes.insert(name.clone(), fake);
            next.handle(Event::Attached {
                node: name,
                incarnation: "same".into(),
                connection,
                slots,
                home: Home::default(),
                state: NodeState { workers, epoch: 1, ..NodeState::default() },
            });
        }
        next
    }

    /// Gives up the exchange in a worker, which says what it gave and had.
    pub(in crate::machine::tests) fn give_up(&mut self, name: &str, moved: (u64, u64)) {
        let name = node(name);
        let worker = &mut self.nodes.get_mut(&name).unwrap().workers[0];
        worker.phase = WorkerPhase::Failed;
        let (kind, reason) = (FailureKind::Exchange, "not done in time".into());
        worker.failure = Some(Failure { kind, reason, exit: (None, None), moved: Some(moved) });
        self.report(&name);
    }

    /// Ends one worker as its agent would report it.
    pub(in crate::machine::tests) fn kill(&mut self, name: &str, index: usize) {
        self.fail(name, index, WorkerPhase::Exited, FailureKind::Exit, "killed by signal 9");
    }

    pub(in crate::machine::tests) fn fail(
        &mut self,
        name: &str,
        index: usize,
        phase: WorkerPhase,
        kind: FailureKind,
        reason: &str,
    ) {
        let name = node(name);
        let worker = &mut self.nodes.get_mut(&name).unwrap().workers[index];
        worker.phase = phase;
        let signal = (kind == FailureKind::Exit).then_some(9);
        worker.failure = Some(Failure { kind, reason: reason.into(), exit: (None, signal), moved: None });
        self.report(&name);
    }
}
