//! draft
pub mod backend;
pub mod chain;
pub mod digest;
pub mod error;
pub mod history;
pub mod layout;
pub mod leader;
pub mod probe;
pub mod record;
pub mod scalar;
pub mod space;
pub mod url;
pub use backend::{Create, Listed, Store};
