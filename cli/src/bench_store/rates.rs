//! What one thread of this machine does with bytes in memory: the floors that hashing and parity are held against.

use std::hint::black_box;
use std::time::Instant;

use checkpoint_store::parity::Layout;
use checkpoint_store::{AlignedBuffer, BlockHash};
use serde_json::{Value, json};

use crate::failure::Failure;

/// Bytes of each measurement.
const MEMORY: usize = 256 << 20;
/// Bytes of a block, as in a store.
const BLOCK: usize = 256 << 10;
/// Bytes of a stripe that are encoded at once, as an agent does.
const RANGE: usize = 4 << 20;
/// Nodes and parities of the groups whose encoding is measured.
const GROUPS: [(usize, usize); 3] = [(3, 1), (8, 1), (8, 2)];

/// Bytes a second of one thread; the best of five tries.
#[derive(Debug, Default)]
pub(super) struct Rates {
    pub(super) blake3: f64,
    pub(super) memcpy: f64,
    /// By nodes and parities: bytes of snapshots that go into parity, for one row of it.
    pub(super) parity: Vec<((usize, usize), f64)>,
}

fn best(mut work: impl FnMut() -> Result<u64, Failure>) -> Result<f64, Failure> {
    (0..5).try_fold(0.0, |best: f64, _| {
        let began = Instant::now();
        let bytes = work()?;
        Ok(best.max(bytes as f64 / began.elapsed().as_secs_f64()))
    })
}

impl Rates {
    pub(super) fn measure() -> Result<Self, Failure> {
        let (mut from, mut to) = (AlignedBuffer::new(MEMORY), AlignedBuffer::new(MEMORY));
        for (i, word) in from.as_mut_slice().chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        }
        to.as_mut_slice().fill(1);
        let blake3 = best(|| {
            from.as_slice().chunks(BLOCK).for_each(|block| _ = black_box(BlockHash::of(block)));
            Ok(MEMORY as u64)
        })?;
        let memcpy = best(|| {
            to.as_mut_slice().copy_from_slice(from.as_slice());
            black_box(&to);
            Ok(MEMORY as u64)
        })?;
        let parity = GROUPS.map(|group| Ok((group, parity(group, from.as_slice(), to.as_mut_slice())?)));
        Ok(Self { blake3, memcpy, parity: parity.into_iter().collect::<Result<_, Failure>>()? })
    }

    pub(super) fn json(&self) -> Value {
        let parity = self
            .parity
            .iter()
            .map(|((nodes, parities), rate)| json!({"nodes": nodes, "parities": parities, "bytes_per_second": rate}));
        json!({
            "blake3_bytes_per_second": self.blake3, "memcpy_bytes_per_second": self.memcpy,
            "parity": parity.collect::<Vec<_>>(),
        })
    }

    pub(super) fn text(&self) -> String {
        let parity = self.parity.iter().map(|((nodes, parities), rate)| {
            let data = nodes - parities;
            format!(", parity {data}+{parities} {:.2} GB/s", rate / 1e9)
        });
        let (blake3, memcpy) = (self.blake3 / 1e9, self.memcpy / 1e9);
        let parity = parity.collect::<String>();
        format!("one thread: memory copy {memcpy:.2} GB/s, BLAKE3 {blake3:.2} GB/s{parity}")
    }
}

/// Encodes one row of parity over all of `from`.
fn parity((nodes, parities): (usize, usize), from: &[u8], to: &mut [u8]) -> Result<f64, Failure> {
    let layout = Layout::new(nodes, parities, (RANGE * (nodes - parities)) as u64);
    let layout = layout.ok_or_else(|| Failure::job(format!("no parity of {nodes} nodes")))?;
    best(|| {
        let mut bytes = 0;
        for stripe in from.chunks_exact(RANGE * layout.parts()) {
            let parts: Vec<&[u8]> = stripe.chunks_exact(RANGE).collect();
            layout.encode(0, &parts, &mut to[..RANGE]).map_err(|error| super::store_failure(&error))?;
            black_box(&to);
            bytes += stripe.len() as u64;
        }
        Ok(bytes)
    })
}
