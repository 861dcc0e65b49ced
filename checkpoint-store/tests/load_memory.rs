//! A load takes the caller's memory and a fixed buffer beside it, measured by the allocator itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use checkpoint_store::loader::{BUFFER_LOCAL, BUFFER_REMOTE};
use checkpoint_store::*;
use proto::ids::{Generation, JobName, Rank, WorldSize};

struct Counted;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's; only its sizes are counted.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `at` came from `alloc` above with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// Memory of everything that does not grow with the load: plan, futures, threads.
const SLACK: u64 = 2 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_load_takes_the_shard_and_a_fixed_buffer() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Store::open(&normalize_url("store", folder.path()).unwrap()).unwrap();
    for (store, bound) in [(disk, BUFFER_LOCAL), (Store::memory(), BUFFER_REMOTE)] {
        // 3 × 64 MiB, and edges within blocks, so that some requests need a buffer.
        let tensor = TensorDecl { name: "w".into(), shape: vec![16 << 20], dtype: Dtype::F32 };
        let space = Space::new(vec![tensor]).unwrap();
        let state = Bytes::from((0..space.elements()).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<_>>());
        let hashes = HashList(hash_blocks(&state, space.block_elements(), Dtype::F32));
        let states = StateDecl::adamw().into_iter();
        let source = ShardSource {
            job: JobName::new("memory").unwrap(),
            space: space.clone(),
            generation: Generation::new(1),
            rank: Rank::ZERO,
            world_size: WorldSize::ONE,
            scalar: ScalarState::start(1, 10),
            states: states.map(|decl| ShardState { decl, bytes: state.clone(), hashes: hashes.clone() }).collect(),
        };
        let receipt = upload_shard(&store, &source, uuid::Uuid::new_v4()).await.unwrap();
        let manifest = Manifest::assemble(&space, source.scalar.clone(), vec![receipt]).unwrap();
        let range = 5..space.elements() - 5;
        let mut memory = vec![vec![0u8; 4 * (range.end - range.start) as usize]; 3];
        let names = ["param", "exp_avg", "exp_avg_sq"].into_iter();
        let mut targets: Vec<_> = names.zip(memory.iter_mut().map(Vec::as_mut_slice)).collect();
        let before = NOW.load(Ordering::Relaxed);
        MOST.store(before, Ordering::Relaxed);
        let report = Loader::new(&store, &manifest).load(range, &mut targets).await.unwrap();
        let most = (MOST.load(Ordering::Relaxed) - before) as u64;
        println!("{}: {most} bytes beside {}, bound {bound}", store.url(), report.bytes_needed);
        assert!(most <= bound + SLACK, "{}: {most} bytes beside the shard, bound {bound}", store.url());
        assert!(memory.iter().all(|m| m[..] == state[20..state.len() - 20]));
    }
}
