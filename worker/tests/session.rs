//! A worker's whole life through its socket: the same bits whatever the number of workers, threads and interruptions
//! (P1), and every kind of trouble told as what it is.

#[path = "session/agent.rs"]
mod agent;

use agent::Agent;
use proto::wire::{FailureKind, WorkerPhase, worker_message};

async fn whole(workers: usize, threads: u32) -> agent::Outcome {
    let mut agent = Agent::new(|_| {}).await;
    agent.start(workers, threads).await;
    agent.announce(1, None, 10, false).await;
    agent.finish(1, None).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_do_not_depend_on_workers_threads_or_interruptions() {
    let reference = whole(1, 1).await;
    assert_eq!(reference.checkpoint.step.get(), 10);
    assert_eq!(reference.losses.len(), 10);
    assert_eq!(reference.validation.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [5, 10]);
    assert!(reference.losses[9].1 < reference.losses[0].1, "it learns: {:?}", reference.losses);
    for (workers, threads) in [(1, 2), (2, 1), (3, 1), (5, 1)] {
        let other = whole(workers, threads).await;
        assert_eq!(other.losses, reference.losses, "{workers} workers, {threads} threads");
        assert_eq!(other.validation, reference.validation, "{workers} workers, {threads} threads");
        assert_eq!(other.checkpoint.digest, reference.checkpoint.digest, "{workers} workers, {threads} threads");
    }

    // Stopped at 4 with two workers, at 7 with three, ended with one.
    let mut agent = Agent::new(|_| {}).await;
    agent.start(2, 1).await;
    agent.announce(1, None, 4, false).await;
    let first = agent.finish(1, None).await.unwrap().checkpoint;
    agent.start(1, 1).await;
    agent.announce(2, Some(&first), 7, false).await;
    let second = agent.finish(2, Some(&first)).await.unwrap().checkpoint;
    agent.drop_worker(0);
    agent.drop_worker(0);
    agent.announce(3, Some(&second), 10, false).await;
    let last = agent.finish(3, Some(&second)).await.unwrap();
    assert_eq!((first.step.get(), second.step.get()), (4, 7));
    assert_eq!(last.losses, reference.losses[7..]);
    assert_eq!(last.checkpoint.digest, reference.checkpoint.digest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_peer_is_an_exchange_failure_and_the_survivor_goes_on() {
    let change = |spec: &mut proto::spec::JobSpec| {
        spec.training.steps = 100_000;
        spec.checkpoint.every_steps = 100_000;
    };
    let mut undisturbed = Agent::new(change).await;
    undisturbed.start(1, 1).await;
    undisturbed.announce(1, None, 10, false).await;
    let reference = undisturbed.finish(1, None).await.unwrap();
    let mut agent = Agent::new(change).await;
    agent.start(2, 1).await;
    agent.announce(1, None, 100_000, false).await;
    // Once the first step is done, rank 1 is lost.
    while !matches!(agent.hear().await.1, worker_message::Body::Step(_)) {}
    agent.drop_worker(1);
    let survivor = agent.workers[0].clone();
    loop {
        let (worker, body) = agent.hear().await;
        let worker_message::Body::State(state) = body else { continue };
        if worker == survivor && state.phase() == WorkerPhase::Failed {
            assert_eq!(state.failure.unwrap().kind(), FailureKind::Exchange);
            break;
        }
    }
    agent.hold(&survivor, 1).await;
    agent.announce(2, None, 10, false).await;
    let outcome = agent.finish(2, None).await.unwrap();
    assert_eq!(outcome.checkpoint.digest, reference.checkpoint.digest);
}

/// The last step's snapshot was in memory, and its upload was lost with the agent that made it: there is no step left
/// to take, and the checkpoint is made all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_last_step_that_is_in_memory_only_is_stored_by_the_next_generation() {
    let mut agent = Agent::new(|_| {}).await;
    agent.start(2, 1).await;
    agent.announce(1, None, 10, false).await;
    let first = agent.finish(1, None).await.unwrap().checkpoint;
    agent.memory = Some(proto::wire::MemoryStart { generation: 1, step: 10, world_size: 2, groups: vec![] });
    agent.announce(2, None, 10, false).await;
    let second = agent.finish(2, None).await.unwrap();
    assert_eq!((second.checkpoint.step.get(), second.losses), (10, vec![]), "no step was taken");
    assert_eq!(second.checkpoint.generation.get(), 2);
    assert_eq!(second.checkpoint.digest, first.digest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_asked_of_one_rank_stops_all_after_the_same_step() {
    let mut agent = Agent::new(|spec| spec.training.steps = 100_000).await;
    agent.start(2, 1).await;
    agent.announce(1, None, 100_000, false).await;
    while !matches!(agent.hear().await.1, worker_message::Body::Step(_)) {}
    agent.announce(1, None, 100_000, true).await;
    let outcome = agent.finish(1, None).await.unwrap();
    assert!(outcome.checkpoint.step.get() >= 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbers_that_cannot_be_used_end_the_job_on_every_rank() {
    let mut agent = Agent::new(|spec| {
        spec.optimizer.learning_rate = 1e30;
        spec.optimizer.clip_norm = None;
        spec.schedule.warmup_steps = 0;
    })
    .await;
    agent.start(2, 1).await;
    agent.announce(1, None, 10, false).await;
    let failure = agent.finish(1, None).await.unwrap_err();
    assert_eq!(failure.kind(), FailureKind::NonFinite, "{}", failure.reason);
    assert!(failure.reason.contains("step ") && failure.reason.contains("micro-batch"), "{}", failure.reason);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_and_wrong_input_are_told_apart() {
    let mut agent = Agent::new(|_| {}).await;
    agent.start(1, 1).await;
    agent.announce(1, None, 2, false).await;
    let first = agent.finish(1, None).await.unwrap().checkpoint;
    let object = find(agent.folder.path(), "safetensors");
    let mut bytes = std::fs::read(&object).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&object, bytes).unwrap();
    agent.announce(2, Some(&first), 10, false).await;
    let failure = agent.finish(2, Some(&first)).await.unwrap_err();
    assert_eq!(failure.kind(), FailureKind::Corrupt);
    assert!(failure.reason.contains(object.file_name().unwrap().to_str().unwrap()), "{}", failure.reason);

    let mut agent = Agent::new(|spec| spec.data.train = "/nowhere/text".into()).await;
    agent.start(1, 1).await;
    let state = agent.state(&agent.workers[0]);
    assert_eq!((state.phase(), state.generation), (WorkerPhase::Failed, None));
    assert_eq!(state.failure.as_ref().unwrap().kind(), FailureKind::Input);
}

fn find(folder: &std::path::Path, ending: &str) -> std::path::PathBuf {
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == ending) {
                return path;
            }
        }
    }
    panic!("no .{ending} file")
}
