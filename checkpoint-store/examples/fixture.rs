//! Writes a small store with one checkpoint, and the receipts that made it, into a folder.
//!
//! Every format that was ever released stays readable. `tests/fixtures/format-1` was written by this program before
//! format 2 existed; run it again, with a new folder, before a format changes:
//!
//! ```text
//! cargo run -p checkpoint-store --example fixture -- checkpoint-store/tests/fixtures/format-N
//! ```

use bytes::Bytes;
use checkpoint_store::{
    BlockHash, Chain, Dtype, Event, HashList, Manifest, Record, ScalarState, ShardSource, ShardState, Space, StateDecl,
    Store, TensorDecl, commit, hash_blocks, upload_shard,
};
use proto::ids::{Epoch, Generation, JobName, Step, WorldSize};
use uuid::Uuid;

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let folder = std::env::args().nth(1).ok_or("usage: fixture FOLDER")?;
    std::fs::create_dir_all(&folder)?;
    let folder = std::fs::canonicalize(folder)?;
    let store = Store::open(&format!("file://{}/store", folder.display()))?;
    let (job, epoch, generation) = (JobName::new("tiny")?, Epoch::new(1), Generation::new(1));
    let world_size = WorldSize::new(2).ok_or("two is a size")?;
    let submitted = Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
    let mut chain = Chain::create(&store, &job, Record::new(epoch, Generation::ZERO, submitted)).await?;
    let formed = Event::Generation {
        generation,
        world_size,
        members: vec![],
        start: None,
        memory: None,
        identity: "cpu".into(),
        fingerprint: "data".into(),
    };
    chain.append(Record::new(epoch, generation, formed)).await?;
    let tensor = |name: &str, shape: &[u64]| TensorDecl { name: name.into(), shape: shape.into(), dtype: Dtype::F32 };
    let space = Space::new(vec![tensor("embed", &[20, 40]), tensor("norm", &[40]), tensor("scale", &[])])?;
    let scalar = ScalarState { step: Step::new(50), cursor: 800, ..ScalarState::start(7, 100) };
    let mut receipts = vec![];
    for rank in world_size.ranks() {
        let shard = space.shard(rank, world_size);
        let state = |(number, decl): (usize, StateDecl)| {
            let bytes: Bytes = shard.clone().flat_map(|i| (i as f32 + number as f32 * 0.5).to_le_bytes()).collect();
            let hashes = HashList(hash_blocks(&bytes, space.block_elements(), Dtype::F32));
            ShardState { decl, bytes, hashes }
        };
        let source = ShardSource {
            job: job.clone(),
            space: space.clone(),
            generation,
            rank,
            world_size,
            scalar: scalar.clone(),
            states: StateDecl::adamw().into_iter().enumerate().map(state).collect(),
        };
        let receipt = upload_shard(&store, &source, Uuid::from_u128(100 + u128::from(rank.get()))).await?;
        std::fs::write(folder.join(format!("receipt-{rank}")), receipt.to_bytes()?)?;
        receipts.push(receipt);
    }
    let manifest = Manifest::assemble(&space, scalar, receipts)?;
    let checkpoint = commit(&mut chain, &manifest, epoch, Uuid::from_u128(200)).await?;
    println!("step {} with digest {}", checkpoint.step, checkpoint.digest);
    Ok(())
}
