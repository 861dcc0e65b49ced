//! General tensors.
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
