//! A worker process that speaks but does not train. The job's name says what it does: `die` ends at once; any other
//! captures step 4 when it is run, and goes on to step 5 once its slot is free.

use checkpoint_store::{
    CAPTURE_FORMAT, Capture, Dtype, HashList, ScalarState, Space, StateDecl, TensorDecl, hash_blocks,
};
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use proto::ids::{Generation, JobName, Rank, Step, WorldSize};
use proto::wire::node_client::NodeClient;
use proto::wire::worker_message::Body;
use proto::wire::{self, WorkerPhase, agent_command};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

fn argument(name: &str) -> String {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1).unwrap_or_else(|| panic!("{name} is missing"))
}

/// Plays the worker until the agent's stream ends.
pub(crate) async fn play() {
    let (socket, id, job) = (argument("--agent"), argument("--id"), argument("--job"));
    if job == "die" {
        std::process::exit(7);
    }
    let (sender, messages) = mpsc::channel(16);
    let say = async |body: Body| sender.send(wire::WorkerMessage { body: Some(body) }).await.unwrap();
    say(Body::Hello(id)).await;
    let channel = tonic::transport::Endpoint::from_static("http://agent.invalid")
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .unwrap();
    let mut commands = NodeClient::new(channel).attach(ReceiverStream::new(messages)).await.unwrap().into_inner();
    let mut slots = String::new();
    let mut state = wire::WorkerState::default();
    while let Some(Ok(command)) = commands.next().await {
        match command.body.unwrap() {
            agent_command::Body::Prepare(prepare) => {
                slots = prepare.slots;
                state.set_phase(WorkerPhase::Ready);
            }
            agent_command::Body::Run(run) => {
                let announcement = run.announcement.unwrap();
                state.set_phase(WorkerPhase::Running);
                state.generation = Some(announcement.generation);
                state.rank = Some(run.rank);
                say(Body::Captured(capture(&job, announcement.generation, &slots))).await;
            }
            agent_command::Body::SlotFree(0) => state.step = Some(5),
            agent_command::Body::Hold(_) => {
                state.set_phase(WorkerPhase::Ready);
                state.generation = None;
            }
            _ => {}
        }
        say(Body::State(state.clone())).await;
    }
}

fn capture(job: &str, generation: u64, slots: &str) -> wire::Captured {
    let space = Space::new(vec![TensorDecl { name: "w".into(), shape: vec![1000], dtype: Dtype::F32 }]).unwrap();
    let slot = vec![3u8; 3 * 4000];
    std::fs::write(format!("{slots}/slot-0"), &slot).unwrap();
    let hashes = HashList(hash_blocks(&slot[..4000], space.block_elements(), Dtype::F32));
    let capture = Capture {
        format: CAPTURE_FORMAT,
        job: JobName::new(job).unwrap(),
        generation: Generation::new(generation),
        rank: Rank::ZERO,
        world_size: WorldSize::ONE,
        space,
        scalar: ScalarState { step: Step::new(4), ..ScalarState::start(1, 10) },
        states: StateDecl::adamw(),
        hashes: vec![hashes; 3],
        stages: vec![],
    };
    wire::Captured {
        job: job.into(),
        generation,
        step: 4,
        world_size: 1,
        store: true,
        capture: capture.to_json().unwrap(),
        ..Default::default()
    }
}
