//! Reading what other agents hold.
//!
//! One channel for each peer, opened when first needed. Every call has a deadline, and what a peer sends is bounded by
//! what was asked for. A peer that cannot be reached is no error of this node: the caller takes another source.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::auth::Token;
use proto::wire::snapshots_client::SnapshotsClient;
use proto::wire::{self, ReadRequest, StepDescription, StepRequest};
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

/// To open a connection, and for a short call.
const CALL: Duration = Duration::from_secs(5);
/// Without a byte arriving, a read is given up.
const STALL: Duration = Duration::from_secs(5);

type Sign = Box<dyn FnMut(tonic::Request<()>) -> Result<tonic::Request<()>, Status> + Send>;
type Client = SnapshotsClient<InterceptedService<Channel, Sign>>;

/// All peers of this node.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    token: Token,
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
}

impl Peers {
    pub(crate) fn new(token: Token) -> Self {
        Self { token, channels: Arc::default() }
    }

    fn client(&self, address: &str) -> Result<Client, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => {
                let endpoint = Endpoint::from_shared(format!("http://{address}"))
                    .map_err(|error| Status::invalid_argument(format!("peer address {address:?}: {error}")))?;
                let channel = endpoint.connect_timeout(CALL).tcp_nodelay(true).connect_lazy();
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
        within(CALL, client.sync(state)).await.map(|_| ())
    }

    /// What a peer knows of a step.
    pub(crate) async fn describe(&self, address: &str, request: StepRequest) -> Result<StepDescription, Status> {
        let mut client = self.client(address)?;
        within(CALL, client.describe(request)).await.map(tonic::Response::into_inner)
    }

    /// Reads bytes of a peer's payload or parity into `out`, which they fill.
    pub(crate) async fn read(&self, address: &str, request: ReadRequest, out: &mut [u8]) -> Result<(), Status> {
        let mut client = self.client(address)?;
        let mut chunks = within(CALL, client.read(request)).await?.into_inner();
        let mut at = 0;
        while let Some(chunk) = within(STALL, chunks.message()).await? {
            let end = at + chunk.data.len();
            let Some(place) = out.get_mut(at..end) else {
                return Err(Status::out_of_range("the peer sends more than was asked for"));
            };
            place.copy_from_slice(&chunk.data);
            at = end;
        }
        if at == out.len() { Ok(()) } else { Err(Status::data_loss("the peer sent less than was asked for")) }
    }
}

async fn within<T>(time: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded(format!("no answer within {} s", time.as_secs()));
    tokio::time::timeout(time, call).await.map_err(late)?
}
