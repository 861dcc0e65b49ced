//! The ring at work: moving chunks to the next rank while others come in from the previous one.

use std::ops::Range;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use bytemuck::Pod;
use proto::ids::{Generation, Rank, WorldSize};

use super::super::{AbortHandle, Collective, CollectiveError, Moved, Result, check_ranges};
use super::frame::{HEADER, Header, Kind};
use super::socket::{Connection, Deadline};

/// The most one rank may give to [`Collective::all_gather_bytes`]. Room for a float64 per block of the largest state.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Bytes that are received, added and sent on as one: they stay in a core's cache.
const SEGMENT: usize = 256 << 10;

pub(crate) fn too_large(bytes: usize) -> CollectiveError {
    CollectiveError::Request(format!("a message of {bytes} bytes; at most {MAX_MESSAGE} can be gathered"))
}

/// One rank's end of a ring; see the module above for how it works and [`Collective`] for what it does.
#[derive(Debug)]
pub struct Ring {
    rank: Rank,
    world: WorldSize,
    generation: Generation,
    limit: Duration,
    /// Operations started, the same on every rank.
    operation: u64,
    outgoing: Connection,
    incoming: Connection,
    abort: AbortHandle,
    failed: bool,
    /// Where a segment to be added is received. Words, so that it is aligned for every element type.
    segment: Vec<u64>,
}

/// A piece of a chunk on its way to the sender thread; the first one carries the chunk's header.
struct Piece<'a> {
    header: Option<[u8; HEADER]>,
    body: &'a [u8],
}

/// What one operation's receiving side needs.
struct Receiving<'a> {
    incoming: &'a mut Connection,
    deadline: Deadline,
    header: Header,
    segment: &'a mut [u64],
}

impl Ring {
    pub(super) fn assemble(
        rank: Rank,
        world: WorldSize,
        generation: Generation,
        limit: Duration,
        mut outgoing: Connection,
        mut incoming: Connection,
        abort: AbortHandle,
    ) -> Self {
        // Greetings are not counted: both ends count alike from here on.
        (outgoing.moved, incoming.moved) = (0, 0);
        let segment = vec![0; SEGMENT / 8];
        Self { rank, world, generation, limit, operation: 0, outgoing, incoming, abort, failed: false, segment }
    }

    /// Runs one operation: `receive` on this thread, while what it passes to the channel is sent by another. Whichever
    /// fails first closes the connections, which ends the other; its error is the operation's.
    fn operate<'data>(
        &mut self,
        kind: Kind,
        receive: impl FnOnce(&mut Receiving<'_>, Sender<Piece<'data>>) -> Result<()>,
    ) -> Result<()> {
        if self.failed || self.abort.is_aborted() {
            return Err(CollectiveError::Aborted);
        }
        let deadline = Deadline::after(self.limit, kind.name());
        let (generation, operation) = (self.generation.get(), self.operation);
        self.operation += 1;
        let header = Header { kind, generation, operation, step: 0, bytes: 0 };
        let mut receiving = Receiving { incoming: &mut self.incoming, deadline, header, segment: &mut self.segment };
        let (outgoing, abort) = (&mut self.outgoing, &self.abort);
        let (failures, first) = mpsc::channel();
        let fail = |error: CollectiveError| {
            // Told before the connections close, so that the cause comes before its consequence at the other thread.
            let _ = failures.send(error);
            abort.close();
        };
        thread::scope(|scope| {
            let (pieces, queue) = mpsc::channel();
            let sender_fails = fail;
            let sender = thread::Builder::new().name("ring-sender".into()).spawn_scoped(scope, move || {
                if let Err(error) = send_all(outgoing, queue, &deadline) {
                    sender_fails(error);
                }
            });
            let received = match sender {
                Ok(_) => receive(&mut receiving, pieces),
                Err(source) => Err(CollectiveError::Io { action: "starting the sender thread", source }),
            };
            if let Err(error) = received {
                fail(error);
            }
        });
        match first.try_recv() {
            Ok(error) => {
                self.failed = true;
                Err(if self.abort.is_aborted() { CollectiveError::Aborted } else { error })
            }
            Err(_) => Ok(()),
        }
    }

    /// Sends chunk `first` of `data`, then receives each chunk before it in turn, `place`s it segment by segment, and
    /// sends it on, all but the last.
    fn circulate<T: Pod + Send + Sync>(
        &mut self,
        kind: Kind,
        data: &mut [T],
        ranges: &[Range<usize>],
        first: usize,
        place: impl Fn(&mut Receiving<'_>, &mut [T]) -> Result<()>,
    ) -> Result<()> {
        check_ranges(data.len(), ranges, self.world)?;
        let world = self.world.count();
        let mut chunks = cut(data, ranges);
        self.operate(kind, |receiving, pieces| {
            let mut index = first;
            let own: &mut [T] = std::mem::take(&mut chunks[index]);
            send_chunk(&pieces, receiving.header, own);
            for step in 0..world - 1 {
                index = (index + world - 1) % world;
                let mut rest = std::mem::take(&mut chunks[index]);
                receiving.header.step = step as u64;
                receiving.header.bytes = size_of_val(rest) as u64;
                receiving.expect_header()?;
                let onward = Header { step: step as u64 + 1, ..receiving.header };
                let mut header = Some(onward.encode());
                loop {
                    let (segment, tail) = rest.split_at_mut(rest.len().min(SEGMENT / size_of::<T>()));
                    rest = tail;
                    place(receiving, segment)?;
                    if step + 2 < world {
                        // A sender that has failed has said why itself.
                        let _ = pieces.send(Piece { header: header.take(), body: bytemuck::cast_slice(segment) });
                    }
                    if rest.is_empty() {
                        break;
                    }
                }
            }
            Ok(())
        })
    }

    fn reduce_scatter<T: Pod + Send + Sync>(
        &mut self,
        kind: Kind,
        data: &mut [T],
        ranges: &[Range<usize>],
        add: impl Fn(T, T) -> T,
    ) -> Result<()> {
        let first = (self.rank.index() + self.world.count() - 1) % self.world.count();
        self.circulate(kind, data, ranges, first, |receiving, mine| {
            let words = size_of_val(mine).div_ceil(8);
            let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut receiving.segment[..words]);
            let theirs = &mut buffer[..size_of_val(mine)];
            receiving.incoming.receive(theirs, &receiving.deadline)?;
            for (mine, theirs) in mine.iter_mut().zip(bytemuck::cast_slice::<u8, T>(theirs)) {
                *mine = add(*theirs, *mine);
            }
            Ok(())
        })
    }

    fn all_gather<T: Pod + Send + Sync>(&mut self, kind: Kind, data: &mut [T], ranges: &[Range<usize>]) -> Result<()> {
        let first = self.rank.index();
        self.circulate(kind, data, ranges, first, |receiving, part| {
            receiving.incoming.receive(bytemuck::cast_slice_mut(part), &receiving.deadline)
        })
    }

    /// Passes one message of each rank around.
    fn gather_messages(&mut self, kind: Kind, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let world = self.world.count();
        let mut messages = vec![Vec::new(); world];
        messages[self.rank.index()].extend_from_slice(mine);
        let mut index = self.rank.index();
        let mut slots: Vec<Option<&mut Vec<u8>>> = messages.iter_mut().map(Some).collect();
        self.operate(kind, |receiving, pieces| {
            let mut message: &[u8] = slots[index].take().map_or(&[], |own| own.as_slice());
            for step in 0..world - 1 {
                let header = Header { step: step as u64, bytes: message.len() as u64, ..receiving.header };
                // A sender that has failed has said why itself.
                let _ = pieces.send(Piece { header: Some(header.encode()), body: message });
                index = (index + world - 1) % world;
                receiving.header.step = step as u64;
                let bytes = receiving.message_length()?;
                let Some(slot) = slots[index].take() else {
                    return Err(CollectiveError::Protocol("a message came twice".into()));
                };
                slot.resize(bytes, 0);
                receiving.incoming.receive(slot, &receiving.deadline)?;
                message = slot.as_slice();
            }
            Ok(())
        })?;
        Ok(messages)
    }
}

impl Receiving<'_> {
    fn raw_header(&mut self) -> Result<[u8; HEADER]> {
        let mut raw = [0; HEADER];
        self.incoming.receive(&mut raw, &self.deadline)?;
        Ok(raw)
    }

    fn expect_header(&mut self) -> Result<()> {
        let raw = self.raw_header()?;
        self.header.accept_exactly(&raw)
    }

    /// The length of the message that follows, checked before anything is allocated for it.
    fn message_length(&mut self) -> Result<usize> {
        let raw = self.raw_header()?;
        let bytes = self.header.accept(&raw)?;
        usize::try_from(bytes).ok().filter(|bytes| *bytes <= MAX_MESSAGE).ok_or_else(|| {
            CollectiveError::Protocol(format!("a message of {bytes} bytes came; at most {MAX_MESSAGE} is allowed"))
        })
    }
}

/// The buffer's parts, by rank.
fn cut<'a, T>(mut data: &'a mut [T], ranges: &[Range<usize>]) -> Vec<&'a mut [T]> {
    let mut at = 0;
    let mut chunks = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (_, rest) = data.split_at_mut(range.start - at);
        let (chunk, rest) = rest.split_at_mut(range.len());
        chunks.push(chunk);
        data = rest;
        at = range.end;
    }
    chunks
}

/// Queues a whole chunk that is ready from the start.
fn send_chunk<'a, T: Pod>(pieces: &Sender<Piece<'a>>, header: Header, chunk: &'a [T]) {
    let body: &[u8] = bytemuck::cast_slice(chunk);
    let header = Header { step: 0, bytes: body.len() as u64, ..header };
    // A sender that has failed has said why itself.
    let _ = pieces.send(Piece { header: Some(header.encode()), body });
}

/// The sender thread: sends what it is given until there is no more.
fn send_all(outgoing: &mut Connection, queue: Receiver<Piece<'_>>, deadline: &Deadline) -> Result<()> {
    for Piece { header, body } in queue {
        let header = header.as_ref().map_or(&[][..], |header| &header[..]);
        // In segments even if the whole chunk is ready: the kernel's copy then starts with what is in cache.
        let (head, tail) = body.split_at(body.len().min(SEGMENT));
        outgoing.send(header, head, deadline)?;
        for segment in tail.chunks(SEGMENT) {
            outgoing.send(&[], segment, deadline)?;
        }
    }
    Ok(())
}

impl Collective for Ring {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> WorldSize {
        self.world
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn reduce_scatter_i64(&mut self, data: &mut [i64], ranges: &[Range<usize>]) -> Result<()> {
        self.reduce_scatter(Kind::ReduceI64, data, ranges, i64::wrapping_add)
    }

    fn reduce_scatter_i32(&mut self, data: &mut [i32], ranges: &[Range<usize>]) -> Result<()> {
        self.reduce_scatter(Kind::ReduceI32, data, ranges, i32::wrapping_add)
    }

    fn reduce_scatter_f32(&mut self, data: &mut [f32], ranges: &[Range<usize>]) -> Result<()> {
        self.reduce_scatter(Kind::ReduceF32, data, ranges, |theirs, mine| theirs + mine)
    }

    fn all_gather_f32(&mut self, data: &mut [f32], ranges: &[Range<usize>]) -> Result<()> {
        self.all_gather(Kind::GatherF32, data, ranges)
    }

    fn all_gather_u16(&mut self, data: &mut [u16], ranges: &[Range<usize>]) -> Result<()> {
        self.all_gather(Kind::GatherU16, data, ranges)
    }

    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        if mine.len() > MAX_MESSAGE {
            return Err(too_large(mine.len()));
        }
        self.gather_messages(Kind::GatherBytes, mine)
    }

    fn barrier(&mut self) -> Result<()> {
        self.gather_messages(Kind::Barrier, &[]).map(drop)
    }

    fn moved(&self) -> Moved {
        Moved { sent: self.outgoing.moved, received: self.incoming.moved }
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The abort handle may live on; the connections must not, or the neighbours would wait for their deadlines.
        self.abort.release();
    }
}
