//! Proving to each other, on a fresh connection, to be neighbours of the same generation (P6).
//!
//! ```text
//! connector → acceptor   hello: who I am, whom I mean, nonce
//! acceptor → connector   reply: who I am, whom I mean, nonce; MAC over both
//! connector → acceptor   MAC over both
//! acceptor → connector   one byte: welcome
//! ```
//!
//! The MACs are keyed BLAKE3 under the generation's key, with a different prefix each way, so that neither can be
//! reflected; the nonces keep an old conversation from being replayed. Everything has a fixed length: nothing is
//! allocated for a stranger.

use proto::ids::{Generation, JobName, Rank};

use super::super::{CollectiveError, Result};
use super::socket::{Connection, Deadline};

const MAGIC: &[u8; 8] = b"CAIRNrng";
const VERSION: u32 = 2;
const GREETING: usize = 96;
const MAC: usize = 32;
const WELCOME: u8 = 1;
const FROM_ACCEPTOR: &[u8] = b"cairn ring v1 acceptor";
const FROM_CONNECTOR: &[u8] = b"cairn ring v1 connector";

/// What one member of a generation knows of itself.
#[derive(Clone)]
pub(super) struct Identity {
    job: [u8; 32],
    generation: Generation,
    rank: Rank,
    world: u32,
    key: [u8; 32],
}

impl Identity {
    pub(super) fn new(job: &JobName, generation: Generation, rank: Rank, world: u32, key: [u8; 32]) -> Self {
        Self { job: *blake3::hash(job.as_str().as_bytes()).as_bytes(), generation, rank, world, key }
    }

    /// The connector's side.
    pub(super) fn introduce(&self, connection: &mut Connection, to: Rank, deadline: &Deadline) -> Result<()> {
        let hello = self.greeting(to, &nonce()?);
        connection.send(&hello, &[], deadline)?;
        let mut reply = [0; GREETING + MAC];
        connection.receive(&mut reply, deadline)?;
        let (greeting, mac) = reply.split_at(GREETING);
        self.check_greeting(greeting, to)?;
        self.check_mac(FROM_ACCEPTOR, &hello, greeting, mac)?;
        connection.send(self.mac(FROM_CONNECTOR, &hello, greeting).as_bytes(), &[], deadline)?;
        let mut welcome = [0];
        connection.receive(&mut welcome, deadline)?;
        if welcome[0] == WELCOME { Ok(()) } else { Err(refuse("the peer did not welcome this rank")) }
    }

    /// The acceptor's side: admits only `from`.
    pub(super) fn admit(&self, connection: &mut Connection, from: Rank, deadline: &Deadline) -> Result<()> {
        let mut hello = [0; GREETING];
        connection.receive(&mut hello, deadline)?;
        self.check_greeting(&hello, from)?;
        let reply = self.greeting(from, &nonce()?);
        connection.send(&reply, self.mac(FROM_ACCEPTOR, &hello, &reply).as_bytes(), deadline)?;
        let mut mac = [0; MAC];
        connection.receive(&mut mac, deadline)?;
        self.check_mac(FROM_CONNECTOR, &hello, &reply, &mac)?;
        connection.send(&[WELCOME], &[], deadline)
    }

    /// Whether bytes are a greeting that this member would go on with.
    pub(super) fn understands(&self, bytes: &[u8], from: Rank) -> bool {
        bytes.len() == GREETING && self.check_greeting(bytes, from).is_ok()
    }

    pub(super) fn greeting(&self, to: Rank, nonce: &[u8; 32]) -> [u8; GREETING] {
        let mut out = [0; GREETING];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.world.to_le_bytes());
        out[16..48].copy_from_slice(&self.job);
        out[48..56].copy_from_slice(&self.generation.get().to_le_bytes());
        out[56..60].copy_from_slice(&self.rank.get().to_le_bytes());
        out[60..64].copy_from_slice(&to.get().to_le_bytes());
        out[64..].copy_from_slice(nonce);
        out
    }

    /// Checks everything a greeting says but its nonce, against what the right neighbour would say.
    fn check_greeting(&self, greeting: &[u8], from: Rank) -> Result<()> {
        let word = |at: usize| u32::from_le_bytes([greeting[at], greeting[at + 1], greeting[at + 2], greeting[at + 3]]);
        let generation = u64::from(word(48)) | u64::from(word(52)) << 32;
        if greeting[..8] != *MAGIC {
            return Err(refuse("a connection that is not a Cairn worker's"));
        }
        let differs = |what: &str, theirs: u64, ours: u64| Err(refuse(&format!("{what} {theirs} instead of {ours}")));
        if word(8) != VERSION {
            return differs("a worker of ring protocol version", word(8).into(), VERSION.into());
        }
        if greeting[16..48] != self.job {
            return Err(refuse("a worker of another job"));
        }
        if generation != self.generation.get() {
            return differs("a worker of generation", generation, self.generation.get());
        }
        if word(12) != self.world {
            return differs("a worker of a world of size", word(12).into(), self.world.into());
        }
        if word(56) != from.get() {
            return differs("a worker of rank", word(56).into(), from.get().into());
        }
        if word(60) != self.rank.get() {
            return differs("a worker that looks for rank", word(60).into(), self.rank.get().into());
        }
        Ok(())
    }

    fn mac(&self, side: &[u8], hello: &[u8], reply: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(side).update(hello).update(reply);
        hasher.finalize()
    }

    fn check_mac(&self, side: &[u8], hello: &[u8], reply: &[u8], theirs: &[u8]) -> Result<()> {
        // Comparing `blake3::Hash`es takes the same time wherever they differ.
        match blake3::Hash::from_slice(theirs) {
            Ok(theirs) if theirs == self.mac(side, hello, reply) => Ok(()),
            _ => Err(refuse("a worker without this generation's key")),
        }
    }
}

fn refuse(what: &str) -> CollectiveError {
    CollectiveError::Protocol(format!("refused {what}"))
}

/// 32 unpredictable bytes from the system.
fn nonce() -> Result<[u8; 32]> {
    let mut out = [0; 32];
    let count = rustix::rand::getrandom(&mut out, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| CollectiveError::Io { action: "drawing a nonce", source: errno.into() })?;
    // The system gives up to 256 bytes at once or none.
    if count == out.len() { Ok(out) } else { Err(refuse("to go on without randomness")) }
}
