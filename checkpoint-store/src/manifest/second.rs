//! Manifests of format 2: binary and compressed.
//!
//! After the mark comes one LZ4 frame with the fields of [`crate::codec`]: the small ones, the objects, the times, and
//! last the block hashes as they are. Hashes are most of it and do not compress, so what counts is the rest and speed;
//! LZ4 has both, in safe Rust. Fields go straight through the compressor, and the reader builds the manifest from what
//! the decompressor gives: beside the manifest there is one encoded copy, and never a decoded one.

use std::io::{BufReader, Read, Write};

use bytes::Bytes;
use lz4_flex::frame::{BlockMode, BlockSize, FrameDecoder, FrameEncoder, FrameInfo};
use proto::ids::{Generation, Step};

use super::{MANIFEST_FORMAT, MAX_EXTENTS, MAX_MANIFEST, MAX_OBJECTS, Manifest};
use crate::codec::{self, HEAD, Reader, Writer, Wrong};
use crate::digest::{BlockHash, Digest, HashList};
use crate::error::StoreError;
use crate::fields;
use crate::space::{MAX_DIMENSIONS, MAX_NAME, MAX_TENSORS, Space, TensorDecl};
use crate::timeline::Timeline;

const MARK: [u8; 8] = *b"cairn/m\n";
/// A body that unpacks to more than this is refused: twice what 2^19 blocks of sixteen states take.
const MAX_BODY: u64 = 512 << 20;
/// What an encoded manifest takes beside its hashes and objects, to begin with.
const SMALL: usize = 64 << 10;

/// A manifest as it is stored.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// The bytes.
    pub bytes: Bytes,
    /// Their hash, by which the chain's record names them.
    pub hash: BlockHash,
    /// How many bytes they unpack to.
    pub unpacked: u64,
}

/// Counts what goes through.
struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl Manifest {
    /// The manifest as it is stored.
    pub fn encode(&self) -> Result<Encoded, StoreError> {
        let bug = |e: std::io::Error| StoreError::Bug(format!("the manifest of step {}: {e}", self.step));
        let hashes: usize = self.hashes.iter().map(|list| list.0.len() * 32).sum();
        let mut out = Vec::with_capacity(HEAD + SMALL + hashes + hashes / 64 + self.objects.len() * 128);
        out.extend_from_slice(&codec::head(MARK, MANIFEST_FORMAT));
        let info = FrameInfo::new().block_size(BlockSize::Max1MB).block_mode(BlockMode::Independent);
        let mut frame = Writer(Counted { inner: FrameEncoder::with_frame_info(info, &mut out), bytes: 0 });
        self.write(&mut frame).map_err(bug)?;
        let unpacked = frame.0.bytes;
        frame.0.inner.finish().map_err(|e| bug(e.into()))?;
        if out.len() as u64 > MAX_MANIFEST || unpacked > MAX_BODY {
            return Err(StoreError::Bug(format!("the manifest would have {} bytes, {unpacked} unpacked", out.len())));
        }
        let hash = BlockHash::of(&out);
        Ok(Encoded { bytes: out.into(), hash, unpacked })
    }

    fn write<W: Write>(&self, out: &mut Writer<W>) -> std::io::Result<()> {
        out.text(self.job.as_str())?;
        let numbers = [self.step.get(), self.generation.get(), u64::from(self.world_size.get()), self.block_elements];
        numbers.into_iter().try_for_each(|n| out.number(n))?;
        out.raw(self.digest.as_bytes())?;
        fields::write_scalar(out, &self.scalar)?;
        out.length(self.space.tensors().len())?;
        for tensor in self.space.tensors() {
            out.text(&tensor.name)?;
            fields::write_dtype(out, tensor.dtype)?;
            out.length(tensor.shape.len())?;
            tensor.shape.iter().try_for_each(|n| out.number(*n))?;
        }
        fields::write_states(out, &self.states)?;
        out.length(self.objects.len())?;
        self.objects.iter().try_for_each(|o| fields::write_object(out, &self.job, &self.states, o))?;
        self.timeline.write(out)?;
        for list in &self.hashes {
            out.length(list.0.len())?;
            out.hashes(&list.0)?;
        }
        Ok(())
    }
}

/// Reads what [`Manifest::encode`] made; the claims are not checked yet.
pub(super) fn parse(path: &str, bytes: &[u8]) -> Result<Manifest, StoreError> {
    let mut frame = codec::body(path, bytes, MARK, 2, MANIFEST_FORMAT)?;
    let mut from = Reader::new(BufReader::with_capacity(1 << 16, FrameDecoder::new(&mut frame)), MAX_BODY);
    let manifest = read(&mut from).and_then(|manifest| from.end().map(|()| manifest));
    let nothing_more = |manifest| if frame.is_empty() { Ok(manifest) } else { Err("bytes follow its frame".into()) };
    manifest.and_then(nothing_more).map_err(|why| StoreError::Corrupt(format!("{path} is not valid: {why}")))
}

fn read<R: Read>(from: &mut Reader<R>) -> Result<Manifest, Wrong> {
    let job = fields::read_job(from)?;
    let (step, generation) = (Step::new(from.number()?), Generation::new(from.number()?));
    let world_size = fields::read_world_size(from)?;
    let block_elements = from.number()?;
    let digest = Digest::from_bytes(from.raw()?);
    let scalar = fields::read_scalar(from)?;
    let space = read_space(from)?;
    let states = fields::read_states(from)?;
    // An extent holds a block at least, and no block lies twice.
    let mut extents = MAX_EXTENTS.min(states.len() * space.blocks() as usize);
    let mut objects = vec![];
    for _ in 0..from.length("objects", MAX_OBJECTS.min(extents))? {
        objects.push(fields::read_object(from, &job, &states, &mut extents)?);
    }
    let timeline = Timeline::read(from)?;
    let mut hashes = vec![];
    for _ in &states {
        let count = from.length("hashes of a state", space.blocks() as usize)?;
        hashes.push(HashList(from.hashes(count)?));
    }
    Ok(Manifest {
        job,
        step,
        generation,
        world_size,
        scalar,
        space,
        block_elements,
        states,
        objects,
        hashes,
        digest,
        timeline,
        index: vec![],
    })
}

fn read_space<R: Read>(from: &mut Reader<R>) -> Result<Space, Wrong> {
    let mut tensors = vec![];
    for _ in 0..from.length("tensors", MAX_TENSORS)? {
        let name = from.text("a tensor's name", MAX_NAME)?;
        let dtype = fields::read_dtype(from)?;
        let mut shape = vec![];
        for _ in 0..from.length("dimensions", MAX_DIMENSIONS)? {
            shape.push(from.number()?);
        }
        tensors.push(TensorDecl { name, shape, dtype });
    }
    Space::new(tensors).map_err(|e| e.to_string())
}
