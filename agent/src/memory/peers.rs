//! Reading what other agents hold.
//!
//! One channel for each peer, opened when first needed. Every call has a deadline, and what a peer sends is bounded by
//! what was asked for. A peer that cannot be reached is no error of this node: the caller takes another source.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::auth::Token;
use proto::tls::{Role, Security};
use proto::wire::snapshots_client::SnapshotsClient;
use proto::wire::{self, GroupHeld, GroupQuery, ReadRequest, StepDescription, StepRequest};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// To open a connection, and for a short call.
pub(super) const CALL: Duration = Duration::from_secs(5);
/// Silence on a connection in use after which it is probed, and again after which it is given up: well within a call,
/// so that after one that failed the next one has a connection that works. The network may drop what it carries without
/// a word, and a group whose members do not hear of each other keeps its slots for ever.
const PROBE: Duration = Duration::from_secs(2);
/// Without a byte arriving, a read is given up.
const STALL: Duration = Duration::from_secs(5);

type Sign = Box<dyn FnMut(tonic::Request<()>) -> Result<tonic::Request<()>, Status> + Send>;
type Client = SnapshotsClient<InterceptedService<Channel, Sign>>;

/// All peers of this node.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    token: Token,
    security: Security,
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
    /// Those whose certificate disagrees with this node's: said once.
    strange: Arc<Mutex<BTreeSet<String>>>,
}

impl Peers {
    pub(crate) fn new(token: Token, security: Security) -> Self {
        Self { token, security, channels: Arc::default(), strange: Arc::default() }
    }

    pub(super) fn client(&self, address: &str) -> Result<Client, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => {
                let endpoint = Endpoint::from_shared(format!("http://{address}"))
                    .map_err(|error| Status::invalid_argument(format!("peer address {address:?}: {error}")))?;
                let endpoint = endpoint
                    .connect_timeout(CALL)
                    .tcp_nodelay(true)
                    .http2_keep_alive_interval(PROBE)
                    .keep_alive_timeout(PROBE);
                let channel = self.security.connect_lazy(&endpoint, &[Role::Agent, Role::Coordinator]);
                channels.insert(address.to_string(), channel.clone());
                channel
            }
        };
        let token = self.token.clone();
        let sign: Sign = Box::new(move |request| token.sign(request));
        Ok(SnapshotsClient::with_interceptor(channel, sign)
            .max_decoding_message_size(wire::MOST_MESSAGE_BYTES)
            .max_encoding_message_size(wire::MOST_MESSAGE_BYTES))
    }

    /// Tells a peer what this node holds.
    pub(crate) async fn sync(&self, address: &str, state: wire::GroupState) -> Result<(), Status> {
        let mut client = self.client(address)?;
        let taken = within(CALL, client.sync(state)).await;
        taken.map(|_| ()).inspect_err(|status| self.note(address, status))
    }

    /// Which steps a peer holds.
    pub(crate) async fn ask(&self, address: &str, query: GroupQuery) -> Result<GroupHeld, Status> {
        let mut client = self.client(address)?;
        let held = within(CALL, client.ask(query)).await;
        held.map(tonic::Response::into_inner).inspect_err(|status| self.note(address, status))
    }

    /// What a peer knows of a step.
    pub(crate) async fn describe(&self, address: &str, request: StepRequest) -> Result<StepDescription, Status> {
        let mut client = self.client(address)?;
        let described = match within(CALL, client.describe(request.clone())).await {
            Err(status) if may_be_stale(&status) => within(CALL, client.describe(request)).await,
            described => described,
        };
        described.map(tonic::Response::into_inner).inspect_err(|status| self.note(address, status))
    }

    /// A peer out of reach is a case like others, but certificates that disagree are for a person to mend.
    pub(super) fn note(&self, address: &str, status: &Status) {
        let refused = proto::tls::refused(status).filter(|refused| refused.is_settled()).map(ToString::to_string);
        let denied = || (status.code() == tonic::Code::PermissionDenied).then(|| status.message().to_string());
        let Some(reason) = refused.or_else(denied) else { return };
        let first = self.strange.lock().unwrap_or_else(PoisonError::into_inner).insert(address.to_string());
        if first {
            tracing::warn!(address, reason, "no snapshots are shared with another agent");
        }
    }

    /// Reads bytes of a peer's payload or parity into `out`, which they fill.
    pub(crate) async fn read(&self, address: &str, request: ReadRequest, out: &mut [u8]) -> Result<(), Status> {
        let mut client = self.client(address)?;
        let chunks = match within(CALL, client.read(request.clone())).await {
            Err(status) if may_be_stale(&status) => within(CALL, client.read(request)).await,
            chunks => chunks,
        };
        let mut chunks = chunks?.into_inner();
        let mut filling = Filling { out, at: 0 };
        while let Some(chunk) = within(STALL, chunks.message()).await? {
            filling.take(&chunk)?;
        }
        filling.done()
    }
}

/// Whether a call has failed of a connection, or of a try to open one, that may be older than the peer's return. A call
/// meets it once; a second one begins anew. A deadline of our own is none of these: it has taken its time.
fn may_be_stale(status: &Status) -> bool {
    status.code() != Code::DeadlineExceeded && std::error::Error::source(status).is_some()
}

/// Memory that a peer's chunks fill, no more and no less.
pub(super) struct Filling<'a> {
    pub(super) out: &'a mut [u8],
    pub(super) at: usize,
}

impl Filling<'_> {
    pub(super) fn take(&mut self, chunk: &wire::Chunk) -> Result<(), Status> {
        let end = self.at.saturating_add(chunk.data.len());
        let Some(place) = self.out.get_mut(self.at..end) else {
            return Err(Status::out_of_range("the peer sends more than was asked for"));
        };
        place.copy_from_slice(&chunk.data);
        self.at = end;
        Ok(())
    }

    pub(super) fn done(self) -> Result<(), Status> {
        let all = self.at == self.out.len();
        all.then_some(()).ok_or_else(|| Status::data_loss("the peer sent less than was asked for"))
    }
}

pub(super) async fn within<T>(time: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded(format!("no answer within {} s", time.as_secs()));
    tokio::time::timeout(time, call).await.map_err(late)?
}
