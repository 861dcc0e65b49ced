//! Cairn's checkpoint store: a library for training state that is whole, verifiable and loads at any size.
//!
//! # How the parts fit
//!
//! * [`space`]: a model's parameters laid end to end, cut into blocks, shared out to ranks;
//! * [`digest`], [`scalar`]: what makes two states equal;
//! * [`backend`], [`url`], [`probe`]: a place to keep bytes, with one primitive that matters, atomic put-if-absent;
//! * [`record`], [`history`], [`chain`]: a job's history as a chain of such puts, and [`leader`] epochs;
//! * [`object`], [`manifest`], [`save`]: shard → object → receipt → manifest → commit record;
//! * [`mod@plan`], [`load`], [`loader`], [`mod@verify`]: any range back from any checkpoint, every byte proved;
//! * [`retention`]: what may go, and how; [`spec_file`]: what was asked; [`layout`]: where everything lies.
//!
//! A checkpoint exists exactly when a record of the chain names its manifest with its hash.
//!
//! # Example
//!
//! Two workers save, and a reader loads an arbitrary range:
//!
//! ```
//! use checkpoint_store::*;
//! use proto::ids::{Epoch, Generation, JobName, WorldSize};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let (store, job) = (Store::memory(), JobName::new("tiny")?);
//! let (epoch, generation, world_size) = (Epoch::new(1), Generation::new(1), WorldSize::new(2).unwrap());
//!
//! // A job's history begins, and a generation of two workers forms.
//! let submitted = Event::Submitted { spec_hash: BlockHash::of(b"spec"), stop_at: None };
//! let mut chain = Chain::create(&store, &job, Record::new(epoch, Generation::ZERO, submitted)).await?;
//! let formed = Event::Generation {
//!     generation, world_size, members: vec![], start: None, identity: "cpu".into(), fingerprint: "data".into(),
//! };
//! chain.append(Record::new(epoch, generation, formed)).await?;
//!
//! // Each worker stores its shard; the receipts make the manifest, and a record makes it a checkpoint.
//! let space = Space::new(vec![TensorDecl { name: "w".into(), shape: vec![300, 1000], dtype: Dtype::F32 }])?;
//! let state: Vec<u8> = (0..space.elements()).flat_map(|i| (i as f32).to_le_bytes()).collect();
//! let scalar = ScalarState::start(7, 100);
//! let mut receipts = vec![];
//! for rank in world_size.ranks() {
//!     let shard = space.shard(rank, world_size);
//!     let bytes = bytes::Bytes::copy_from_slice(&state[shard.start as usize * 4..shard.end as usize * 4]);
//!     let hashes = HashList(hash_blocks(&bytes, space.block_elements(), Dtype::F32));
//!     let source = ShardSource {
//!         job: job.clone(), space: space.clone(), generation, rank, world_size, scalar: scalar.clone(),
//!         states: vec![ShardState { decl: StateDecl::f32("param"), bytes, hashes }],
//!     };
//!     receipts.push(upload_shard(&store, &source, uuid::Uuid::new_v4()).await?);
//! }
//! let manifest = Manifest::assemble(&space, scalar, receipts)?;
//! let checkpoint = commit(&mut chain, &manifest, epoch, uuid::Uuid::new_v4()).await?;
//!
//! // Anyone can now load any part of it.
//! let manifest = open_checkpoint(&store, &job, &checkpoint).await?;
//! let mut part = vec![0; 4 * 1000];
//! read_range(&store, &manifest, "param", 70_000..71_000, &mut part).await?;
//! assert_eq!(part, state[4 * 70_000..4 * 71_000]);
//! # Ok(()) })
//! # }
//! ```

pub mod aligned;
pub mod backend;
pub mod capture;
pub mod chain;
pub mod conformance;
pub mod digest;
pub mod error;
pub mod history;
pub mod layout;
pub mod leader;
pub mod load;
pub mod loader;
pub mod manifest;
pub mod object;
pub mod plan;
pub mod probe;
pub mod record;
pub mod retention;
pub mod save;
pub mod scalar;
pub mod space;
pub mod spec_file;
pub mod url;
pub mod verify;

pub use aligned::AlignedBuffer;
pub use backend::{Create, DiskOp, Listed, Store, Witness};
pub use capture::{CAPTURE_FORMAT, Capture};
pub use chain::{Chain, ChainError, list_jobs};
pub use digest::{BlockHash, Digest, HashList, StateDecl, hash_blocks, state_digest};
pub use error::{Kind, StoreError};
pub use history::{Checkpoint, FoldError, History, Status};
pub use leader::{LeaderRecord, LeaderView, Take};
pub use load::{open_checkpoint, read_range};
pub use loader::{LoadReport, Loader, Stage};
pub use manifest::{AssembleError, Manifest};
pub use object::{Extent, ObjectEntry, Receipt, ShardSource, ShardState};
pub use plan::plan;
pub use probe::probe_atomic_create;
pub use record::{CheckpointRef, Event, Member, Record};
pub use retention::{collect, condemned, sweep};
pub use save::{commit, upload_shard};
pub use scalar::ScalarState;
pub use space::{Dtype, Piece, Space, SpaceError, TensorDecl};
pub use spec_file::{read_spec, write_spec};
pub use url::normalize_url;
pub use verify::{ObjectReport, VerifyReport, verify};
