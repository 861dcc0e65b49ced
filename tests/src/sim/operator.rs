//! The operator: submits the job, changes its mind while things go wrong, and looks at the job until it is finished.

use std::time::Duration;

use proto::tls::Role;
use proto::wire::jobs_client::JobsClient;
use proto::wire::{self, JobStatus};
use tokio::time::{sleep, timeout};
use tonic::Status;
use tonic::transport::Endpoint;

use super::Options;
use super::hosts::Site;
use super::network::{COORDINATOR, PORT};
use super::oracle::job;
use super::random::Random;
use super::truth;

/// Between two looks at the job.
const LOOK: Duration = Duration::from_millis(1_500);
/// For a call.
const CALL: Duration = Duration::from_secs(4);

/// What is asked of the coordinator.
#[derive(Debug, Clone)]
enum Ask {
    Submit,
    Look,
    Scale(u32),
    Pause,
    Resume,
    /// A node takes no more work, or takes it again.
    Drain(String, bool),
}

/// Works until the job is finished.
pub(crate) async fn work(site: Site, options: Options, nodes: Vec<&'static str>) {
    let mut random = Random::new(options.seed, 3);
    let mut ask = Ask::Submit;
    let mut drained: Option<String> = None;
    loop {
        let told = timeout(CALL, site.ask(&ask)).await;
        if let Ok(Ok(Some(status))) = &told {
            site.told(status);
        }
        let quiet = {
            let state = site.world.lock();
            if state.finished {
                break;
            }
            state.quiet.is_some() || options.shut
        };
        let paused = site.world.lock().told.starts_with("paused");
        ask = match (ask, told) {
            // Nobody was there: a submission is made again. A job that is there already was taken before.
            (Ask::Submit, Ok(Err(status))) if status.code() == tonic::Code::FailedPrecondition => Ask::Look,
            (Ask::Submit, Ok(Err(_)) | Err(_)) => Ask::Submit,
            (Ask::Look, Ok(Err(status))) if status.code() == tonic::Code::NotFound => Ask::Submit,
            (Ask::Resume, Ok(Err(status))) if status.code() == tonic::Code::FailedPrecondition => Ask::Look,
            // What must not be forgotten is asked again, of the other coordinator.
            (ask @ (Ask::Drain(_, false) | Ask::Resume), Ok(Err(_)) | Err(_)) => ask,
            (Ask::Look, _) if paused => Ask::Resume,
            (Ask::Look, _) if quiet => match drained.take() {
                Some(node) => Ask::Drain(node, false),
                None => Ask::Look,
            },
            (Ask::Look, _) => change(&mut random, &nodes, &mut drained),
            _ => Ask::Look,
        };
        sleep(LOOK).await;
    }
    std::future::pending::<()>().await;
}

/// What the operator wants while things go wrong: mostly to know.
fn change(random: &mut Random, nodes: &[&'static str], drained: &mut Option<String>) -> Ask {
    match random.below(16) {
        0 => Ask::Scale(random.within(1, 4) as u32),
        1 => Ask::Pause,
        2 => match drained.take() {
            Some(node) => Ask::Drain(node, false),
            None => {
                let node = nodes[random.below(nodes.len() as u64) as usize].to_string();
                *drained = Some(node.clone());
                Ask::Drain(node, true)
            }
        },
        _ => Ask::Look,
    }
}

impl Site {
    fn told(&self, status: &JobStatus) {
        let mut state = self.world.lock();
        let told = format!("{} generation {} of {}", status.state, status.generation, status.world_size);
        if state.told != told {
            state.note(self.host, "status", &told);
            state.told = told;
        }
        state.finished |= status.state == "finished";
        if status.state == "failed" {
            let reason = format!("no progress: the job failed: {}", status.reason);
            state.hold(self.host, Err(reason));
        }
    }

    async fn ask(&self, ask: &Ask) -> Result<Option<JobStatus>, Status> {
        if !matches!(ask, Ask::Look) {
            self.world.note(self.host, "asks", format_args!("{ask:?}"));
        }
        let endpoint = Endpoint::from_shared(format!("http://{COORDINATOR}:{PORT}")).expect("an address");
        let channel = self.security().connect(&endpoint, &[Role::Coordinator]).await;
        let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
        let token = self.token.clone();
        let mut client = JobsClient::with_interceptor(channel, move |request| token.sign(request));
        let request = wire::JobRequest { job: job().to_string() };
        let status = match ask {
            Ask::Submit => {
                let spec = serde_json::to_vec(&truth::job(self.shape)).expect("a spec is JSON");
                client.submit(wire::SubmitRequest { spec, ..Default::default() }).await?;
                return Ok(None);
            }
            Ask::Drain(node, true) => {
                return client.drain(wire::NodeRequest { node: node.clone() }).await.map(|_| None);
            }
            Ask::Drain(node, false) => {
                return client.undrain(wire::NodeRequest { node: node.clone() }).await.map(|_| None);
            }
            Ask::Look => client.status(request).await?,
            Ask::Scale(workers) => client.scale(wire::ScaleRequest { job: request.job, workers: *workers }).await?,
            Ask::Pause => client.pause(request).await?,
            Ask::Resume => client.resume(request).await?,
        };
        Ok(Some(status.into_inner()))
    }
}
