//! The simulated workers' ring: each step needs a word of every rank, passed on from neighbour to neighbour.
//!
//! As in the product the ring is formed anew in each generation, knows its neighbours only, is authenticated by the
//! generation's key, and gives up after the job's deadlines.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use turmoil::net::{TcpListener, TcpStream};
use worker::machine::cadence::Wish;
use worker::machine::kept::{OPEN, Steps};

use super::network::Wire;
use super::world::{Host, World};

/// Between two tries to reach the next rank.
const AGAIN: Duration = Duration::from_millis(250);
/// For a neighbour that has connected to say who it is.
const GREETING: Duration = Duration::from_secs(2);

/// A rank's place.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) generation: u64,
    pub(crate) rank: u32,
    pub(crate) world: u32,
    pub(crate) next: SocketAddr,
    pub(crate) key: Vec<u8>,
}

/// What each rank tells all others at a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Word {
    pub(crate) step: u64,
    /// The sum over its micro-batches.
    pub(crate) sum: u64,
    /// It was asked to stop after this step.
    pub(crate) stop: bool,
    pub(crate) wish: Wish,
}

/// A formed ring.
pub(crate) struct Ring {
    place: Place,
    /// To the next rank and from the one before; none for one rank alone.
    ways: Option<(Wire, Wire)>,
}

fn broken(why: impl Into<String>) -> io::Error {
    io::Error::other(why.into())
}

impl Place {
    fn greeting(&self, rank: u32) -> Vec<u8> {
        [&self.generation.to_le_bytes()[..], &rank.to_le_bytes(), &self.key].concat()
    }

    fn before(&self) -> u32 {
        (self.rank + self.world - 1) % self.world
    }
}

impl Ring {
    /// Connects to the next rank and takes the one before in.
    pub(crate) async fn form(
        on: (&World, Host),
        listener: &TcpListener,
        place: Place,
        within: Duration,
    ) -> io::Result<Self> {
        if place.world == 1 {
            return Ok(Self { place, ways: None });
        }
        let forming = async { tokio::try_join!(reach(on, &place), take_in(on, listener, &place)) };
        let formed = timeout(within, forming).await;
        let ways = formed.map_err(|_| broken("the ring did not form in time"))??;
        Ok(Self { place, ways: Some(ways) })
    }

    /// Tells all ranks, and returns what each says, in rank order.
    pub(crate) async fn exchange(&mut self, word: Word, within: Duration) -> io::Result<Vec<Word>> {
        let Place { world, rank, .. } = self.place;
        let mut words = vec![None; world as usize];
        words[rank as usize] = Some(word);
        if let Some((next, before)) = &mut self.ways {
            for round in 0..world - 1 {
                let of = (rank + world - round) % world;
                let passing = words[of as usize].ok_or_else(|| broken("a word is missing"))?;
                let passed = async {
                    next.write_all(&frame(of, &passing)).await?;
                    let mut bytes = [0; FRAME];
                    before.read_exact(&mut bytes).await?;
                    Ok::<_, io::Error>(bytes)
                };
                let bytes =
                    timeout(within, passed).await.map_err(|_| broken("a neighbour was silent for too long"))??;
                let (from, heard) = unframe(&bytes);
                if from != (of + world - 1) % world || heard.step != word.step {
                    return Err(broken(format!("a word of rank {from} and step {} came", heard.step)));
                }
                words[from as usize] = Some(heard);
            }
        }
        words.into_iter().collect::<Option<_>>().ok_or_else(|| broken("a word is missing"))
    }
}

async fn reach((world, host): (&World, Host), place: &Place) -> io::Result<Wire> {
    loop {
        if let Ok(mut stream) = TcpStream::connect(place.next).await.map(|stream| Wire::new(world, host, stream))
            && stream.write_all(&place.greeting(place.rank)).await.is_ok()
            // Only a neighbour in the same generation answers; another one hangs up.
            && matches!(timeout(GREETING, stream.read_u8()).await, Ok(Ok(1)))
        {
            return Ok(stream);
        }
        sleep(AGAIN).await;
    }
}

async fn take_in((world, host): (&World, Host), listener: &TcpListener, place: &Place) -> io::Result<Wire> {
    let expected = place.greeting(place.before());
    loop {
        let (stream, _) = listener.accept().await?;
        let mut stream = Wire::new(world, host, stream);
        let mut greeting = vec![0; expected.len()];
        let greeted = timeout(GREETING, stream.read_exact(&mut greeting)).await;
        if matches!(greeted, Ok(Ok(_))) && greeting == expected && stream.write_u8(1).await.is_ok() {
            return Ok(stream);
        }
    }
}

/// Large numbers of a frame: the step, the sum, and what became of snapshots.
const LARGE: usize = 2 + 2 * OPEN;
const FRAME: usize = 8 * LARGE + 4 * 4;

fn frame(rank: u32, word: &Word) -> [u8; FRAME] {
    let Wish { ready, interval, guard, steps } = word.wish;
    let flags = u32::from(word.stop) | u32::from(ready) << 1;
    let mut out = [0; FRAME];
    let small = [rank, flags, interval, guard];
    for (place, number) in out.chunks_exact_mut(8).zip([word.step, word.sum].into_iter().chain(steps.numbers())) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    for (place, number) in out[8 * LARGE..].chunks_exact_mut(4).zip(small) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    out
}

fn unframe(bytes: &[u8; FRAME]) -> (u32, Word) {
    let large = |at: usize| u64::from_le_bytes(bytes[8 * at..8 * at + 8].try_into().expect("eight bytes"));
    let small = |at: usize| {
        let at = 8 * LARGE + 4 * at;
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    };
    let steps = Steps::from_numbers(std::array::from_fn(|number| large(2 + number)));
    let wish = Wish { ready: small(1) & 2 != 0, interval: small(2), guard: small(3), steps };
    (small(0), Word { step: large(0), sum: large(1), stop: small(1) & 1 != 0, wish })
}
