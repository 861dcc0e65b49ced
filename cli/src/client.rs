//! The way to the coordinator that leads: addresses, token, certificates, deadlines, and a watch that survives the
//! coordinator's restart.

use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::auth::Token;
use proto::event::JobEvent;
use proto::tls::{Refused, Role, Security};
use proto::wire::jobs_client::JobsClient;
use proto::wire::{MOST_MESSAGE_BYTES, NodesRequest, WatchRequest};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::args::OperatorArgs;
use crate::failure::{Failure, chain};
use crate::parts;

/// A call that takes longer is given up; pausing, which waits for a checkpoint, has its own limit.
const CALL: Duration = Duration::from_secs(30);
/// Silence on a connection after which it is probed, and again after which it is given up.
const PROBE: Duration = Duration::from_secs(5);
/// Of several coordinators one that leads says so within this.
const ANSWER: Duration = Duration::from_secs(3);
/// Of several coordinators one leads within this: a standby may just be taking over.
const CHANGEOVER: Duration = Duration::from_secs(15);
/// Between two rounds of asking.
const AGAIN: Duration = Duration::from_millis(200);

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

/// The coordinators somebody named, of which one leads.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    addresses: Vec<String>,
    token: Token,
    security: Security,
}

impl Way {
    /// To those at these addresses, separated by commas.
    pub(crate) fn new(addresses: &str, token: Token, security: Security) -> Result<Self, Failure> {
        Ok(Self { addresses: checked(addresses, &security)?, token, security })
    }

    /// A client of the one that leads. It connects on first use and again after a loss.
    pub(crate) async fn client(&self) -> Result<Client, Failure> {
        let clients = self.addresses.iter().map(|address| connect(address, self.token.clone(), &self.security));
        let mut clients: Vec<Client> = clients.collect::<Result<_, _>>()?;
        if clients.len() > 1 {
            let deadline = Instant::now() + CHANGEOVER;
            while Instant::now() < deadline {
                if let Some(leader) = leader(&clients).await {
                    return Ok(leader);
                }
                sleep(AGAIN).await;
            }
        }
        // None leads: the call that is made with it finds that out, and why.
        Ok(clients.swap_remove(0))
    }
}

/// Addresses separated by commas, each of which may be spoken to.
fn checked(addresses: &str, security: &Security) -> Result<Vec<String>, Failure> {
    let allowed = |address: &str| match security.may_connect("--coordinator", address) {
        Ok(()) => Ok(address.to_string()),
        Err(error) => Err(Failure::request(chain(&error))),
    };
    addresses.split(',').map(|address| allowed(address.trim())).collect()
}

/// Who of several answers, and that in the highest epoch: one that was replaced may not know it yet. One whose answer
/// is a refusal is as good as a leader's, if there is none: it tells the caller what is wrong.
async fn leader(clients: &[Client]) -> Option<Client> {
    let mut asked = JoinSet::new();
    for client in clients {
        let mut client = client.clone();
        asked.spawn(async move {
            let epoch = match client.list_nodes(timed_for(NodesRequest {}, ANSWER)).await {
                Ok(reply) => Some(reply.get_ref().epoch),
                Err(status) => (!is_passing(&status)).then_some(0),
            };
            epoch.map(|epoch| (epoch, client))
        });
    }
    // A task that broke off answers nothing.
    let answers = asked.join_all().await;
    answers.into_iter().flatten().max_by_key(|(epoch, _)| *epoch).map(|(_, client)| client)
}

/// A client of one coordinator, that connects on first use and again after a loss.
pub(crate) fn connect(address: &str, token: Token, security: &Security) -> Result<Client, Failure> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| Failure::request(format!("--coordinator {address:?} is not HOST:PORT: {error}")))?
        .connect_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .http2_keep_alive_interval(PROBE)
        .keep_alive_timeout(PROBE);
    let channel = security.connect_lazy(&endpoint, &[Role::Coordinator]);
    let client = JobsClient::with_interceptor(channel, Sign(token));
    Ok(client.max_decoding_message_size(MOST_MESSAGE_BYTES).max_encoding_message_size(MOST_MESSAGE_BYTES))
}

/// The way an operator's command asked for.
pub(crate) async fn way(args: &OperatorArgs) -> Result<Way, Failure> {
    let security = parts::security(&args.security)?;
    let addresses = checked(&args.coordinator, &security)?;
    let path = token_path(args.token_file.as_deref())?;
    Ok(Way { addresses, token: parts::wait_for_token(&path).await?, security })
}

/// The client an operator's command asked for.
pub(crate) async fn operator(args: &OperatorArgs) -> Result<Client, Failure> {
    way(args).await?.client().await
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
    // What HTTP/2 makes of an answer in TLS, or of the connection closed upon it; a coordinator's own status has no
    // source.
    if matches!(status.code(), Code::Internal | Code::Cancelled | Code::Unknown)
        && std::error::Error::source(&status).is_some()
    {
        let cause = chain(&status);
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
    let away = matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown | Code::DeadlineExceeded);
    // A connection that broke under the call, as when a standby begins to lead; a coordinator's word has no cause.
    let broke = status.code() == Code::Internal && std::error::Error::source(status).is_some();
    !is_settled(status) && (away || broke)
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
pub(crate) fn follow(way: Way, job: String, patience: Duration) -> mpsc::Receiver<Result<JobEvent, Failure>> {
    let (sender, receiver) = mpsc::channel(256);
    tokio::spawn(async move {
        let (mut epoch, mut after) = (0, 0);
        let mut seen = Seen::default();
        let mut last_seen = Instant::now();
        loop {
            let request = WatchRequest { job: job.clone(), epoch, after };
            let mut client = match way.client().await {
                Ok(client) => client,
                Err(failure) => {
                    let _ = sender.send(Err(failure)).await;
                    return;
                }
            };
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
            sleep(AGAIN).await;
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_connection_that_broke_is_passing_and_what_a_coordinator_says_of_itself_is_not() {
        let mut status = Status::internal("h2 protocol error: http2 error");
        assert!(!is_passing(&status), "a coordinator's word has no cause");
        status.set_source(Arc::new(std::io::Error::other("the connection broke")));
        assert!(is_passing(&status));
        assert!(is_passing(&Status::unavailable("standing by")) && !is_passing(&Status::not_found("no such job")));
    }
}
