//! General tensors: boxes of any framework's tensors, saved at one sharding and loaded at any other.
//!
//! The canonical space is for models that Cairn trains. This part is for everyone else, whatever the parallelism: a
//! rank says which *boxes* it holds (tensor, offsets, lengths), and that is all the library needs to know.
//!
//! * [`TensorInfo`], [`Catalog`]: the tensors; [`Region`], [`BoxPiece`]: boxes, and the geometry on which all rests.
//!   [`Catalog::flat_pieces`] cuts a flat shard (ZeRO, FSDP) into boxes;
//! * [`Description`], [`SavePlan`]: replicas are found, covered exactly once, and written by the least-loaded holder;
//!   [`PlanCache`] and [`vote()`] keep a plan for the next save;
//! * [`upload_boxes`], [`TensorManifest`], [`commit_tensors`]: objects any safetensors reader opens, receipts,
//!   manifest, and the commit record;
//! * [`Reader`]: any box, or any flat range over tensors in any order, from boxes or from a canonical checkpoint;
//!   [`LoadPlan`]: the same for many ranks, each byte read once; [`canonicalize`]: the digest.
//!
//! The library has no collective of its own: where ranks must hear of one another (descriptions, ballots, receipts,
//! parcels), the values are plain data and the caller sends them.
//!
//! # Example
//!
//! Two tensor-parallel ranks write: `up` is cut by rows, `down` by columns, and both hold the same `norm`. Three ranks
//! then read flat shards, as FSDP wants them.
//!
//! ```
//! use std::collections::BTreeMap;
//!
//! use checkpoint_store::tensors::*;
//! use checkpoint_store::{BlockHash, Chain, Event, Record, Store};
//! use proto::ids::{Epoch, Generation, JobName, Rank, Step, WorldSize};
//! use uuid::Uuid;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let catalog = Catalog::new(vec![
//!     TensorInfo::new("up", ElementType::F32, [8, 4]),
//!     TensorInfo::new("down", ElementType::F32, [4, 8]),
//!     TensorInfo::new("norm", ElementType::F32, [4]),
//! ])?;
//! // What the ranks hold. Here every element is its own index, to tell them apart.
//! let value = |i: u64| (i as f32).to_le_bytes();
//! let mut held = vec![];
//! for rank in 0..2 {
//!     let pieces = vec![
//!         BoxPiece::new("up", &[4 * rank, 0], &[4, 4])?,
//!         BoxPiece::new("down", &[0, 4 * rank], &[4, 4])?,
//!         BoxPiece::new("norm", &[0], &[4])?,
//!     ];
//!     held.push(Description { rank: Rank::new(rank as u32), pieces });
//! }
//!
//! // Every rank computes the same plan; the next save needs only a vote to know that it still holds.
//! let plan = std::sync::Arc::new(SavePlan::new(&catalog, &held)?);
//! let mut caches = [PlanCache::new(2), PlanCache::new(2)];
//! caches.iter_mut().zip(&held).for_each(|(cache, own)| cache.insert(&catalog, own, plan.clone()));
//! let ballots: Vec<_> = caches.iter().zip(&held).map(|(cache, own)| cache.ballot(&catalog, own)).collect();
//! assert_eq!(vote(&ballots), Vote::Go(plan.key()));
//!
//! // A job begins, each rank uploads its part, and whoever has all receipts commits.
//! let (store, job, epoch) = (Store::memory(), JobName::new("other")?, Epoch::new(1));
//! let (generation, world_size) = (Generation::new(1), WorldSize::new(2).unwrap());
//! let submitted = Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
//! let mut chain = Chain::create(&store, &job, Record::new(epoch, Generation::ZERO, submitted)).await?;
//! let formed = Event::Generation {
//!     generation, world_size, members: vec![], start: None, memory: None,
//!     identity: "gpu".into(), fingerprint: "data".into(),
//! };
//! chain.append(Record::new(epoch, generation, formed)).await?;
//! let mut receipts = vec![];
//! for own in &held {
//!     let r = u64::from(own.rank.get());
//!     let up = (16 * r..16 * r + 16).flat_map(value).collect::<Vec<u8>>();
//!     let down = (0..4).flat_map(|row| (0..4).flat_map(move |c| value(32 + 8 * row + 4 * r + c)));
//!     let norm = (64..68).flat_map(value).collect::<Vec<u8>>();
//!     let data = vec![up.into(), down.collect::<Vec<u8>>().into(), norm.into()];
//!     let source = TensorSource { job: job.clone(), step: Step::new(7), generation, rank: own.rank, data };
//!     receipts.push(upload_boxes(&store, &plan, &source, Uuid::new_v4()).await?);
//! }
//! let manifest = TensorManifest::assemble(&plan, receipts, BTreeMap::new())?;
//! let checkpoint = commit_tensors(&mut chain, &manifest, epoch, Uuid::new_v4()).await?;
//!
//! // Three readers with flat shards of all 68 elements: one plan, every byte read once.
//! let reader = Reader::open(&store, &job, &checkpoint).await?;
//! let shards = [0..23, 23..46, 46..68];
//! let boxes = |range| catalog.flat_pieces(range).into_iter().map(|(tensor, region)| {
//!     BoxPiece { tensor: catalog.tensors()[tensor].name.clone(), region }
//! });
//! let wanted: Vec<Vec<_>> = shards.iter().cloned().map(|range| boxes(range).collect()).collect();
//! let load = LoadPlan::new(&reader, &wanted, LoadOptions::default())?;
//! assert_eq!((load.bytes_needed(), load.ratio()), (68 * 4, 1.0));
//! let mut shard_buffers: Vec<Vec<Vec<u8>>> = wanted.iter().map(|own| {
//!     own.iter().map(|piece| vec![0; 4 * piece.region.elements() as usize]).collect()
//! }).collect();
//! let mut parcels = vec![];
//! for (rank, buffers) in (0..).map(Rank::new).zip(&mut shard_buffers) {
//!     let mut own: Vec<&mut [u8]> = buffers.iter_mut().map(|b| &mut b[..]).collect();
//!     load.run(&reader, rank, &mut own, |parcel| { parcels.push(parcel); Ok(()) }).await?;
//! }
//! for parcel in &parcels { // Here one process plays all ranks; elsewhere these go over the wire.
//!     let mut own: Vec<&mut [u8]> = shard_buffers[parcel.to.index()].iter_mut().map(|b| &mut b[..]).collect();
//!     load.place(&reader, parcel.to, parcel, &mut own)?;
//! }
//! for (range, buffers) in shards.iter().zip(&shard_buffers) {
//!     assert_eq!(buffers.concat(), range.clone().flat_map(value).collect::<Vec<u8>>());
//! }
//!
//! // Alone, any box at all: two columns of `down`.
//! let columns = reader.read_box(&BoxPiece::new("down", &[0, 3], &[4, 2])?).await?;
//! assert_eq!(columns[..8], [value(35), value(36)].concat());
//! # Ok(()) })
//! # }
//! ```

mod cache;
mod canonical;
mod catalog;
mod commit;
mod coverage;
mod load;
mod manifest;
mod object;
mod plan;
mod region;
#[cfg(test)]
mod region_tests;
mod source;
mod verify;

pub use cache::{Ballot, PlanCache, Vote, vote};
pub use canonical::{CanonicalState, canonicalize};
pub use catalog::{BoxPiece, Catalog, ElementType, TensorInfo};
pub use commit::{TensorRef, commit_tensors, open_tensors, reached_by_tensors};
pub use coverage::{Coverage, coverage};
pub use load::{LoadOptions, LoadPlan, Parcel};
pub use manifest::{ManifestKind, TensorManifest};
pub use object::{StoredPiece, TENSORS_FORMAT, TensorObject, TensorReceipt, TensorSource, upload_boxes};
pub use plan::{Description, MAX_PIECES, PlanKey, SavePlan, Share};
pub use region::{Region, Runs, copy_region};
pub use source::Reader;
pub use verify::verify_tensors;
