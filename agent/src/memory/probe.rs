//! Exchanging data with another node, so that the coordinator knows what the network between the two gives.

use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use proto::wire;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::Memory;
use super::peers::{CALL, Peers, within};
use crate::driver::Input;

/// For an exchange; what came until then tells the rate.
const EXCHANGE: Duration = Duration::from_secs(5);
/// Most bytes of an exchange, each way.
pub(super) const MOST_EXCHANGE: u64 = 256 << 20;
/// Bytes of one message of an exchange.
const PIECE: usize = 256 << 10;

/// What is exchanged: zeros, which no transport here packs.
static ZEROS: [u8; PIECE] = [0; PIECE];

/// Chunks of so many zeros in all.
fn zeros(bytes: u64) -> impl Stream<Item = wire::Chunk> {
    let pieces = (0..bytes.div_ceil(PIECE as u64)).map(move |at| {
        let length = (bytes - at * PIECE as u64).min(PIECE as u64);
        wire::Chunk { data: Bytes::from_static(&ZEROS[..length as usize]) }
    });
    futures::stream::iter(pieces)
}

impl Peers {
    /// Sends a peer so many bytes, which it sends back; the bytes a second that came, of as many as came in time.
    pub(crate) async fn exchange(&self, address: &str, bytes: u64) -> Result<f64, Status> {
        let bytes = bytes.min(MOST_EXCHANGE);
        let mut client = self.client(address)?;
        // The connection, and the first bytes of it, are not what is measured.
        within(CALL, client.exchange(zeros(1))).await.inspect_err(|status| self.note(address, status))?;
        let began = Instant::now();
        let until = began + EXCHANGE;
        let mut chunks = within(CALL, client.exchange(zeros(bytes))).await?.into_inner();
        let mut come = 0;
        while come < bytes {
            match timeout_at(until, chunks.message()).await {
                Ok(chunk) => match chunk? {
                    Some(chunk) => come += chunk.data.len() as u64,
                    None => return Err(Status::data_loss("the peer sent less back than it got")),
                },
                Err(_) if come > 0 => break,
                Err(_) => {
                    return Err(Status::deadline_exceeded(format!("nothing came within {} s", EXCHANGE.as_secs())));
                }
            }
        }
        Ok(come.min(bytes) as f64 / began.elapsed().as_secs_f64().max(f64::MIN_POSITIVE))
    }
}

impl Memory {
    /// Exchanges data with another node, and tells the coordinator how it went.
    pub(crate) fn probe(&self, probe: wire::Probe) {
        let (peers, inputs) = (self.peers.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let found = peers.exchange(&probe.address, probe.bytes).await;
            let (bytes_per_second, failure) = match found {
                Ok(rate) => (Some(rate), String::new()),
                Err(status) => (None, status.message().to_string()),
            };
            // A closed channel is the agent's end.
            let _ = inputs.send(Input::Probed(wire::Probed { round: probe.round, bytes_per_second, failure })).await;
        });
    }
}
