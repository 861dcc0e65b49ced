//! The stream to the coordinator, made again for ever.
//!
//! One attempt: connect, send the hello, read the welcome, prove that this node sees the coordinator's store by reading
//! back a nonce it wrote there (two hosts with different disks under one path are caught here, before any job), then
//! pass on orders until the stream ends. What ends the agent is only what trying again cannot mend: a refusal, a
//! foreign store, an address that is none.
//!
//! Several coordinators may be named, of which one leads: those that stand by say so. A stream that broke is made again
//! where it was, since a coordinator waits for its agents only a moment; then the others are tried in turn.

use std::time::Duration;

use checkpoint_store::Opener;
use proto::auth::Token;
use proto::tls::{Refused, Role, Security};
use proto::wire::cluster_client::ClusterClient;
use proto::wire::{self, coordinator_message};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::AgentError;
use crate::driver::Input;

/// Between two attempts: doubles from the first to the last.
const WAITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// To open a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// The same, and for the handshake, while there are other coordinators to try.
const TURN: Duration = Duration::from_secs(3);
/// Silence on the connection after which it is probed, and again after which it is given up. Both together are shorter
/// than what a standby needs to take a silent leader's place: its agents look for it when it begins to lead.
const PROBE: Duration = Duration::from_secs(2);
/// To read the nonce from the store.
const PROOF: Duration = Duration::from_mins(1);
/// Longer than any nonce.
const MOST_NONCE: u64 = 4096;
/// Messages on their way to the coordinator.
const OUTGOING: usize = 1024;

/// The way to the coordinator, while there is one.
pub(crate) type Outgoing = mpsc::Sender<wire::AgentMessage>;

/// Why an attempt ended.
enum Ended {
    /// Nobody is there, or not any more.
    Lost(String),
    /// Somebody is there who does not speak as expected: worth a warning from the first time on.
    Strange(String),
    Fatal(AgentError),
}

/// The coordinators' addresses and how they are spoken to.
pub(crate) struct Way {
    /// At least one.
    endpoints: Vec<Endpoint>,
    token: Token,
    security: Security,
}

/// Checks the coordinators' addresses, separated by commas, before anything is started.
pub(crate) fn way(addresses: &str, token: Token, security: Security) -> Result<Way, AgentError> {
    let endpoints = addresses.split(',').map(|address| endpoint(address.trim(), &security));
    Ok(Way { endpoints: endpoints.collect::<Result<_, _>>()?, token, security })
}

fn endpoint(address: &str, security: &Security) -> Result<Endpoint, AgentError> {
    let refuse = |reason: String| AgentError::Address { address: address.into(), reason };
    let (host, port) = address.rsplit_once(':').ok_or_else(|| refuse("there is no port".into()))?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(refuse("host or port is not one".into()));
    }
    security.may_connect("--coordinator", address)?;
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| refuse(error.to_string()))?;
    Ok(endpoint
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PROBE)
        .keep_alive_timeout(PROBE)
        .keep_alive_while_idle(true))
}

/// Keeps the stream up until the driver is gone or a fatal error was passed to it.
pub(crate) async fn run(way: Way, stores: Opener, inputs: mpsc::Sender<Input>) {
    let mut wait = WAITS.0;
    let mut welcomed = false;
    // Which one is tried, how many were in vain, and what was last said of each.
    let (mut at, mut tried) = (0, 0);
    let mut said = vec![String::new(); way.endpoints.len()];
    loop {
        let mut taken_in = false;
        let ended = attempt(&way, at, &stores, &inputs, welcomed, &mut taken_in).await;
        let last = &mut said[at];
        welcomed |= taken_in;
        if inputs.send(Input::LinkDown).await.is_err() {
            return;
        }
        match ended {
            Ended::Fatal(error) => {
                let _ = inputs.send(Input::LinkFailed(error)).await;
                return;
            }
            Ended::Lost(reason) | Ended::Strange(reason) if reason == *last => {}
            // An agent may well be up before its coordinator; only a loss is worth a warning.
            Ended::Lost(reason) if !welcomed => {
                tracing::info!(reason, "no coordinator yet, trying again");
                *last = reason;
            }
            Ended::Lost(reason) | Ended::Strange(reason) => {
                tracing::warn!(reason, "no coordinator; workers go on, trying again");
                *last = reason;
            }
        }
        if taken_in {
            (tried, wait) = (0, WAITS.0);
        } else {
            (at, tried) = ((at + 1) % way.endpoints.len(), tried + 1);
            if tried % way.endpoints.len() > 0 {
                continue;
            }
            wait = (wait * 2).min(WAITS.1);
        }
        tokio::time::sleep(wait).await;
    }
}

async fn attempt(
    way: &Way,
    at: usize,
    stores: &Opener,
    inputs: &mpsc::Sender<Input>,
    welcomed: bool,
    taken_in: &mut bool,
) -> Ended {
    let lost = |error: String| Ended::Lost(error);
    let connecting = way.security.connect(&way.endpoints[at], &[Role::Coordinator]);
    let limit = if way.endpoints.len() > 1 { TURN } else { Duration::MAX };
    let channel: Channel = match tokio::time::timeout(limit, connecting).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => return unconnected(&error, welcomed),
        Err(_) => return lost(format!("no connection within {} s", limit.as_secs())),
    };
    let token = way.token.clone();
    let mut client = ClusterClient::with_interceptor(channel, move |request| token.sign(request))
        .max_decoding_message_size(wire::MOST_MESSAGE_BYTES)
        .max_encoding_message_size(wire::MOST_MESSAGE_BYTES);
    let (sender, outgoing) = mpsc::channel(OUTGOING);
    if inputs.send(Input::LinkUp(sender)).await.is_err() {
        return lost("the agent is ending".into());
    }
    let mut orders = match client.attach(ReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return refusal(&status, welcomed || *taken_in, way.security.hint()),
    };
    loop {
        let message = match orders.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return lost("the coordinator closed the stream".into()),
            Err(status) => return refusal(&status, welcomed || *taken_in, way.security.hint()),
        };
        match message.body {
            Some(coordinator_message::Body::Refused(reason)) => return Ended::Fatal(AgentError::Refused(reason)),
            Some(coordinator_message::Body::Welcome(ref welcome)) => {
                if let Err(ended) = prove(stores, welcome).await {
                    return ended;
                }
                *taken_in = true;
                tracing::info!(epoch = message.epoch, store = welcome.store, "taken in by the coordinator");
            }
            _ => {}
        }
        if inputs.send(Input::Coordinator(message)).await.is_err() {
            return lost("the agent is ending".into());
        }
    }
}

/// No connection came about. Certificates that disagree at the first try are the user's to mend; later they may be
/// those of a coordinator in change.
fn unconnected(error: &tonic::transport::Error, welcomed: bool) -> Ended {
    match proto::tls::refused(error) {
        Some(refused) if refused.is_settled() && !welcomed => Ended::Fatal(AgentError::Handshake(refused.clone())),
        Some(refused @ (Refused::Settled(_) | Refused::Broken(_))) => Ended::Strange(refused.to_string()),
        Some(refused @ Refused::Unreachable(_)) => Ended::Lost(refused.to_string()),
        None => Ended::Lost(with_cause(error)),
    }
}

/// A wrong credential at the first try is the user's to mend; later it may be a coordinator in change. `hint` is what
/// may be behind a connection that broke without a word.
fn refusal(status: &tonic::Status, welcomed: bool, hint: &str) -> Ended {
    use tonic::Code;
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument | Code::FailedPrecondition
            if !welcomed =>
        {
            Ended::Fatal(AgentError::Refused(status.message().to_string()))
        }
        _ if std::error::Error::source(status).is_some() && !welcomed && !hint.is_empty() => {
            Ended::Strange(format!("{}{hint}", status.message()))
        }
        _ => Ended::Lost(status.message().to_string()),
    }
}

/// Reads the coordinator's nonce from the store as this node sees it.
async fn prove(stores: &Opener, welcome: &wire::Welcome) -> Result<(), Ended> {
    let found = tokio::time::timeout(PROOF, read_nonce(stores, welcome)).await;
    let url = &welcome.store;
    match found {
        Err(_) => Err(Ended::Lost(format!("the store {url} did not answer within {} s", PROOF.as_secs()))),
        Ok(Ok(text)) if !welcome.nonce.is_empty() && text.contains(&welcome.nonce) => Ok(()),
        Ok(Ok(_)) => Err(foreign(url, "holds another nonce")),
        Ok(Err(error)) if error.kind() == checkpoint_store::Kind::Retry => Err(Ended::Lost(error.to_string())),
        Ok(Err(error)) if error.is_not_found() => Err(foreign(url, "does not hold its nonce")),
        Ok(Err(error)) => Err(Ended::Fatal(AgentError::ForeignStore(error.to_string()))),
    }
}

fn foreign(url: &str, what: &str) -> Ended {
    Ended::Fatal(AgentError::ForeignStore(format!(
        "the store {url} as this node sees it is not the coordinator's: it {what}; mount the same storage on every node"
    )))
}

/// The object that holds the nonce, as text.
async fn read_nonce(stores: &Opener, welcome: &wire::Welcome) -> Result<String, checkpoint_store::StoreError> {
    let store = stores.open_existing(&welcome.store)?;
    let bytes = store.get(&welcome.nonce_path, MOST_NONCE).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// An error with its causes in one line; tonic's own message says little.
fn with_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
