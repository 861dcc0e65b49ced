//! Cairn's checkpoint store: a library for training state that is whole, verifiable and loads at any size.
//!
//! # How the parts fit
//!
//! * [`space`]: a model's parameters laid end to end, cut into blocks, shared out to ranks;
//! * [`digest`], [`scalar`]: what makes two states equal;
//! * [`backend`], [`url`], [`opener`], [`probe`]: a place to keep bytes, with one primitive that matters, atomic
//!   put-if-absent;
//! * [`record`], [`history`], [`chain`]: a job's history as a chain of such puts, and [`leader`] epochs; [`node_book`]:
//!   the nodes that are kept empty;
//! * [`object`], [`receipt`], [`manifest`], [`save`]: shard → object → receipt → manifest → commit record;
//! * [`known`], [`references`]: blocks that have not changed stay where they lie; [`timeline`]: where the time went;
//! * [`mod@plan`], [`load`], [`loader`], [`mod@verify`]: any range back from any checkpoint, every byte proved;
//! * [`tensors`]: boxes of any framework's tensors, written at one sharding and read at another;
//! * [`trust`], [`leases`]: what is known of a checkpoint, and who needs it; [`mod@diff`]: how two differ;
//! * [`policy`], [`retention`]: what may go, and how; [`change`]: what people ask for; [`leadership`]: who may do it;
//! * [`spec_file`]: what was asked; [`layout`]: where everything lies; [`mod@aside`]: work off the async threads;
//! * [`hostile`]: each kind of input as an attacker's, for fuzzers and tests.
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
//!     generation, world_size, members: vec![], start: None, memory: None,
//!     identity: "cpu".into(), fingerprint: "data".into(),
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
pub mod aside;
pub mod backend;
pub mod capture;
pub mod chain;
pub mod change;
mod codec;
pub mod conformance;
pub mod diff;
pub mod digest;
pub mod error;
mod fields;
pub mod history;
pub mod hostile;
pub mod known;
pub mod layout;
pub mod leader;
pub mod leadership;
pub mod leases;
pub mod load;
pub mod loader;
pub mod manifest;
pub mod node_book;
pub mod object;
pub mod opener;
pub mod parity;
pub mod plan;
pub mod policy;
pub mod probe;
mod reach;
pub mod receipt;
pub mod record;
pub mod references;
pub mod retention;
pub mod save;
pub mod scalar;
pub mod space;
pub mod spec_file;
pub mod tensors;
pub mod timeline;
pub mod trust;
pub mod url;
pub mod verify;

pub use aligned::AlignedBuffer;
pub use aside::{aside, in_place};
pub use backend::{Create, DiskOp, Limits, Listed, Store, Witness};
pub use capture::{CAPTURE_FORMAT, Capture};
pub use chain::{Chain, ChainError, Refreshed, list_jobs};
pub use change::{Change, ChangeReport, Keeper};
pub use diff::{DiffReport, Side, diff};
pub use digest::{BlockHash, Digest, HashList, StateDecl, hash_blocks, state_digest};
pub use error::{Kind, StoreError};
pub use history::{Checkpoint, FoldError, History, Status};
pub use known::KnownBlocks;
pub use leader::{LeaderRecord, LeaderView, Take};
pub use leadership::{Claim, LeadError, Leadership};
pub use load::{open_checkpoint, read_range};
pub use loader::{LoadReport, Loader};
pub use manifest::{AssembleError, Encoded, Manifest};
pub use node_book::{NodeBook, NodesRecord};
pub use object::{Extent, ObjectEntry, Run, ShardSource, ShardState, lay_out};
pub use opener::Opener;
pub use plan::plan;
pub use policy::{Keep, Policy, Why};
pub use probe::probe_atomic_create;
pub use receipt::Receipt;
pub use record::{CheckpointRef, Event, Member, MemoryPoint, Record};
pub use references::{Reached, condemned_references};
pub use retention::{Collected, Collector, Freed, Open, collect, condemned, sweep};
pub use save::{UploadOptions, commit, commit_encoded, upload_changed, upload_shard};
pub use scalar::ScalarState;
pub use space::{Dtype, Piece, Space, SpaceError, TensorDecl, shards_before};
pub use spec_file::{read_spec, write_spec};
pub use timeline::{MAX_STAGES, Stage, StageSummary, Timeline};
pub use trust::{Lease, Proof, Trust, note};
pub use url::normalize_url;
pub use verify::{ObjectReport, Sample, VerifyReport, verify, verify_sample};
