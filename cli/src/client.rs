//! The way to a coordinator: address, token, certificates, deadlines, and a watch that survives the coordinator's
//! restart.

use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::auth::Token;
use proto::event::JobEvent;
use proto::tls::{Refused, Role, Security};
use proto::wire::jobs_client::JobsClient;
use proto::wire::{MOST_MESSAGE_BYTES, WatchRequest};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::args::OperatorArgs;
use crate::failure::{Failure, chain};
use crate::parts;

/// A call that takes longer is given up; pausing, which waits for a checkpoint, has its own limit.
const CALL: Duration = Duration::from_secs(30);

/// Adds the token to each call.
#[derive(Clone)]
pub(crate) struct Sign(Token);

impl tonic::service::Interceptor for Sign {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.0.sign(request)
    }
}

pub(crate) type Client = JobsClient<InterceptedService<Channel, Sign>>;

/// The default token file: `~/.cairn/token`.
pub(crate) fn token_path(given: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = given {
        return Ok(path.to_path_buf());
    }
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    let home = home.ok_or_else(|| Failure::request("HOME is not set: name the token file with --token-file"))?;
    Ok(PathBuf::from(home).join(".cairn").join("token"))
}

/// A client that connects on first use and again after a loss.
pub(crate) fn connect(address: &str, token: Token, security: &Security) -> Result<Client, Failure> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| Failure::request(format!("--coordinator {address:?} is not HOST:PORT: {error}")))?
        .connect_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10));
    let channel = security.connect_lazy(&endpoint, &[Role::Coordinator]);
    let client = JobsClient::with_interceptor(channel, Sign(token));
    Ok(client.max_decoding_message_size(MOST_MESSAGE_BYTES).max_encoding_message_size(MOST_MESSAGE_BYTES))
}

/// The client an operator's command asked for.
pub(crate) async fn operator(args: &OperatorArgs) -> Result<Client, Failure> {
    let security = parts::security(&args.security)?;
    let allowed = security.may_connect("--coordinator", &args.coordinator);
    allowed.map_err(|error| Failure::request(chain(&error)))?;
    let path = token_path(args.token_file.as_deref())?;
    let token = parts::wait_for_token(&path).await?;
    connect(&args.coordinator, token, &security)
}

/// A request with the ordinary deadline.
pub(crate) fn timed<T>(message: T) -> Request<T> {
    timed_for(message, CALL)
}

/// A request with a deadline of its own.
pub(crate) fn timed_for<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// A status as a failure, an unreachable coordinator explained.
pub(crate) fn explain(status: Status, address: &str) -> Failure {
    match proto::tls::refused(&status) {
        Some(refused @ Refused::Settled(_)) => {
            return Failure::request(format!("the coordinator at {address} cannot be used: {refused}"));
        }
        Some(refused @ Refused::Broken(_)) => {
            return Failure::job(format!("the coordinator at {address} cannot be used: {refused}"));
        }
        Some(Refused::Unreachable(_)) | None => {}
    }
    // What HTTP/2 makes of an answer in TLS.
    if matches!(status.code(), Code::Internal | Code::Cancelled) && std::error::Error::source(&status).is_some() {
        let cause = status.message();
        return Failure::job(format!(
            "the coordinator at {address} does not answer as it should ({cause}): if it was started with --tls, use \
             --tls here as well"
        ));
    }
    if status.code() == Code::Unavailable {
        let cause = proto::tls::refused(&status).map_or_else(|| chain(&status), ToString::to_string);
        return Failure::job(format!(
            "no coordinator answers at {address} ({cause}); start one with `cairn coordinator`, or name another with \
             --coordinator"
        ));
    }
    status.into()
}

/// Whether the same call may succeed later: the coordinator is away or restarting.
pub(crate) fn is_passing(status: &Status) -> bool {
    !is_settled(status)
        && matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown | Code::DeadlineExceeded)
}

/// Whether certificates disagree.
fn is_settled(status: &Status) -> bool {
    proto::tls::refused(status).is_some_and(Refused::is_settled)
}

/// Whether a failed call cannot have reached a coordinator: nobody listened.
pub(crate) fn was_unheard(status: &Status) -> bool {
    chain(status).contains("tcp connect error")
}

/// The newest steps shown: a new coordinator is told of the last ones again.
#[derive(Default)]
struct Seen {
    step: u64,
    validation: u64,
}

impl Seen {
    /// Whether an event was shown before. A new generation takes steps again, and they are shown again.
    fn repeats(&mut self, event: &JobEvent) -> bool {
        let (newest, step) = match event {
            JobEvent::Generation { .. } => {
                *self = Self::default();
                return false;
            }
            JobEvent::Step { step, .. } => (&mut self.step, *step),
            JobEvent::Validation { step, .. } => (&mut self.validation, *step),
            _ => return false,
        };
        let repeated = step <= *newest;
        *newest = step.max(*newest);
        repeated
    }
}

/// Follows a job, reconnecting while the coordinator is away for at most `patience`; ends after the last event.
///
/// Events arrive on the channel; an error is the last thing on it.
pub(crate) fn follow(mut client: Client, job: String, patience: Duration) -> mpsc::Receiver<Result<JobEvent, Failure>> {
    let (sender, receiver) = mpsc::channel(256);
    tokio::spawn(async move {
        let (mut epoch, mut after) = (0, 0);
        let mut seen = Seen::default();
        let mut last_seen = Instant::now();
        loop {
            let request = WatchRequest { job: job.clone(), epoch, after };
            let status = match client.watch(Request::new(request)).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    let ended = loop {
                        match stream.message().await {
                            Ok(Some(event)) => {
                                (epoch, after) = (event.epoch, event.sequence);
                                // A kind this version does not know is for a newer tool.
                                let Ok(event) = serde_json::from_str::<JobEvent>(&event.json) else { continue };
                                if seen.repeats(&event) {
                                    continue;
                                }
                                let last = event.is_last();
                                if sender.send(Ok(event)).await.is_err() || last {
                                    return;
                                }
                            }
                            Ok(None) => break Status::unavailable("the coordinator closed the stream"),
                            Err(status) => break status,
                        }
                    };
                    // It was there until now, however long there was nothing to tell.
                    last_seen = Instant::now();
                    ended
                }
                Err(status) => status,
            };
            if !is_passing(&status) || last_seen.elapsed() > patience {
                let _ = sender.send(Err(status.into())).await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    receiver
}
