//! Cairn's side of the store benchmark: real saves with manifest and commit, real loads with every block verified.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use checkpoint_store::{
    AlignedBuffer, Chain, Dtype, Event, HashList, LoadReport, Loader, Manifest, Record, ScalarState, ShardSource,
    ShardState, Space, StateDecl, Store, StoreError, TensorDecl, commit, hash_blocks, upload_shard,
};
use futures::future::try_join_all;
use proto::ids::{Epoch, Generation, JobName, Rank, WorldSize};

use super::plain;
use crate::failure::Failure;

/// Elements of one tensor of the invented model.
const TENSOR: u64 = 4 << 20;
const EPOCH: Epoch = Epoch::new(1);

/// A store and the model that is saved to it.
pub(super) struct Ours {
    store: Store,
    url: String,
    space: Space,
}

/// The state shared out to ranks, as it lies in their slots.
pub(super) struct Shape {
    space: Space,
    pub(super) ranks: u32,
    /// One for each rank: its shard of three states, one after the other.
    pub(super) slots: Vec<Bytes>,
    hashes: Vec<Vec<HashList>>,
}

/// A checkpoint.
pub(super) struct Saved {
    manifest: Arc<Manifest>,
}

fn bug(e: impl std::fmt::Display) -> StoreError {
    StoreError::Bug(e.to_string())
}

fn world(ranks: u32) -> Result<WorldSize, StoreError> {
    WorldSize::new(ranks).ok_or_else(|| bug("no ranks"))
}

impl Shape {
    /// Memory for each rank's shard.
    pub(super) fn buffers(&self) -> Vec<AlignedBuffer> {
        let mut buffers: Vec<_> = self.slots.iter().map(|slot| AlignedBuffer::new(slot.len())).collect();
        // Touched once, so that no side pays for the first use of the memory.
        for buffer in &mut buffers {
            buffer.as_mut_slice().fill(1);
        }
        buffers
    }

    fn source(&self, job: &JobName, rank: usize) -> Result<ShardSource, StoreError> {
        let (world_size, index) = (world(self.ranks)?, Rank::new(rank as u32));
        let slot = &self.slots[rank];
        let third = slot.len() / 3;
        let states = StateDecl::adamw().into_iter().zip(&self.hashes[rank]).enumerate();
        let states = states.map(|(i, (decl, hashes))| ShardState {
            decl,
            bytes: slot.slice(i * third..(i + 1) * third),
            hashes: hashes.clone(),
        });
        Ok(ShardSource {
            job: job.clone(),
            space: self.space.clone(),
            generation: Generation::new(1),
            rank: index,
            world_size,
            scalar: ScalarState::start(1, 10),
            states: states.collect(),
        })
    }
}

impl Ours {
    pub(super) fn open(url: &str, bytes: u64) -> Result<Self, StoreError> {
        let elements = (bytes / 12).max(1);
        let tensor = |i: u64| TensorDecl {
            name: format!("model.layers.{i}.weight"),
            shape: vec![TENSOR.min(elements - i * TENSOR)],
            dtype: Dtype::F32,
        };
        let space = Space::new((0..elements.div_ceil(TENSOR)).map(tensor).collect()).map_err(bug)?;
        Ok(Self { store: Store::open(url)?, url: url.to_owned(), space })
    }

    /// The state at a number of ranks, hashed as a capture hashes it.
    pub(super) fn shape(&self, ranks: u32) -> Shape {
        let (mut slots, mut hashes) = (vec![], vec![]);
        for rank in WorldSize::new(ranks).into_iter().flat_map(|world| world.ranks().map(move |r| (r, world))) {
            let shard = self.space.shard(rank.0, rank.1);
            let third = (shard.end - shard.start) as usize * 4;
            let mut slot = AlignedBuffer::new(third * 3);
            for (i, word) in slot.as_mut_slice().chunks_exact_mut(4).enumerate() {
                let mixed = (i as u64 ^ (shard.start << 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
                word.copy_from_slice(&(mixed as u32).to_le_bytes());
            }
            let states = (0..3).map(|i| &slot.as_slice()[i * third..(i + 1) * third]);
            let lists = states.map(|s| HashList(hash_blocks(s, self.space.block_elements(), Dtype::F32)));
            hashes.push(lists.collect());
            slots.push(Bytes::from_owner(slot));
        }
        Shape { space: self.space.clone(), ranks, slots, hashes }
    }

    /// A whole save: every rank's upload at once, manifest, commit.
    pub(super) async fn save(&self, name: &str, shape: &Shape) -> Result<Saved, StoreError> {
        let job = JobName::new(name).map_err(bug)?;
        let sources = (0..shape.slots.len()).map(|rank| shape.source(&job, rank)).collect::<Result<Vec<_>, _>>()?;
        let uploads = sources.iter().map(|source| upload_shard(&self.store, source, uuid::Uuid::new_v4()));
        let receipts = try_join_all(uploads).await?;
        let manifest = Manifest::assemble(&shape.space, ScalarState::start(1, 10), receipts).map_err(bug)?;
        let submitted = Event::Submitted { spec_hash: checkpoint_store::BlockHash::of(b"bench"), stop_at: None };
        let submitted = Record::new(EPOCH, Generation::ZERO, submitted);
        let mut chain = Chain::create(&self.store, &job, submitted).await.map_err(bug)?;
        let formed = Event::Generation {
            generation: Generation::new(1),
            world_size: world(shape.ranks)?,
            members: vec![],
            start: None,
            memory: None,
            identity: "bench".into(),
            fingerprint: "bench".into(),
        };
        chain.append(Record::new(EPOCH, Generation::new(1), formed)).await.map_err(bug)?;
        commit(&mut chain, &manifest, EPOCH, uuid::Uuid::new_v4()).await.map_err(bug)?;
        Ok(Saved { manifest: Arc::new(manifest) })
    }

    /// Loads every rank's shard at once. Returns the seconds and what all ranks did together.
    pub(super) async fn load(
        &self,
        saved: &Saved,
        buffers: &mut Vec<AlignedBuffer>,
    ) -> Result<(f64, LoadReport), StoreError> {
        let world_size = world(buffers.len() as u32)?;
        let began = Instant::now();
        let ranks = world_size.ranks().zip(std::mem::take(buffers)).map(|(rank, mut buffer)| {
            let (store, manifest) = (self.store.clone(), Arc::clone(&saved.manifest));
            let shard = self.space.shard(rank, world_size);
            tokio::spawn(async move {
                let third = (buffer.as_slice().len() / 3).max(1);
                let names = ["param", "exp_avg", "exp_avg_sq"];
                let mut targets: Vec<_> = names.into_iter().zip(buffer.as_mut_slice().chunks_mut(third)).collect();
                let loader = Loader::new(&store, &manifest);
                let report = if targets.is_empty() { None } else { Some(loader.load(shard, &mut targets).await?) };
                Ok::<_, StoreError>((buffer, report.unwrap_or_default()))
            })
        });
        let mut sum = LoadReport::default();
        for done in ranks.collect::<Vec<_>>() {
            let (buffer, report) = done.await.map_err(bug)??;
            buffers.push(buffer);
            sum += report;
        }
        sum.seconds = began.elapsed().as_secs_f64();
        Ok((sum.seconds, sum))
    }

    /// Puts the objects of a checkpoint out of the page cache, or into it. A bucket has none.
    pub(super) fn prepare(&self, saved: &Saved, cold: bool) -> Result<(), Failure> {
        let Some(root) = plain::folder(&self.url) else { return Ok(()) };
        for object in &saved.manifest.objects {
            plain::prepare(&root.join(&object.path), cold)?;
        }
        Ok(())
    }

    /// Removes everything of a job.
    pub(super) async fn remove(&self, name: &str) -> Result<(), StoreError> {
        let folder = format!("jobs/{name}");
        loop {
            let found = self.store.list(&folder, None, 1_000).await?;
            if found.is_empty() {
                // Its empty folders, where there are such.
                return match plain::folder(&self.url).map(|root| std::fs::remove_dir_all(root.join(&folder))) {
                    Some(Err(e)) => Err(StoreError::Input(format!("{folder} cannot be removed: {e}"))),
                    _ => Ok(()),
                };
            }
            for listed in found {
                self.store.delete(&listed.path).await?;
            }
        }
    }
}
